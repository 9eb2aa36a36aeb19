"""Whether a model's output is that of a classifier, and where in it the classes are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitprobe.tracing.layers import LayerMap
from vitprobe.tracing.trace import tensors


def class_output(found: LayerMap) -> tuple[str, int] | str:
    """Which tensor of the output holds a number a class, and how many classes; or why none does.

    The output must have one row an image, and the last thing with weights that a pass of the model
    runs must be a linear layer or a convolution with as many outputs: features end in a
    normalisation, or have other sizes.
    """
    root = next(call for call in reversed(found.trace.calls) if not call.name)
    rows = [
        (suffix, info.shape) for suffix, info in root.outputs
        if info.depends and info.dtype.is_floating_point and len(info.shape) == 2
    ]  # fmt: skip
    if len(rows) != 1:
        sizes = " and ".join(str(info.shape[1:]) for _, info in root.outputs) or "nothing"
        return f"its output for an image is {sizes}"
    ((suffix, (_, count)),) = rows
    weighted = [
        found.modules[call.name]
        for call in sorted(found.trace.calls, key=lambda call: call.finished)
        if call.is_leaf and next(found.modules[call.name].parameters(False), None) is not None
    ]
    last = weighted[-1] if weighted else None
    made = (
        last.out_features if isinstance(last, nn.Linear)
        else last.out_channels if isinstance(last, nn.Conv2d) else None
    )  # fmt: skip
    if made != count or count < 2:
        return "its output does not come from a linear layer of classes"
    return suffix, count


def scores(output: Any, suffix: str) -> Tensor:
    """(n, classes) of a model's output."""
    return dict(tensors(output))[suffix]
