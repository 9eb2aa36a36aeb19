"""Where in the image the vectors of a forward pass stand.

While a pass is watched, every tensor that depends on the input carries a place: a complex tensor
of its own shape, x + iy in input pixels for each element, NaN for what stands nowhere (class
tokens, registers, padding). Operations that move vectors (reshape, roll, window partitions,
unfolding) move their places in the same way. Operations that mix neighbours (convolution, pooling)
put their result at the middle of what they mix; what mixes all of an image stands nowhere. All
others leave places as they are. So prefix tokens, oblong grids, shifted windows, strided keys and
unfolded patches need no code of their own.

A place that an operation destroys is lost, and the operation's name stays in its stead. Places
live on the CPU, wherever the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vitprobe.tracing.observing import Observer
from vitprobe.tracing.operations import BLANK, LIKE_ANOTHER
from vitprobe.tracing.place_arithmetic import (
    IMAGE_STEP,
    TOLERANCE_PX,
    Place,
    compact,
    middle,
    place_of,
    put,
    spread,
)
from vitprobe.tracing.place_rules import LOSING, MOVING, RULES, assign, pointwise, written_into
from vitprobe.tracing.trace import tensors

__all__ = [
    "IMAGE_STEP", "MOVING", "TOLERANCE_PX", "Following", "Place", "compact", "follow", "middle",
    "place_of", "put", "put_pixels", "spread",
]  # fmt: skip


def put_pixels(images: Tensor) -> None:
    """Places of a batch of images (n, C, H, W): the middle of each pixel."""
    n, _, height, width = images.shape
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = torch.arange(height, dtype=torch.float64) + 0.5
    x = x + IMAGE_STEP * torch.arange(n, dtype=torch.float64)[:, None]
    grid = torch.complex(*torch.broadcast_tensors(x[:, None, :], y[None, :, None]))
    put(images, grid[:, None].expand(images.shape))


class Following(Observer):
    """Carries places over every operation, from its operands to its result."""

    def after(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        follow(function, args, kwargs, result)


def follow(function: Callable, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
    """Carry places over an operation, from its operands to its result."""
    given = [tensor for _, tensor in tensors((args, kwargs)) if place_of(tensor) is not None]
    if not given:
        return
    name = getattr(function, "__name__", "").strip("_")
    if name == "setitem":
        assign(*args)
        return
    if name in BLANK or (name in LIKE_ANOTHER and place_of(args[0]) is None):
        return
    found = [tensor for _, tensor in tensors(result)]
    lost = next((place for t in given if isinstance(place := place_of(t), str)), None)
    rule = RULES.get(name, pointwise)
    if name in LOSING or (lost and rule is not pointwise):
        places: Sequence[Tensor | str] = [lost or name] * len(found)
    else:
        try:
            places = rule(function, args, kwargs, found)
        except (RuntimeError, IndexError, TypeError, ValueError, KeyError):
            # An operation used in a way that the rule does not know.
            places = [name] * len(found)
    before = place_of(args[0]) if args else None
    for tensor, place in zip(found, places):
        fits = isinstance(place, str) or place.shape == tensor.shape
        put(tensor, place if fits else name)
        if args and tensor is args[0] and place is not before:
            written_into(tensor)
