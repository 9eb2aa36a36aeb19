"""Activations in the open: what hand-written passes and timm's own functions give."""

import re

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import vitprobe
from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.models.loading import wrap
from vitprobe.tracing.layers import map_layers


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32).eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def hooks(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def grids_of(seen):
    for label in seen:
        try:
            yield seen.grid(label)
        except NotApplicable:
            continue  # vectors of an image


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_layers_are_what_timm_gives(name, images):
    torch.manual_seed(0)
    size = {"img_size": 32} if "vit" in name else {}
    net = timm.create_model(name, **size).eval()
    with torch.no_grad():
        theirs = net.forward_intermediates(images, intermediates_only=True)
        with vitprobe.capture(wrap(net, "net"), "all", example=images) as seen:
            net(images)
        # Stems and the last blocks of stages, or every block.
        found = [grid.permute(0, 3, 1, 2) for grid in grids_of(seen)]
    for map_of_theirs in theirs:
        assert any(
            mine.shape == map_of_theirs.shape and torch.equal(mine, map_of_theirs) for mine in found
        )


def test_a_torchvision_network_gives_what_its_feature_extractor_does(images):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    theirs = create_feature_extractor(net, ["layer2.1.conv1", "layer2.1", "layer2.1.add"])(images)
    with vitprobe.capture(
        net, ["layer2.1.conv1", "layer2.1", "layer2.1 sum"], example=images
    ) as seen:
        net(images)
    # conv1 stands as it was before the in-place ReLU, and so does the sum.
    torch.testing.assert_close(seen["layer2.1.conv1"], theirs["layer2.1.conv1"])
    torch.testing.assert_close(seen["layer2.1"], theirs["layer2.1"])
    assert float(seen["layer2.1 sum"].min()) < 0
    torch.testing.assert_close(seen["layer2.1 sum"].relu(), theirs["layer2.1"])


def small_torchvision():
    torch.manual_seed(0)
    vision = torchvision.models
    yield "resnet18", vision.resnet18(weights=None)
    yield "mobilenet", vision.mobilenet_v3_small(weights=None)
    yield "vit", vision.VisionTransformer(32, 8, 2, 2, 16, 32)
    yield "swin", vision.SwinTransformer([4, 4], 16, [2, 2], [2, 2], [2, 2])


@pytest.mark.parametrize(("name", "net"), list(small_torchvision()), ids=lambda one: str(one)[:9])
def test_every_module_of_torchvision_gives_what_its_feature_extractor_does(name, net, images):
    """But those that an in-place operation overwrites before the extractor gives them."""
    net = net.eval()
    found = map_layers(name, net, images[:2])
    names = [la.module for la in found.choose("all") if la.label == la.module and la.axis == 0
             and la.fold == 1]  # fmt: skip
    with vitprobe.capture(net, names, example=images) as seen, torch.no_grad():
        net(images)
    nodes = set(get_graph_node_names(net)[1])
    # What a class of attention does within stays one node of the extractor.
    names = [one for one in names if any(f"{node}.".startswith(f"{one}.") for node in nodes)]
    # It takes the number off the end of a module's name and numbers anew: its ln_1 is ln_2.
    names = [one for one in names if not re.search(r"ln_\d$", one)]
    with torch.no_grad():
        theirs = create_feature_extractor(net, names)(images)
    unlike = [one for one in names if not torch.equal(seen[one], theirs[one])]
    assert len(names) > 5
    for one in unlike:
        # It holds what came of it.
        assert isinstance(found.modules[one], nn.BatchNorm2d | nn.Conv2d | nn.Linear), one
        overwritten = [act(seen[one]) for act in (nn.ReLU(), nn.Hardswish(), nn.Hardsigmoid())]
        assert any(torch.equal(theirs[one], after) for after in overwritten), one
    assert not unlike or name in ("resnet18", "mobilenet")


def test_a_sum_is_its_skip_and_its_branch(vit, images):
    names = ["blocks.1 sum 1", "blocks.1 skip 1", "blocks.1 branch 1", "blocks.1.attn", "blocks.0"]
    with vitprobe.capture(vit, names) as seen, torch.no_grad():
        vit(images)
    whole, skip, branch = (seen[name] for name in names[:3])
    torch.testing.assert_close(skip + branch, whole)
    torch.testing.assert_close(skip, seen["blocks.0"])
    assert list(seen) and seen.grid("blocks.1 skip 1").shape[:3] == (3, 2, 2)


def test_places_of_tokens(images):
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=1, embed_dim=16, num_heads=2,
        reg_tokens=2,
    ).eval()  # fmt: skip
    oblong = torch.randn(2, 3, 32, 48)
    with vitprobe.capture(net, "blocks.0") as seen, torch.no_grad():
        net(oblong)
        # While hooks are on, too: the pass that tells places is none of the user's.
        assert seen.grid("blocks.0").shape == (2, 4, 6, 16)
        assert len(seen["blocks.0"]) == 2
        net(oblong[[0, 1, 1]])
        assert seen.grid("blocks.0").shape == (3, 4, 6, 16)
        net(oblong)
    assert seen.grid("blocks.0").shape == (2, 4, 6, 16)
    torch.testing.assert_close(seen.prefix("blocks.0"), seen["blocks.0"][:, :3])
    torch.testing.assert_close(seen.grid("blocks.0").flatten(1, 2), seen["blocks.0"][:, 3:])


def test_one_image_and_reductions_and_gradients(vit, images):
    with vitprobe.capture(vit, "blocks", reduce=lambda name, x: x.norm().item()) as seen:
        vit(images[:1])
    assert all(isinstance(value, float) for value in seen.values())
    inputs = images.clone().requires_grad_()
    with vitprobe.capture(vit, "blocks.0", grad=True) as seen:
        vit(inputs)
    seen["blocks.0"].sum().backward()
    assert inputs.grad.abs().sum() > 0
    with vitprobe.capture(vit, "blocks.0") as seen:
        vit(inputs)
    assert not seen["blocks.0"].requires_grad


def test_hooks_are_gone_also_after_an_exception(vit, images):
    with pytest.raises(ZeroDivisionError), vitprobe.capture(vit, ["blocks", "blocks.1 skip 1"]):
        vit(images)
        raise ZeroDivisionError
    assert hooks(vit) == 0


def test_what_goes_wrong_is_one_line(vit, images):
    with (
        pytest.raises(VitprobeError, match=r"no layer 'blocks.77'"),
        vitprobe.capture(vit, "blocks.77"),
    ):
        pass
    with vitprobe.capture(vit, "blocks.1") as seen:
        with pytest.raises(VitprobeError, match=r"run .* first"):
            seen["blocks.1"]
        vit(images)
        with pytest.raises(VitprobeError, match=r"'blocks.2' was not captured.*blocks.1"):
            seen["blocks.2"]
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 2)).eval()
    with vitprobe.capture(wrap(net, "net", input_size=(3, 32, 32)), ["2"]) as seen:
        net(images)
    with pytest.raises(NotApplicable, match="no grid"):
        seen.grid("2")
    with vitprobe.capture(vit.train(), "blocks"), pytest.raises(VitprobeError, match="eval"):
        vit(images)
    vit.eval()
    other = torchvision.models.resnet18(weights=None).eval()
    with pytest.raises(VitprobeError, match="example="), vitprobe.capture(other, "layer1.0 sum"):
        other(images)


def test_a_model_can_be_called(images):
    model = vitprobe.load_model("test_vit@random", image_size=32)
    with torch.no_grad():
        assert torch.equal(model(images), model.module(images))


def test_attention_maps_are_softmax_of_queries_and_keys(vit, images):
    found = vitprobe.attention_maps(vit, images)
    assert next(iter(found)) == "blocks.0.attn" and len(found) == len(vit.blocks)
    attention = vit.blocks[1].attn
    with vitprobe.capture(vit, ["blocks.1.norm1"]) as seen, torch.no_grad():
        vit(images)
    qkv = attention.qkv(seen["blocks.1.norm1"]).unflatten(2, (3, attention.num_heads, -1))
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    expected = (q @ k.mT * attention.scale).softmax(-1)
    torch.testing.assert_close(found["blocks.1.attn"].maps, expected, rtol=1e-4, atol=1e-6)
    places = found["blocks.1.attn"].queries[0]
    assert np.isnan(places[0]).all() and places[1].tolist() == [8, 8]
    assert list(vitprobe.attention_maps(vit, images[:1], "blocks.1*")) == ["blocks.1.attn"]
    with pytest.raises(VitprobeError, match=r"no attention layer 'blcks.1'.*blocks.1.attn"):
        vitprobe.attention_maps(vit, images, "blcks.1")
    with pytest.raises(NotApplicable, match="no attention"):
        vitprobe.attention_maps(torchvision.models.resnet18(weights=None), images)


def test_windows_come_apart():
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), embed_dim=16,
        num_heads=(1, 2),
    ).eval()  # fmt: skip
    found = vitprobe.attention_maps(swin, torch.randn(2, 3, 32, 32))
    first = next(iter(found.values()))
    assert first.maps.shape == (2, 4, 1, 16, 16) and first.queries.shape == (4, 16, 2)
    torch.testing.assert_close(first.maps.sum(-1), torch.ones(2, 4, 1, 16))
