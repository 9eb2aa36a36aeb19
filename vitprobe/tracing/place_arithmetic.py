"""Places of tensors: complex numbers x + iy in input pixels, and arithmetic with them.

A tensor's places have its shape; NaN stands nowhere. What is the same along an axis is expanded
along it, and looked at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Images of a batch lie this many pixels apart, so that a place also says whose it is.
IMAGE_STEP = 2.0**20
TOLERANCE_PX = 1e-3
# What reaches over so much of an image's places, both ways, is of all of it.
_WHOLE = 2 / 3
NOWHERE = complex(float("nan"), float("nan"))

Place = Tensor | str | None


def place_of(tensor: Any) -> Place:
    """Complex places, the name of the operation that lost them, or None: not of the input."""
    return getattr(tensor, "_vitprobe_place", None)


def put(tensor: Tensor, place: Tensor | str) -> None:
    """Say where a tensor stands."""
    if isinstance(place, Tensor) and place.shape != tensor.shape:
        raise ValueError(f"places {tuple(place.shape)} for a tensor {tuple(tensor.shape)}")
    tensor._vitprobe_place = place  # type: ignore[attr-defined]


def nowhere(tensor: Tensor) -> Tensor:
    """Places of a tensor that has none."""
    return torch.tensor(NOWHERE, dtype=torch.complex128).expand(tensor.shape)


def middle(place: Tensor, axis: int) -> Tensor:
    """Mean place along an axis, of those that stand anywhere."""
    if alike(place, axis):
        return place.select(axis, 0)
    there = ~place.isnan()
    count = there.sum(axis)
    total = torch.where(there, place, 0).sum(axis)
    return torch.where(count > 0, total / count.clamp(min=1), NOWHERE)


def spread(place: Tensor, axis: int) -> float:
    """How many pixels places differ along an axis, at most; what stands nowhere does not count."""
    if not place.numel() or alike(place, axis):
        return 0.0
    there, widest = ~place.isnan(), 0.0
    for part in (place.real, place.imag):
        low = torch.where(there, part, torch.inf).amin(axis)
        high = torch.where(there, part, -torch.inf).amax(axis)
        widest = max(widest, float((high - low).amax()))
    return max(widest, 0.0)


def mover(function: Callable) -> Callable:
    """The operation as it can be done to places, too, which lie otherwise in memory."""
    instead: dict[Callable, Callable] = {
        Tensor.view: Tensor.reshape,
        Tensor.view_as: Tensor.reshape_as,
    }
    return instead.get(function, function)


def compact(place: Tensor) -> Tensor:
    """The places with axes of length 1 where they are expanded: nothing is said twice."""
    for axis in range(place.ndim):
        if alike(place, axis):
            place = place.narrow(axis, 0, 1)
    return place


def alike(place: Tensor, axis: int) -> bool:
    """Whether an axis is known to be of one place without a look at it."""
    return place.shape[axis] == 1 or (place.stride(axis) == 0 and place.shape[axis] > 0)


def mixes_all(place: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether what is mixed along these axes is, for all results, an image as a whole."""
    there = ~place.isnan()
    x = place.real - IMAGE_STEP * (place.real / IMAGE_STEP).round()
    wide = False
    for part in (x, place.imag):
        low = torch.where(there, part, torch.inf).amin(axes)
        high = torch.where(there, part, -torch.inf).amax(axes)
        whole = float(high.amax() - low.amin())
        if whole >= TOLERANCE_PX:
            wide = True
            if float((high - low)[high >= low].amin()) < _WHOLE * whole:
                return False
    return wide
