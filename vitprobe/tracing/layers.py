"""Which tensors are "layers" of a model, and in what order.

Two recorded passes, of one image and of two, decide. They tell which modules run and how often,
which outputs repeat one that is there already, where the residual additions are, which axis of a
tensor counts the images, and that its rows really keep to their images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vitprobe.tracing.failures import forward_failure
from vitprobe.tracing.labels import (
    CHOICES,
    OPERANDS,
    WORDS,
    Choice,
    root_label,
    told_apart,
    words,
)
from vitprobe.tracing.layer_map import Layer, LayerMap
from vitprobe.tracing.rows import Examined, Key, Rows, examine
from vitprobe.tracing.trace import Call, Trace, record

__all__ = ["CHOICES", "OPERANDS", "WORDS", "Choice", "Layer", "LayerMap", "map_layers", "words"]


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
    except BaseException as error:
        told = forward_failure(error, [(name, module)])
        if told is None:
            raise
        raise told from error
    layers: list[Layer] = []
    left_out: dict[str, str] = {}
    modules = dict(module.named_modules())
    root = root_label(modules)
    for key, (call, info) in outputs.items():
        label, rows = _label(trace, call, key[2], root), examined.rows.get(key)
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
    sums = list(_sums(trace, examined, root))
    layers += sums
    layers += _hiddens(trace, module, layers)
    layers.sort(key=lambda layer: layer.time)
    both = [*layers, *_operands(sums)]
    labels = told_apart([layer.label for layer in both])
    both = [replace(layer, label=label) for layer, label in zip(both, labels)]
    layers, operands = both[: len(layers)], both[len(layers) :]
    ran = {call.name for call in trace.calls}
    names = _further_names(module, modules, layers)
    idle = [name for name in modules if name not in ran]
    return LayerMap(name, layers, operands, trace, idle, left_out, modules, names)


def _further_names(
    module: nn.Module, modules: dict[str, nn.Module], layers: list[Layer]
) -> dict[str, list[Layer]]:
    """Each name of a module with several: the call that it stands for, if each name has one.

    Else its further names stand for all calls.
    """
    first = {id(child): name for name, child in modules.items()}
    alike: dict[str, list[str]] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        alike.setdefault(first[id(child)], []).append(name)
    found: dict[str, list[Layer]] = {}
    for original, names in alike.items():
        mine = [la for la in layers if la.module == original and la.point == "output"]
        calls = max((layer.index for layer in mine), default=0) + 1
        if len(names) == 1:
            continue
        for i, name in enumerate(names):
            found[name] = [la for la in mine if la.index == i] if calls == len(names) else mine
    return {name: layers for name, layers in found.items() if layers}


def _one_image(shape: tuple[int, ...], rows: Rows) -> tuple[int, ...]:
    rest = shape[: rows.axis] + shape[rows.axis + 1 :]
    return (rows.fold, *rest) if rows.fold > 1 else rest


def _label(trace: Trace, call: Call, suffix: str, root: str) -> str:
    times = sum(other.name == call.name for other in trace.calls)
    number = f":{call.index + 1}" if times > 1 else ""
    return f"{call.name or root}{number}{suffix}"


def _sums(trace: Trace, examined: Examined, root: str) -> Iterator[Layer]:
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
            f"{addition.module or root} sum{number}",
            addition.started,
            addition.module,
            addition.index,
            point="addition",
            addition=addition,
            **vars(rows),
            shape=_one_image(addition.shape, rows),
            identity=(-1, addition.ordinal),
        )


def _operands(sums: Sequence[Layer]) -> Iterator[Layer]:
    """Skip and branch of each addition, named after it."""
    for layer in sums:
        owner, _, number = layer.label.rpartition(" sum")
        for point in OPERANDS:
            yield replace(
                layer,
                label=f"{owner} {point}{number}",
                point=point,
                identity=(-2, *layer.identity[1:], OPERANDS.index(point)),
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
