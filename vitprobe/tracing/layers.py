"""Which tensors are "layers" of a model, and in what order.

Two recorded passes, of one image and of two, decide. They tell which modules run and how often,
which outputs repeat one that is there already, where the residual additions are, which axis of a
tensor counts the images, and that its rows really keep to their images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite

import torch
from torch import Tensor, nn

from vitprobe.errors import VitprobeError, nearest
from vitprobe.tracing.blocks import find_blocks
from vitprobe.tracing.failures import forward_failure
from vitprobe.tracing.trace import Addition, Call, Trace, record

CHOICES = ("blocks", "paper", "all")
# One image alone and the same image in a batch of two differ by rounding only: measured up to
# 1e-5 in float32 and 2e-2 in bfloat16. Rows of mixed images differ by far more.
MIXING_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


@dataclass(frozen=True)
class Layer:
    """One tensor of the forward pass.

    Attributes:
        label: what figures and files call it.
        time: when in the forward pass it exists; orders the layers.
        module: qualified name of the module that puts it out, takes it in, or adds it.
        index: which call of that module, from 0.
        suffix: which tensor of an output of several.
        point: ``output``, ``input`` or ``addition``.
        addition: the residual addition, where it is one.
        axis: the axis that counts the images.
        fold: how many rows along it belong to an image (windows folded into the batch).
        shape: of one image's part, the image axis left out.
        identity: equal for tensors that hold the very same values.
    """

    label: str
    time: int
    module: str
    index: int = 0
    suffix: str = ""
    point: str = "output"
    addition: Addition | None = None
    axis: int = 0
    fold: int = 1
    shape: tuple[int, ...] = ()
    identity: tuple[int, ...] = ()

    def by_image(self, tensor: Tensor) -> Tensor:
        """The tensor with its images along the first axis, and only they."""
        if self.axis:
            tensor = tensor.movedim(self.axis, 0)
        if self.fold > 1:
            tensor = tensor.unflatten(0, (-1, self.fold))
        return tensor


@dataclass(frozen=True)
class LayerMap:
    """Every tensor of a model's forward pass that can be a layer, and what chooses among them."""

    model: str
    layers: list[Layer]
    trace: Trace
    never_ran: list[str]
    mixed: list[str]
    modules: dict[str, nn.Module]

    @property
    def has_attention(self) -> bool:
        return bool(self.trace.attention_modules)

    def choose(self, choice: str | Sequence[str]) -> list[Layer]:
        """Layers by ``blocks``, ``paper``, ``all`` or names with wildcards, in forward order.

        Raises:
            VitprobeError: nothing by that name, or a module that never ran.
        """
        wanted = [choice] if isinstance(choice, str) else list(choice)
        chosen: dict[str, Layer] = {}
        for one in wanted:
            sets = {"blocks": self._blocks, "paper": self._paper, "all": self._all}
            found = sets[one]() if one in sets else self._named(one)
            chosen.update({layer.label: layer for layer in found})
        if not chosen:
            raise VitprobeError(f"--layers: {self.model} has no layers for {' '.join(wanted)}.")
        return sorted(chosen.values(), key=lambda layer: layer.time)

    def _blocks(self) -> list[Layer]:
        """The residual stream after each block, by ``tracing.blocks``."""
        found = set(find_blocks(self.trace, self.modules))
        chosen = [
            layer
            for layer in self.layers
            if layer.addition in found
            or (layer.point == "output" and (layer.module, layer.index, layer.suffix) in found)
        ]
        # Of a module and the last of its children, which put out the same, the module stays.
        return list({layer.identity: layer for layer in chosen}.values())

    def _paper(self) -> list[Layer]:
        """The representations that give the axis lengths of Raghu et al. 2021.

        Six a transformer block (LN1, MSA, sum, LN2, MLP hidden, sum), seven a bottleneck
        (convolution and normalisation three times, sum), two a projection.
        """
        attention = [name for name in self.trace.attention_modules if name]
        kept = []
        for layer in self.layers:
            if any(layer.module.startswith(f"{name}.") for name in attention):
                continue
            sum_or_hidden = layer.point in ("addition", "input")
            if (
                sum_or_hidden
                or layer.module in attention
                or _is_norm_or_conv(self.modules[layer.module])
            ):
                kept.append(layer)
        return _distinct(kept)

    def _all(self) -> list[Layer]:
        """Every distinct tensor that a module puts out; what passes through is not repeated."""
        return _distinct([layer for layer in self.layers if layer.point == "output"])

    def _named(self, pattern: str) -> list[Layer]:
        found = [
            layer
            for layer in self.layers
            if fnmatchcase(layer.label, pattern)
            or (layer.point == "output" and fnmatchcase(layer.module, pattern))
        ]
        if found:
            return found
        idle = [name for name in self.never_ran if fnmatchcase(name, pattern)]
        if idle:
            raise VitprobeError(f"The layer {idle[0]} of {self.model} never ran.")
        mixed = [label for label in self.mixed if fnmatchcase(label, pattern)]
        if mixed:
            raise VitprobeError(
                f"The layer {mixed[0]} of {self.model} has no rows that belong to one image each."
            )
        labels = [layer.label for layer in self.layers]
        raise VitprobeError(
            f"--layers: {self.model} has no layer {pattern!r}.{nearest(pattern, labels)} "
            f"Use {', '.join(CHOICES)} or names with wildcards; `vitprobe layers` lists them."
        )


def map_layers(name: str, module: nn.Module, example: Tensor) -> LayerMap:
    """Watch a model on one image and on two.

    Args:
        name: of the model, for messages.
        module: in evaluation mode.
        example: (2, C, H, W) on the module's device; the images should differ.
    """
    norms: dict[tuple[str, int, str], tuple[tuple[int, ...], float]] = {}

    def one(call: Call, suffix: str, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            norms[call.name, call.index, suffix] = tuple(tensor.shape), _norm(tensor)

    mixing: dict[tuple[str, int, str], tuple[int, int, bool]] = {}

    def two(call: Call, suffix: str, tensor: Tensor) -> None:
        key = call.name, call.index, suffix
        if key not in norms:
            return
        shape, norm = norms[key]
        place = _image_axis(shape, tuple(tensor.shape))
        if place is None:
            return
        axis, fold = place
        first = tensor.movedim(axis, 0)[:fold]
        allowed = MIXING_TOLERANCE.get(tensor.dtype, 5e-2) * max(norm, 1e-6)
        # Values that are not finite tell nothing of rows; the measurement names their layer.
        mixes = isfinite(norm) and not abs(_norm(first) - norm) <= allowed
        mixing[key] = axis, fold, mixes

    try:
        alone = record(module, example[:1], on_output=one)
        trace = record(module, example[:2], on_output=two)
    except Exception as error:
        told = forward_failure(error, [(name, module)])
        if told is None:
            raise
        raise told from error
    layers, mixed = [], []
    for call in trace.calls:
        for suffix, info in call.outputs:
            key = call.name, call.index, suffix
            if not info.depends or key not in mixing:
                continue
            axis, fold, mixes = mixing[key]
            label = _label(trace, call, suffix)
            if mixes:
                mixed.append(label)
                continue
            layers.append(
                Layer(
                    label,
                    call.finished,
                    call.name,
                    call.index,
                    suffix,
                    axis=axis,
                    fold=fold,
                    shape=_one_image(info.shape, axis, fold),
                    identity=info.identity,
                )
            )
    layers += _sums(alone, trace)
    layers += _hiddens(trace, module, layers)
    layers.sort(key=lambda layer: layer.time)
    ran = {call.name for call in trace.calls}
    modules = dict(module.named_modules())
    return LayerMap(name, layers, trace, [n for n in modules if n not in ran], mixed, modules)


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm() if tensor.device.type != "mps" else tensor.norm())


def _image_axis(one: tuple[int, ...], two: tuple[int, ...]) -> tuple[int, int] | None:
    """(axis, rows an image): the axis that doubles with the number of images."""
    if len(one) != len(two) or not one:
        return None
    differing = [axis for axis, (a, b) in enumerate(zip(one, two)) if a != b]
    if len(differing) != 1 or two[differing[0]] != 2 * one[differing[0]]:
        return None
    return differing[0], one[differing[0]]


def _one_image(shape: tuple[int, ...], axis: int, fold: int) -> tuple[int, ...]:
    rest = shape[:axis] + shape[axis + 1 :]
    return (fold, *rest) if fold > 1 else rest


def _label(trace: Trace, call: Call, suffix: str) -> str:
    times = sum(other.name == call.name for other in trace.calls)
    number = f":{call.index + 1}" if times > 1 else ""
    return f"{call.name or 'output'}{number}{suffix}"


def _sums(alone: Trace, trace: Trace) -> Iterator[Layer]:
    """The residual additions; those of one module are numbered."""
    total: dict[str, int] = {}
    for addition in trace.additions:
        total[addition.module] = total.get(addition.module, 0) + 1
    count: dict[str, int] = {}
    for single, addition in zip(alone.additions, trace.additions):
        count[addition.module] = count.get(addition.module, 0) + 1
        number = f" {count[addition.module]}" if total[addition.module] > 1 else ""
        place = _image_axis(single.shape, addition.shape)
        if place is None:
            continue
        axis, fold = place
        yield Layer(
            f"{addition.module or 'output'} sum{number}",
            addition.started,
            addition.module,
            addition.index,
            point="addition",
            addition=addition,
            axis=axis,
            fold=fold,
            shape=_one_image(addition.shape, axis, fold),
            identity=(-1, addition.ordinal),
        )


def _hiddens(trace: Trace, module: nn.Module, outputs: list[Layer]) -> Iterator[Layer]:
    """MLP hiddens: what enters the last of the linear layers that stand in one module."""
    attention = {name for name in trace.attention_modules if name}
    linear: dict[str, list[Call]] = {}
    for call in trace.calls:
        parent, _, _ = call.name.rpartition(".")
        inside = any(parent == name or parent.startswith(f"{name}.") for name in attention)
        if not inside and isinstance(module.get_submodule(call.name), nn.Linear):
            linear.setdefault(parent, []).append(call)
    places = {(la.module, la.index): la for la in outputs if la.point == "output"}
    for parent, calls in linear.items():
        names = {call.name for call in calls}
        if len(names) < 2:
            continue
        for call in calls:
            if call.name != calls[-1].name or not call.inputs:
                continue
            suffix, info = call.inputs[0]
            place = places.get((call.name, call.index))
            if place is not None and info.depends and suffix == "[0]":
                number = f":{call.index + 1}" if call.index else ""
                yield replace(
                    place,
                    label=f"{parent} hidden{number}",
                    time=call.started,
                    point="input",
                    suffix="",
                    shape=(*place.shape[:-1], info.shape[-1]),
                    identity=info.identity,
                )


def _distinct(layers: list[Layer]) -> list[Layer]:
    kept: dict[tuple[int, ...], Layer] = {}
    for layer in layers:
        kept.setdefault(layer.identity, layer)
    return list(kept.values())


def _is_norm_or_conv(module: nn.Module) -> bool:
    # Normalisations are known by name: timm and others have dozens of classes without a base.
    norm = "Norm" in type(module).__name__ or type(module).__name__ == "FrozenBatchNorm2d"
    return norm or isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
