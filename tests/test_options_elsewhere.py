"""Every option counts of the commands that are no measurements: report, extract, redraw, lists.

Options are read off the parsers, so that a new one is tested from the day it is added.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace as Stub

import numpy as np
import pytest
import torch
from test_options_count import OUTPUT, argument, comparable

from vitprobe import cka, cli, extract, layer_table, listing, load_result, redraw
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.loading import wrap
from vitprobe.report import command as report


class Stopped(Exception):
    """Where a command would begin its work."""


def actions_of(main, arguments, monkeypatch):
    """What a command's parser takes."""
    found = []

    def parse(parser, argv):
        found.extend(parser._actions)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", parse)
        with pytest.raises(Stopped):
            main(arguments)
    return [one for one in found if one.option_strings]


def test_every_option_of_extract_reaches_it(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(extract, "extract", lambda *a, **k: asked.append(comparable([a, k])) or {})

    def told(*options):
        assert extract.main(["--models", "a", "--out", str(tmp_path), *options]) == 0
        return asked.pop()

    base = told()
    for action in actions_of(extract.main, [], monkeypatch):
        # The folder has no figure, and its files are named by their layers.
        if action.dest not in OUTPUT | {"stem"}:
            options = argument(action)
            assert told(*options) != base, options


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 5, 3)

    def forward(self, x):
        return self.b(torch.relu(self.a(x))).mean((2, 3))


@pytest.mark.parametrize(
    "changed",
    [
        {"layers": ["a"]}, {"readout": "mean"}, {"dtype": "float32"}, {"precision": "bf16"},
        {"seed": 1}, {"num_images": 5}, {"names": ["other"]},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_extracted_says_how(changed, tmp_path):
    """Else a finished folder would be taken for what is asked for now."""
    images = open_images(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    told = []
    for k, more in enumerate(({}, changed)):
        options = {"layers": ["a", "b"], "batch_size": 3, "device": "cpu", **more}
        (folder,) = extract.extract(
            wrap(Net().eval(), "net"), images, out=tmp_path / str(k), **options
        ).values()
        told.append(json.loads((folder / "meta.json").read_text(encoding="utf-8")))
    assert told[0] != told[1]


class Given(list):
    """What models were asked for, in their stead."""

    def provenance(self):
        return list(self)


def test_every_option_of_the_report_reaches_what_it_measures(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # one of the options is --out
    asked = []

    def measure(todo, models, images, options, go_on):
        asked.append(comparable([todo, models, images, options]))
        raise VitprobeError("Stopped.")

    monkeypatch.setattr(report, "load_models", lambda *given: [Given(given)])
    monkeypatch.setattr(report, "open_images", lambda *given: Stub(digest=given))
    monkeypatch.setattr(report, "measure_each", measure)
    monkeypatch.setattr(report, "resolve_device", lambda name: None)

    def told(*options):
        base = ["--models", "a", "--out", str(tmp_path / "x"), "--only", "cka", "skip_ratio"]
        assert report.main([*base, *options]) == cli.FAILED
        return asked.pop()

    base = told()
    for action in actions_of(report.main, [], monkeypatch):
        if action.dest not in OUTPUT:
            options = argument(action)
            assert told(*options) != base, options


@pytest.fixture
def saved(tmp_path):
    features = np.random.default_rng(0).normal(size=(24, 3, 6))
    result = cka.from_features({"a": dict(zip("xyz", features.transpose(1, 0, 2)))}, batch_size=8)
    result.save(tmp_path / "made" / "r", ["png"])
    return tmp_path / "made" / "r.npz"


def test_every_option_of_redraw_counts(saved, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    before = set(saved.parent.iterdir())

    def told(*options):
        assert redraw.main([str(saved), *options]) == 0
        new = [path for path in tmp_path.rglob("*.*") if path not in before]
        found = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in new}
        for path in new:
            path.unlink()
        return found, capsys.readouterr().out

    # Beside its numbers, whatever folder the command is run in.
    (saved.parent / "r.png").unlink()
    before.discard(saved.parent / "r.png")
    base = told()
    assert list(base[0]) == ["made/r.png"]
    assert list(told("--out", str(tmp_path / "o"))[0]) == ["o/r.png"]
    assert list(told("--stem", "s")[0]) == ["made/s.png"]
    assert list(told("--format", "pdf")[0]) == ["made/r.pdf"]
    assert b"Mine" in told("--format", "svg", "--title", "Mine")[0]["made/r.svg"]
    assert json.loads(told("--json")[1])["files"]
    tested = {"out", "stem", "format", "title", "json"}
    known = {one.dest for one in actions_of(redraw.main, [], monkeypatch)}
    assert known == tested | {"quiet", "debug", "help"}
    with pytest.raises(SystemExit):
        redraw.main([])
    assert load_result(saved).models == ["a"]


def test_every_option_of_the_listings_counts(monkeypatch, capsys):
    def told(main, *options):
        assert main(list(options)) == 0
        return capsys.readouterr().out

    # What can be had of a model takes a while to try, and no option decides it.
    monkeypatch.setattr(layer_table, "_applicable", lambda *given: {})
    base = told(layer_table.list_layers, "resnet_box", "--json")
    few = told(layer_table.list_layers, "resnet_box", "--json", "--layers", "blocks")
    assert len(few) < len(base) / 2 and json.loads(few) != json.loads(base)
    assert told(layer_table.list_layers, "resnet_box") != base
    asked = []

    def look(*given):
        asked.append(comparable(given))
        raise VitprobeError("Stopped.")

    monkeypatch.setattr(layer_table, "_looking_at", look)
    known = {one.dest: one for one in actions_of(layer_table.list_layers, ["m"], monkeypatch)}
    assert set(known) == {"layers", "json", "image_size", "device", "debug", "help"}
    for name in (None, "image_size", "device"):
        layer_table.list_layers(["m", *(argument(known[name]) if name else [])])
    assert len({json.dumps(one, sort_keys=True) for one in asked}) == 3
    capsys.readouterr()
    known = {one.dest for one in actions_of(listing.list_models, [], monkeypatch)}
    assert known == {"json", "debug", "help"}
    assert json.loads(told(listing.list_models, "--json"))[0]["name"] == "resnet_box"
    assert Path("models").name in told(listing.list_models)
