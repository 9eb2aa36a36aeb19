"""What operations that slide over a map do to what its elements can depend on.

What an operation takes in along one axis is tried out: a line with one NaN in it, and the elements
that become NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprobe.tracing.place_arithmetic import compact
from vitprobe.tracing.reaches import Reach, each, joined, mixed, own_reach, reach_of, slid, whole_of

Size = tuple[int, int]


def convolve(
    function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    turned = "transpose" in function.__name__
    last = ("output_padding", "groups", "dilation") if turned else ("dilation", "groups")
    names = ("input", "weight", "bias", "stride", "padding", *last)
    asked = {**dict(zip(names, args)), **kwargs}
    weight, groups, out = asked["weight"], asked.get("groups", 1), found[0]
    count = weight.ndim - 2
    taps = []
    for i in range(count):
        own: dict[str, Any] = {
            key: value if isinstance(value, str) else many(value, count)[i]
            for key in ("stride", "padding", "dilation", "output_padding")
            if (value := asked.get(key)) is not None
        }
        own["weight"] = torch.ones(1, 1, weight.shape[2 + i], dtype=torch.float64)
        operation: Any = F.conv_transpose1d if turned else F.conv1d
        taps.append(_taps(partial(operation, **own), asked["input"].shape[2 + i]))

    def work(part: Tensor) -> Tensor:
        part = _grouped(part, groups, out.shape[1])
        for i, one in enumerate(taps):
            part = slid(part, 2 + i, one)
        return part.expand(out.shape)

    reach = each(own_reach(asked["input"]), work) if reach_of(asked["input"]) else None
    others = [whole_of(own_reach(asked[key]), out.shape) for key in ("weight", "bias")
              if reach_of(asked.get(key)) is not None]  # fmt: skip
    known = [*([reach] if reach else []), *others]
    return [joined(known, out.shape)]


def _grouped(part: Tensor, groups: int, channels: int) -> Tensor:
    """Joined over the channels of each group, for as many channels as come out."""
    small = compact(part)
    if small.shape[1] == 1:
        return part[:, :1].expand(-1, channels, *part.shape[2:])
    joint = small.unflatten(1, (groups, -1)).amax(2).repeat_interleave(channels // groups, 1)
    return joint.expand(part.shape[0], channels, *part.shape[2:])


def pool(
    function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    name = function.__name__
    count = args[0].ndim - 2
    if "adaptive" in name:
        asked: dict[str, Any] = {}
        one: Any = F.adaptive_avg_pool1d
        own = [{"output_size": found[0].shape[2 + i]} for i in range(count)]
    else:
        lp = "lp_pool" in name
        names = ("norm_type",) * lp + ("kernel_size", "stride")
        names += () if lp else ("padding",) + ("dilation",) * ("max" in name)
        asked = {**dict(zip((*names, "ceil_mode"), args[1:])), **kwargs}
        one = F.max_pool1d if "max" in name else F.avg_pool1d
        own = [
            {
                key: many(asked[key], count)[i] if key != "ceil_mode" else asked[key]
                for key in ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
                if asked.get(key) is not None and asked.get(key) != []
            }
            for i in range(count)
        ]
    taps = [_taps(partial(one, **mine), args[0].shape[2 + i]) for i, mine in enumerate(own)]

    def work(part: Tensor) -> Tensor:
        for i, mine in enumerate(taps):
            part = slid(part, 2 + i, mine)
        return part

    reach = each(own_reach(args[0]), work)
    reach = mixed(reach, size) if "adaptive" in name else reach
    return [reach] * len(found)


def resize(
    function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    names = ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor",
             "antialias")  # fmt: skip
    asked = {**dict(zip(names, args)), **kwargs}
    image = asked.pop("input")
    count = image.ndim - 2
    scale = asked.get("scale_factor")
    mode = asked.get("mode", "nearest")
    plain = {"linear": "bilinear", "trilinear": "bilinear"}.get(mode, mode)

    def work(part: Tensor) -> Tensor:
        for i in range(count):
            own: dict[str, Any] = {key: asked[key] for key in names[4:] if asked.get(key)}
            own["mode"] = plain
            if scale is not None:
                each_scale = scale if isinstance(scale, (tuple, list)) else [scale] * count
                own["scale_factor"] = (each_scale[i], 1.0)
            else:
                own["size"] = (found[0].shape[2 + i], 2)

            def resized(line: Tensor, own: dict[str, Any] = own) -> Tensor:
                # Two columns: torch gets the smoothing of one wrong.
                return F.interpolate(line[..., None].expand(*line.shape, 2), **own)[..., 0]

            part = slid(part, 2 + i, _taps(resized, image.shape[2 + i]))
        return part

    return [each(own_reach(image), work)]


def _taps(operation: Callable[[Tensor], Tensor], length: int) -> Tensor:
    """(out, in) which elements of a line go into which of an operation's."""
    lines = torch.zeros(length, 1, length, dtype=torch.float64)
    lines[torch.arange(length), 0, torch.arange(length)] = torch.nan
    return operation(lines)[:, 0].isnan().T


def unfold(
    function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    asked = {**dict(zip(("input", "kernel_size", "dilation", "padding", "stride"), args)), **kwargs}
    rows, columns = many(asked.pop("padding", 0), 2)
    # Minus infinity would become NaN in it.
    least = -1e9

    def work(part: Tensor) -> Tensor:
        padded = F.pad(part.clamp(min=least), (columns, columns, rows, rows), value=least)
        cut = F.unfold(padded, **asked)
        return torch.where(cut <= least, -torch.inf, cut)

    return [each(own_reach(asked.pop("input")), work)]


def many(value: Any, count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    return tuple(value) * count if len(value) == 1 else tuple(value)
