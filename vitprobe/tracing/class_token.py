"""Which token is the class token: the one that the model's own output reads.

The vectors of a layer get marks, which travel as places do. A mark is a point (k, k²) of a
parabola: a mean of several marks is none of them. What is read from the last layer alone, and goes
on as one mark, has been picked out of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Layer
from vitprobe.tracing.observing import observing
from vitprobe.tracing.tokens import Following, compact, middle, place_of, put
from vitprobe.tracing.trace import tensors

_PICKING = {"getitem", "select", "index_select", "narrow", "split", "chunk", "unbind", "gather"}


class _AsItIs(Layer):
    """A layer whose tensor is not rearranged, so that marks stay on it."""

    def by_image(self, tensor: Tensor) -> Tensor:
        return tensor


def as_they_are(layers: Sequence[Layer]) -> list[Layer]:
    """The layers, to be captured without a rearrangement."""
    return [_AsItIs(**vars(layer)) for layer in layers]


def class_tokens(
    module: nn.Module,
    layers: Sequence[Layer],
    extra: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]],
    example: Tensor,
) -> dict[int, int]:
    """Which vector of each layer is the class token, for the layers that have one.

    Of several vectors without a place it is the one that the output reads; where the output reads
    none of them by itself (or hands on all tokens as they are), no one is. A single one that is
    handed on with the patches is taken for the class token.

    Args:
        module: in evaluation mode.
        layers: of ``map_layers``.
        extra: for each layer that has some, by index: the axes of its tensor (images first) that
            count vectors, and the vectors without a place.
        example: (n, C, H, W).
    """
    if not extra:
        return {}
    marks: dict[int, np.ndarray] = {}
    watch = _Picked()

    def take(j: int, tensor: Tensor) -> None:
        i = list(extra)[j]
        axes, _ = extra[i]
        watch.alone.clear()
        old = place_of(tensor)
        first = sum(len(some) for some in marks.values())
        marks[i] = _mark(tensor, layers[i], axes, old if isinstance(old, Tensor) else None, first)

    chosen = as_they_are([layers[i] for i in extra])
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        observing(module, watch),
        capture(module, chosen, take),
    ):
        output = module(example[:2].clone())
    bare = {i: [complex(marks[i][k]) for k in without] for i, (_, without) in extra.items()}
    last = bare[list(extra)[-1]]
    one, handed_on = _read(output, {mark for some in bare.values() for mark in some})
    found = {}
    for i, mine in bare.items():
        picked = [mark for mark in mine if mark in watch.alone]
        if one is not None and one in mine:
            mark = one
        elif len(picked) == 1:
            mark = picked[0]
        elif len(last) == 1 and last[0] in handed_on and last[0] in mine:
            mark = last[0]
        else:
            continue
        found[i] = extra[i][1][mine.index(mark)]
    return found


class _Picked(Following):
    """Follows marks, and notes those that an operation picks out alone."""

    def __init__(self) -> None:
        super().__init__()
        self.alone: dict[complex, None] = {}

    def after(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        super().after(function, args, kwargs, result)
        if getattr(function, "__name__", "").strip("_") in _PICKING:
            for _, tensor in tensors(result):
                some = _marks_of(tensor)
                if len(some) == 1:
                    self.alone[some.pop()] = None


def _mark(
    tensor: Tensor, layer: Layer, axes: tuple[int, ...], old: Tensor | None, first: int
) -> np.ndarray:
    """Marks on a layer's vectors: those that they bring along, and new ones from ``first`` on."""
    shape = layer.by_image(tensor).shape
    count = int(np.prod([shape[axis] for axis in axes], dtype=int))
    marks = np.full(count, complex("nan"))
    if old is not None:
        place = layer.by_image(old)[0]
        for axis in reversed(range(1, place.ndim + 1)):
            if axis not in axes:
                place = middle(place, axis - 1)
        marks = place.flatten().numpy().copy()
    new = np.flatnonzero(np.isnan(marks))
    marks[new] = [complex(k, k**2) for k in (first + new).tolist()]
    sizes = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
    spreading = torch.from_numpy(marks).reshape(sizes).expand(shape)
    put(tensor, _as_it_was(spreading, layer))
    return marks


def _as_it_was(by_image: Tensor, layer: Layer) -> Tensor:
    """The inverse of ``Layer.by_image``."""
    if layer.fold > 1:
        by_image = (by_image if layer.images_first else by_image.movedim(0, 1)).flatten(0, 1)
    return by_image.movedim(0, layer.axis) if layer.axis else by_image


def _marks_of(tensor: Tensor) -> set[complex]:
    """Up to two different marks of a tensor; none where a part has none."""
    place = place_of(tensor)
    if not isinstance(place, Tensor) or not place.numel():
        return set()
    values = compact(place).flatten()
    if values.isnan().any():
        return set()
    other = values[values != values[0]]
    return {complex(one) for one in (values[0], *other[:1])}


def _read(output: Any, candidates: set[complex]) -> tuple[complex | None, set[complex]]:
    """The candidate that a part of the output is made of alone, and those that are handed on."""
    handed_on: set[complex] = set()
    for _, tensor in tensors(output):
        marks = _marks_of(tensor)
        if len(marks) == 1 and marks <= candidates:
            return marks.pop(), set()
        place = place_of(tensor)
        if len(marks) > 1 and isinstance(place, Tensor):
            handed_on |= candidates & set(np.unique(compact(place).numpy()).tolist())
    return None, handed_on
