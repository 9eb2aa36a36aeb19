"""Passes that begin in the middle: equal to whole ones, or not taken."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import timm
import torch
import torchvision
from torch import nn

from vitprobe import skip_ablation
from vitprobe.tracing import ablation
from vitprobe.tracing.ablation import WithoutSkips, block_names
from vitprobe.tracing.layers import map_layers


class Block(nn.Module):
    def __init__(self, inside=None):
        super().__init__()
        self.linear, self.inside = nn.Linear(6, 6), inside

    def forward(self, x):
        return x + torch.tanh(self.linear(x)) * (1 if self.inside is None else self.inside[0])


class Net(nn.Module):
    """Four blocks; ``dense``: the last output also adds that of the first block."""

    def __init__(self, dense=False):
        super().__init__()
        self.embed = nn.Linear(3, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.dense = dense

    def forward(self, images):
        x = self.embed(images.flatten(2).mT)
        first = None
        for block in self.blocks:
            x = block(x)
            first = x if first is None else first
        return torch.cat([x, first], -1) if self.dense else x


def without(module, block, example, choice="all"):
    found = map_layers("net", module, example)
    layers = found.choose(choice)
    passes = WithoutSkips(module, found, block, layers, example, nullcontext)
    return passes, layers


def seen(module, passes, images, layers):
    tensors = [None] * (len(layers) - passes.start)
    with torch.no_grad():
        with passes.keeping():
            module(images)
        with passes.capture(lambda i, tensor: tensors.__setitem__(i, tensor.clone())):
            module(images)
    return tensors


def real(kind):
    if kind == "timm vit":
        return timm.create_model("test_vit", depth=4).eval(), 160
    if kind == "timm swin":
        net = timm.create_model("test_vit", class_token=False, global_pool="avg", depth=4)
        return net.eval(), 160
    if kind == "torchvision resnet":
        return torchvision.models.resnet18(), 64
    return timm.create_model("test_convnext").eval(), 64


@pytest.mark.parametrize("kind", ["timm vit", "timm swin", "torchvision resnet", "timm convnext"])
def test_a_pass_from_the_block_on_equals_a_whole_one(kind, monkeypatch):
    torch.manual_seed(0)
    module, side = real(kind)
    module.eval()
    example, images = torch.randn(2, 3, side, side), torch.randn(5, 3, side, side)
    block = block_names(map_layers("net", module, example))[-2]
    passes, layers = without(module, block, example)
    assert passes._beginning is not None and passes._beginning.idle
    part = seen(module, passes, images, layers)
    monkeypatch.setattr(ablation, "find_beginning", lambda *_: None)
    whole, _ = without(module, block, example)
    assert whole._beginning is None
    for layer, one, other in zip(layers[passes.start :], part, seen(module, whole, images, layers)):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=layer.label)


def test_blocks_before_it_do_not_run():
    module, example = Net(), torch.randn(2, 3, 4, 4)
    passes, layers = without(module, "blocks.2", example)
    ran = []
    for i, block in enumerate(module.blocks):
        block.linear.register_forward_hook(lambda *_, i=i: ran.append(i))
    seen(module, passes, torch.randn(3, 3, 4, 4), layers)
    assert ran == [0, 1, 2, 3, 2, 3]
    assert all("forward" not in vars(part) for part in module.modules())


def test_a_later_use_of_an_earlier_output_takes_whole_passes():
    passes, _ = without(Net(dense=True), "blocks.2", torch.randn(2, 3, 4, 4))
    assert passes._beginning is None


def test_a_block_may_read_what_an_earlier_one_left_aside():
    module = Net()
    shared = [None]

    def leave(_, args, output):
        shared[0] = output[..., :1]

    module.blocks[0].linear.register_forward_hook(leave)
    module.blocks[3].inside = shared
    images = torch.randn(3, 3, 4, 4)
    passes, layers = without(module, "blocks.3", images[:2])
    tensors = seen(module, passes, images, layers)
    with torch.no_grad():
        module.blocks[3].inside = None
        x = module.blocks[0](module.embed(images.flatten(2).mT))
        scale = module.blocks[0].linear(module.embed(images.flatten(2).mT))[..., :1]
        x = module.blocks[2](module.blocks[1](x))
        expected = torch.tanh(module.blocks[3].linear(x)) * scale
    torch.testing.assert_close(tensors[-1], expected)


def test_ablations_do_not_depend_on_where_passes_begin(monkeypatch):
    module, images = Net(), torch.randn(16, 3, 4, 4)
    part = skip_ablation.measure(module, images, layers="all", blocks=[1, 2, 3], batch_size=8)
    monkeypatch.setattr(ablation, "find_beginning", lambda *_: None)
    whole = skip_ablation.measure(module, images, layers="all", blocks=[1, 2, 3], batch_size=8)
    torch.testing.assert_close(
        torch.from_numpy(part.cka), torch.from_numpy(whole.cka), rtol=0, atol=0
    )
