"""The theoretical receptive field: the pixels that a place of a layer can depend on at all.

One watched pass tells: every element of a tensor carries the first and last row and column of the
image that it can depend on. Moving elements moves these; adding, convolving, pooling, resizing,
attending join them (``reach_rules``). Operations that are not known join all that they are given,
so that no field is too small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.tracing.capture import capture
from vitprobe.tracing.class_token import as_they_are
from vitprobe.tracing.layers import Layer
from vitprobe.tracing.observing import Observer, observing
from vitprobe.tracing.places import Places, find_places
from vitprobe.tracing.reach_rules import assigned, follow_reach
from vitprobe.tracing.reaches import Reach, joined, nothing, put_reach, reach_of, whole_of

Box = tuple[int, int, int, int]


def theoretical_fields(
    module: nn.Module,
    layers: Sequence[Layer],
    places: Sequence[tuple[int, int]],
    example: Tensor,
    grids: Sequence[Places | str] | None = None,
) -> list[Box | None]:
    """The pixels that a place of each layer can depend on.

    Args:
        module: in evaluation mode.
        layers: of ``map_layers``.
        places: row and column in each layer's grid.
        example: (n, C, H, W).
        grids: of ``find_places``, where they are known already.

    Returns:
        first row, first column, last row, last column, within the image, for each layer; None
        where a mixture of all places leaves no smaller field than the whole image, or the layer
        has no grid.
    """
    found_grids = grids or find_places(module, layers, torch.cat([example[:1]] * 2))
    height, width = example.shape[-2:]
    found: list[Box | None] = [None] * len(layers)

    def locate(i: int, tensor: Tensor) -> None:
        reach, grid = reach_of(tensor), found_grids[i]
        if reach is None or not isinstance(grid, Places):
            return
        bounds = [float(grid.at(layers[i].by_image(part), *places[i]).amax()) for part in reach]
        if not all(abs(bound) < float("inf") for bound in bounds):
            return
        top, bottom, left, right, mixed = (int(bound) for bound in bounds)
        box = -top, -left, bottom, right
        if not (mixed and box == (0, 0, height - 1, width - 1)):
            found[i] = box

    with torch.inference_mode(False), torch.no_grad():
        inputs = example[:1].clone()
        put_reach(inputs, _pixels(inputs))
        with (
            observing(module, _Reaching((height, width))),
            capture(module, as_they_are(layers), locate),
        ):
            module(inputs)
    return found


def _pixels(image: Tensor) -> Reach:
    y = torch.arange(image.shape[-2], dtype=torch.float32)[:, None]
    x = torch.arange(image.shape[-1], dtype=torch.float32)[None]
    return tuple(part.expand(image.shape) for part in (-y, y, -x, x, torch.zeros(1)))


class _Reaching(Observer):
    """Carries what tensors can depend on over every operation."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.versions: dict[int, int] = {}

    def before(self, function: Callable, args: tuple, kwargs: dict) -> None:
        target = args[0] if args else None
        if isinstance(target, Tensor) and not target.is_inference():
            self.versions = {id(target): target._version}

    def after(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        target = args[0] if args else None
        if getattr(function, "__name__", "") == "__setitem__":
            assigned(*args)
        else:
            follow_reach(function, args, kwargs, result, self.size)
        if not isinstance(target, Tensor) or target._base is None or target.is_inference():
            return
        own, base = reach_of(target), target._base
        if own is None or self.versions.get(id(target), target._version) == target._version:
            return
        # A part was written into, and with it what it is a part of.
        put_reach(base, _written(reach_of(base), own, target, base))


def _written(before: Reach | None, own: Reach, view: Tensor, base: Tensor) -> Reach:
    """What a tensor can depend on after its part that is a view has been written into."""
    if before is None:
        before = tuple(nothing(base.shape) for _ in own)
    if not base.is_contiguous():
        return joined([before, whole_of(own, base.shape)], base.shape)
    parts = []
    for old, new in zip(before, own):
        part = old.clone(memory_format=torch.contiguous_format)
        offset = view.storage_offset() - base.storage_offset()
        part.as_strided(view.shape, view.stride(), offset).copy_(new)
        parts.append(part)
    return tuple(parts)
