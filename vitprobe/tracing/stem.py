"""The filters that look at pixels: which weights meet the image first, and at which pixels.

One watched pass tells. Each element of the image carries its column, row and channel; patches that
are cut, flattened or folded into channels carry them along. The first weights that multiply them
are the filters, each as it lies on the image, whatever the layer that computes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.tracing.attention_operations import PRODUCTS
from vitprobe.tracing.einsum import of_tensordot, subscripts
from vitprobe.tracing.observing import observing, parts
from vitprobe.tracing.place_rules import MOVING, RULES
from vitprobe.tracing.tokens import IMAGE_STEP, Following, place_of, put
from vitprobe.tracing.trace import tensors

_PIXEL = 1e-6  # how far from an element of the image its own mark may be
# The middle of several elements must not be taken for one.
_OFF = complex(0.37, 0.37)
_MIXING = frozenset(RULES) - frozenset(MOVING.split()) - {"pad", "unfold"}


def stem_filters(module: nn.Module, example: Tensor) -> tuple[str, Tensor] | None:
    """The layer that looks at pixels first, and its filters (filters, height, width, channels).

    Of several that look at the same pixels it is the one with the largest filters.

    Args:
        module: in evaluation mode.
        example: (1, C, H, W) as the model takes it.

    Returns:
        None where no layer's filters lie on pixels as they are.
    """
    watch = _Stems(module, example.shape[1])
    with torch.inference_mode(False), torch.no_grad():
        inputs = example[:1].clone()
        _put_elements(inputs)
        with watch.modules(), observing(module, watch):
            module(inputs)
    if not watch.found:
        return None
    return max(watch.found, key=lambda one: one[1].shape[1:].numel())


def _put_elements(image: Tensor) -> None:
    """Marks x + i (y + step · channel)."""
    _, channels, height, width = image.shape
    c, y, x = torch.meshgrid(
        *(torch.arange(size, dtype=torch.float64) for size in (channels, height, width)),
        indexing="ij",
    )
    put(image, torch.complex(x, y + IMAGE_STEP * c)[None])


class _Stems(Following):
    """Notes the weights that multiply elements of the image."""

    def __init__(self, module: nn.Module, channels: int) -> None:
        super().__init__()
        self.module, self.channels = module, channels
        self.stack: list[str] = []
        self.found: list[tuple[str, Tensor]] = []

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Within it, ``stack`` holds the names of the modules under way."""

        def entering(name: str) -> Callable[..., None]:
            return lambda *_: self.stack.append(name)

        def leave(*_: Any) -> None:
            self.stack.pop()

        with ExitStack() as hooks:
            for name, part in parts(self.module):
                before = part.register_forward_pre_hook(entering(name))
                hooks.callback(before.remove)
                hooks.callback(part.register_forward_hook(leave, always_call=True).remove)
            yield

    def after(self, function: Callable, args: tuple, kwargs: dict, result: Any) -> None:
        name = getattr(function, "__name__", "").strip("_")
        met = None
        if name in ("conv2d", "conv3d"):
            met = _convolved(args, kwargs)
        elif name == "linear":
            asked = {**dict(zip(("input", "weight"), args)), **kwargs}
            met = _last(asked["input"], asked["weight"])
        elif function in PRODUCTS and len(args) == 2:
            met = _multiplied(*args)
        elif name == "addmm" and len(args) > 2:
            met = _multiplied(*args[1:3])
        elif name in ("einsum", "tensordot") and len(args) > 1:
            met = _summed(args if name == "einsum" else of_tensordot(args, kwargs))
        if met is None:
            super().after(function, args, kwargs, result)
            for _, tensor in tensors(result):
                place = place_of(tensor)
                if isinstance(place, Tensor) and name in _MIXING:
                    put(tensor, place + _OFF if name[:4] != "conv" else _nothing(tensor))
            return
        marks, weights = met
        filters = _on_pixels(marks, weights)
        if filters is None and name == "conv2d" and weights.shape[1] == self.channels:
            filters = weights.detach().permute(0, 2, 3, 1)  # on an image of another size
        if filters is not None:
            self.found.append((self.stack[-1] or "output", filters))
        # What comes of it is of no pixel as it is.
        put(result, _nothing(result))


def _nothing(tensor: Tensor) -> Tensor:
    """Marks of a tensor that holds no element of the image as it is."""
    return torch.tensor(complex("nan")).expand(tensor.shape)


_Met = tuple[Tensor, Tensor]
"""(places, taps) marks of what the weights meet, and the weights (filters, ...), as many taps."""


def _met(marks: Any, weights: Any) -> _Met | None:
    """What weights meet wherever all of it is of the image; None if that is nowhere."""
    if not isinstance(marks, Tensor) or not isinstance(weights, Tensor):
        return None
    if place_of(weights) is not None or weights.ndim < 2:
        return None
    marks = marks.flatten(0, -2)
    marks = marks[~marks.isnan().any(-1)]
    return (marks, weights) if len(marks) else None


def _last(tensor: Tensor, weights: Tensor) -> _Met | None:
    """Of weights (filters, features)."""
    return _met(place_of(tensor), weights)


def _multiplied(left: Any, right: Any) -> _Met | None:
    """Of a product of two matrices, or of many with the same one."""
    for marks, weights in ((place_of(left), right.mT), (place_of(right), left)):
        one = all(size == 1 for size in weights.shape[:-2]) and weights.ndim >= 2
        if isinstance(marks, Tensor) and one:
            return _met(marks if weights is not left else marks.mT, weights.flatten(0, -2))
    return None


def _convolved(args: tuple, kwargs: dict) -> _Met | None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    asked = {**dict(zip(names, args)), **kwargs}
    place, weight = place_of(asked["input"]), asked["weight"]
    if not isinstance(place, Tensor) or asked.get("groups", 1) != 1 or place.isnan().all():
        return None
    count = weight.ndim - 2
    stride, dilation = (_many(asked.get(key) or 1, count) for key in ("stride", "dilation"))
    windows = place[0]
    for axis, (size, step, apart) in enumerate(zip(weight.shape[2:], stride, dilation), 1):
        span = apart * (size - 1) + 1
        if windows.shape[axis] < span:
            return None
        windows = windows.unfold(axis, span, step)[..., ::apart]
    # (channels, places..., taps...) -> (places, channels · taps)
    windows = windows.flatten(1, count).movedim(1, 0)
    return _met(windows.flatten(1), weight)


def _summed(args: tuple) -> _Met | None:
    """Of ``einsum`` of a tensor and weights."""
    asked = subscripts(args)
    if asked is None or len(asked.operands) != 2:
        return None
    first = 0 if place_of(asked.operands[0]) is not None else 1
    names = asked.inputs[first], asked.inputs[1 - first]
    marks, weights = place_of(asked.operands[first]), asked.operands[1 - first]
    summed = [letter for letter in names[0] if letter not in asked.output]
    if set(names[0]) & set(names[1]) != set(summed) or not summed:
        return None
    flat = []
    for name, tensor in zip(names, (marks, weights)):
        if not isinstance(tensor, Tensor):
            return None
        kept = [axis for axis, letter in enumerate(name) if letter not in summed]
        order = kept + [name.index(letter) for letter in summed]
        flat.append(tensor.permute(order).flatten(len(kept)))
    return _met(flat[0], flat[1].flatten(0, -2))


def _on_pixels(marks: Tensor, weights: Tensor) -> Tensor | None:
    """(filters, height, width, channels) from what each weight meets; None where that is no patch.

    Args:
        marks: (places, taps) of the image's elements.
        weights: (filters, ...) of as many taps.
    """
    first = marks[0]
    channel = (first.imag / IMAGE_STEP).round()
    x, y = first.real, first.imag - IMAGE_STEP * channel
    # Every place must see its own patch in the same order.
    moved = marks - first
    if float((moved - moved[:, :1]).abs().amax()) > _PIXEL:
        return None
    if float(torch.stack([x - x.round(), y - y.round()]).abs().amax()) > _PIXEL:
        return None
    columns, rows = (part.unique(return_inverse=True) for part in (x.round(), y.round()))
    size = len(rows[0]), len(columns[0]), int(channel.max()) + 1
    at = (rows[1] * size[1] + columns[1]) * size[2] + channel.long()
    filters = weights.detach().flatten(1)
    # An element that is met twice, as in frames of a still, counts with both weights.
    flat = filters.new_zeros(len(filters), size[0] * size[1] * size[2])
    flat.index_add_(1, at.to(filters.device), filters)
    return flat.unflatten(1, size)


def _many(value: Any, count: int) -> tuple[int, ...]:
    return (int(value),) * count if isinstance(value, int) else tuple(value)
