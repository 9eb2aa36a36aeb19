"""Every option of every command counts: it reaches the measurement, and it changes the result.

Options are read off the parsers and the classes of the measurements, so that a new one is tested
from the day it is added.
"""

import inspect
import json
import re
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vitprobe import attention_distance, cli, load_result
from vitprobe.catalogue import measurements
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.loading import wrap
from vitprobe.running.checkpoint import UntilWritten
from vitprobe.running.measurement import WeightsMeasurement
from vitprobe.running.options import Options

NAMES = list(measurements())
# Of the output: they decide where to and in which form, not what is measured.
OUTPUT = {"format", "title", "json", "debug", "help"}
# Options of what is drawn, and one of which too little shows in three images: meta tells.
IN_META = {"calibrated", "foreground", "fill"}
TYPED = {"levels": "0.3", "blocks": "1"}
# Tested where the images and modules are that they are about.
ELSEWHERE = {"first", "pairs", "task", "test_images", "trained_without"}
CHEAP = {"linear_probe": {"shots": 2}, "receptive_field": {"num_images": 6}}
# What an option needs beside it to have something to act on.
BESIDE = {"calibrated": {"null": 9}}
# Values that no type tells.
VALUES = {
    "layers": ["*.0*"],
    "blocks": [0],
    "grid": (2, 2),
    "channels": 2,
    "levels": (0.3,),
    "shuffle": (2,),
    "times": 1.01,
    "shots": 3,
    "draws": 2,
}


def command(name, monkeypatch):
    """The parser of a command, and what it does with the arguments."""
    found = []
    monkeypatch.setattr(cli, "run", lambda *given: found.append(given) or 0)
    import_module(f"vitprobe.{name}").main([])
    parser, _, _, act = found[0][:4]
    return parser, act


def argument(action):
    """A value other than the default, as it is typed."""
    if action.nargs == 0:
        return [action.option_strings[0]]
    if action.dest in TYPED:
        values = [TYPED[action.dest]]
    elif action.choices:
        default = [action.default] if isinstance(action.default, str) else action.default or []
        values = [next(one for one in action.choices if one not in default)]
    elif isinstance(action.default, (int, float)) or action.type in (int, float):
        values = [str((action.default or 3) + 4) if action.nargs is None else "7"]
    elif isinstance(action.default, (tuple, list)) and action.type in (int, float):
        values = ["7"]
    else:
        values = ["2" if callable(action.type) and action.type is not Path else "other"]
    return [action.option_strings[0], *values * (action.nargs if action.nargs in (2, 3) else 1)]


def comparable(value):
    if isinstance(value, UntilWritten):
        return str(value.path)
    if isinstance(value, Options):
        return {one.name: comparable(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, dict):
        return {key: comparable(one) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return [comparable(one) for one in value]
    return str(value)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_command_reaches_the_measurement(name, monkeypatch, tmp_path):
    module = import_module(f"vitprobe.{name}")
    asked = []
    # As deep as it goes without models: what the run is told, or what ``measure`` is told.
    inner = "measure_one" if hasattr(module, "measure_one") else "measure"
    for function in {inner, "from_features"} & set(vars(module)):

        def record(*args, function=function, **kwargs):
            asked.append(comparable([function, args, kwargs]))

        monkeypatch.setattr(module, function, record)

    parser, act = command(name, monkeypatch)

    def told(*options):
        act(parser.parse_args(["--models", "a", "b", "--out", str(tmp_path), *options]))
        return asked.pop()

    base = told()
    for action in parser._actions:
        # Weights alone: no bar of progress, no passes on a device, no state of a run.
        idle = OUTPUT | ({"quiet", "device", "out", "stem"} if inner == "measure" else set())
        if action.dest in idle:
            continue
        options = argument(action)
        if action.dest == "pairwise":
            options = ["--pairwise", "a", "b"]
        for other, value in BESIDE.get(action.dest, {}).items():
            flags = [f"--{other}", str(value)]
            assert told(*flags) != base
            assert told(*flags, *options) != told(*flags), options
        if action.dest not in BESIDE:
            assert told(*options) != base, options


def models():
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=32, num_classes=4)
    torch.nn.init.normal_(vit.pos_embed)
    cnn = timm.create_model("test_resnet", num_classes=4)
    return {"vit": wrap(vit.eval(), "vit"), "cnn": wrap(cnn.eval(), "cnn")}


# Attention for what is about it, a pair for what compares.
MODELS = {"head_subsets": ["vit", "cnn"], "neighbours": ["vit", "cnn"], "cka": ["vit", "cnn"]}


@pytest.fixture(scope="module")
def images():
    """Noise in two classes."""
    pixels = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return replace(open_images(pixels), labels=np.arange(24) % 2, classes=("a", "b"))


def measured(name, images, **options):
    """What a result file holds: its arrays, and meta as JSON."""
    module = import_module(f"vitprobe.{name}")
    chosen = [models()[one] for one in MODELS.get(name, ["vit"])]
    if issubclass(module.MEASUREMENT, WeightsMeasurement):
        result = module.measure(chosen, **options)
    else:
        shared = {"batch_size": 6, "device": "cpu", **CHEAP.get(name, {})}
        result = module.measure(chosen, images, **{**shared, **options})
    arrays = {key: (a.shape, a.tobytes()) for key, a in result.arrays().items()}
    return arrays, json.dumps(result.meta, sort_keys=True)


def another(option):
    """A value other than the default, as Python has it."""
    if option.name in VALUES:
        return VALUES[option.name]
    choices = option.metadata.get("argument", {}).get("choices")
    if choices:
        return next(one for one in choices if one != option.default)
    if isinstance(option.default, bool):
        return not option.default
    assert isinstance(option.default, (int, float)), f"VALUES needs one for {option.name}"
    return option.default + 1


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_a_measurement_changes_its_numbers(name, images):
    kind = import_module(f"vitprobe.{name}").MEASUREMENT
    own = [one for one in fields(kind) if one.name not in ELSEWHERE]
    base = measured(name, images) if own else None
    for option in own:
        beside = BESIDE.get(option.name, {})
        before = measured(name, images, **beside) if beside else base
        after = measured(name, images, **beside, **{option.name: another(option)})
        assert after[option.name in IN_META] != before[option.name in IN_META], option.name


@pytest.mark.parametrize(
    ("option", "value", "in_meta"),
    [
        ("names", ["other"], True),
        ("num_images", 12, False),
        ("batch_size", 8, False),
        ("precision", "bf16", False),
        ("seed", 1, True),
    ],
)
def test_every_shared_option_changes_what_a_run_gives(option, value, in_meta, images):
    before = measured("skip_ratio", images)
    after = measured("skip_ratio", images, **{option: value})
    assert after[1] != before[1]
    if not in_meta:
        assert after[0] != before[0]


def test_shared_options_that_leave_the_numbers_alone_are_these():
    """A new one needs a place in the test above, or a reason to be here."""
    tested = {"names", "num_images", "batch_size", "precision", "seed"}
    # Where it runs, how it loads, what it shows and keeps; sizes only where models accept them.
    still = {"image_size", "device", "workers", "quiet", "checkpoint", "save_every", "fresh",
             "on_error"}  # fmt: skip
    assert {one.name for one in fields(Options)} == tested | still


# Measurements that draw something beside the order of the images.
DRAWN = {"cka": {"null": 9}, "neighbours": {"null": 9}, "receptive_field": {"channels": 3},
         "linear_probe": {"shots": 3}}  # fmt: skip
# What a file needs to say of random weights; the first images; its own test has predictions.
NO_DRAW = {"position_embedding", "patch_embedding", "patch_pca", "occlusion"}


@pytest.mark.parametrize("name", DRAWN)
def test_every_draw_is_by_the_seed(name, images):
    """Of images whose order is given, only what else is drawn can change with the seed."""
    before, other = (measured(name, images, **DRAWN[name], seed=seed)[0] for seed in (0, 1))
    assert other != before


def test_draws_are_those_of_these_measurements():
    """A new one that draws needs a place in the test above."""
    drawing = re.compile(r"default_rng|manual_seed|permut|order_of_cells|Generator\(|seed=")
    found = [name for name in NAMES
             if drawing.search(inspect.getsource(import_module(f"vitprobe.{name}")))]  # fmt: skip
    assert set(found) <= {*DRAWN, *NO_DRAW}


@pytest.mark.parametrize("name", ["skip_ratio", "patch_embedding"])
def test_every_option_of_the_output_counts(name, images, monkeypatch, tmp_path, capsys):
    module = import_module(f"vitprobe.{name}")
    given = () if name == "patch_embedding" else (images,)
    result = module.measure(models()["cnn"], *given, **({"batch_size": 6} if given else {}))
    monkeypatch.setattr(module, "measure", lambda *args, **kwargs: replace(result))

    def written(*options):
        base = ["--models", "a"]
        status = module.main([*base, *options])
        found = (path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
        return status, sorted(found), capsys.readouterr().out

    out = ["--out", str(tmp_path / "x")]
    stem = f"{name}-a"
    assert written(*out)[:2] == (0, [f"x/{stem}.npz", f"x/{stem}.png"])
    told = written(*out, "--json", "--stem", "s", "--format", "svg", "--title", "Mine")
    assert told[1] == sorted(["x/s.npz", "x/s.svg", f"x/{stem}.npz", f"x/{stem}.png"])
    assert {Path(one).name for one in json.loads(told[2])["files"]} == {"s.npz", "s.svg"}
    assert load_result(tmp_path / "x" / "s.npz").meta["title"] == "Mine"
    assert "Mine" in (tmp_path / "x" / "s.svg").read_text()


def test_debug_shows_the_traceback(monkeypatch, tmp_path, capsys):
    def fail(*args, **kwargs):
        raise VitprobeError("Gone.")

    monkeypatch.setattr(attention_distance, "measure", fail)
    for options, traceback in (([], False), (["--debug"], True)):
        assert attention_distance.main(["--out", str(tmp_path), *options]) == cli.FAILED
        assert ("Traceback" in capsys.readouterr().err) == traceback
