"""Layouts that training code writes, and what becomes of each: the very weights, or one line."""

import argparse
import collections
import datetime
import enum
import json
import pathlib
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vitprobe import VitprobeError, load_model


class Settings:
    """Of the user's own code, which would do something when it is read."""

    def __init__(self):
        self.lr = 0.1

    def __setstate__(self, state):
        Path("executed").touch()


class Config(dict):
    """A dict of a class of its own, as yacs and mmcv have them."""

    def __init__(self, *given):
        super().__init__(*given)
        self.__dict__["frozen"] = True


class Mode(enum.Enum):
    FAST = 1


def network(seed=0, classes=0, name="test_vit"):
    torch.manual_seed(seed)
    return timm.create_model(name, num_classes=classes).eval()


RIGHT, OTHER = network(0), network(1)


def under(prefix, module=RIGHT):
    return {prefix + name: tensor.clone() for name, tensor in module.state_dict().items()}


def zeros(*names):
    return {name: torch.zeros(3) for name in names}


STATE = RIGHT.state_dict()
RECORDS = {
    "args": argparse.Namespace(lr=1e-3, data=argparse.Namespace(root=pathlib.PurePosixPath("/d"))),
    "best": np.float32(0.7),
    "curve": np.arange(3.0),
    "numpy": np.random.get_state(),
    "log": collections.defaultdict(list, {"loss": [1.0]}),
    "last": collections.deque([1, 2], 3),
    "when": datetime.datetime(2024, 1, 2),
    "space": types.SimpleNamespace(lr=1),
    "mode": Mode.FAST,
    "config": Config({"model": Config({"depth": 2})}),
    "settings": Settings(),
    "optimizer": torch.optim.AdamW(RIGHT.parameters()).state_dict(),
    "rng": torch.get_rng_state(),
    "device": torch.device("cpu"),
}
DECODER = zeros("mask_token", "decoder_embed.weight", "decoder_blocks.0.norm1.weight")
# What is in the file, and what the caption says of it.
GOOD = {
    "bare": (STATE, []),
    "records beside": ({"model": STATE, **RECORDS}, []),
    "module saved whole": (RIGHT, []),
    "model_state_dict": ({"model_state_dict": STATE, "epoch": 3}, []),
    "deep": ({"state": {"net": {"weights": STATE}}}, []),
    "data parallel": (under("module."), ["'module.'"]),
    "compiled and parallel": (under("_orig_mod.module."), ["'_orig_mod.module.'"]),
    "Lightning": ({"state_dict": under("model.")}, ["'model.'"]),
    "two prefixes": (under("net.vit."), ["'net.vit.'"]),
    "averaged beside": (
        {"state_dict": under("", OTHER), "state_dict_ema": STATE},
        ["taken from state_dict_ema, not state_dict"],
    ),
    "teacher and student": (
        {"student": under("module.backbone.", OTHER), "teacher": under("backbone.")},
        ["teacher under 'backbone.', not student under 'module.backbone.'"],
    ),
    "both in one dict": (
        {"model": {**under("student.", OTHER), **under("teacher.")}},
        ["model under 'teacher.', not model under 'student.'"],
    ),
    "momentum": (
        {"state_dict": {**under("momentum_encoder.", OTHER), **under("base_encoder.")}},
        ["'base_encoder.', not"],
    ),
    "decoder": ({"model": {**STATE, **DECODER}}, ["left out: decoder_blocks, decoder_embed, mask"]),
    "projector": ({**STATE, **zeros("projector.0.weight", "queue")}, ["left out: projector"]),
    "head of DINO": ({"teacher": {**under("backbone."), **zeros("head.mlp.0.weight")}}, ["head"]),
    "profiled": ({**STATE, **zeros("total_ops", "blocks.0.total_ops")}, ["left out: blocks"]),
    "bfloat16": ({n: t.bfloat16().float() for n, t in STATE.items()}, []),
}  # fmt: skip
WITHOUT = {name: t for name, t in STATE.items() if not name.startswith("blocks.3.")}
BAD = {
    "a block is missing": ({"model": WITHOUT}, r"Missing: blocks\.3\.norm1\.weight, .* more"),
    "patches are missing": (
        {n.replace("patch_embed", "stem"): t for n, t in STATE.items()},
        r"Missing: patch_embed\.proj\.weight, .*",
    ),
    "deeper": ({**STATE, **zeros("blocks.9.norm1.weight")}, r"another network: it has blocks\.9"),
    "with layer scale": ({**STATE, **zeros("blocks.0.ls1.gamma")}, r"it has blocks\.0\.ls1\.gamma"),
    "with registers": ({**STATE, **zeros("reg_token")}, "it has reg_token, which"),
    "another network": (nn.Linear(3, 3).state_dict(), "Missing are all of its tensors"),
    "wider": (
        timm.create_model("test_vit2").state_dict(),
        r"test_vit@w\.pth: the weights do not fit",
    ),
    "no tensors": ({"epoch": 3}, "holds no state dict"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not Path("executed").exists()


def same(model, module):
    """Whether a network puts out what its source does."""
    torch.manual_seed(3)
    images = torch.randn(2, *model.input_size)
    with torch.inference_mode():
        torch.testing.assert_close(model.module(images), module(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", GOOD)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before zip"])
def test_weights_are_found_whatever_is_beside_and_around_them(what, legacy):
    content, said = GOOD[what]
    if legacy and what in ("module saved whole",):
        pytest.skip("a module in that format brings its source code along")
    torch.save(content, "w.pth", _use_new_zipfile_serialization=not legacy)
    model = load_model("test_vit@w.pth")
    expected = STATE if what != "bfloat16" else content
    torch.testing.assert_close(model.module.state_dict(), expected, rtol=0, atol=0)
    for text in said:
        assert text in model.origin
    if not said:
        assert model.origin.count(";") == 1  # that the transform is the architecture's, no more


@pytest.mark.parametrize("what", BAD)
def test_weights_that_are_not_all_there_get_one_line(what):
    content, message = BAD[what]
    torch.save(content, "w.pth")
    with pytest.raises(VitprobeError, match=message) as caught:
        load_model("test_vit@w.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "visual."])
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "weights"])
def test_what_a_file_is_shows_in_its_bytes(prefix, name):
    save_file(under(prefix), name)
    same(load_model(f"test_vit@{name}"), RIGHT)


@pytest.mark.parametrize(
    "name",
    ["inception_v3", "dla34", "convnextv2_atto.fcmae", "resnet18", "swin_tiny_patch4_window7_224"],
)
def test_families_that_timm_loads_loosely_are_loaded_in_whole_or_not_at_all(name):
    architecture = name.partition(".")[0]
    module = network(5, 7, name)
    torch.save({"state_dict": {f"net.{k}": v for k, v in module.state_dict().items()}}, "w.ckpt")
    model = load_model(f"{name}@w.ckpt")
    torch.testing.assert_close(model.module.state_dict(), module.state_dict(), rtol=0, atol=0)
    torch.save({f"a.{k}": torch.zeros(2) for k in module.state_dict()}, "w.ckpt")
    with pytest.raises(VitprobeError, match=r"Missing|Of another shape"):
        load_model(f"{name}@w.ckpt")
    # Without a classifier, and one tensor short of the rest.
    state = network(5, 0, name).state_dict()
    torch.save(state, "w.ckpt")
    assert load_model(f"{name}@w.ckpt").module.num_classes == 0
    lost = next(key for key in state if state[key].ndim > 1)
    torch.save({key: value for key, value in state.items() if key != lost}, "w.ckpt")
    with pytest.raises(VitprobeError, match=f"Missing: {lost}"):
        load_model(f"{architecture}@w.ckpt")


def test_a_microsoft_swin_is_converted_before_its_classes_are_counted():
    module = network(2, 9, "swin_tiny_patch4_window7_224")
    names = {}
    for key, tensor in module.state_dict().items():
        parts = key.replace("head.fc.", "head.").split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        names[".".join(parts)] = tensor
    torch.save({"model": names}, "swin.pth")
    model = load_model("swin_t@swin.pth")
    assert model.module.num_classes == 9 and "converted from another layout" in model.origin
    same(model, module)


def test_torchvision_s_regnet_is_read():
    import torchvision

    torch.manual_seed(4)
    module = torchvision.models.regnet_y_400mf(num_classes=6).eval()
    torch.save(module.state_dict(), "w.pth")
    model = load_model("regnety_004@w.pth")
    assert model.module.num_classes == 6
    same(model, module)


def test_resampled_tables_are_said_and_other_patches_refused():
    torch.save(network(0, 0, "test_vit").state_dict(), "w.pth")
    model = load_model("test_vit@w.pth", image_size=96)
    assert "pos_embed resampled from 10×10 to 6×6" in model.origin
    assert model.details["resampled"] == {"pos_embed": "from 10×10 to 6×6"}
    small = timm.create_model("vit_tiny_patch16_224", depth=1, patch_size=8, num_classes=0)
    torch.save(
        {**network(0, 0, "vit_tiny_patch16_224").state_dict(), **small.state_dict()}, "8.pth"
    )
    with pytest.raises(VitprobeError, match=r"patches .* are 8×8 pixels, the network's 16×16"):
        load_model("vit_tiny_patch16_224@8.pth")
    torch.save(timm.create_model("vit_small_patch8_224", num_classes=0).state_dict(), "s8.pth")
    with pytest.raises(VitprobeError, match=r"Try vit_small_patch8_224@s8\.pth\."):
        load_model("dino_s16@s8.pth")


def test_shards_and_folders_of_a_hub():
    names = list(STATE)
    halves = {"a-1.safetensors": names[::2], "a-2.safetensors": names[1::2]}
    folder = Path("snapshot")
    folder.mkdir()
    for name, keys in halves.items():
        save_file({key: STATE[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for spec in ("snapshot", "snapshot/model.safetensors.index.json"):
        same(load_model(f"test_vit@{spec}"), RIGHT)
    assert load_model("test_vit@snapshot").name == "snapshot"
    (folder / "a-2.safetensors").unlink()
    with pytest.raises(VitprobeError, match=r"index\.json names a-2\.safetensors, which is not"):
        load_model("test_vit@snapshot")
    Path("empty").mkdir()
    with pytest.raises(VitprobeError, match="empty holds no weights file"):
        load_model("test_vit@empty")
    for name in ("a.pth", "b.pth"):
        torch.save(STATE, Path("empty") / name)
    with pytest.raises(VitprobeError, match=r"several weights files, a\.pth, b\.pth"):
        load_model("test_vit@empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"PK\x03\x04 torn", "neither a safetensors file nor a checkpoint"),
    ],
)
def test_what_is_no_weights_says_what_it_is(content, message):
    Path("w.pth").write_bytes(content)
    with pytest.raises(VitprobeError, match=message):
        load_model("test_vit@w.pth")


def test_timm_s_own_checkpoints_with_their_transform():
    from timm.utils import CheckpointSaver

    module = network(6, 5)
    arguments = argparse.Namespace(
        model="test_vit", mean=(0.1, 0.2, 0.3), std=None, interpolation="", crop_pct=None
    )
    saver = CheckpointSaver(
        module, torch.optim.SGD(module.parameters(), 0.1), args=arguments,
        checkpoint_dir=".", recovery_dir=".",
    )  # fmt: skip
    saver.save_checkpoint(0, 71.0)
    model = load_model("test_vit@last.pth.tar")
    same(model, module)
    assert model.name == "last" and '"mean": [0.1, 0.2, 0.3]' in model.transform_key
    assert "transform of" not in model.origin
    with pytest.raises(VitprobeError, match=r"of the architecture test_vit, .* Try test_vit@last"):
        load_model("test_vit2@last.pth.tar")


def test_the_configuration_beside_a_file_decides_the_transform_and_the_architecture():
    module = network(0)
    timm.models.save_for_hf(module, "mine", safe_serialization=True)
    config = json.loads(Path("mine/config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.1, 0.2, 0.3]
    Path("mine/config.json").write_text(json.dumps(config))
    for spec in ("test_vit@mine", "test_vit@mine/model.safetensors", "local-dir:mine"):
        model = load_model(spec)
        assert '"mean": [0.1, 0.2, 0.3]' in model.transform_key
        assert "transform of" not in model.origin
    with pytest.raises(VitprobeError, match="of the architecture test_vit, which is another"):
        load_model("test_vit3@mine")
    Path("mine/config.json").unlink()
    with pytest.raises(VitprobeError, match=r"has no config\.json as timm writes it"):
        load_model("local-dir:mine")


def google(module, width=192, heads=3):
    """A ViT in the layout of Google's .npz."""
    s = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    found = {
        "cls": s["cls_token"],
        "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": s["pos_embed"],
        "Transformer/encoder_norm/scale": s["norm.weight"],
        "Transformer/encoder_norm/bias": s["norm.bias"],
        "head/kernel": s["head.weight"].T,
        "head/bias": s["head.bias"],
    }
    for i in range(len(module.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        for n, norm in enumerate((0, 2), 1):
            found[f"{theirs}LayerNorm_{norm}/scale"] = s[f"{ours}norm{n}.weight"]
            found[f"{theirs}LayerNorm_{norm}/bias"] = s[f"{ours}norm{n}.bias"]
            found[f"{theirs}MlpBlock_3/Dense_{n - 1}/kernel"] = s[f"{ours}mlp.fc{n}.weight"].T
            found[f"{theirs}MlpBlock_3/Dense_{n - 1}/bias"] = s[f"{ours}mlp.fc{n}.bias"]
        weights = s[f"{ours}attn.qkv.weight"].reshape(3, width, width)
        biases = s[f"{ours}attn.qkv.bias"].reshape(3, width)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases):
            found[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, -1)
            found[f"{attention}{name}/bias"] = bias.reshape(heads, -1)
        found[f"{attention}out/kernel"] = s[f"{ours}attn.proj.weight"].T.reshape(heads, -1, width)
        found[f"{attention}out/bias"] = s[f"{ours}attn.proj.bias"]
    return found


def test_google_s_own_files_are_read_to_the_bit_or_refused():
    module = network(0, 8, "vit_tiny_patch16_224")
    arrays = google(module)
    np.savez("Ti_16.npz", **arrays)
    model = load_model("vit_ti16@Ti_16.npz")
    assert model.name == "Ti_16" and "converted from Google's .npz" in model.origin
    torch.testing.assert_close(model.module.state_dict(), module.state_dict(), rtol=0, atol=0)
    deeper = {n.replace("block_11/", "block_12/"): a for n, a in arrays.items() if "block_11/" in n}
    np.savez("deeper.npz", **arrays, **deeper)
    with pytest.raises(VitprobeError, match="the file holds another network"):
        load_model("vit_ti16@deeper.npz")
    np.savez("less.npz", **{n: a for n, a in arrays.items() if "block_3/" not in n})
    with pytest.raises(VitprobeError, match=r"do not fit the architecture: KeyError, .*block_3/"):
        load_model("vit_ti16@less.npz")
    with pytest.raises(VitprobeError, match="16×16 pixels, the network's 32×32"):
        load_model("vit_s32@Ti_16.npz")
    with pytest.raises(VitprobeError, match=r"timm reads no \.npz for this architecture"):
        load_model("test_resnet@Ti_16.npz")
