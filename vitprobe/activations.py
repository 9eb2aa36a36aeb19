"""Activations, attention and layers of any model, for notebooks and scripts.

    with vitprobe.capture(model, ["blocks.3", "blocks.*.attn"]) as seen:
        model(images)
    seen["blocks.3"]  # (n, tokens, features), images first, as it was when it existed

The layers are those that ``--layers`` chooses, with what the measurements rely on: tensors are
taken before an in-place operation can rewrite them, windows folded into the batch come back to
their images, and places of tokens are followed through the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprobe.errors import NotApplicable, VitprobeError, nearest
from vitprobe.models.example import at_an_example
from vitprobe.models.loading import load_models
from vitprobe.models.model import Model
from vitprobe.tracing.attention import map_attention, observe
from vitprobe.tracing.capture import capture as capture_layers
from vitprobe.tracing.layers import Choice, Layer, LayerMap, map_layers
from vitprobe.tracing.places import Places, find_places


class Activations(Mapping[str, Any]):
    """What ``capture`` has seen in the last pass, by the names of layers."""

    def __init__(self, model: Model, layers: Sequence[Layer]) -> None:
        self._model, self._layers = model, {layer.label: layer for layer in layers}
        self._values: dict[str, Any] = {}
        self._inputs: Tensor | None = None
        self._places: dict[str, Places | str] = {}
        self._looking = False  # a pass that is ours, and leaves nothing

    def __getitem__(self, name: str) -> Any:
        if name in self._values:
            return self._values[name]
        if name in self._layers:
            raise VitprobeError(f"The layer {name} is not there: run {self._model.name} first.")
        known = list(self._values or self._layers)
        raise VitprobeError(f"The layer {name!r} was not captured.{nearest(name, known)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {_shape(value)}" for name, value in self._values.items())
        return f"<activations of {self._model.name}: {shapes or 'no pass yet'}>"

    def grid(self, name: str) -> Tensor:
        """(n, rows, columns, features) of the tokens or locations that stand in the image.

        Raises:
            NotApplicable: the layer has no grid of places.
        """
        places = self.places(name)
        return places.spatial(self[name]).unflatten(1, (places.rows, places.columns))

    def prefix(self, name: str) -> Tensor:
        """(n, tokens, features) of those without a place: class token first, then the others."""
        return self.places(name).rest(self[name])

    def places(self, name: str) -> Places:
        """Where the vectors of a layer stand, followed through a pass of the images last seen.

        Raises:
            NotApplicable: the layer has no grid of places.
        """
        self[name]  # was captured
        if not self._places and self._inputs is not None:
            module, layers = self._model.module, list(self._layers.values())
            self._looking = True
            try:
                with _evaluating(module), torch.no_grad():
                    found = find_places(module, layers, self._inputs)
            finally:
                self._looking = False
            self._places = dict(zip(self._layers, found))
        places = self._places[name]
        if isinstance(places, str):
            raise NotApplicable(
                f"The layer {name} of {self._model.name} has no grid of places: {places}.",
                self._model.name,
            )
        return places


@contextmanager
def capture(
    model: Any,
    layers: Choice = "blocks",
    *,
    example: Tensor | None = None,
    grad: bool = False,
    to_cpu: bool = False,
    reduce: Callable[[str, Tensor], Any] | None = None,
) -> Iterator[Activations]:
    """Within it, every forward pass of ``model`` leaves its layers in the mapping that it gives.

    Args:
        model: a ``Model``, a module in evaluation mode, or a spec.
        layers: ``blocks``, ``paper``, ``all``, numbers, or names with wildcards, as
            ``vitprobe.layers`` lists them: ``blocks.3 skip`` and ``blocks.3 branch``, which a
            residual addition adds, beside ``blocks.3 sum``.
        example: (n, C, H, W) images of the size to come, where that is not the model's own.
        grad: keep the tensors in the graph, so that gradients flow; else copies are kept.
        to_cpu: keep them in the memory of the CPU.
        reduce: ``reduce(name, tensor)``, called while the tensor exists; what it returns is kept
            in its stead. It must not keep the tensor itself.

    Yields:
        ``seen[name]``: (n, ...) with the images along the first axis; ``seen.grid(name)`` and
        ``seen.prefix(name)`` where tokens and locations stand. It holds the last pass.

    Raises:
        VitprobeError: no such layer; a layer that does not run in a pass. The hooks are gone
            afterwards, also after an exception.
    """
    (loaded,) = load_models(model)
    module = loaded.module
    at = _example(loaded) if example is None else _two(example)
    chosen = _found(loaded, at).choose(layers)
    seen = Activations(loaded, chosen)
    # Additions are found again by their shapes; other layers run at any size.
    additions = any(layer.addition is not None for layer in chosen)

    def take(name: str, tensor: Tensor) -> None:
        if seen._looking:
            return
        if reduce is not None:
            seen._values[name] = reduce(name, tensor)
            return
        kept = tensor if grad else tensor.detach()
        kept = kept.cpu() if to_cpu and kept.device.type != "cpu" else kept.clone()
        seen._values[name] = kept

    def begin(_: nn.Module, args: tuple[Any, ...]) -> None:
        if seen._looking:
            return
        if module.training:
            raise VitprobeError(f"{loaded.name} is in training mode: call eval() first.")
        seen._values.clear()
        seen._places.clear()
        if args and isinstance(args[0], Tensor):
            seen._inputs = _two(args[0])
            if additions and args[0].shape[1:] != at.shape[1:]:
                sizes = [" × ".join(map(str, one.shape[1:])) for one in (args[0], at)]
                raise VitprobeError(
                    f"{loaded.name} gets images of {sizes[0]}, and was looked at with {sizes[1]}: "
                    f"give capture(..., example=images)."
                )

    labels = [layer.label for layer in chosen]
    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(begin, prepend=True).remove)
        stack.enter_context(
            capture_layers(module, chosen, lambda i, tensor: take(labels[i], tensor))
        )
        yield seen


@dataclass(frozen=True)
class AttentionMaps:
    """The attention of one layer.

    Attributes:
        maps: (n, heads, queries, keys); of windows (n, windows, heads, queries, keys).
        queries: (windows, queries, 2) x and y in input pixels; NaN for class tokens and the like.
        keys: (windows, keys, 2).
    """

    maps: Tensor
    queries: np.ndarray
    keys: np.ndarray


@torch.no_grad()
def attention_maps(
    model: Any, images: Tensor, layers: str | Sequence[str] = "*"
) -> dict[str, AttentionMaps]:
    """The attention probabilities of chosen layers, by the names of the modules that attend.

    Args:
        model: a ``Model``, a module or a spec.
        images: (n, C, H, W) as the model takes them. All maps asked for are in memory at once.
        layers: names of attention layers with wildcards; all by default.

    Raises:
        NotApplicable: the model has no attention between places of the image.
        VitprobeError: no such layer.
    """
    (loaded,) = load_models(model)
    with _evaluating(loaded.module):
        found = map_attention(loaded.name, loaded.module, _two(images))
        found.require("attention maps")
        labels = [layer.label for layer in found.layers]
        wanted = [layers] if isinstance(layers, str) else list(layers)
        chosen = [i for i, label in enumerate(labels) if any(_fits(label, one) for one in wanted)]
        if not chosen:
            raise VitprobeError(
                f"{loaded.name} has no attention layer {wanted[0]!r}."
                f"{nearest(wanted[0], labels)} It has {', '.join(labels)}."
            )
        made: dict[int, Tensor] = {}

        def keep(i: int, block: Tensor, of: slice, queries: slice) -> None:
            layer = found.layers[i]
            if i not in made:
                shape = len(images), *layer.rows.shape, layer.queries.shape[1], layer.keys.shape[1]
                made[i] = block.new_empty(shape)
            made[i][of, :, :, queries] = block

        with observe(loaded.module, found, keep, only=chosen):
            loaded.module(images)
    return {
        labels[i]: AttentionMaps(
            maps[:, 0] if maps.shape[1] == 1 else maps,
            found.layers[i].queries,
            found.layers[i].keys,
        )
        for i, maps in made.items()
    }


def _found(model: Model, example: Tensor) -> LayerMap:
    with _evaluating(model.module), torch.no_grad():
        return map_layers(model.name, model.module, example)


def _example(model: Model) -> Tensor:
    with at_an_example(model) as image:
        return _two(image)


def _two(images: Tensor) -> Tensor:
    """Two images that differ, which tell which rows belong to which."""
    images = images.detach()[:2]
    return images if len(images) == 2 else torch.cat([images, images.flip(-1)])


def _fits(label: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    parent = label.rpartition(".")[0]
    return any(fnmatchcase(one, pattern.replace("[", "[[]")) for one in (label, parent))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


def _shape(value: Any) -> str:
    return " × ".join(map(str, value.shape)) if hasattr(value, "shape") else type(value).__name__
