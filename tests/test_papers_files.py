"""Files as the papers' authors published them: OpenAI's archives of TorchScript, Google's BiT."""

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vitprobe import VitprobeError, load_model
from vitprobe.models.contents import read
from vitprobe.models.fitting import fit, put
from vitprobe.models.reference import reference
from vitprobe.models.settings import settle

SIDE, PATCH, WIDTH = 32, 8, 32


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """By the names of OpenAI's code."""

    def __init__(self, activation):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2)
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, activation=QuickGELU):
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(WIDTH))
        self.positional_embedding = nn.Parameter(torch.zeros((SIDE // PATCH) ** 2 + 1, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*[Block(activation) for _ in range(2)])
        self.proj = nn.Parameter(torch.zeros(WIDTH, 16))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x):
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding).transpose(0, 1)
        x = self.transformer.resblocks(x).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj


class Clip(nn.Module):
    """A visual tower, and a text tower whose parts have the same names."""

    def __init__(self, visual):
        super().__init__()
        self.visual = visual
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(nn.Linear(4, 4))
        self.token_embedding = nn.Embedding(9, 4)

    def forward(self, x):
        return self.visual(x)


def timms(num_classes, pretrained=False, act_layer=timm.layers.QuickGELU):
    return timm.models.vision_transformer.VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=2, pre_norm=True,
        num_classes=num_classes, act_layer=act_layer, norm_layer=nn.LayerNorm,
    ).eval()  # fmt: skip


def read_into(path, make=timms):
    contents = read(Path(path))
    convert = timm.models.vision_transformer.checkpoint_filter_fn
    found = fit("clip@w.pt", contents, replace(reference(make), convert=convert))
    module = make(found.num_classes)
    put("clip@w.pt", module, found)
    settle("clip@w.pt", module, contents)
    return module, found


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return torch.randn(2, 3, SIDE, SIDE)


def traced(module, images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(module.eval(), images).save("w.pt")


@torch.no_grad()
def test_the_tower_of_an_archive_of_torchscript(images):
    clip = Clip(Tower())
    traced(clip, images)
    module, found = read_into("w.pt")
    torch.testing.assert_close(module(images), clip(images), rtol=0, atol=1e-5)
    assert found.num_classes == 16 and "left out: token_embedding, transformer" in found.said()


@pytest.mark.parametrize("prefix", ["visual.", "", "model.clip.visual."])
@torch.no_grad()
def test_the_tower_s_weights_alone(images, prefix):
    tower = Tower().eval()
    torch.save({prefix + name: t for name, t in tower.state_dict().items()}, "w.pt")
    torch.testing.assert_close(read_into("w.pt")[0](images), tower(images), rtol=0, atol=1e-5)


def test_an_archive_tells_its_activation(images):
    traced(Clip(Tower()), images)
    with pytest.raises(VitprobeError, match=r"computes with QuickGELU, this architecture does not"):
        read_into("w.pt", partial(timms, act_layer=nn.GELU))
    traced(Clip(Tower(nn.GELU)), images)
    with pytest.raises(VitprobeError, match=r"another function, this architecture with QuickGELU"):
        read_into("w.pt")
    torch.save(Clip(Tower(nn.GELU)), "w.pt")
    with pytest.raises(VitprobeError, match=r"another function, this architecture with QuickGELU"):
        read_into("w.pt")


def bit(module):
    """A ResNetV2 by the names of Google's BiT."""
    state = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    found = {}

    def kernel(theirs, ours):
        found[f"resnet/{theirs}/kernel"] = state[f"{ours}.weight"].transpose(2, 3, 1, 0)

    def norm(theirs, ours):
        found[f"resnet/{theirs}/gamma"] = state[f"{ours}.weight"]
        found[f"resnet/{theirs}/beta"] = state[f"{ours}.bias"]

    kernel("root_block/standardized_conv2d", "stem.conv")
    norm("group_norm", "norm")
    for i, stage in enumerate(module.stages):
        for j, block in enumerate(stage.blocks):
            ours, theirs = f"stages.{i}.blocks.{j}", f"block{i + 1}/unit{j + 1:02d}"
            for n, letter in enumerate("abc", 1):
                kernel(f"{theirs}/{letter}/standardized_conv2d", f"{ours}.conv{n}")
                norm(f"{theirs}/{letter}/group_norm", f"{ours}.norm{n}")
            if block.downsample is not None:
                kernel(f"{theirs}/a/proj/standardized_conv2d", f"{ours}.downsample.conv")
    kernel("head/conv2d", "head.fc")
    found["resnet/head/conv2d/bias"] = state["head.fc.bias"]
    return found


def test_google_s_bit_is_read_to_the_bit_or_refused(images):
    module = timm.create_model("resnetv2_50x1_bit", num_classes=6)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    arrays = bit(module)
    np.savez("BiT-M-R50x1.npz", **arrays)
    model = load_model("bit_r50x1@BiT-M-R50x1.npz")
    torch.testing.assert_close(model.module.state_dict(), module.state_dict(), rtol=0, atol=0)
    assert "converted from Google's .npz" in model.origin
    np.savez("less.npz", **{n: a for n, a in arrays.items() if "block3/unit02" not in n})
    with pytest.raises(VitprobeError, match=r"do not fit the architecture: .*block3/unit02"):
        load_model("bit_r50x1@less.npz")
    more = {n.replace("unit06", "unit07"): a for n, a in arrays.items() if "block3/unit06" in n}
    np.savez("more.npz", **arrays, **more)
    with pytest.raises(VitprobeError, match="the file holds another network"):
        load_model("bit_r50x1@more.npz")
