"""Theoretical fields: against a referee that knows no operation, and a few known by hand."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from vitprobe import receptive_field
from vitprobe.models.loading import wrap
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.places import Places, find_places
from vitprobe.tracing.theoretical_field import theoretical_fields


def seen(module, layers, grids, at, x):
    """(first row, first column, last row, last column) by NaN: one row, one column at a time."""
    sizes = x.shape[-2:]
    spoilt = [[torch.zeros(size, dtype=torch.bool) for size in sizes] for _ in layers]
    for axis, size in enumerate(sizes):
        for line in range(size):
            y = x.clone()
            y.select(2 + axis, line).fill_(torch.nan)

            def take(i, tensor, axis=axis, line=line):
                spoilt[i][axis][line] = grids[i].at(tensor, *at[i]).isnan().any()

            with torch.no_grad(), capture(module, layers, take):
                module(y)
    found = []
    for rows, columns in spoilt:
        down, along = rows.nonzero(), columns.nonzero()
        found.append(tuple(int(v) for v in (down[0], along[0], down[-1], along[-1])))
    return found


def compared(module, size, names="all", channels=3):
    """Pairs of what is said and what the referee says, of every layer that has a grid."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
    layers = map_layers("net", module, x).choose(names)
    placed = [
        (layer, grid)
        for layer, grid in zip(layers, find_places(module, layers, x))
        if isinstance(grid, Places)
    ]
    layers, grids = ([one[k] for one in placed] for k in (0, 1))
    at = [(grid.rows // 2, grid.columns // 2) for grid in grids]
    boxes = theoretical_fields(module, layers, at, x[:1], grids)
    whole = (0, 0, size[0] - 1, size[1] - 1)
    return [
        (layer.label, box or whole, true)
        for layer, box, true in zip(layers, boxes, seen(module, layers, grids, at, x[:1]))
    ]


class Steps(nn.Module):
    """One operation after a convolution, and another one behind."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.out, self.last = nn.Conv2d(3, 8, 3), nn.Identity(), nn.Identity()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, (3, 1), 2, padding=1, dilation=(2, 1))
        self.turned = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1)
        self.operation = operation

    def forward(self, x):
        return self.last(F.relu(self.out(self.operation(self, self.first(x)))))


def linear_over_channels(net, x):
    return net.linear(net.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def part_of_the_channels(net, x):
    a, b = x.split((2, 6), 1)
    return torch.cat([net.depthwise(x)[:, :2] + a, b[:, [1, 0, 2, 3, 4, 5]]], 1)


def groups_that_see_differently(net, x):
    wide = F.max_pool2d(x[:, :4], 5, 1, 2)
    return net.grouped(torch.cat([x[:, :4], wide], 1))[:, :4]


def shuffled_channels(net, x):
    wide = F.avg_pool2d(x[:, :4], 3, 1, 1)
    return torch.channel_shuffle(torch.cat([x[:, 4:], wide], 1), 2)[:, :1] * 1


def windows(net, x):
    x = torch.roll(x, (-3, -3), (2, 3))
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // 5, 5, w // 6, 6).permute(0, 2, 4, 3, 5, 1).reshape(-1, 30, c)
    attended = F.scaled_dot_product_attention(x, x, x)
    scores = torch.einsum("wic,wjc->wij", attended, x).softmax(-1)
    x = scores @ x
    x = x.reshape(n, h // 5, w // 6, 5, 6, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
    return torch.roll(x, (3, 3), (2, 3))


def assigned_to(net, x):
    y = torch.zeros_like(x)
    y[:, :, 1:] = F.avg_pool2d(x, 3, 1, 1)[:, :, :-1]
    y[:, 0] += x[:, 1]
    return y


def written_into_a_part(net, x):
    y = x.clone()
    y[:, :2].add_(F.avg_pool2d(x, 5, 1, 2)[:, :2])
    return y


def rows_alone(net, x):
    return x + x.mean(2, keepdim=True)


OPERATIONS = [
    linear_over_channels, part_of_the_channels, groups_that_see_differently, shuffled_channels,
    windows, assigned_to, written_into_a_part, rows_alone,
    lambda net, x: F.interpolate(x, scale_factor=2),
    lambda net, x: F.interpolate(x, size=(7, 31), mode="bilinear"),
    lambda net, x: F.interpolate(x, scale_factor=1.5, mode="bicubic", align_corners=True),
    lambda net, x: F.interpolate(x, (11, 11), mode="bilinear", antialias=True),
    lambda net, x: F.interpolate(x, (11, 11), mode="area"),
    lambda net, x: net.dilated(x),
    lambda net, x: net.turned(x),
    lambda net, x: F.adaptive_avg_pool2d(x, (4, 5)),
    lambda net, x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True),
    lambda net, x: F.avg_pool2d(x, (2, 3), ceil_mode=True),
    lambda net, x: F.pad(x, (1, 2, 0, 3), mode="reflect")[:, :, 2:-1],
    lambda net, x: F.pixel_unshuffle(F.pad(x, (2, 2, 1, 1)), 2),
    lambda net, x: F.unfold(x, 3, stride=2, padding=1).unflatten(2, (10, 12)),
    lambda net, x: x.flip(3) + x,
    lambda net, x: F.glu(x, 1) * x.transpose(2, 3).transpose(2, 3)[:, ::2],
    lambda net, x: F.normalize(x, dim=1) * x.norm(dim=1, keepdim=True),
    lambda net, x: torch.where(x > 0, x, F.avg_pool2d(x, 3, 1, 1)),
    lambda net, x: x.flatten(2).mT.mul(2).mT.unflatten(2, (20, 24)),
]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_field_is_what_the_referee_sees(operation):
    torch.manual_seed(0)
    for label, said, true in compared(Steps(operation), (22, 26)):
        assert said == true, label


@pytest.mark.parametrize(
    "operation",
    [
        lambda net, x: x + x.cumsum(2),
        lambda net, x: x + x.sort(3).values,
        lambda net, x: torch.fft.irfft2(torch.fft.rfft2(x)),
        lambda net, x: x.gather(2, x[:, :, :, :1].argsort(2).expand(x.shape)),
        lambda net, x: torch.lerp(x, x.median(3, keepdim=True).values, 0.5),
    ],
)
def test_no_field_is_too_small_behind_operations_without_a_rule(operation):
    for label, said, true in compared(Steps(operation), (12, 14)):
        assert said[0] <= true[0] and said[1] <= true[1], label
        assert said[2] >= true[2] and said[3] >= true[3], label


STAGES = ["stages.0*", "stages.1*"]


@pytest.mark.parametrize(
    ("name", "options", "size", "names"),
    [
        (
            "convnext_atto",
            {"depths": (1, 1, 1, 1), "dims": (4, 4, 4, 4)},
            64,
            STAGES,
        ),
        ("ghostnet_050", {}, 32, [f"blocks.{i}*" for i in range(4)]),
        ("test_coatnet", {"img_size": 64}, 64, STAGES),
        ("edgenext_xx_small", {}, 32, STAGES),
    ],
)
def test_fields_of_published_networks_are_what_the_referee_sees(name, options, size, names):
    torch.manual_seed(0)
    found = compared(timm.create_model(name, **options), (size, size), names)
    assert len(found) > 10
    for label, said, true in found:
        assert said == true, label


def test_a_swin_sees_its_window_until_the_shift():
    module = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=112, depths=(2,), num_heads=(1,), embed_dim=8
    )
    result = receptive_field.measure(
        wrap(module, "swin"),
        torch.randn(2, 3, 112, 112),
        layers=["layers.0.blocks.0", "layers.0.blocks.1"],
        channels=1,
    )
    # The centre stands in the third of four windows of 28 px; shifted ones lie 12 px lower.
    assert result.box.tolist() == [[56, 56, 83, 83], [28, 28, 83, 83]]


def test_a_mixture_of_everything_has_no_smaller_field_but_a_chain_of_convolutions_has_its_own():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 9, padding=4), nn.Conv2d(4, 4, 9, padding=4)
            self.gated = nn.Identity()

        def forward(self, x):
            x = self.second(self.first(x))
            return self.gated(x * x.mean((2, 3), keepdim=True).sigmoid())

    module, x = Both().eval(), torch.randn(2, 3, 10, 10)
    layers = map_layers("net", module, x).choose(["second", "gated"])
    assert theoretical_fields(module, layers, [(5, 5)] * 2, x[:1]) == [(0, 0, 9, 9), None]
