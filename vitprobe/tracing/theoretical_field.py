"""The theoretical receptive field: the pixels that a location of a map can depend on at all.

Convolutions and pooling widen an interval of rows and one of columns, additions join them. Where
anything else mixes locations (attention, global pooling, normalisation over the map), there is no
smaller field than the whole picture, and none is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Layer
from vitprobe.tracing.trace import tensors

_PLAIN = {"add", "sub", "mul", "div", "iadd", "isub", "imul", "radd", "rmul", "rsub", "truediv"}
_POINTWISE = _PLAIN | {
    "batch_norm", "relu", "relu6", "hardtanh", "gelu", "silu", "elu", "selu", "celu", "mish",
    "leaky_relu", "prelu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "softplus", "clamp",
    "clip", "abs", "neg", "pow", "square", "sqrt", "exp", "dropout", "dropout2d", "alpha_dropout",
    "to", "float", "half", "double", "type", "contiguous", "clone", "detach",
}  # fmt: skip
_POOLS = {"max_pool2d", "max_pool2d_with_indices", "avg_pool2d", "lp_pool2d"}


@dataclass(frozen=True)
class Span:
    """Index i of an axis sees the pixels ``i * stride + low`` to ``i * stride + high``."""

    stride: int = 1
    low: int = 0
    high: int = 0

    def window(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Span:
        """After a window slid over the axis."""
        start = -padding * self.stride
        return Span(
            self.stride * stride,
            self.low + start,
            self.high + start + dilation * (kernel - 1) * self.stride,
        )

    def joined(self, other: Span) -> Span | None:
        if self.stride != other.stride:
            return None
        return Span(self.stride, min(self.low, other.low), max(self.high, other.high))


@dataclass(frozen=True)
class Reach:
    """The spans of a map's two axes of places, and which axes these are."""

    rows: Span = Span()
    columns: Span = Span()
    axes: tuple[int, int] = (2, 3)


def theoretical_fields(
    module: nn.Module,
    layers: Sequence[Layer],
    places: Sequence[tuple[int, int]],
    example: Tensor,
) -> list[tuple[int, int, int, int] | None]:
    """The pixels that a place of each layer can depend on.

    Args:
        module: in evaluation mode.
        layers: of ``map_layers``.
        places: row and column in each layer's map.
        example: (n, C, H, W).

    Returns:
        first row, first column, last row, last column, within the picture, for each layer; None
        where there is no smaller field than the whole picture, or the layer is no map.
    """
    height, width = example.shape[-2:]
    found: list[tuple[int, int, int, int] | None] = [None] * len(layers)
    watch = _Watch(example)

    def locate(i: int, tensor: Tensor) -> None:
        reach = watch.known.get(_key(tensor))
        if reach is None:
            return
        (top, bottom), (left, right) = (
            (place * span.stride + span.low, place * span.stride + span.high)
            for place, span in zip(places[i], (reach.rows, reach.columns))
        )
        found[i] = max(top, 0), max(left, 0), min(bottom, height - 1), min(right, width - 1)

    # The capture's own observer comes first, so that every operation still reaches this one.
    with torch.no_grad(), watch, capture(module, layers, locate):
        module(example)
    return found


class _Watch(TorchFunctionMode):
    """Keeps the reach of every tensor of a pass; None for those that see everything."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.known: dict[tuple, Reach | None] = {_key(example): Reach()}
        # Kept alive, so that no storage is used twice.
        self.alive: list[Tensor] = [example]

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [(t, _key(t)) for _, t in tensors([args, kwargs])]
        before = [(t, self.known[key]) for t, key in given if key in self.known]
        result = function(*args, **kwargs)
        if before:
            for _, tensor in tensors(result):
                name = getattr(function, "__name__", "").strip("_")
                self.known[_key(tensor)] = _after(name, before, args, kwargs, tensor)
                self.alive.append(tensor)
        return result


def _key(tensor: Tensor) -> tuple:
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _after(
    name: str, given: list[tuple[Tensor, Reach | None]], args: Any, kwargs: Any, result: Tensor
) -> Reach | None:
    """The reach of an operation's result."""
    reach = given[0][1]
    for _, other in given:
        if reach is None or other is None or other.axes != reach.axes:
            return None
        rows, columns = reach.rows.joined(other.rows), reach.columns.joined(other.columns)
        if rows is None or columns is None:
            return None
        reach = Reach(rows, columns, reach.axes)
    if reach is None:
        return None
    first = given[0][0]
    if name in _POINTWISE:
        return reach if result.ndim == first.ndim else None
    if name == "layer_norm":
        over = len(args[1] if len(args) > 1 else kwargs["normalized_shape"])
        return reach if max(reach.axes) < first.ndim - over else None
    if name == "permute":
        dims = args[1:] if isinstance(args[1], int) else args[1]
        order = [dim % first.ndim for dim in dims]
        return replace(reach, axes=(order.index(reach.axes[0]), order.index(reach.axes[1])))
    if name == "cat":
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        return reach if dim % result.ndim not in reach.axes else None
    if reach.axes != (2, 3):
        return None
    if name == "pad":
        amounts = [*(args[1] if len(args) > 1 else kwargs["pad"]), 0, 0][:4]
        left, _, top, _ = amounts
        return Reach(reach.rows.window(1, 1, top), reach.columns.window(1, 1, left))
    if name == "conv2d":
        return _window(reach, args[1].shape[-2:], _options(args[3:], kwargs, 1, 0, 1))
    if name in _POOLS:
        kernel = args[1] if len(args) > 1 else kwargs["kernel_size"]
        dilation = kwargs.get("dilation", args[4] if name[0] == "m" and len(args) > 4 else 1)
        stride, padding, _ = _options(args[2:4], kwargs, None, 0, 1)
        return _window(reach, _two(kernel), (stride or kernel, padding, dilation))
    return None


def _options(args: Any, kwargs: Any, *defaults: Any) -> tuple[Any, Any, Any]:
    names = ("stride", "padding", "dilation")
    given = dict(zip(names, args)) | {name: kwargs[name] for name in names if name in kwargs}
    stride, padding, dilation = (given.get(n, default) for n, default in zip(names, defaults))
    return stride, padding, dilation


def _window(reach: Reach, kernel: Sequence[int], options: tuple[Any, Any, Any]) -> Reach:
    stride, padding, dilation = options
    strides, dilations = _two(stride), _two(dilation)
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilations, kernel)]
    paddings = (0, 0) if padding == "valid" else _two(padding)
    sizes = zip(kernel, strides, paddings, dilations)
    rows, columns = (span.window(*size) for span, size in zip((reach.rows, reach.columns), sizes))
    return Reach(rows, columns)


def _two(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else tuple(value)
