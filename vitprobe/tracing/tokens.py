"""Where in the image the vectors of a forward pass stand.

While a pass is watched, every tensor that depends on the input carries a place: a complex tensor
of its own shape, x + iy in input pixels for each element, NaN for what stands nowhere (class
tokens, registers, padding). Operations that move vectors (reshape, roll, window partitions,
unfolding) move their places in the same way. Operations that mix neighbours (convolution, pooling)
put their result at the middle of what they mix; what mixes all of an image stands nowhere. All
others leave places as they are. So prefix tokens, oblong grids, shifted windows, strided keys and
unfolded patches need no code of their own.

A place that an operation destroys is lost, and the operation's name stays in its stead. Places
live on the CPU, wherever the model runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprobe.tracing.observing import Observer
from vitprobe.tracing.trace import tensors

# Images of a batch lie this many pixels apart, so that a place also says whose it is.
IMAGE_STEP = 2.0**20
TOLERANCE_PX = 1e-3
# What reaches over so much of an image's places, both ways, is of all of it.
_WHOLE = 2 / 3
_NOWHERE = complex(float("nan"), float("nan"))

Place = Tensor | str | None


def place_of(tensor: Any) -> Place:
    """Complex places, the name of the operation that lost them, or None: not of the input."""
    return getattr(tensor, "_vitprobe_place", None)


def _places(value: Any) -> Tensor:
    """The places of what must have some; whoever gets others meets an exception."""
    return place_of(value)  # type: ignore[return-value]


def put(tensor: Tensor, place: Tensor | str) -> None:
    """Say where a tensor stands."""
    if isinstance(place, Tensor) and place.shape != tensor.shape:
        raise ValueError(f"places {tuple(place.shape)} for a tensor {tuple(tensor.shape)}")
    tensor._vitprobe_place = place  # type: ignore[attr-defined]


def put_pixels(images: Tensor) -> None:
    """Places of a batch of images (n, C, H, W): the middle of each pixel."""
    n, _, height, width = images.shape
    x = torch.arange(width, dtype=torch.float64) + 0.5
    y = torch.arange(height, dtype=torch.float64) + 0.5
    x = x + IMAGE_STEP * torch.arange(n, dtype=torch.float64)[:, None]
    grid = torch.complex(*torch.broadcast_tensors(x[:, None, :], y[None, :, None]))
    put(images, grid[:, None].expand(images.shape))


class Following(Observer):
    """Carries places over every operation, from its operands to its result."""

    def after(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        follow(function, args, kwargs, result)


def follow(function: Callable, args: tuple, kwargs: Mapping[str, Any], result: Any) -> None:
    """Carry places over an operation, from its operands to its result."""
    given = [tensor for _, tensor in tensors((args, kwargs)) if place_of(tensor) is not None]
    if not given:
        return
    name = getattr(function, "__name__", "").strip("_")
    if name == "setitem":
        _assign(*args)
        return
    found = [tensor for _, tensor in tensors(result)]
    lost = next((place for t in given if isinstance(place := place_of(t), str)), None)
    rule = _RULES.get(name, _pointwise)
    if name in _LOSING.split() or (lost and rule is not _pointwise):
        places: Sequence[Tensor | str] = [lost or name] * len(found)
    else:
        try:
            places = rule(function, args, kwargs, found)
        except (RuntimeError, IndexError, TypeError, ValueError, KeyError):
            # An operation used in a way that the rule does not know.
            places = [name] * len(found)
    for tensor, place in zip(found, places):
        fits = isinstance(place, str) or place.shape == tensor.shape
        put(tensor, place if fits else name)


def middle(place: Tensor, axis: int) -> Tensor:
    """Mean place along an axis, of those that stand anywhere."""
    if _alike(place, axis):
        return place.select(axis, 0)
    there = ~place.isnan()
    count = there.sum(axis)
    total = torch.where(there, place, 0).sum(axis)
    return torch.where(count > 0, total / count.clamp(min=1), _NOWHERE)


def spread(place: Tensor, axis: int) -> float:
    """How many pixels places differ along an axis, at most; what stands nowhere does not count."""
    if not place.numel() or _alike(place, axis):
        return 0.0
    there, widest = ~place.isnan(), 0.0
    for part in (place.real, place.imag):
        low = torch.where(there, part, torch.inf).amin(axis)
        high = torch.where(there, part, -torch.inf).amax(axis)
        widest = max(widest, float((high - low).amax()))
    return max(widest, 0.0)


def _nowhere(tensor: Tensor) -> Tensor:
    return torch.tensor(_NOWHERE, dtype=torch.complex128).expand(tensor.shape)


def _expanded(place: Tensor, axis: int, tensor: Tensor) -> Tensor:
    return place.unsqueeze(axis).expand(tensor.shape)


def _pointwise(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
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


def compact(place: Tensor) -> Tensor:
    """The places with axes of length 1 where they are expanded: nothing is said twice."""
    for axis in range(place.ndim):
        if _alike(place, axis):
            place = place.narrow(axis, 0, 1)
    return place


def _alike(place: Tensor, axis: int) -> bool:
    """Whether an axis is known to be of one place without a look at it."""
    return place.shape[axis] == 1 or (place.stride(axis) == 0 and place.shape[axis] > 0)


def _unknown(place: Tensor) -> float:
    """The share of the elements that stand nowhere."""
    return float(compact(place).isnan().double().mean())


def _mixes_all(place: Tensor, axes: tuple[int, ...]) -> bool:
    """Whether what is mixed along these axes is, for all results, an image as a whole."""
    there = ~place.isnan()
    x = place.real - IMAGE_STEP * (place.real / IMAGE_STEP).round()
    wide = False
    for part in (x, place.imag):
        low = torch.where(there, part, torch.inf).amin(axes)
        high = torch.where(there, part, -torch.inf).amax(axes)
        whole = float(high.amax() - low.amin())
        if whole >= TOLERANCE_PX:
            wide = True
            if float((high - low)[high >= low].amin()) < _WHOLE * whole:
                return False
    return wide


def _move(function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    """The very operation, done to the places."""

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            place = place_of(value)
            if isinstance(place, Tensor) and value.is_floating_point():
                return place
            # Beside placed tensors, one that does not depend on the input stands nowhere.
            blank = value.is_floating_point() and place is None
            return _nowhere(value) if blank else value.cpu()
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return type(value)(swap(item) for item in value)
        return value

    moved = function(*map(swap, args), **{key: swap(value) for key, value in kwargs.items()})
    return [place for _, place in tensors(moved)]


def _pad(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    widths = args[1] if len(args) > 1 else kwargs["pad"]
    return [F.pad(_places(args[0]), tuple(widths), value=float("nan"))]


def _unfold(function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    if function is not F.unfold:
        return _move(function, args, kwargs, found)
    asked = {**dict(zip(("input", "kernel_size", "dilation", "padding", "stride"), args)), **kwargs}
    rows, columns = _many(asked.pop("padding", 0), 2)
    place = F.pad(_places(asked.pop("input")), (columns, columns, rows, rows), value=float("nan"))
    return [torch.complex(F.unfold(place.real, **asked), F.unfold(place.imag, **asked))]


def _linear(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    place = _places(args[0] if args else kwargs["input"])
    if not _alike(place, -1) and _mixes_all(place, (-1,)):
        return [_nowhere(found[0])]
    return [_expanded(middle(place, -1), -1, found[0])]


def _product(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    """Rows of the left or columns of the right operand: whichever the product does not mix."""
    left, right = (place_of(operand) for operand in args[-2:])
    if isinstance(left, Tensor) and (right is None or spread(left, -1) < TOLERANCE_PX):
        return [_expanded(middle(left, -1), -1, found[0])]
    if isinstance(right, Tensor) and spread(right, -2) < TOLERANCE_PX:
        return [_expanded(middle(right, -2), -2, found[0])]
    return ["matmul"]


def _attention(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    """What attention puts out stands where its queries stand."""
    query = args[0] if args else kwargs["query"]
    if place_of(query) is None:
        return [_nowhere(tensor) for tensor in found]
    places: list[Any] = [_expanded(middle(_places(query), -1), -1, found[0])]
    return places + ["multi_head_attention_forward"] * (len(found) - 1)


def _mean(_: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor]) -> list:
    place = _places(args[0])
    axes = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
    if axes is None:
        return ["mean"]
    axes = tuple(sorted({axis % place.ndim for axis in _many(axes, 1)}, reverse=True))
    small = compact(place)
    if any(small.shape[axis] > 1 for axis in axes) and _mixes_all(small, axes):
        return [_nowhere(tensor) for tensor in found]
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
    asked = {**dict(zip(names, args)), **kwargs}
    kernel = _many(asked["kernel_size"], found[0].ndim - 2)
    asked["stride"] = asked.get("stride") or kernel
    return [_slide(asked, kernel, found[0])] * len(found)


def _slide(asked: Mapping[str, Any], kernel: Sequence[int], out: Tensor) -> Tensor:
    """The middle of a kernel that slides over a map; beyond its edge places go on evenly.

    What a kernel puts out with its middle on padding stands nowhere.
    """
    place = middle(_places(asked["input"]), 1)
    there = ~place.isnan()
    if not there.any():
        raise ValueError("a map that stands nowhere")
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
    place = torch.where(there, place, _NOWHERE)
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
    place = middle(_places(args[0]), 1).unsqueeze(1)
    real, imaginary = (function(part, *args[1:], **kwargs) for part in (place.real, place.imag))
    if found[0].shape[2:].numel() == 1 < place.shape[2:].numel():
        return [_nowhere(found[0])]
    return [torch.complex(real, imaginary).expand(found[0].shape)]


def _assign(target: Tensor, index: Any, value: Any) -> None:
    old, new = place_of(target), place_of(value)
    lost = old if isinstance(old, str) else new
    if isinstance(lost, str):
        put(target, lost)
        return
    place = (_nowhere(target) if old is None else _places(target)).clone()
    place[index] = torch.tensor(_NOWHERE) if new is None else _places(value)
    put(target, place)


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
    "einsum sort topk argsort cumsum scatter index_put fold grid_sample masked_select "
    "conv_transpose2d bilinear fft2 rfft2 irfft2"
)
_RULES: dict[str, Callable[..., Sequence[Tensor | str]]] = {
    **dict.fromkeys(MOVING.split(), _move),
    **dict.fromkeys(("matmul", "bmm", "rmatmul", "baddbmm", "addmm"), _product),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward"), _attention),
    **dict.fromkeys(("mean", "sum", "amax", "var", "std", "var_mean"), _mean),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolve),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d"), _pool),
    **dict.fromkeys(("adaptive_avg_pool2d", "interpolate", "upsample"), _resample),
    "linear": _linear,
    "pad": _pad,
    "unfold": _unfold,
}
