"""The residual stream before and after every sublayer: attention, MLP, convolutional block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from vitprobe.tracing.additions import Addition
from vitprobe.tracing.branches import branch_kind
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Layer, LayerMap
from vitprobe.tracing.trace import AdditionHooks


@dataclass(frozen=True)
class Point:
    """A tensor on the way of the residual stream.

    Attributes:
        layer: it, or for the stream before an addition the sum, which has the same places.
        kind: what is between the point before and this one; empty where the two do not follow
            each other.
        before: the addition whose skip is meant, not its sum.
    """

    layer: Layer
    kind: str = ""
    before: Addition | None = None

    @property
    def label(self) -> str:
        return f"{self.layer.label} before" if self.before else self.layer.label


def sublayers(module: nn.Module, found: LayerMap, example: Tensor) -> list[Point]:
    """The points of a model in forward order; none where it makes no residual additions.

    What a sublayer leaves is the sum, or what the block that adds puts out once it has added the
    last time (a ResNet's block after its activation). A pass of the example tells whether a skip
    carries what the sublayer before it left. Where it does not, the stream before the addition is a
    point of its own; behind a projected skip the stream begins anew.

    Args:
        module: the model, in evaluation mode.
        found: its layers.
        example: (2, C, H, W).
    """
    sums = [layer for layer in found.layers if layer.addition is not None]
    left = [_left(layer, sums, found.layers) for layer in sums]
    skips = _follow(module, sums, left, example)
    points: list[Point] = []
    for layer, after, follows in zip(sums, left, skips):
        addition = layer.addition
        assert addition is not None
        kind = branch_kind(addition, found.modules)
        if not follows:
            if addition.kind == "projection":
                kind = ""
            else:
                points.append(Point(layer, "", addition))
        points.append(Point(after, kind))
    return points


def _left(layer: Layer, sums: Sequence[Layer], layers: Sequence[Layer]) -> Layer:
    """What a sublayer leaves: its sum, or what its block puts out after the last one."""
    later = [
        one for one in sums
        if (one.module, one.index) == (layer.module, layer.index) and one.time > layer.time
    ]  # fmt: skip
    outputs = [
        one for one in layers
        if one.point == "output"
        and (one.module, one.index, one.suffix) == (layer.module, layer.index, "")
        and one.shape == layer.shape
    ]  # fmt: skip
    return outputs[0] if layer.module and outputs and not later else layer


def _follow(
    module: nn.Module, sums: Sequence[Layer], left: Sequence[Layer], example: Tensor
) -> list[bool]:
    """Of each addition, whether its skip holds the values that the sublayer before it left."""
    follows = [False] * len(sums)
    last: list[Tensor | None] = [None] * len(sums)

    def given(i: int, skip: Tensor, branch: Tensor) -> None:
        before = last[i - 1] if i else None
        mine = sums[i].by_image(skip)
        follows[i] = before is not None and torch.equal(before, mine.flatten())
        if i:
            last[i - 1] = None

    def keep(i: int, tensor: Tensor) -> None:
        last[i] = tensor.flatten().clone()

    hooks = {layer.addition: partial(given, i) for i, layer in enumerate(sums) if layer.addition}
    with torch.no_grad(), AdditionHooks(module, before=hooks), capture(module, left, keep):
        module(example)
    return follows
