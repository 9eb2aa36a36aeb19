"""Which operations of a forward pass are attention, and what their probabilities are.

``scaled_dot_product_attention``: the probabilities are recomputed from queries, keys, mask and
scale, by blocks, and checked: times the values they must be what the operation put out.

A product whose left operand is a softmax over its last axis: that operand, as it is when it meets
the values. What is done to it before (a gated mix of two maps) is thereby included; rows that no
longer are probabilities are an error.

``torch.nn.MultiheadAttention`` gives its weights itself, on request, and with them must put out
what it put out without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprobe.tracing.einsum import as_product, subscripts
from vitprobe.tracing.masks import hidden_of, mask_of, masks_of_pytorchs, put_hidden
from vitprobe.tracing.observing import Observer
from vitprobe.tracing.tokens import place_of, put
from vitprobe.tracing.trace import tensors

SOFTMAXES = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm}
# Between a softmax and the values, these leave the map what it is.
_KEEPING = (
    "dropout contiguous to type_as float half bfloat16 clone reshape view flatten unflatten "
    "squeeze unsqueeze"
)
_TURNING = ("transpose", "swapaxes", "permute", "get")


@dataclass
class Operation:
    """An attention operation that has just run.

    Attributes:
        query, key, value: (..., tokens, features), as far as there are such tensors.
        out: (..., queries, features of a head), or None where heads are joined already.
        map: (..., queries, keys) of a product; None where it has to be recomputed.
        altered: something was done to the map since its softmax.
        mask, causal, scale, grouped: of ``scaled_dot_product_attention``.
        softmax: the softmax that made the map, among those of the pass.
        length_first: queries and keys are (length, images, features), heads side by side.
        twice: what the module put out, what it puts out when it also gives its weights, and a
            function that computes the latter in float64.
    """

    out: Tensor | None
    query: Tensor
    key: Tensor
    value: Tensor | None = None
    map: Tensor | None = None
    altered: bool = False
    softmax: int | None = None
    mask: Tensor | None = None
    causal: bool = False
    scale: float = 1.0
    grouped: bool = False
    length_first: bool = False
    twice: tuple[Tensor, Tensor, Callable[[], Tensor]] | None = None

    def leading(self) -> tuple[int, ...]:
        """The axes before (queries, keys): images, windows, heads."""
        if self.map is not None:
            return tuple(self.map.shape[:-2])
        key = self.grown(self.key)
        return tuple(torch.broadcast_shapes(self.query.shape[:-2], key.shape[:-2]))

    def hidden(self) -> Tensor | None:
        """(..., queries, keys) which pairs its mask hides, in a pass whose masks are followed."""
        if self.map is not None:
            return hidden_of(self.map)
        queries, keys = self.query.shape[-2], self.key.shape[-2]
        shape = (*self.leading(), queries, keys)
        hidden = None if self.mask is None else mask_of(self.mask)
        if self.causal:
            later = torch.ones(queries, keys, dtype=torch.bool, device=self.query.device).triu(1)
            hidden = later if hidden is None else hidden | later
        return None if hidden is None else hidden.expand(shape)

    def grown(self, tensor: Tensor) -> Tensor:
        """Keys or values with as many heads as queries (grouped-query attention)."""
        if not self.grouped:
            return tensor
        return tensor.repeat_interleave(self.query.shape[-3] // tensor.shape[-3], -3)

    def full(self, tensor: Tensor) -> Tensor:
        """Keys, values, queries or a mask with all leading axes; a view where it can be."""
        tensor = self.grown(tensor) if tensor is self.key or tensor is self.value else tensor
        return tensor.expand(*self.leading(), *tensor.shape[-2:])


@dataclass(frozen=True)
class _Tag:
    """On a tensor that a softmax made."""

    softmax: int
    turned: bool = False
    altered: bool = False
    axis: int = -1  # that it was taken over


class AttentionObserver(Observer):
    """Calls ``attend(ordinal, operation)`` at each attention operation of a pass."""

    def __init__(self) -> None:
        self.count = self.softmaxes = 0

    def attend(self, ordinal: int, operation: Operation) -> None:
        """What to do with an operation, the ``ordinal``-th of its pass."""
        raise NotImplementedError

    def note_softmax(self) -> None:
        """A softmax that may become an attention operation."""

    def begin(self) -> None:
        self.count = self.softmaxes = 0

    def after(self, function: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        if function in SOFTMAXES and (axis := _over_keys(args, kwargs, result)):
            result._vitprobe_softmax = _Tag(self.softmaxes, axis=axis)
            self.softmaxes += 1
            if axis == -1:
                self.note_softmax()
        for operation in _recognise(function, args, kwargs, result):
            self.count += 1
            self.attend(self.count - 1, operation)


def _recognise(
    function: Any, args: tuple, kwargs: dict[str, Any], result: Any
) -> Iterator[Operation]:
    if function is F.scaled_dot_product_attention:
        yield _fused(result, *args, **kwargs)
    elif function is F.multi_head_attention_forward:
        asked = {**kwargs, "need_weights": True, "average_attn_weights": False}
        again, weights = function(*args, **asked)
        if weights is not None and weights.ndim == 4:
            put_hidden(weights, masks_of_pytorchs(kwargs, weights))
            yield Operation(
                None, args[0], args[1], map=weights, length_first=True,
                twice=(result[0], again, partial(_exactly, function, args, asked)),
            )  # fmt: skip
    elif getattr(function, "__name__", "") == "flex_attention" and len(args) > 5:
        yield from _flexible(args, result[0])
    elif function in PRODUCTS:
        left, right = args[0], args[1]
        if (tag := _tag(left)) and not tag.turned and tag.axis == -1:
            yield Operation(result, left, right, right, left, tag.altered, tag.softmax)
        elif (tag := _tag(right)) and tag.turned and tag.axis == -1:
            # values · mapᵀ: the same product, written the other way round.
            map_, value = _turned(right), _turned(left)
            yield Operation(result.mT, map_, value, value, map_, tag.altered, tag.softmax)
    elif function is torch.einsum and any(_tag(tensor) for _, tensor in tensors(args)):
        yield from _summed(args, result)
    else:
        _carry_tag(function, args, result)


def _flexible(args: tuple, out: Tensor) -> Iterator[Operation]:
    """``flex_attention`` as it runs without a compiler: a function changes the scores."""
    query, key, value, change, block_mask, scale, *more = args
    buffers = (*more[1:], (), ())[:2]
    shows = block_mask[-1]

    def computed(wide: bool = False) -> tuple[Tensor, Tensor]:
        q, k, v = (one.double() if wide else one for one in (query, key, value))
        groups = q.shape[1] // k.shape[1]
        k, v = (one.repeat_interleave(groups, 1) if groups > 1 else one for one in (k, v))
        scores = (q @ k.mT) * scale
        at = [
            torch.arange(size, device=q.device).reshape([-1 if a == axis else 1 for a in range(4)])
            for axis, size in enumerate(scores.shape)
        ]
        scores = change(scores, *at, *buffers[0])
        shown = shows(*at, *buffers[1])
        map_ = scores.masked_fill(~shown, -torch.inf).softmax(-1).nan_to_num(0)
        return map_, map_ @ v

    try:
        map_, again = computed()
    except (RuntimeError, TypeError, IndexError, ValueError):
        return  # a change that is not written for many scores at once
    grown = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if isinstance(place := place_of(key), Tensor):
        put(grown, place.repeat_interleave(query.shape[1] // key.shape[1], 1))
    elif isinstance(place, str):
        put(grown, place)
    twice = out, again, lambda: computed(True)[1]
    yield Operation(out, query, grown, value, map_, twice=twice)


def _summed(args: tuple, result: Tensor) -> Iterator[Operation]:
    """A product of a map and values that is written as ``einsum``."""
    asked = subscripts(args)
    if asked is None or len(asked.operands) != 2:
        return
    for i, (map_, value) in enumerate((asked.operands, asked.operands[::-1])):
        tag = _tag(map_)
        product = tag and as_product(asked, i, -2 if tag.turned else tag.axis)
        if not tag or not product:
            continue
        turned, values = product.turn_map(map_), product.turn_values(value)
        for tensor, source, turn in (
            (turned, map_, product.turn_map), (values, value, product.turn_values)
        ):  # fmt: skip
            if isinstance(place := place_of(source), Tensor):
                put(tensor, turn(place))
            elif isinstance(place, str):
                put(tensor, place)
        hidden = hidden_of(map_)
        put_hidden(turned, None if hidden is None else product.turn_map(hidden))
        out = product.turn_result(result)
        yield Operation(out, turned, values, values, turned, tag.altered, tag.softmax)
        return


def _exactly(function: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.cpu() if value.device.type == "mps" else value
        return value.double() if value.is_floating_point() else value

    return function(*map(wide, args), **{name: wide(value) for name, value in kwargs.items()})[0]


def _over_keys(args: tuple, kwargs: dict[str, Any], result: Tensor) -> int | None:
    """The axis, from the end, of a softmax that can be one over keys."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    if not isinstance(axis, int) or result.ndim < 3 or result.shape[axis] < 2:
        return None
    return axis if axis < 0 else axis - result.ndim


def _fused(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Operation:  # fmt: skip
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    return Operation(
        out, query, key, value, mask=attn_mask, causal=is_causal, scale=factor, grouped=enable_gqa
    )


def _turned(tensor: Tensor) -> Tensor:
    turned, place = tensor.mT, place_of(tensor)
    if isinstance(place, Tensor):
        put(turned, place.mT)
    hidden = hidden_of(tensor)
    put_hidden(turned, None if hidden is None else hidden.mT)
    return turned


def _tag(value: Any) -> _Tag | None:
    return getattr(value, "_vitprobe_softmax", None)


def _carry_tag(function: Any, args: tuple, result: Any) -> None:
    source = next((a for a in args if _tag(a)), None)
    if source is None or not isinstance(result, Tensor):
        return
    tag, name = _tag(source), getattr(function, "__name__", "").strip("_")
    assert tag is not None
    if tag.axis != -1 and (result.shape != source.shape or name in (*_TURNING, "reshape", "view")):
        return
    same_end = result.shape[-2:] == source.shape[-2:]
    if name in _TURNING:
        there, here = source.stride()[-2:], result.stride()[-2:]
        if here == there and same_end:
            result._vitprobe_softmax = tag  # type: ignore[attr-defined]
        elif here == there[::-1] and result.shape[-2:] == source.shape[-2:][::-1]:
            result._vitprobe_softmax = _Tag(tag.softmax, not tag.turned, tag.altered)  # type: ignore[attr-defined]
    elif name in _KEEPING.split():
        if same_end:
            result._vitprobe_softmax = tag  # type: ignore[attr-defined]
    elif result.shape == source.shape:
        result._vitprobe_softmax = _Tag(tag.softmax, tag.turned, True, tag.axis)  # type: ignore[attr-defined]


def joined(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale · query keyᵀ + mask) over the last axis; a row that is all masked out is 0."""
    scores = (query * scale) @ key.mT
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0)
    probabilities = (scores + mask).softmax(-1)
    hidden = mask.amax(-1, keepdim=True) == -torch.inf
    return probabilities.masked_fill(hidden, 0) if hidden.any() else probabilities
