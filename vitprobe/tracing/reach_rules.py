"""What operations do to what their operands can depend on.

What comes of an operation without a rule can depend on all that its operands depend on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitprobe.tracing.einsum import of_tensordot
from vitprobe.tracing.operations import BLANK
from vitprobe.tracing.place_arithmetic import mover
from vitprobe.tracing.place_rules import on_cpu
from vitprobe.tracing.reach_windows import Size, convolve, many, pool, resize, unfold
from vitprobe.tracing.reaches import (
    Reach,
    each,
    joined,
    mixed,
    nothing,
    over,
    own_reach,
    put_reach,
    reach_of,
    whole_of,
)
from vitprobe.tracing.tokens import MOVING
from vitprobe.tracing.trace import tensors

# Their values do not depend on any tensor given.
_BLANK = BLANK | {"size", "dim"}
_FIRST_ONLY = {"to", "type_as"}
_POINTWISE = (
    "add sub mul div iadd isub imul idiv itruediv radd rsub rmul rdiv truediv rtruediv floordiv "
    "mod floor_divide remainder fmod pow rpow ipow neg pos abs absolute square sqrt rsqrt "
    "reciprocal exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan sinh cosh erf sign "
    "floor ceil round trunc frac clamp clip clamp_min clamp_max nan_to_num maximum minimum lerp "
    "addcmul addcdiv where masked_fill gt lt ge le eq ne isnan isfinite isinf logical_and "
    "logical_or logical_not and or xor invert bitwise_and bitwise_or bitwise_not "
    "batch_norm relu relu6 hardtanh gelu silu elu selu celu mish leaky_relu prelu rrelu sigmoid "
    "tanh hardswish hardsigmoid softplus softsign logsigmoid hardshrink softshrink tanhshrink "
    "threshold logit dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout "
    "float half double bfloat16 type long int bool detach contiguous clone requires_grad"
)
_REDUCING = (
    "mean sum amax amin max min var std var_mean std_mean norm vector_norm logsumexp prod all any "
    "median argmax argmin"
)
_INDEXING = {"gather", "index_select", "take_along_dim", "getitem"}


def follow_reach(
    function: Callable, args: tuple, kwargs: Mapping[str, Any], result: Any, size: Size
) -> None:
    """Carry what tensors can depend on over an operation; ``size`` is that of the image."""
    given = [tensor for _, tensor in tensors((args, kwargs))]
    found = [tensor for _, tensor in tensors(result)]
    name = getattr(function, "__name__", "").strip("_")
    known = [tensor for tensor in given if reach_of(tensor) is not None]
    if not known or name in _BLANK:
        for tensor in found:
            if reach_of(tensor) is not None:
                put_reach(tensor, None)
        return
    rule = _rule_of(name, args, kwargs)
    try:
        reaches = rule(function, args, kwargs, found, size) if rule else None
        if reaches is not None and len(reaches) == len(found):
            for tensor, reach in zip(found, reaches):
                put_reach(tensor, reach)
            return
    except (RuntimeError, IndexError, TypeError, ValueError, KeyError, AttributeError):
        pass  # used in a way that the rule does not know
    for tensor in found:
        everything = [whole_of(own_reach(one), tensor.shape) for one in known]
        put_reach(tensor, mixed(joined(everything, tensor.shape), size))


def assigned(target: Tensor, index: Any, value: Any) -> None:
    """What a tensor can depend on after ``target[index] = value``."""
    old, new = reach_of(target), reach_of(value)
    if old is None and new is None:
        return
    parts = []
    for i in range(5):
        part = (nothing(target.shape) if old is None else old[i]).clone()
        part[on_cpu(index)] = torch.tensor(-torch.inf) if new is None else new[i]
        parts.append(part)
    put_reach(target, tuple(parts))


def _rule_of(name: str, args: tuple, kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    if name in ("max", "min") and len(args) > 1 and isinstance(args[1], Tensor):
        return _pointwise
    return _RULES.get(name)


def _pointwise(
    _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    known = [reach for _, t in tensors((args, kwargs)) if (reach := reach_of(t)) is not None]
    return [joined(known, tensor.shape) for tensor in found]


def _first(
    _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    return [own_reach(args[0])]


def _copy(
    _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    reach = reach_of(args[1] if len(args) > 1 else kwargs["src"])
    if reach is None:
        return [tuple(nothing(found[0].shape) for _ in range(5))]
    return [each(reach, lambda part: part.expand(found[0].shape))]


def _move(
    function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    """The very operation, done to the parts."""
    indexing = function.__name__.strip("_") in _INDEXING

    def swap(value: Any, i: int, data: bool) -> Any:
        if isinstance(value, Tensor):
            if not data:
                return value.cpu()
            reach = reach_of(value)
            return nothing(value.shape) if reach is None else reach[i]
        if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
            return type(value)(swap(item, i, data) for item in value)
        return value

    moved: list[list[Tensor]] = []
    for i in range(5):
        rest = [swap(value, i, not indexing) for value in args[1:]]
        named = {key: swap(value, i, not indexing) for key, value in kwargs.items()}
        result = mover(function)(swap(args[0], i, True), *rest, **named)
        moved.append([tensor for _, tensor in tensors(result)])
    reaches = [tuple(parts) for parts in zip(*moved)]
    chosen = [t for _, t in tensors((args[1:], kwargs)) if reach_of(t) is not None]
    if indexing and chosen:
        # Where is looked depends on the image, too.
        reaches = [
            joined(
                [reach, *(whole_of(own_reach(t), reach[0].shape) for t in chosen)], reach[0].shape
            )
            for reach in reaches
        ]
    return reaches


def _pad(
    _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    widths = tuple(args[1] if len(args) > 1 else kwargs["pad"])
    mode = args[2] if len(args) > 2 else kwargs.get("mode", "constant")
    if mode == "constant":
        return [each(own_reach(args[0]), lambda part: F.pad(part, widths, value=-torch.inf))]
    return [each(own_reach(args[0]), lambda part: F.pad(part, widths, mode=mode))]


def _reduce(
    function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    reach = own_reach(args[0])
    axes = kwargs.get("dim", kwargs.get("axis"))
    # Norms have their order first.
    place = 2 if "norm" in function.__name__ else 1
    if axes is None and len(args) > place:
        axes = args[place]
    chosen = range(reach[0].ndim) if axes is None else many(axes, 1)
    reach = mixed(over(reach, chosen), size)
    return [tuple(part.reshape(tensor.shape) for part in reach) for tensor in found]


def _along(axes: Callable[..., Sequence[int]]) -> Callable[..., list[Reach]]:
    """Of operations that mix along some axes, and give as many elements as they take."""

    def rule(
        _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
    ) -> list[Reach]:
        total = over(own_reach(args[0]), axes(args, kwargs))
        return [mixed(each(total, lambda part: part.expand(found[0].shape)), size)]

    return rule


def _softmax_axes(args: tuple, kwargs: Mapping[str, Any]) -> list[int]:
    return [args[1] if len(args) > 1 else kwargs["dim"]]


def _normalised_axes(args: tuple, kwargs: Mapping[str, Any]) -> list[int]:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    return [-1 - i for i in range(len(shape))]


def _group_axes(args: tuple, kwargs: Mapping[str, Any]) -> list[int]:
    return list(range(1, args[0].ndim))


def _spatial_axes(args: tuple, kwargs: Mapping[str, Any]) -> list[int]:
    return list(range(2, args[0].ndim))


def _normalize_axes(args: tuple, kwargs: Mapping[str, Any]) -> list[int]:
    return list(many(args[2] if len(args) > 2 else kwargs.get("dim", 1), 1))


def _glu(
    _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    axis = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    halves = zip(*(part.chunk(2, axis) for part in own_reach(args[0])))
    return [joined(list(halves), found[0].shape)]


def _linear(
    _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    total = over(own_reach(args[0] if args else kwargs["input"]), [-1])
    return [mixed(each(total, lambda part: part.expand(found[0].shape)), size)]


def _product(
    _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    left, right = args[-2:]
    known = []
    if reach_of(left) is not None:
        known.append(over(own_reach(left), [-1]))
    if reach_of(right) is not None:
        known.append(over(own_reach(right), [-2]))
    if len(args) == 3 and reach_of(args[0]) is not None:
        known.append(own_reach(args[0]))
    return [mixed(joined(known, found[0].shape), size)]


def _einsum(
    _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach] | None:
    given = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
    inputs, _arrow, output = args[0].replace(" ", "").partition("->")
    names = inputs.split(",")
    if not output or "." in output or any(len(set(name)) < len(name) for name in names):
        return None
    known = []
    for name, tensor in zip(names, given):
        if reach_of(tensor) is None:
            continue
        summed = [axis for axis, letter in enumerate(name) if letter not in output]
        reach = over(own_reach(tensor), summed) if summed else own_reach(tensor)
        kept = [name.index(letter) for letter in output if letter in name]

        def aligned(part: Tensor, kept: list[int] = kept, summed: list[int] = summed,
                    name: str = name) -> Tensor:  # fmt: skip
            part = part.permute(*kept, *summed)
            for _ in summed:
                part = part.select(-1, 0)
            for axis, letter in enumerate(output):
                if letter not in name:
                    part = part.unsqueeze(axis)
            return part

        known.append(each(reach, aligned))
    return [mixed(joined(known, found[0].shape), size)]


def _attention(
    _: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    names = ("query", "key", "value", "attn_mask")
    asked = {**dict(zip(names, args)), **kwargs}
    known = []
    for name in names:
        reach = reach_of(asked.get(name))
        if reach is None:
            continue
        reach = over(reach, [-1]) if name in ("query", "attn_mask") else over(reach, [-2, -1])
        heads = found[0].shape[-3] if found[0].ndim > 2 else 1
        if reach[0].ndim > 2 and reach[0].shape[-3] not in (1, heads):
            reach = over(reach, [-3])  # fewer heads of keys than of queries
        known.append(reach)
    return [mixed(joined(known, found[0].shape), size)]


def _unfold(
    function: Any, args: tuple, kwargs: Mapping[str, Any], found: list[Tensor], size: Size
) -> list[Reach]:
    rule = unfold if function is F.unfold else _move
    return rule(function, args, kwargs, found, size)


_RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(MOVING.split(), _move),
    **dict.fromkeys(_POINTWISE.split(), _pointwise),
    **dict.fromkeys(_FIRST_ONLY, _first),
    **dict.fromkeys(_REDUCING.split(), _reduce),
    **dict.fromkeys(("softmax", "log_softmax", "softmin"), _along(_softmax_axes)),
    **dict.fromkeys(("layer_norm", "rms_norm"), _along(_normalised_axes)),
    **dict.fromkeys(("matmul", "rmatmul", "bmm", "mm", "baddbmm", "addmm"), _product),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolve),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), convolve),
    **dict.fromkeys(
        [f"{kind}_pool{n}d" for kind in ("max", "avg", "lp", "adaptive_avg", "adaptive_max")
         for n in (1, 2)], pool,
    ),
    **dict.fromkeys(("interpolate", "upsample"), resize),
    "group_norm": _along(_group_axes),
    "instance_norm": _along(_spatial_axes),
    "local_response_norm": _along(lambda args, kwargs: [1]),
    "normalize": _along(_normalize_axes),
    "scaled_dot_product_attention": _attention,
    "copy": _copy,
    "linear": _linear,
    "einsum": _einsum,
    "tensordot": lambda function, args, kwargs, found, size: _einsum(
        function, of_tensordot(args, kwargs), {}, found, size
    ),
    "glu": _glu,
    "pad": _pad,
    "unfold": _unfold,
}  # fmt: skip
