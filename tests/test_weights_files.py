"""Weights files of odd kinds: the very weights, or one line; never weights of something else."""

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from vitprobe import VitprobeError, load_model
from vitprobe.models.contents import Contents, state_dicts
from vitprobe.models.fitting import fit
from vitprobe.models.reference import Reference, reference


def network(seed=0, name="test_vit", **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **{"num_classes": 0, **options}).eval()


RIGHT, OTHER = network(0), network(1)
STATE = RIGHT.state_dict()
MATRIX = "blocks.0.mlp.fc1.weight"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(spec, message):
    with pytest.raises(VitprobeError, match=message) as caught:
        load_model(spec)
    assert "\n" not in str(caught.value)


def same(spec, module=RIGHT):
    model = load_model(spec)
    images = torch.randn(2, *model.input_size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        torch.testing.assert_close(model.module(images), module(images), rtol=0, atol=1e-6)
    return model


@pytest.mark.parametrize(
    "content",
    [[STATE], (3, STATE), {"models": [{"a": torch.zeros(1)}, STATE]}],
    ids=["list", "tuple", "list in a dict"],
)
def test_weights_are_found_in_lists(content):
    torch.save(content, "w.pth")
    same("test_vit@w.pth")


def test_parts_that_hold_each_other_come_to_an_end():
    tree = {"model": {"a": torch.zeros(1)}}
    tree["self"], tree["again"] = tree, [tree, tree]
    assert [where for where, _ in state_dicts(tree)] == ["model"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: (t * 127).to(torch.int8), "int8"),
        (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda t: t.to_sparse(), "float32, sparse"),
        (lambda t: t > 0, "bool"),
    ],
)
def test_quantised_weights_are_not_taken_for_their_integers(change, said):
    torch.save({**STATE, MATRIX: change(STATE[MATRIX])}, "w.pth")
    refused("test_vit@w.pth", rf"Not in plain numbers \(quantised weights\?\): {MATRIX} is {said}")


@pytest.mark.parametrize(
    "extra",
    ["register_tokens", "storage_tokens", "prompt_embeddings", "lora.blocks.0.A", "rope.freqs",
     "blocks.0.attn.qkv.lora_A", "norm_pre.weight", "fc_norm.weight"],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_what_takes_part_in_the_computation_is_not_left_out(extra, prefix):
    state = {**STATE, extra: torch.zeros(1, 4, 64)}
    torch.save({prefix + name: tensor for name, tensor in state.items()}, "w.pth")
    refused("test_vit@w.pth", f"another network: it has {extra}")


def test_an_average_pooled_network_is_told_by_its_norm():
    state = {name.replace("norm.", "fc_norm.", 1) if name.startswith("norm.") else name: tensor
             for name, tensor in STATE.items()}  # fmt: skip
    torch.save(state, "w.pth")
    refused("test_vit@w.pth", r"Missing: norm\.weight, norm\.bias\. The file has fc_norm\.weight")


def test_a_norm_in_a_block_is_no_trifle():
    state = network(2, "convnextv2_atto").state_dict()
    lost = "stages.1.blocks.0.norm.weight"
    torch.save({name: tensor for name, tensor in state.items() if name != lost}, "w.pth")
    refused("convnextv2_atto.fcmae@w.pth", f"Missing: {lost}")
    kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.norm")}
    torch.save(kept, "w.pth")
    assert "not in the file: head.norm.weight" in load_model("convnextv2_atto.fcmae@w.pth").origin


def test_a_classifier_behind_a_layer_that_timm_no_longer_has_is_left_out():
    state = network(3, num_classes=5).state_dict()
    layer = {"pre_logits.fc.weight": torch.eye(64), "pre_logits.fc.bias": torch.zeros(64)}
    torch.save({**state, **layer}, "w.pth")
    model = load_model("test_vit@w.pth")
    assert model.module.num_classes == 0 and "left out: head, pre_logits" in model.origin


def dinov2(registers, seed=0):
    """A small network of DINOv2's kind, what timm needs for it, and its weights by Meta's names."""
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    def make(num_classes=0, pretrained=False):
        return VisionTransformer(
            img_size=56, patch_size=14, embed_dim=32, depth=3, num_heads=2, init_values=1e-5,
            num_classes=num_classes, reg_tokens=registers, no_embed_class=bool(registers),
        ).eval()  # fmt: skip

    plain = reference(make)
    needed = Reference(plain.module, plain.trunk, plain.head, checkpoint_filter_fn,
                       names=plain.names)  # fmt: skip
    torch.manual_seed(seed)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = {**module.state_dict(), "mask_token": torch.zeros(1, 32)}
    if registers:
        first = torch.randn(1, 1, 32)
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - first
        state["pos_embed"] = torch.cat([first, state["pos_embed"]], 1)
    return module, needed, state


def fitted(needed, tree):
    return fit("net@w.pth", Contents("w.pth", tree, "", Path("w.pth")), needed)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("chunks", [False, True])
def test_dinov2_by_meta_s_names_and_as_it_is_trained(registers, chunks):
    module, needed, state = dinov2(registers)
    if chunks:
        state = {f"backbone.{name.replace('blocks.', 'blocks.0.')}": t for name, t in state.items()}
        state = {"teacher": {**state, "dino_head.mlp.0.weight": torch.zeros(2, 2)}}
    expected = module.state_dict()
    module.load_state_dict({name: torch.zeros_like(t) for name, t in expected.items()})
    module.load_state_dict(fitted(needed, state).state)
    torch.testing.assert_close(module.state_dict(), expected, rtol=0, atol=1e-6)


def test_dinov2_with_registers_is_not_dinov2_without():
    _, with_none, without = dinov2(0)
    _, with_four, state = dinov2(4)
    with pytest.raises(VitprobeError, match=r"another network: it has reg(ister)?_token"):
        fitted(with_none, state)
    with pytest.raises(VitprobeError, match="Missing: reg_token"):
        fitted(with_four, without)


@pytest.mark.skipif(os.name != "posix", reason="links and pipes")
def test_what_is_no_file_says_so():
    os.mkfifo("pipe.pth")
    refused("test_vit@pipe.pth", r"'pipe\.pth' is not a regular file")
    os.symlink("round.pth", "round.pth")
    refused("test_vit@round.pth", r"'round\.pth' is a link that leads nowhere\.$")
    refused("test_vit@/dev/null", "'/dev/null' is not a regular file")
    refused(f"test_vit@{'x' * 300}", "cannot be read: File name too long")


def test_what_cannot_be_a_weights_file_says_so():
    refused("test_vit@~nobody of that name/w.pth", "no such weights file")
    torch.save(STATE, "w.pth", pickle_protocol=4)
    refused("test_vit@w.pth", r"pickle protocol 2 only: save the file again with torch\.save")
    torch.save(STATE, "w.safetensors")
    same("test_vit@w.safetensors")


@pytest.mark.parametrize(
    "index",
    ['{"weight_map": ["a"]}', '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[1]", "{",
     '{"weight_map": {"a": "."}}', "[" * 100_000],
)  # fmt: skip
def test_an_index_that_makes_no_sense_is_one_line(index):
    Path("model.safetensors.index.json").write_text(index)
    refused("test_vit@model.safetensors.index.json", r"names|is not JSON")


def test_an_index_decides_from_which_shard_a_tensor_is():
    names = list(STATE)
    second = {name: STATE[name] for name in names[1:]}
    save_file({names[0]: STATE[names[0]]}, "a.safetensors")
    save_file({**second, names[0]: STATE[names[0]] + 1}, "b.safetensors")
    index = {"weight_map": dict.fromkeys(second, "b.safetensors") | {names[0]: "a.safetensors"}}
    Path("model.safetensors.index.json").write_text(json.dumps(index))
    same("test_vit@model.safetensors.index.json")


def test_an_archive_that_unfolds_to_anything_is_not_unfolded():
    with zipfile.ZipFile("w.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cls.npy", bytes(10**7))
    refused("vit_ti16@w.npz", "would unfold to")


CONFIGS = {
    "model_args": ({"architecture": "test_vit", "model_args": [1]}, "are no object"),
    "unknown option": ({"architecture": "test_vit", "model_args": {"foo": 1}}, "cannot be made"),
    "mean of text": ({"pretrained_cfg": {"mean": "abc"}}, "mean is 'abc', which is no mean"),
    "deviation of 0": ({"pretrained_cfg": {"std": [0, 1, 1]}}, r"std is \(0, 1, 1\)"),
    "crop": ({"pretrained_cfg": {"crop_pct": -1}}, "crop_pct is -1"),
    "filter": ({"pretrained_cfg": {"interpolation": "x"}}, "interpolation is 'x'"),
    "epsilon": ({"model_type": "vit", "layer_norm_eps": "a"}, "layer_norm_eps as 'a'"),
    "activation": ({"model_type": "vit", "hidden_act": "relu"}, "computes relu, .* GELU"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_that_makes_no_sense_is_one_line(what):
    config, message = CONFIGS[what]
    save_file(STATE, "model.safetensors")
    Path("config.json").write_text(json.dumps(config))
    refused("test_vit@model.safetensors", message)


def test_a_processor_that_scales_pixels_otherwise_keeps_its_meaning():
    from PIL import Image

    save_file(STATE, "model.safetensors")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5,
                 "size": {"height": 160, "width": 160}}  # fmt: skip
    Path("preprocessor_config.json").write_text(json.dumps(processor))
    model = load_model("test_vit@model.safetensors")
    image = Image.fromarray(np.full((160, 160, 3), 200, np.uint8))
    expected = torch.full((3, 160, 160), (200 / 127.5 - 0.5) / 0.5)
    torch.testing.assert_close(model.transform(image), expected, rtol=0, atol=1e-5)
    Path("preprocessor_config.json").write_text('{"image_mean": 0.5, "image_std": 0.5}')
    refused("test_vit@model.safetensors", r"preprocessor_config\.json gives no transform")
