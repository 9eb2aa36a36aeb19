"""The gallery: every script draws, the runner skips and goes on, and figures/ is what they drew."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from vitprobe import load_result
from vitprobe.models.loading import bundled_models
from vitprobe.results import drawing

ROOT = Path(__file__).parents[1]
ANALYSES, FIGURES = ROOT / "analyses", ROOT / "figures"
SCRIPTS = sorted(path.stem for path in ANALYSES.glob("*_fig*.py"))
# What makes each command quick; the pictures' number is every other's.
TINY = {
    "receptive_field": ["--num-images", "2", "--channels", "1", "--layers", "blocks"],
    "linear_probe": ["--num-images", "20", "--shots", "2", "--draws", "1"],
    "position_embedding": [],
    "patch_embedding": [],
    "neighbours": ["--num-images", "12", "--null", "2"],
    "occlusion": ["--num-images", "8", "--levels", "0.5", "--shuffle", "2"],
}
OTHERS = ["--num-images", "8", "--batch-size", "4"]

pytestmark = pytest.mark.skipif(not SCRIPTS, reason="the scripts are not installed")


@pytest.fixture
def gallery(monkeypatch):
    """The runner, with the scripts' folder on the path for as long as a test takes."""
    monkeypatch.syspath_prepend(str(ANALYSES))
    spec = importlib.util.spec_from_file_location("gallery_runner", ANALYSES / "__main__.py")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    # Coarse pictures: what they show is the measurements' tests' business.
    monkeypatch.setattr(drawing, "DPI", 40)
    yield runner
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def figure(name):
    return importlib.import_module(name).FIGURE


def tiny(one):
    return TINY.get(one.command.RESULT.analysis, OTHERS)


def drawn(name, out, *more):
    one = figure(name)
    assert one.main([*tiny(one), "--out", str(out), *more]) == 0
    assert (out / f"{name}.png").stat().st_size > 1000
    return load_result(out / f"{name}.npz")


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_draws_its_figure(gallery, tmp_path, capsys, name):
    lines = (ANALYSES / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert 11 <= len(lines) <= 50
    one = figure(name)
    result = drawn(name, tmp_path)
    assert lines[0].startswith(f'"""{result.meta["title"].split(" (")[0]}')
    for one in result.findings():
        assert one.models and all(model in one.claim for model in one.models), one
        assert set(one.models) <= set(result.models)
    # The command in the file is whole: it names the models and needs no script.
    command = result.meta["command"]
    assert command.startswith(f"python -m vitprobe.{result.analysis} ")
    assert "vit_small_box" in command or "resnet_box" in command or "vit_gap_box" in command


def test_what_is_there_stays_unless_something_that_made_it_is_another(
    gallery, tmp_path, capsys, monkeypatch
):
    name = "vit_fig06_attention_rollout"
    few = ["--num-images", "2", "--out", str(tmp_path)]
    assert gallery.main([name, *few]) == 0
    assert f"{name}.png," in capsys.readouterr().out
    before = (tmp_path / f"{name}.npz").stat().st_mtime_ns
    assert gallery.main([name, *few]) == 0
    assert f"{name}.png is there" in capsys.readouterr().out
    assert (tmp_path / f"{name}.npz").stat().st_mtime_ns == before

    one, given = figure(name), ["--num-images", "2"]
    assert one.is_there(tmp_path, [*given, "--device", "cpu", "--quiet"])
    assert not one.is_there(tmp_path, ["--num-images", "3"])
    assert not one.is_there(tmp_path / "elsewhere", given)
    with monkeypatch.context() as other:
        other.setattr(sys.modules["gallery"], "__version__", "0.0")
        assert not one.is_there(tmp_path, given)
    with monkeypatch.context() as other:
        other.setitem(bundled_models()["vit_small_box"], "sha256", "trained anew")
        assert not one.is_there(tmp_path, given)
    assert gallery.main([name, *few, "--fresh"]) == 0
    assert (tmp_path / f"{name}.npz").stat().st_mtime_ns > before
    (tmp_path / f"{name}.png").unlink()
    assert not one.is_there(tmp_path, given)


def test_a_figure_that_fails_is_named_and_the_others_are_drawn(
    gallery, tmp_path, capsys, monkeypatch
):
    centre, left = (f"vit_fig07_{side}" for side in ("centre_position", "left_patch"))
    broken = figure(f"{centre}_embedding")
    monkeypatch.setitem(broken.arguments, "models", ["no_such_network"])
    assert gallery.main([f"{centre}*", f"{left}*", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert f"{centre}_embedding: failed" in said.out and "no_such_network" in said.err
    assert (tmp_path / f"{left}_embedding.png").is_file()
    assert not (tmp_path / f"{centre}_embedding.npz").exists()

    def fault(given):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(broken, "main", fault)
    assert gallery.main([f"{centre}*", "--out", str(tmp_path)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        gallery.main(["no_such_figure"])


def test_the_index_shows_every_figure_with_its_command_and_findings(gallery, tmp_path):
    out = tmp_path / "out"
    title = drawn("vit_fig07_left_patch_embedding", out).figure().get_suptitle()
    assert title.replace("\n", " ").startswith("Dosovitskiy et al. 2021, Figure 7 left: ")
    drawn("vit_fig07_left_patch_embedding", out / "real", "--title", "Real (weights)")
    np.savez(out / "curves.npz", no_result=np.zeros(3))
    page = gallery.gallery_index.write(out, SCRIPTS).read_text(encoding="utf-8")
    assert "![Real (weights)](real/vit_fig07_left_patch_embedding.png)" in page
    assert "`python analyses/vit_fig07_left_patch_embedding.py`" in page
    assert "python -m vitprobe.patch_embedding --models vit_small_box vit_small_box@random`" in page
    assert page.count("**does not hold**") + page.count("**holds**") == 4
    assert "curves" not in page and str(tmp_path) not in page


# Those that cost little at their own settings.
QUICK = (
    "raghu_fig08_without_skips",
    "vit_fig06_attention_rollout",
    "vit_fig07_centre_position_embedding",
    "vit_fig07_left_patch_embedding",
    "vit_fig07_right_attention_distance",
)


@pytest.mark.parametrize("name", QUICK)
def test_the_committed_numbers_are_what_the_script_measures(gallery, tmp_path, name):
    assert figure(name).main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    new, committed = load_result(tmp_path / f"{name}.npz"), load_result(FIGURES / f"{name}.npz")
    for key, array in committed.arrays().items():
        if array.dtype.kind != "f" or not array.size:
            np.testing.assert_array_equal(new.arrays()[key], array)
            continue
        # Other processors add in another order: of the seven digits that float32 keeps, sums over
        # some hundred terms through six blocks cost two or three. Standard errors are differences
        # of nearly equal numbers and lose more. What is wrong is wrong by far more than that.
        precision = 1e-2 if key.endswith("_se") else 1e-4
        scale = np.nanmax(np.abs(array))
        np.testing.assert_allclose(new.arrays()[key], array, rtol=0, atol=precision * scale)
    assert new.meta["images"] == committed.meta["images"] if "images" in new.meta else True


def test_the_index_page_says_what_the_committed_numbers_say(gallery, tmp_path):
    for file in [*FIGURES.glob("*.npz"), *FIGURES.glob("*.png"), *FIGURES.glob("real/*")]:
        target = tmp_path / file.relative_to(FIGURES)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(file, target)
    page = gallery.gallery_index.write(tmp_path, SCRIPTS).read_text(encoding="utf-8")
    assert page == (FIGURES / "README.md").read_text(encoding="utf-8")
    for file in FIGURES.glob("*_fig0*.npz"):
        for one in load_result(file).findings():
            assert not one.over or f"over {one.over}: {one.numbers}." in page
            # Numbers are shown in parts, which no parenthesis spans.
            assert all(part.count("(") == part.count(")") for part in one.numbers.split("; "))


@pytest.mark.parametrize("file", sorted(FIGURES.glob("**/*.png")), ids=lambda file: file.stem)
def test_committed_figures_are_small(file):
    assert file.stat().st_size < 300_000
