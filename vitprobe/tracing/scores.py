"""Which tensors of a pass are scores of attention, and where their rows and columns stand.

A product of two placed tensors that mixes neither's tokens has scores: its rows stand where those
of the left operand stand, and its columns where those of the right one do. Scores stay scores while
numbers are added or multiplied and axes are moved, up to the softmax over the columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vitprobe.tracing.attention_operations import PRODUCTS, SOFTMAXES
from vitprobe.tracing.place_arithmetic import mover
from vitprobe.tracing.place_rules import einsum_place
from vitprobe.tracing.tokens import MOVING, TOLERANCE_PX, Following, middle, place_of, spread
from vitprobe.tracing.trace import tensors

_MOVED = frozenset(MOVING.split())


def columns_of(tensor: Any) -> Tensor | None:
    """Places of the shape of scores: where their columns stand; None: no scores."""
    return getattr(tensor, "_vitprobe_columns", None)


def product_of(tensor: Any) -> int:
    """Which product of the pass scores came from."""
    return getattr(tensor, "_vitprobe_product", -1)


def is_map(tensor: Any) -> bool:
    """Whether a tensor is what a softmax has made of scores."""
    return getattr(tensor, "_vitprobe_map", False)


class Scores(Following):
    """Follows places, and the columns of scores with them."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.turned: set[int] = set()  # products whose softmax is over their rows

    def after(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        super().after(function, args, kwargs, result)
        if not isinstance(result, Tensor):
            found = [tensor for _, tensor in tensors(result)]
        else:
            found = [result]
        source = next((a for a in args if columns_of(a) is not None or is_map(a)), None)
        name = getattr(function, "__name__", "").strip("_")
        if function in PRODUCTS or name in ("einsum", "baddbmm"):
            if len(args) > 1 and not is_map(source) and isinstance(result, Tensor):
                self.products += 1
                _put(result, _columns(name, args, result), self.products)
        elif source is None:
            return
        elif is_map(source) or function in SOFTMAXES:
            if function in SOFTMAXES and _over_rows(source, args, kwargs):
                self.turned.add(product_of(source))
            for tensor in found:
                if tensor.ndim >= 2:
                    tensor._vitprobe_map = True  # type: ignore[attr-defined]
                    _put(tensor, None, -1)
        elif name in _MOVED and args[0] is source:
            moved = mover(function)(columns_of(source), *args[1:], **kwargs)
            for tensor, (_, columns) in zip(found, tensors(moved)):
                _put(tensor, columns, product_of(source))
        else:
            for tensor in found:
                same = tensor.shape == source.shape and tensor.is_floating_point()
                _put(tensor, columns_of(source) if same else None, product_of(source))


def _over_rows(scores: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether a softmax goes over what the product had as its rows."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    columns, rows = columns_of(scores), place_of(scores)
    if columns is None or not isinstance(rows, Tensor) or axis is None:
        return False
    return spread(columns, axis) < TOLERANCE_PX <= spread(rows, axis)


def _put(tensor: Tensor, columns: Tensor | None, product: int) -> None:
    tensor._vitprobe_columns = columns  # type: ignore[attr-defined]
    tensor._vitprobe_product = product  # type: ignore[attr-defined]


def _columns(name: str, args: tuple, result: Tensor) -> Tensor | None:
    if result.ndim < 3:
        return None
    if name == "einsum":
        return einsum_place(args, result, columns=True)
    left, right = (place_of(operand) for operand in args[-2:])
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        return None
    if spread(left, -1) >= TOLERANCE_PX or spread(right, -2) >= TOLERANCE_PX:
        return None
    return middle(right, -2).unsqueeze(-2).expand(result.shape)
