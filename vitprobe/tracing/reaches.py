"""What parts of an image the elements of a tensor can depend on, and arithmetic with it.

A reach is five tensors of the tensor's shape: minus the first row, the last row, minus the first
column, the last column, and 1 where all places were mixed; the larger of two is what both can
depend on, and minus infinity depends on nothing. They are expanded along axes where all is alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitprobe.tracing.place_arithmetic import compact

Reach = tuple[Tensor, ...]
_NOTHING = -torch.inf


def reach_of(tensor: Any) -> Reach | None:
    """None: it does not depend on the image."""
    return getattr(tensor, "_vitprobe_reach", None)


def own_reach(tensor: Any) -> Reach:
    """That of a tensor that has one; whoever gets none meets an exception."""
    return reach_of(tensor)  # type: ignore[return-value]


def put_reach(tensor: Tensor, reach: Reach | None) -> None:
    """Say what a tensor can depend on."""
    if reach is not None and any(part.shape != tensor.shape for part in reach):
        raise ValueError(f"a reach {tuple(reach[0].shape)} for a tensor {tuple(tensor.shape)}")
    tensor._vitprobe_reach = reach  # type: ignore[attr-defined]


def nothing(shape: Sequence[int]) -> Tensor:
    """A part of the reach of what depends on nothing."""
    return torch.tensor(_NOTHING).expand(tuple(shape))


def each(reach: Reach, work: Callable[[Tensor], Tensor]) -> Reach:
    """The same done to all parts."""
    return tuple(work(part) for part in reach)


def over(reach: Reach, axes: Sequence[int]) -> Reach:
    """What all along some axes can depend on; the axes stay, with length 1."""

    def work(part: Tensor) -> Tensor:
        small = compact(part)
        long = tuple(axis for axis in axes if small.shape[axis] > 1)
        if long:
            small = small.amax(long, keepdim=True)
        shape = [1 if axis in _positive(axes, part.ndim) else size
                 for axis, size in enumerate(part.shape)]  # fmt: skip
        return small.expand(shape)

    axes = _positive(axes, reach[0].ndim)
    return each(reach, work)


def _positive(axes: Sequence[int], ndim: int) -> list[int]:
    return [axis % ndim for axis in axes]


def joined(reaches: Sequence[Reach], shape: Sequence[int]) -> Reach:
    """What any of them can depend on, of tensors that are broadcast to a shape."""
    found = []
    for parts in zip(*reaches):
        total = compact(parts[0])
        for part in parts[1:]:
            small = compact(part)
            total = small if small is total else torch.maximum(total, small)
        found.append(total.expand(tuple(shape)))
    return tuple(found)


def whole_of(reach: Reach, shape: Sequence[int]) -> Reach:
    """For all elements of a shape, what any element of a reach can depend on."""
    return each(reach, lambda part: compact(part).amax().expand(tuple(shape)))


def mixed(reach: Reach, size: tuple[int, int]) -> Reach:
    """After a mixture: marked where it is of the whole image."""
    small = [compact(part) for part in reach]
    everything = (
        (small[0] >= 0) & (small[1] >= size[0] - 1) & (small[2] >= 0) & (small[3] >= size[1] - 1)
    )
    mark = torch.where(everything, 1.0, small[4])
    return (*reach[:4], mark.expand(reach[0].shape))


def slid(part: Tensor, axis: int, taps: Tensor) -> Tensor:
    """Along an axis, the most that an element's taps can depend on.

    Args:
        part: of a reach.
        axis: along which it is looked at.
        taps: (elements of the result, elements of the part) whether one meets the other.
    """
    small = compact(part)
    if small.shape[axis] == 1:
        met = taps.any(1)
        shape = [1] * small.ndim
        shape[axis] = len(met)
        if not met.all():
            small = torch.where(met.reshape(shape), small, _NOTHING)
        sizes = list(part.shape)
        sizes[axis] = len(met)
        return small.expand(sizes)
    lines = small.movedim(axis, -1)
    found = torch.stack(
        [
            lines[..., meets].amax(-1) if len(meets) else torch.full(lines.shape[:-1], _NOTHING)
            for meets in (row.nonzero().flatten() for row in taps)
        ],
        -1,
    ).movedim(-1, axis)
    sizes = list(part.shape)
    sizes[axis] = len(taps)
    return found.expand(sizes)
