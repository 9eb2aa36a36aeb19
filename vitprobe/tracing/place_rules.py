"""What operations do to places.

Operations that move vectors move their places in the same way; those that mix put their result at
the middle of what they mix, or nowhere, where that is all of an image. A rule gets the operation,
its operands and the tensors that it gave, and returns the places of these; the name of an operation
stands for places that it loses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprobe.tracing.einsum import of_tensordot, subscripts
from vitprobe.tracing.place_arithmetic import (
    NOWHERE,
    TOLERANCE_PX,
    alike,
    compact,
    middle,
    mixes_all,
    mover,
    nowhere,
    place_of,
    put,
    spread,
)
from vitprobe.tracing.trace import tensors


def places_of(value: Any) -> Tensor:
    """The places of what must have some; whoever gets others meets an exception."""
    return place_of(value)  # type: ignore[return-value]


def _expanded(place: Tensor, axis: int, tensor: Tensor) -> Tensor:
    return place.unsqueeze(axis).expand(tensor.shape)


def pointwise(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    """The places of the operand that has the result's shape.

    Where several have, those of the one that knows most: a sum of tokens and of what was made of
    all of them stands where the tokens stand. Where they know as much, the first one's.
    """
    known = [place for _, t in tensors((args, kwargs)) if isinstance(place := place_of(t), Tensor)]
    lost = [place for _, t in tensors((args, kwargs)) if isinstance(place := place_of(t), str)]
    places: list[Tensor | str] = []
    for tensor in found:
        same = [place for place in known if place.shape == tensor.shape]
        if same:
            places.append(same[0] if len(same) == 1 else min(same, key=_unknown))
        elif known:
            largest = max(known, key=lambda place: place.numel())
            places.append(largest.expand(tensor.shape))
        else:
            places.append(lost[0])
    return places


def _unknown(place: Tensor) -> float:
    """The share of the elements that stand nowhere."""
    return float(compact(place).isnan().double().mean())


def _move(function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    """The very operation, done to the places."""

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            place = place_of(value)
            if isinstance(place, Tensor) and value.is_floating_point():
                return place
            # Beside placed tensors, one that does not depend on the input stands nowhere.
            blank = value.is_floating_point() and place is None
            return nowhere(value) if blank else value.cpu()
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return type(value)(swap(item) for item in value)
        return value

    named = {key: swap(value) for key, value in kwargs.items()}
    moved = mover(function)(*map(swap, args), **named)
    return [place for _, place in tensors(moved)]


def _pad(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    widths = args[1] if len(args) > 1 else kwargs["pad"]
    return [F.pad(places_of(args[0]), tuple(widths), value=float("nan"))]


def _unfold(function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    if function is not F.unfold:
        return _move(function, args, kwargs, found)
    asked = {**dict(zip(("input", "kernel_size", "dilation", "padding", "stride"), args)), **kwargs}
    rows, columns = _many(asked.pop("padding", 0), 2)
    place = F.pad(places_of(asked.pop("input")), (columns, columns, rows, rows), value=float("nan"))
    return [torch.complex(F.unfold(place.real, **asked), F.unfold(place.imag, **asked))]


def _linear(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    place = places_of(args[0] if args else kwargs["input"])
    if not alike(place, -1) and mixes_all(place, (-1,)):
        return [nowhere(found[0])]
    return [_expanded(middle(place, -1), -1, found[0])]


def _product(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    """Rows of the left or columns of the right operand: whichever the product does not mix."""
    left, right = (place_of(operand) for operand in args[-2:])
    if isinstance(left, Tensor) and (right is None or spread(left, -1) < TOLERANCE_PX):
        return [_expanded(middle(left, -1), -1, found[0])]
    if isinstance(right, Tensor) and spread(right, -2) < TOLERANCE_PX:
        return [_expanded(middle(right, -2), -2, found[0])]
    return ["matmul"]


def _tensordot(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    place = einsum_place(of_tensordot(args, kwargs), found[0])
    return ["tensordot" if place is None else place]


def _einsum(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    place = einsum_place(args, found[0])
    return ["einsum" if place is None else place]


def einsum_place(args: tuple, result: Tensor, columns: bool = False) -> Tensor | None:
    """The places of an operand of ``einsum`` that it does not mix.

    Args:
        args: of the operation.
        result: of it.
        columns: those of the operand with the result's last index, if there is one; otherwise
            preferably those of the operand with the last index but one.

    Returns:
        Places of the result, or None where they are lost.
    """
    asked = subscripts(args)
    if asked is None:
        return None
    names, given, output = asked.inputs, asked.operands, asked.output
    placed = [(n, place_of(t)) for n, t in zip(names, given) if place_of(t) is not None]
    kept: list[tuple[str, Tensor]] = []
    for name, place in placed:
        if not isinstance(place, Tensor):
            return None
        summed = tuple(axis for axis, letter in enumerate(name) if letter not in output)
        mixed = any(spread(place, axis) >= TOLERANCE_PX for axis in summed)
        if mixed and len(placed) > 1:
            continue
        if mixed and mixes_all(compact(place), summed):
            return nowhere(result)
        for axis in reversed(summed):
            place = middle(place, axis)
        kept.append(("".join(letter for letter in name if letter in output), place))
    wanted = output[-1:] if columns else output[-2:-1]
    chosen = [one for one in kept if wanted and wanted in one[0]]
    if columns and (len(kept) < 2 or len(chosen) != 1):
        return None
    if not kept:
        return None
    name, place = (chosen or kept)[0]
    place = place.permute([name.index(letter) for letter in output if letter in name])
    for axis, letter in enumerate(output):
        if letter not in name:
            place = place.unsqueeze(axis)
    return place.expand(result.shape)


def _attention(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    """What attention puts out stands where its queries stand."""
    query = args[0] if args else kwargs["query"]
    if place_of(query) is None:
        return [nowhere(tensor) for tensor in found]
    places: list[Any] = [_expanded(middle(places_of(query), -1), -1, found[0])]
    return places + ["multi_head_attention_forward"] * (len(found) - 1)


def _reduce(function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    """Means, largest ones, norms along some axes."""
    place, name = places_of(args[0]), function.__name__
    # Norms have their order first.
    at = 2 if "norm" in name else 1
    axes = args[at] if len(args) > at else kwargs.get("dim", kwargs.get("axis"))
    if isinstance(axes, Tensor) or isinstance(kwargs.get("other"), Tensor):
        return pointwise(function, args, kwargs, found)  # the larger of two
    if axes is None:
        return [name]
    axes = tuple(sorted({axis % place.ndim for axis in _many(axes, 1)}, reverse=True))
    small = compact(place)
    if any(small.shape[axis] > 1 for axis in axes) and mixes_all(small, axes):
        return [nowhere(tensor) for tensor in found]
    for axis in axes:
        place = middle(place, axis).unsqueeze(axis)
    return [place.reshape(tensor.shape) for tensor in found]


def _convolve(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    asked = {**dict(zip(names, args)), **kwargs}
    return [_slide(asked, asked["weight"].shape[2:], found[0])]


def _pool(function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    dilated = ("dilation",) if "max" in function.__name__ else ()
    names = ("input", "kernel_size", "stride", "padding", *dilated, "ceil_mode")
    if "lp_pool" in function.__name__:
        names = ("input", "norm_type", "kernel_size", "stride", "ceil_mode")
    asked = {**dict(zip(names, args)), **kwargs}
    kernel = _many(asked["kernel_size"], found[0].ndim - 2)
    asked["stride"] = asked.get("stride") or kernel
    return [_slide(asked, kernel, found[0])] * len(found)


def _slide(asked: Mapping[str, Any], kernel: Sequence[int], out: Tensor) -> Tensor:
    """The middle of a kernel that slides over a map; beyond its edge places go on evenly.

    What a kernel puts out with its middle on padding stands nowhere.
    """
    place = middle(places_of(asked["input"]), 1)
    there = ~place.isnan()
    if not there.any():
        return nowhere(out)
    count = len(kernel)
    stride, dilation = (_many(asked.get(key) or 1, count) for key in ("stride", "dilation"))
    for i, size in enumerate(kernel):
        axis, steps = i + 1, out.shape[i + 2]
        span = dilation[i] * (size - 1) + 1
        padding = asked.get("padding") or 0
        before = (span - 1) // 2 if padding == "same" else 0 if padding == "valid" else None
        before = _many(padding, count)[i] if before is None else before
        length = (steps - 1) * stride[i] + span
        place, there = _even(place.movedim(axis, -1), there.movedim(axis, -1), before, length)
        place = place.unfold(-1, span, stride[i]).mean(-1)
        taps = there.unfold(-1, span, stride[i])[..., (span - 1) // 2 : span // 2 + 1]
        place, there = place.movedim(-1, axis), taps.any(-1).movedim(-1, axis)
    place = torch.where(there, place, NOWHERE)
    return place.unsqueeze(1).expand(out.shape)


def _even(place: Tensor, there: Tensor, before: int, length: int) -> tuple[Tensor, Tensor]:
    """Lines of places, ``before`` more of them in front and ``length`` in all, and which are real.

    Those in front, those behind, and padding (which stands nowhere) get the places that they take
    up if each line goes on as evenly as it is, or as others are where it has one place only.
    """
    size = place.shape[-1]
    index = torch.arange(size)
    low = torch.where(there, index, size - 1).amin(-1, True)
    high = torch.where(there, index, 0).amax(-1, True)
    some = there.any(-1, True)
    first, last = place.gather(-1, low), place.gather(-1, high)
    step = (last - first) / (high - low).clamp(min=1)
    long = some & (high > low)
    if long.any():
        step = torch.where(long, step, step[long].mean())
    index = torch.arange(length) - before
    inner = index.clamp(0, size - 1)
    real = there.index_select(-1, inner) & (index == inner)
    even = torch.where(index > high, last + step * (index - high), first + step * (index - low))
    return torch.where(real, place.index_select(-1, inner), even), real


def _resample(function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    place = middle(places_of(args[0]), 1).unsqueeze(1)
    if "adaptive_max" in function.__name__:
        # A maximum stands somewhere in its window: in the middle, on average.
        function = F.adaptive_avg_pool2d
        kwargs = {key: value for key, value in kwargs.items() if key == "output_size"}
        args = args[:2]
    real, imaginary = (function(part, *args[1:], **kwargs) for part in (place.real, place.imag))
    if found[0].shape[2:].numel() == 1 < place.shape[2:].numel():
        return [nowhere(found[0])] * len(found)
    return [torch.complex(real, imaginary).expand(found[0].shape)] * len(found)


def assign(target: Tensor, index: Any, value: Any) -> None:
    """Places after ``target[index] = value``."""
    old, new = place_of(target), place_of(value)
    lost = old if isinstance(old, str) else new
    if isinstance(lost, str):
        put(target, lost)
        return
    place = (nowhere(target) if old is None else places_of(target)).clone()
    place[on_cpu(index)] = torch.tensor(NOWHERE) if new is None else places_of(value)
    put(target, place)


def written_into(tensor: Tensor) -> None:
    """Carry the places of a tensor that an operation has written into to what it is a view of."""
    base, place = tensor._base, place_of(tensor)
    if base is None or place is None:
        return
    old = place_of(base)
    if isinstance(place, str) or isinstance(old, str):
        put(base, place if isinstance(place, str) else str(old))
        return
    if not base.is_contiguous():
        if old is None:
            put(base, "a part that is written into")
        return
    whole = (nowhere(base) if old is None else old).clone(memory_format=torch.contiguous_format)
    offset = int(tensor.storage_offset()) - int(base.storage_offset())
    whole.as_strided(tensor.shape, tensor.stride(), offset).copy_(place)
    put(base, whole)


def on_cpu(index: Any) -> Any:
    """An index whose tensors are where places are."""
    if isinstance(index, Tensor):
        return index.cpu()
    return tuple(map(on_cpu, index)) if isinstance(index, tuple) else index


def _copy(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    """What has been copied stands where it came from; numbers of no image stand nowhere."""
    source = args[1] if len(args) > 1 else kwargs["src"]
    place = place_of(source)
    if isinstance(place, str):
        return [place]
    return [nowhere(found[0]) if place is None else place.expand(found[0].shape)]


def _many(value: Any, count: int) -> tuple[int, ...]:
    return (int(value),) * count if isinstance(value, int) else tuple(value)


MOVING = (
    "reshape view permute transpose swapaxes swapdims movedim moveaxis flatten unflatten squeeze "
    "unsqueeze chunk split tensor_split unbind cat concat concatenate stack expand expand_as "
    "repeat repeat_interleave tile roll flip getitem get narrow select index_select gather "
    "take_along_dim contiguous clone pixel_unshuffle pixel_shuffle channel_shuffle view_as "
    "reshape_as t rot90 detach"
)
_LOSING = (
    "sort topk argsort cumsum scatter index_put fold grid_sample masked_select conv_transpose2d "
    "bilinear fft2 rfft2 irfft2"
)
LOSING = frozenset(_LOSING.split())
_REDUCING = (
    "mean sum amax amin max min var std var_mean std_mean norm vector_norm logsumexp prod all any "
    "median argmax argmin"
)
_POOLS = [f"{kind}_pool{n}d" for kind in ("max", "avg", "lp") for n in (1, 2)]
_RESAMPLES = ("adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate", "upsample")
RULES: dict[str, Callable[..., Sequence[Tensor | str]]] = {
    **dict.fromkeys(MOVING.split(), _move),
    **dict.fromkeys(("matmul", "bmm", "rmatmul", "baddbmm", "addmm"), _product),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward"), _attention),
    **dict.fromkeys(_REDUCING.split(), _reduce),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolve),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_RESAMPLES, _resample),
    "linear": _linear,
    "einsum": _einsum,
    "tensordot": _tensordot,
    "pad": _pad,
    "unfold": _unfold,
    "copy": _copy,
}
