"""The training script: resumes to the same weights, ships what it evaluates, takes folders."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vitprobe import data
from vitprobe.data.scenes import scenes

ANALYSES = Path(__file__).parents[1] / "analyses"
# In float32 torch 2.14 does not come back from the backward pass of 1 x 1 convolutions of so few
# channels on a CPU with AVX2 alone; networks of the size that ships do come back.
TINY = ["--precision", "bf16", "--size", "tiny", "--batch-size", "16"]
TINY += ["--pictures-seen", "96", "--log-every", "2"]


@pytest.fixture
def family(monkeypatch):
    if not ANALYSES.is_dir():
        pytest.skip("the training script is not part of the installed package")
    monkeypatch.syspath_prepend(str(ANALYSES))
    import timm.layers
    import train_family

    # main() turns the fused attention off for CPU training; put it back for the tests that follow.
    fused = timm.layers.use_fused_attn()
    yield train_family
    timm.layers.set_fused_attn(bool(fused))


def run(family, tmp_path, *arguments):
    family.main([*arguments, *TINY, "--device", "cpu", "--out", str(tmp_path)])
    state = torch.load(tmp_path / arguments[0] / "checkpoint.pt", weights_only=True)
    log = (tmp_path / arguments[0] / "log.jsonl").read_text().splitlines()
    return state, [json.loads(line) for line in log]


@pytest.mark.parametrize("model", [["--model", "vit", "--train-size", "40"], ["--model", "resnet"]])
def test_an_interrupted_run_ends_with_the_same_weights(family, tmp_path, model):
    whole, log = run(family, tmp_path / "a", "net", *model)
    run(family, tmp_path / "b", "net", *model, "--stop-after", "3")
    resumed, resumed_log = run(family, tmp_path / "b", "net", *model)
    assert whole["step"] == resumed["step"] == 6
    for key, value in whole["module"].items():
        torch.testing.assert_close(resumed["module"][key], value, rtol=0, atol=0)
    assert [entry["pictures_seen"] for entry in log] == [32, 64, 96]
    assert resumed_log[-1]["test_accuracy"] == log[-1]["test_accuracy"]
    with pytest.raises(SystemExit, match="another recipe"):
        run(family, tmp_path / "a", "net", *model, "--learning-rate", "0.5")


def test_the_shipped_file_is_what_was_trained(family, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_HERE", tmp_path)
    monkeypatch.setattr(family, "TEST_PICTURES", 200)
    state, _ = run(family, tmp_path, "net", "--pool", "gap", "--no-skip", "1", "--export")
    assert data.names() == ["net"]
    card = data.load_card("net")
    assert card["no_skip_block"] == 1 and card["pictures_seen"] == 96 and card["test_n"] == 200
    module = data.build(card)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, state["module"][key], rtol=1e-3, atol=1e-4)
    test = scenes(200)
    inputs = (torch.from_numpy(test.images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    with torch.no_grad():
        right = module(inputs).argmax(1).numpy() == test.labels
    assert card["test_accuracy"] == pytest.approx(right.mean())

    data.weights_path("net").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="sha256"):
        data.build(card)


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_a_network_starts_from_a_shipped_one(family, tmp_path, monkeypatch, pool):
    monkeypatch.setattr(data, "_HERE", tmp_path)
    monkeypatch.setattr(family, "TEST_PICTURES", 200)
    run(family, tmp_path, "net", "--export")
    shipped = data.build(data.load_card("net")).state_dict()
    still = ["--learning-rate", "0", "--stop-after", "1"]
    state, _ = run(
        family, tmp_path, "other", "--start-from", "net", "--no-skip", "1", "--pool", pool, *still
    )
    begun, own = state["card"]["recipe"]["start"], state["module"]
    assert begun.startswith("net after 96 images") and state["card"]["no_skip_block"] == 1
    assert ("cls_token" in own) == ("class token" not in begun) == (pool == "cls")
    torch.testing.assert_close(own["blocks.1.mlp.fc1.weight"], shipped["blocks.1.mlp.fc1.weight"])
    rows = own["pos_embed"].shape[1]
    torch.testing.assert_close(own["pos_embed"], shipped["pos_embed"][:, -rows:])


def test_class_folders_take_the_place_of_scenes(family, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            noise = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(noise).save(tmp_path / "pictures" / name / f"{i:02}.png")
    state, log = run(family, tmp_path, "net", "--data", str(tmp_path / "pictures"))
    assert state["card"]["classes"] == ["cat", "dog"]
    assert state["module"]["head.weight"].shape[0] == 2 and len(log) == 3


def test_a_block_without_skips_passes_on_its_branch_alone():
    import timm

    module = timm.create_model(
        "vit_base_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2
    ).eval()
    tokens = torch.randn(2, 17, 16)
    block = module.blocks[1]
    half = block.attn(block.norm1(tokens))
    expected = block.mlp(block.norm2(half))
    before = set(module.state_dict())
    data.without_skips(module, 1)
    torch.testing.assert_close(module.blocks[1](tokens), expected)
    assert set(module.state_dict()) == before
    with pytest.raises(ValueError, match="no block 2: expected 0 to 1"):
        data.without_skips(module, 2)


def test_images_are_augmented_by_the_seed(family, tmp_path, monkeypatch):
    drawn = {}

    def augment(images, generator, flip):
        drawn.setdefault(seed, []).append(generator.random())
        return images

    monkeypatch.setattr(sys.modules["training_stages"], "augment", augment)
    for seed in (0, 1):
        run(family, tmp_path / str(seed), "net", "--seed", str(seed), "--stop-after", "2")
    assert len({*drawn[0], *drawn[1]}) == 4
