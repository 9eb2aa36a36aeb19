"""Checkpoints that transformers has written give timm's networks the very same outputs."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from vitprobe import VitprobeError, load_model
from vitprobe.models.contents import Contents
from vitprobe.models.fitting import fit, put
from vitprobe.models.foreign import rename
from vitprobe.models.reference import reference

transformers = pytest.importorskip("transformers")

TINY = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2,
        "intermediate_size": 192, "image_size": 160, "patch_size": 16}  # fmt: skip
IMAGES = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def saved(module, folder="hf"):
    for parameter in module.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, std=0.2)
    module.eval().save_pretrained(folder)
    return module


def filled(module):
    """All of its numbers drawn, also those that begin as zeros or ones."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def beit(num_classes, pretrained=False):
    return timm.models.beit.Beit(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2,
        num_classes=num_classes, init_values=0.1, use_abs_pos_emb=False, use_rel_pos_bias=True,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-12),
    )  # fmt: skip


def convnext(num_classes, pretrained=False, **options):
    return timm.models.convnext.ConvNeXt(
        depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=num_classes, **options
    )


def dinov2(num_classes, pretrained=False, **options):
    return timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=num_classes,
        init_values=1e-5, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6), **options,
    )  # fmt: skip


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
         "patch_size": 8}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_labels": 5}
FAMILIES = {
    "BEiT": (
        "Beit", {**SMALL, "intermediate_size": 64, "num_labels": 5, "layer_norm_eps": 1e-12,
                 "use_relative_position_bias": True, "use_mask_token": False},
        beit, timm.models.beit, "ForImageClassification",
    ),
    "ConvNeXt": (
        "ConvNext", STAGES, convnext, timm.models.convnext, "ForImageClassification"
    ),
    "ConvNeXt V2": (
        "ConvNextV2", STAGES, partial(convnext, use_grn=True, ls_init_value=None),
        timm.models.convnext, "ForImageClassification",
    ),
    "DINOv2": ("Dinov2", SMALL, dinov2, timm.models.vision_transformer, "Model"),
    "DINOv2 with registers": (
        "Dinov2WithRegisters", {**SMALL, "num_register_tokens": 4},
        partial(dinov2, reg_tokens=4, no_embed_class=True), timm.models.vision_transformer,
        "Model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", ["in a file", "in memory"])
@torch.no_grad()
def test_families_that_renaming_alone_makes_timm_s(family, names):
    kind, options, make, where, what = FAMILIES[family]
    theirs = filled(getattr(transformers, f"{kind}{what}")(
        getattr(transformers, f"{kind}Config")(**options)
    ))  # fmt: skip
    state = theirs.state_dict()
    if names == "in a file":
        theirs.save_pretrained("hf")
        state = load_file("hf/model.safetensors")
    needed = replace(reference(make), convert=where.checkpoint_filter_fn)
    found = fit("net@hf", Contents("hf", state, "", Path("hf")), needed)
    mine = make(found.num_classes).eval()
    put("net@hf", mine, found)
    images = IMAGES[:, :, :32, :32]
    out = theirs(images)
    expected = out.logits if what != "Model" else out.last_hidden_state
    got = mine(images) if what != "Model" else mine.forward_features(images)
    assert found.num_classes == (5 if what != "Model" else 0)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert f"converted from transformers ({family.split()[0]}" in found.said()


@torch.no_grad()
def test_a_vit_with_its_classes_epsilon_and_transform():
    module = saved(transformers.ViTForImageClassification(
        transformers.ViTConfig(**TINY, num_labels=5)
    ))  # fmt: skip
    Path("hf/preprocessor_config.json").write_text(
        '{"do_normalize": true, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], '
        '"size": {"height": 160, "width": 160}, "resample": 2}'
    )
    model = load_model("test_vit@hf")
    torch.testing.assert_close(model.module(IMAGES), module(IMAGES).logits, rtol=0, atol=1e-6)
    assert "converted from transformers (ViT)" in model.origin
    assert "not 'vit.'" not in model.origin and model.details["layer_norm_eps"] == 1e-12
    assert '"mean": [0.1, 0.2, 0.3]' in model.transform_key and "squash" in model.transform_key
    with pytest.raises(VitprobeError, match="It looks like transformers"):
        load_model("test_resnet@hf")


@torch.no_grad()
def test_a_vit_s_trunk_alone_and_another_activation():
    module = saved(transformers.ViTModel(transformers.ViTConfig(**TINY)))
    model = load_model("test_vit@hf")
    expected = module(IMAGES).last_hidden_state
    torch.testing.assert_close(model.module.forward_features(IMAGES), expected, rtol=0, atol=1e-6)
    assert "left out: pooler" in model.origin
    saved(transformers.ViTModel(transformers.ViTConfig(**TINY, hidden_act="quick_gelu")), "quick")
    with pytest.raises(VitprobeError, match="computes quick_gelu, this architecture GELU"):
        load_model("test_vit@quick")


@torch.no_grad()
def test_clip_s_tower_and_swin_s_stages_by_timm_s_names():
    from timm.layers import QuickGELU
    from timm.models import swin_transformer, vision_transformer

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64, "image_size": 32, "patch_size": 8}  # fmt: skip
    images = IMAGES[:, :, :32, :32]
    clip = saved(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size)), "clip")
    mine = vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, pre_norm=True,
        num_classes=0, act_layer=QuickGELU, norm_layer=torch.nn.LayerNorm,
    ).eval()  # fmt: skip
    mine.load_state_dict(rename(load_file("clip/model.safetensors")))
    torch.testing.assert_close(mine(images), clip(images).pooler_output, rtol=0, atol=1e-6)
    swin = saved(transformers.SwinModel(transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 2], window_size=4
    )), "swin")  # fmt: skip
    mine = swin_transformer.SwinTransformer(
        img_size=32, patch_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2), window_size=4,
        num_classes=0,
    ).eval()  # fmt: skip
    mine.load_state_dict(rename(load_file("swin/model.safetensors")))
    expected = swin(images).last_hidden_state
    got = mine.forward_features(images).flatten(1, 2)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
