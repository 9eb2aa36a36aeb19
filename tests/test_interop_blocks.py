"""Blocks, additions and attention of other people's libraries, against what their sources say."""

import re

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from vitprobe.tracing.attention import map_attention
from vitprobe.tracing.layers import map_layers

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 64, "patch_size": 16,
}  # fmt: skip


def blocks(module, side=64):
    torch.manual_seed(0)
    images = torch.randn(2, 3, side, side)
    return [layer.label for layer in map_layers("theirs", module.eval(), images).choose("blocks")]


def numbered(pattern, *numbers):
    """``pattern`` with the numbers of stages and of blocks in them."""
    return [pattern.format(stage, block) for stage, count in numbers for block in range(count)]


TORCHVISION = {
    "convnext_tiny": numbered("features.{}.{}", (1, 3), (3, 3), (5, 9), (7, 3)),
    "swin_t": numbered("features.{}.{}", (1, 2), (3, 2), (5, 6), (7, 2)),
    "swin_v2_t": numbered("features.{}.{}", (1, 2), (3, 2), (5, 6), (7, 2)),
    "efficientnet_b0": numbered(
        "features.{}.{}", (1, 1), (2, 2), (3, 2), (4, 3), (5, 3), (6, 4), (7, 1)
    ),
    "mobilenet_v2": [f"features.{i}" for i in range(1, 18)],
    "mobilenet_v3_small": [f"features.{i}" for i in range(1, 12)],
    "resnet18": numbered("layer{}.{}", (1, 2), (2, 2), (3, 2), (4, 2)),
    "regnet_y_400mf": numbered(
        "trunk_output.block{0}.block{0}-{1}", (1, 1), (2, 3), (3, 6), (4, 6)
    ),
    "densenet121": [
        f"features.denseblock{i}.denselayer{j + 1}"
        for i, count in ((1, 6), (2, 12), (3, 24), (4, 16))
        for j in range(count)
    ],
    "vgg11": [f"features.{i}" for i in (1, 4, 7, 9, 12, 14, 17, 19)],
    "shufflenet_v2_x0_5": numbered("stage{}.{}", (2, 4), (3, 8), (4, 4)),
    "squeezenet1_1": [f"features.{i}" for i in (3, 4, 6, 7, 9, 10, 11, 12)],
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_blocks_of_torchvision(name):
    assert blocks(getattr(torchvision.models, name)()) == TORCHVISION[name]


def test_blocks_of_torchvisions_maxvit_are_its_layers():
    model = torchvision.models.MaxVit((64, 64), 8, 2, [8, 16], [1, 2], 4, stochastic_depth_prob=0.0)
    assert blocks(model) == numbered("blocks.{}.layers.{}", (0, 1), (1, 2))


def test_a_flattened_resnet_keeps_all_of_its_skips():
    model = torchvision.models.resnet18().eval()
    flat = create_feature_extractor(model, ["layer4"])
    images = torch.randn(2, 3, 64, 64)
    found = [
        [(a.kind, a.skip) for a in map_layers("r", one, images).trace.additions]
        for one in (model, flat)
    ]
    assert found[0] == found[1] and len(found[1]) == 8
    assert blocks(flat) == [f"output sum {i}" for i in range(1, 9)]


TRANSFORMERS = ["ViT", "DeiT", "Dinov2", "Beit", "CLIPVision", "SiglipVision", "DINOv3ViT"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_of_transformers(name, attention):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**SMALL, attn_implementation=attention)
    model = getattr(transformers, f"{name}Model")(config).eval()
    found = blocks(model)
    # What the list of blocks is called is a matter of the version.
    assert [re.sub(r"\d+", "*", label) for label in found] == 3 * [re.sub(r"\d+", "*", found[0])]
    assert [int(number) for label in found for number in re.findall(r"\d+", label)] == [0, 1, 2]


@pytest.mark.parametrize("name", ["Swin", "Swinv2"])
def test_blocks_of_transformers_swin(name):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        image_size=64, patch_size=4, embed_dim=16, depths=[2, 4], num_heads=[2, 4], window_size=4
    )
    found = blocks(getattr(transformers, f"{name}Model")(config))
    assert found == numbered("encoder.layers.{}.blocks.{}[0]", (0, 2), (1, 4))


def test_blocks_of_transformers_convnext():
    transformers = pytest.importorskip("transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 3, 1])
    found = blocks(transformers.ConvNextModel(config))
    assert found == numbered("encoder.stages.{}.layers.{}", (0, 1), (1, 1), (2, 3), (3, 1))


@pytest.mark.parametrize("scaled", [False, True])
def test_adapters_of_peft_add_no_skips(scaled):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = transformers.ViTModel(transformers.ViTConfig(**SMALL))
    names = [name.rpartition(".")[2] for name, m in model.named_modules() if type(m) is nn.Linear]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=sorted(set(names)), use_dora=scaled)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    found = map_layers("lora", model.eval(), torch.randn(2, 3, 64, 64))
    assert [a.kind for a in found.trace.additions] == ["identity"] * 6
    assert len(found.choose("blocks")) == 3


@pytest.mark.parametrize("module", ["vit", "simple_vit", "deepvit", "parallel_vit"])
def test_blocks_of_vit_pytorch_are_the_iterations_of_its_loop(module):
    pytest.importorskip("vit_pytorch")
    imported = pytest.importorskip(f"vit_pytorch.{module}")
    name = {"simple_vit": "SimpleViT", "deepvit": "DeepViT"}.get(module, "ViT")
    model = getattr(imported, name)(
        image_size=64, patch_size=16, num_classes=5, dim=32, depth=3, heads=2, mlp_dim=64
    ).eval()
    assert blocks(model) == [f"transformer sum {2 * i}" for i in (1, 2, 3)]
    if module == "vit":
        found = map_attention("vit", model, torch.randn(2, 3, 64, 64))
        assert [layer.heads for layer in found.layers] == [2, 2, 2]
        paper = map_layers("vit", model, torch.randn(2, 3, 64, 64)).choose("paper")
        labels = [layer.label for layer in paper]
        assert "transformer.layers.0.0" in labels
        assert not any("attend" in label for label in labels)


def test_blocks_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    vision = {"image_size": 64, "patch_size": 16, "width": 64, "layers": 3, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.model.CLIP(32, vision, text).visual
    assert blocks(model) == [f"transformer.resblocks.{i}" for i in range(3)]


def test_blocks_of_monai():
    nets = pytest.importorskip("monai.networks.nets")
    model = nets.ViT(
        3, (64, 64), (16, 16), hidden_size=32, mlp_dim=64, num_layers=3, num_heads=2,
        spatial_dims=2, proj_type="conv",
    ).eval()  # fmt: skip
    assert blocks(model) == ["blocks.0", "blocks.1", "blocks.2"]
    found = map_attention("monai", model, torch.randn(2, 3, 64, 64))
    assert [layer.heads for layer in found.layers] == [2, 2, 2]
