"""Which pairs of tokens an attention operation hides from each other, as its own mask says.

A probability may be small for many reasons; only a mask makes a pair one that cannot attend. Masks
come as flags (``is_causal``), as booleans, as fills of scores, and as numbers added to scores: 0
where a pair may attend, and minus infinity or one large negative number where not. A position bias
is added in the same way, and may be large and negative, too; it is told by having other values, by
coming from parameters, or by differing between heads.

While a pass is watched, a tensor that a mask went into carries which of its elements are hidden,
through additions, reshapes and the softmax, up to the operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.tracing.tokens import MOVING, place_of
from vitprobe.tracing.trace import tensors

# No more than this is what masks add (Swin: -100); exp(-50) is 2e-22.
FAR = -50.0

_ADDING = {"add", "radd", "iadd", "sub"}
_FILLING = {"masked_fill"}
# These leave an element where it is, and hidden where it was.
_KEEPING = {
    "mul", "rmul", "imul", "div", "truediv", "itruediv", "to", "float", "half", "bfloat16",
    "double", "type", "type_as", "softmax", "clone", "contiguous", "dropout", "clamp", "nan_to_num",
}  # fmt: skip
_MOVED = set(MOVING.split())


def hidden_of(tensor: Any) -> Tensor | None:
    """Boolean, of the tensor's shape: which of its elements are hidden; None: none is."""
    return getattr(tensor, "_vitprobe_hidden", None)


def put_hidden(tensor: Tensor, hidden: Tensor | None) -> None:
    """Say which elements of a tensor are hidden."""
    if hidden is not None:
        tensor._vitprobe_hidden = hidden.expand(tensor.shape)  # type: ignore[attr-defined]
    elif hidden_of(tensor) is not None:
        del tensor._vitprobe_hidden  # type: ignore[attr-defined]


def follow_masks(function: Any, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
    """Carry what masks hide over an operation, from its operands to its result."""
    name = getattr(function, "__name__", "").strip("_")
    if name == "setitem":
        _assign(*args)
        return
    found = [tensor for _, tensor in tensors(result)]
    given = [tensor for _, tensor in tensors((args, kwargs))]
    if any(map(_learned, given)):
        for tensor in found:
            if place_of(tensor) is None and not _learned(tensor):
                tensor._vitprobe_learned = True  # type: ignore[attr-defined]
    if len(found) == 1 and found[0].is_floating_point():
        if name in _ADDING and name != "sub":
            put_hidden(found[0], _added(given, found[0]))
        elif name in _FILLING or (name == "where" and len(args) == 3):
            put_hidden(found[0], _chosen(name, args, kwargs, found[0]))
        elif name in _KEEPING:
            hidden = hidden_of(given[0]) if given else None
            if hidden is not None and hidden.shape != found[0].shape:
                hidden = None
            if name == "softmax" and place_of(found[0]) is not None:
                # However they came there.
                infinite = given[0] == -torch.inf
                if infinite.any() and infinite.shape == found[0].shape:
                    hidden = infinite if hidden is None else hidden | infinite
            put_hidden(found[0], hidden)
    if name in _MOVED and any(hidden_of(tensor) is not None for tensor in given):
        _move(function, args, kwargs, found)


def mask_of(mask: Tensor) -> Tensor | None:
    """Which pairs a mask hides that is added to scores, or, if it is boolean, lets through."""
    if mask.dtype == torch.bool:
        return ~mask
    hidden = hidden_of(mask)
    return hidden if hidden is not None else _hiding(mask)


def masks_of_pytorchs(arguments: Mapping[str, Any], weights: Tensor) -> Tensor | None:
    """Of ``multi_head_attention_forward``: boolean masks hide where they are true."""
    hidden = None
    for key in ("attn_mask", "key_padding_mask"):
        mask = arguments.get(key)
        if mask is None:
            continue
        one = mask_of(~mask if mask.dtype == torch.bool else mask)
        if one is None:
            continue
        if key == "key_padding_mask":
            one = one[:, None, None]
        elif one.ndim == 3:
            one = one.unflatten(0, weights.shape[:2])
        one = one.expand(weights.shape)
        hidden = one if hidden is None else hidden | one
    return hidden


def _learned(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or hasattr(tensor, "_vitprobe_learned")


def _hiding(mask: Tensor) -> Tensor | None:
    """What a tensor hides that is added to scores; None where it hides nothing."""
    if not mask.is_floating_point() or mask.ndim < 2 or min(mask.shape[-2:]) < 1:
        return None
    infinite = mask == -torch.inf
    far = mask <= FAR
    if not far.any():
        return None
    lowest = mask.min()
    two_valued = bool(((mask == 0) | (mask == lowest)).all())
    if not infinite.any() and (_learned(mask) or not two_valued or _differs_by_head(mask)):
        return None
    return far if two_valued else infinite


def _differs_by_head(mask: Tensor) -> bool:
    return mask.ndim >= 3 and mask.shape[-3] > 1 and bool((mask != mask[..., :1, :, :]).any())


def _added(given: list[Tensor], result: Tensor) -> Tensor | None:
    hidden = None
    for one in given:
        mask = hidden_of(one)
        if mask is None and place_of(one) is None and one.ndim >= 2:
            mask = _hiding(one)
        if mask is not None:
            mask = mask.expand(torch.broadcast_shapes(mask.shape, result.shape))
            if mask.shape == result.shape:
                hidden = mask if hidden is None else hidden | mask
    return hidden


def _chosen(name: str, args: tuple, kwargs: Mapping[str, Any], result: Tensor) -> Tensor | None:
    """Of ``masked_fill(x, where, value)`` and ``where(condition, x, y)``."""
    if name == "masked_fill":
        asked = {**dict(zip(("input", "mask", "value"), args)), **kwargs}
        condition, sides = asked["mask"], (asked["value"], asked["input"])
    elif getattr(args[0], "dtype", None) == torch.bool:
        condition, sides = args[0], args[1:]
    else:  # x.where(condition, y)
        condition, sides = args[1], (args[0], args[2])
    if not isinstance(condition, Tensor):
        return None
    parts = []
    for side in sides:
        hidden = hidden_of(side)
        if hidden is None and not isinstance(side, Tensor):
            hidden = torch.tensor(side <= FAR)
        elif hidden is None and place_of(side) is None and not _learned(side):
            hidden = side <= FAR
        elif hidden is None:
            hidden = torch.tensor(False)
        parts.append(hidden.to(condition.device))
    chosen: Tensor = torch.where(condition, parts[0], parts[1])
    return chosen.expand(result.shape) if chosen.any() else None


def _assign(target: Tensor, index: Any, value: Any) -> None:
    """``scores[index] = value``."""
    if not target.is_floating_point() or target.ndim < 2:
        return
    number = value if not isinstance(value, Tensor) else value.item() if value.ndim == 0 else None
    old = hidden_of(target)
    if old is None and (number is None or not number <= FAR):
        return
    hidden = torch.zeros_like(target, dtype=torch.bool) if old is None else old.clone()
    hidden[index] = bool(number is not None and number <= FAR)
    put_hidden(target, hidden if hidden.any() else None)


def _move(function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> None:
    """The very operation, done to what is hidden."""

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            hidden = hidden_of(value)
            blank = torch.zeros_like(value, dtype=torch.bool)
            return blank if hidden is None else hidden.contiguous()
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return type(value)(swap(item) for item in value)
        return value

    moved = function(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
    for tensor, (_, hidden) in zip(found, tensors(moved)):
        put_hidden(tensor, hidden)
