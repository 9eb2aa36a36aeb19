"""Models and images ready on a device, and what an example of them has shown.

A measurement opens a ``session``, resolves its layers on an example, and the ``loop`` then takes
it over all batches. What an example shows of a model (its layers, its attention) is found once
and shared by all measurements of the session.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import VitprobeError, ran_out
from vitprobe.images.sources import Images, open_images
from vitprobe.models.loading import Model, load_models
from vitprobe.models.precision import input_type
from vitprobe.results.provenance import models_meta, versions
from vitprobe.running import memory, processes
from vitprobe.running.checkpoint import UntilWritten
from vitprobe.running.devices import exact, prepared, resolve_device
from vitprobe.running.ending import RESUME
from vitprobe.running.layout import channels_last
from vitprobe.running.loading import Failure, TransformedImages, batches
from vitprobe.running.options import Options
from vitprobe.statistics.hsic import gram
from vitprobe.tracing.attention_map import AttentionMap, map_attention
from vitprobe.tracing.capture import capture
from vitprobe.tracing.failures import forward_failure
from vitprobe.tracing.layers import Layer, LayerMap, map_layers
from vitprobe.tracing.places import Places, find_places

Sums = dict[str, Tensor]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Batch:
    """One batch: ``inputs[i]`` (n, C, H, W) for model i, on the device and in its precision."""

    index: int
    inputs: list[Tensor]
    positions: np.ndarray
    # Grams of layers in the undisturbed pass, by model and label: formed once, whoever asks.
    _grams: dict[tuple[int, str], Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.positions)

    def of(self, chosen: Sequence[int]) -> Batch:
        """The batch for some of the models."""
        return replace(self, inputs=[self.inputs[i] for i in chosen])

    def gram(self, model: Model, layer: Layer, tensor: Tensor) -> Tensor:
        """The Gram of a layer in the undisturbed pass of a model; see ``statistics.hsic.gram``."""
        key = id(model), layer.label
        if key not in self._grams:
            self._grams[key] = gram(tensor)
        return self._grams[key]


class Session:
    """Models and images, ready on a device; made by ``session``."""

    def __init__(
        self, models: list[Model], images: Images, options: Options, at_least: int = 1
    ) -> None:
        self.models, self.images, self.options = models, images, options
        self.device = resolve_device(options.device)
        own = images.batches
        self.batches = (
            even_batches(len(images), options.batch_size, at_least) if own is None else list(own)
        )
        # Whether a caller makes other measurements where one fails.
        self.goes_on = False
        self.broken: list[str] = []
        self.skipped: list[str] = []
        # For each model, whether it gets its inputs so.
        self.channels_last = [False] * len(models)
        self._dataset = TransformedImages(models, images)
        self._example: list[Tensor] = []
        self._found: dict[tuple[str, int], Any] = {}
        self._types: dict[int, torch.dtype] = {}

    def subset(self, chosen: Sequence[int]) -> Session:
        """The session for some of its models, with the same batches and what is found already."""
        part = copy.copy(self)
        part.models = [self.models[i] for i in chosen]
        part.channels_last = [self.channels_last[i] for i in chosen]
        if self._example:
            part._example = [self._example[i] for i in chosen]
        part._dataset = TransformedImages(part.models, self.images)
        return part

    def on(self, images: Images) -> Session:
        """The session on other images, of which nothing is kept on disk."""
        part = copy.copy(self)
        part.images, part.broken, part.skipped = images, [], []
        part.options = replace(self.options, num_images=None, checkpoint=None)
        part.batches = even_batches(len(images), self.options.batch_size)
        part._dataset = TransformedImages(self.models, images)
        return part

    def example(self, count: int = 2) -> list[Tensor]:
        """The first ``count`` readable images, for each model."""
        if count == 2 and self._example:
            return self._example
        found: list[tuple[int, list[Tensor]]] = []
        for position in range(len(self.images)):
            item = self._dataset[position]
            if isinstance(item, Failure):
                if item.stops:
                    raise VitprobeError(item.stops)
                reason = item.reason
            else:
                found.append((position, item))
            if len(found) == count:
                break
        if not found:
            raise VitprobeError(f"No image of {self.images.source} can be read: {reason}")
        while len(found) < count:
            found.append(found[-1])
        return self._to_models(self._dataset.stacked(found))

    def keep_example(self) -> None:
        """From here on the example stays as it is, in its layout."""
        self._example = self.example()

    def layers(self, m: int) -> LayerMap:
        """The layers of a model, found in passes of the example."""
        new = ("layers", id(self.models[m])) not in self._found
        found = self._once("layers", m, map_layers)
        if new and found.remark and processes.is_main_process():
            print(f"vitprobe: {found.remark}", file=sys.stderr)
        return found

    def places(self, m: int, layers: Sequence[Layer]) -> list[Places | str]:
        """The grid of each of a model's layers, or why it has none; found once for each."""
        model = self.models[m]
        known: dict[str, Places | str] = self._found.setdefault(("places", id(model)), {})
        new = [layer for layer in layers if layer.label not in known]
        if new:
            with self.autocast():
                found = find_places(model.module, new, self.example()[m])
            known.update(zip((layer.label for layer in new), found))
        return [known[layer.label] for layer in layers]

    def attention(self, m: int) -> AttentionMap:
        """The attention layers of a model, found in passes of the example.

        Raises:
            NotApplicable: the places of its tokens cannot be followed.
        """
        return self._once("attention", m, map_attention)

    def capture(
        self, m: int, layers: Sequence[Layer], reduce: Callable[[int, Tensor], None]
    ) -> AbstractContextManager[None]:
        """Within it, passes of a model hand its layers to ``reduce``; see ``tracing.capture``."""
        return capture(self.models[m].module, layers, reduce)

    def _once(self, what: str, m: int, find: Callable[[str, Any, Tensor], Found]) -> Found:
        model = self.models[m]
        key = what, id(model)
        if key not in self._found:
            try:
                with self.autocast():
                    self._found[key] = find(model.name, model.module, self.example()[m])
            except VitprobeError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, VitprobeError):
            raise found
        return found

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that was asked for, as a context around forward passes."""
        if self.options.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def forward(self, m: int, batch: Batch) -> Any:
        """A forward pass of a model on its part of a batch."""
        with self.autocast():
            return self.models[m].module(batch.inputs[m])

    def sums(self, **shapes: Sequence[int]) -> Sums:
        """Named float64 sums at zero; on the device, unless it has no float64."""
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        return {
            name: torch.zeros(tuple(shape), dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }

    def fingerprint(self) -> dict[str, Any]:
        """What decides a result in every measurement."""
        options = self.options
        return {
            "models": [model.provenance() for model in self.models],
            "images": [self.images.digest, self.images.version],
            "batch_size": options.batch_size,
            "precision": options.precision,
            "device": self.device.type,
            "seed": options.seed,
            "versions": versions(),
        }

    def meta(self, analysis: str) -> dict[str, Any]:
        """The provenance that goes into a result file."""
        skipped = {"skipped": self.skipped} if self.skipped else {}
        return {
            **models_meta(analysis, self.models, self.options.seed),
            "images": {
                "source": self.images.source,
                "sha256": self.images.digest,
                "broken": self.broken,
                **skipped,
            },
            "n": len(self.images) - len(self.broken) - len(self.skipped),
            "batch_size": self.options.batch_size,
            "precision": self.options.precision,
            "device": self.device.type,
        }

    def load(self, todo: list[int]) -> Iterator[tuple[Batch, list[tuple[int, Failure]]]]:
        """These batches in turn, and the images of each that could not be read."""
        workers = self.workers(len(todo))
        loaded = batches(
            self._dataset,
            [self.batches[b].tolist() for b in todo],
            workers,
            pin=self.device.type == "cuda",
        )
        for index, (columns, positions, failures) in zip(todo, loaded):
            yield Batch(index, self._to_models(columns), positions), failures

    def workers(self, batches: int) -> int:
        """How many processes decode images for so many batches."""
        if self.options.workers is not None:
            return self.options.workers
        if self.images.workers is not None:
            return self.images.workers
        if self.images.are_tensors or batches < 2:
            return 0
        # Not all processors of a shared machine are this process's, nor this process's alone.
        mine = getattr(os, "sched_getaffinity", None)
        usable = len(mine(0)) if mine else os.cpu_count() or 1
        return min(8, max(1, usable // 2 // processes.on_this_machine()))

    def _to_models(self, columns: list[Tensor]) -> list[Tensor]:
        inputs: list[Tensor] = []
        if not columns:
            # Not one image of the batch could be read.
            return inputs
        groups = self._dataset.group_of_model
        for model, group, last in zip(self.models, groups, self.channels_last):
            if id(model) not in self._types:
                with self.autocast():
                    image = columns[group][:1].to(self.device)
                    self._types[id(model)] = input_type(model.module, image)
            dtype = self._types[id(model)]
            layout = torch.channels_last if last else torch.preserve_format
            column = columns[group].to(self.device, dtype, non_blocking=True)
            inputs.append(column.to(memory_format=layout))
        return inputs


@contextmanager
def session(
    models: Any,
    images: Any = None,
    options: Options | None = None,
    *,
    at_least: int = 1,
    lay_out: bool = True,
) -> Iterator[Session]:
    """Models and images made ready; modules get back their modes and device at the end.

    Args:
        models: see ``load_models``.
        images: see ``open_images``.
        options: defaults if None.
        at_least: images that the measurement needs in a batch.
        lay_out: run convolutions in the layout in which their forward passes are fast.

    Raises:
        VitprobeError: fewer images than ``at_least``, or a model that has no transform for them.
    """
    options = options or Options()
    loaded = ready_models(models, options)
    with told(loaded, options):
        opened = open_images(images, options.num_images, options.seed)
        if opened.batches is not None:
            options = replace(options, batch_size=max(map(len, opened.batches)))
        _check_fit(loaded, opened, at_least)
        ready = Session(loaded, opened, options, at_least)
        modules = [model.module for model in loaded]
        with (
            prepared(modules, ready.device),
            exact(ready.device),
            channels_last(modules if lay_out else [], ready.device, ready.example) as taken,
        ):
            ready.channels_last = taken or ready.channels_last
            ready.keep_example()
            yield ready


def ready_models(models: Any, options: Options) -> list[Model]:
    """The models of a session; see ``load_models``."""
    with told([], options):
        return load_models(models, options.image_size, options.seed, options.names)


@contextmanager
def told(models: list[Model], options: Options) -> Iterator[None]:
    """Within it, memory that runs out and what a forward pass raises become one line.

    Raises:
        VitprobeError: that line.
    """
    try:
        yield
    except VitprobeError:
        raise
    except BaseException as error:
        line = _told(error, models, options)
        if line is None:
            raise
        raise line from error


def _check_fit(models: list[Model], images: Images, at_least: int) -> None:
    """Say what is to be said of the images, and refuse what models cannot be given."""
    if processes.is_main_process():
        for remark in images.remarks:
            print(f"vitprobe: {remark}", file=sys.stderr)
    if len(images) < at_least:
        raise VitprobeError(
            f"{len(images)} image{'s' * (len(images) != 1)} of {images.source} are too few: "
            f"at least {at_least} are needed."
        )
    for model in models:
        if model.transform is None and not images.are_tensors:
            raise VitprobeError(
                f"{model.name} has no transform: pass wrap(module, transform=...), or the images "
                f"as a float tensor (n, C, H, W)."
            )


def _told(error: BaseException, models: list[Model], options: Options) -> VitprobeError | None:
    """What a user can do about an exception outside of the loop, where there is something."""
    if ran_out(error):
        names = " and ".join(model.name for model in models)
        named = f" (models: {names})" if names else ""
        line = memory.out_of_memory(resolve_device(options.device), options.batch_size)
        kept = options.checkpoint
        saved = isinstance(kept, UntilWritten) and kept.saved()
        return VitprobeError(f"{line}{named}." + (RESUME if saved else ""))
    return forward_failure(error, [(model.name, model.module) for model in models])


def even_batches(n: int, batch_size: int, at_least: int = 1) -> list[np.ndarray]:
    """Positions of each batch, as many in one as in another.

    Estimates of a few images are noisy, and sums over batches count every batch alike: 100 images
    as 32 + 32 + 32 + 4 have a CKA with more than twice the error of 4 × 25. Only where even
    batches would be under ``at_least`` are all but the last full.
    """
    count = -(-n // batch_size)
    if n // count >= at_least:
        return np.array_split(np.arange(n), count)
    return np.split(np.arange(n), range(batch_size, n, batch_size))
