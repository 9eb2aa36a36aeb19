"""Which tensors are "layers" of a model, and in what order.

Two recorded passes, of one image and of two, decide. They tell which modules run and how often,
which outputs repeat one that is there already, where the residual additions are, which axis of a
tensor counts the images, and that its rows really keep to their images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn

from vitprobe.errors import VitprobeError, nearest
from vitprobe.tracing.blocks import find_blocks
from vitprobe.tracing.failures import forward_failure
from vitprobe.tracing.rows import Examined, Key, Rows, examine
from vitprobe.tracing.trace import Addition, Call, Trace, record

CHOICES = ("blocks", "paper", "all")


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
        images_first: whether the rows of an image lie together there.
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
    images_first: bool = True
    shape: tuple[int, ...] = ()
    identity: tuple[int, ...] = ()

    def by_image(self, tensor: Tensor) -> Tensor:
        """The tensor with its images along the first axis, and only they."""
        rank = len(self.shape) + (self.fold == 1)
        if tensor.ndim != rank and tensor.numel() == prod(self.shape):
            return tensor.reshape(1, *self.shape)  # a batch of one whose axis was squeezed away
        return Rows(self.axis, self.fold, self.images_first).by_image(tensor)


@dataclass(frozen=True)
class LayerMap:
    """Every tensor of a model's forward pass that can be a layer, and what chooses among them.

    Attributes:
        model: its name.
        layers: in forward order.
        trace: of the pass.
        never_ran: names of modules.
        left_out: tensors that are of the image and no layers, and why.
        modules: by qualified name.
        names: further names of modules that stand in several places: the layers that they mean.
    """

    model: str
    layers: list[Layer]
    trace: Trace
    never_ran: list[str]
    left_out: dict[str, str]
    modules: dict[str, nn.Module]
    names: dict[str, list[Layer]]

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
            # Of what an attention module puts out the first is the output, not a map beside it.
            first = not layer.suffix or layer.suffix == min(
                other.suffix for other in self.layers if other.module == layer.module
            )
            if (
                sum_or_hidden
                or (layer.module in attention and first)
                or _is_norm_or_conv(self.modules[layer.module])
            ):
                kept.append(layer)
        return _distinct(kept)

    def _all(self) -> list[Layer]:
        """Every distinct tensor that a module puts out; what passes through is not repeated."""
        return _distinct([layer for layer in self.layers if layer.point == "output"])

    @property
    def remark(self) -> str:
        """A line on what is left out, or nothing."""
        if not self.left_out:
            return ""
        (label, why), *others = self.left_out.items()
        more = f", and so are {len(others)} more" if others else ""
        return f"{self.model}: {label} {why} and is left out{more}."

    def _named(self, pattern: str) -> list[Layer]:
        outputs = [layer for layer in self.layers if layer.point == "output"]
        # A name as it was printed means that very layer, whatever brackets are in it.
        found = (
            [layer for layer in self.layers if layer.label == pattern]
            or [layer for layer in outputs if layer.module == pattern]
            or self.names.get(pattern, [])
        )
        if found:
            return found
        # Brackets are first taken as part of a name, then as a choice of letters.
        for wild in (pattern.replace("[", "[[]"), pattern):
            found = [layer for layer in self.layers if fnmatchcase(layer.label, wild)]
            found += [layer for layer in outputs if fnmatchcase(layer.module, wild)]
            for name, layers in self.names.items():
                found += layers if fnmatchcase(name, wild) else []
            if found:
                return found
        idle = [name for name in self.never_ran if fnmatchcase(name, wild)]
        if idle:
            raise VitprobeError(f"The layer {idle[0]} of {self.model} never ran.")
        for label, why in self.left_out.items():
            if fnmatchcase(label, wild):
                raise VitprobeError(f"The layer {label} of {self.model} {why}.")
        labels = [layer.label for layer in self.layers]
        raise VitprobeError(
            f"--layers: {self.model} has no layer {pattern!r}.{nearest(pattern, labels)} "
            f"Use {', '.join(CHOICES)} or names with wildcards; `vitprobe layers` lists them."
        )


def map_layers(name: str, module: nn.Module, example: Tensor) -> LayerMap:
    """Watch a model on two images, and see with three what each tensor says of an image.

    Args:
        name: of the model, for messages.
        module: in evaluation mode.
        example: (2, C, H, W) on the module's device; the images should differ.

    Raises:
        VitprobeError: the pass fails, is random, or mixes the images of a batch.
    """
    try:
        with torch.no_grad():
            module(example[:2])  # whatever it computes once and keeps
        trace = record(module, example[:2])
        outputs = {
            (call.name, call.index, suffix): (call, info)
            for call in trace.calls
            for suffix, info in call.outputs
            if info.depends and info.dtype.is_floating_point
        }
        shapes: dict[Key, tuple[int, ...]] = {key: info.shape for key, (_, info) in outputs.items()}
        shapes |= {addition: addition.shape for addition in trace.additions}
        examined = examine(name, module, example, shapes)
    except Exception as error:
        told = forward_failure(error, [(name, module)])
        if told is None:
            raise
        raise told from error
    layers: list[Layer] = []
    left_out: dict[str, str] = {}
    for key, (call, info) in outputs.items():
        label, rows = _label(trace, call, key[2]), examined.rows.get(key)
        if rows is not None:
            layers.append(
                Layer(
                    label,
                    call.finished,
                    *key,
                    **vars(rows),
                    shape=_one_image(info.shape, rows),
                    identity=info.identity,
                )
            )
        elif info.shape:
            left_out[label] = (
                "has no rows that belong to one image each"
                if key in examined.mixed
                else "has no axis that counts the images"
            )
    layers += _sums(trace, examined)
    layers += _hiddens(trace, module, layers)
    layers.sort(key=lambda layer: layer.time)
    ran = {call.name for call in trace.calls}
    modules = dict(module.named_modules())
    names = _further_names(module, modules, layers)
    idle = [name for name in modules if name not in ran]
    return LayerMap(name, layers, trace, idle, left_out, modules, names)


def _further_names(
    module: nn.Module, modules: dict[str, nn.Module], layers: list[Layer]
) -> dict[str, list[Layer]]:
    """Each further name of a module: the call that it stands for, if each name has one."""
    first = {id(child): name for name, child in modules.items()}
    alike: dict[str, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        alike.setdefault(first[id(child)], []).append(name)
    found: dict[str, list[Layer]] = {}
    for original, names in alike.items():
        mine = [la for la in layers if la.module == original and la.point == "output"]
        calls = max((layer.index for layer in mine), default=0) + 1
        for i, name in enumerate(names[1:], 1):
            found[name] = [la for la in mine if la.index == i] if calls == len(names) else mine
    return {name: layers for name, layers in found.items() if layers}


def _one_image(shape: tuple[int, ...], rows: Rows) -> tuple[int, ...]:
    rest = shape[: rows.axis] + shape[rows.axis + 1 :]
    return (rows.fold, *rest) if rows.fold > 1 else rest


def _label(trace: Trace, call: Call, suffix: str) -> str:
    times = sum(other.name == call.name for other in trace.calls)
    number = f":{call.index + 1}" if times > 1 else ""
    return f"{call.name or 'output'}{number}{suffix}"


def _sums(trace: Trace, examined: Examined) -> Iterator[Layer]:
    """The residual additions; those of one module are numbered."""
    total: dict[str, int] = {}
    for addition in trace.additions:
        total[addition.module] = total.get(addition.module, 0) + 1
    count: dict[str, int] = {}
    for addition in trace.additions:
        count[addition.module] = count.get(addition.module, 0) + 1
        number = f" {count[addition.module]}" if total[addition.module] > 1 else ""
        rows = examined.rows.get(addition)
        if rows is None:
            continue
        yield Layer(
            f"{addition.module or 'output'} sum{number}",
            addition.started,
            addition.module,
            addition.index,
            point="addition",
            addition=addition,
            **vars(rows),
            shape=_one_image(addition.shape, rows),
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
