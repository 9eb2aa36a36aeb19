"""Measurements on features that were computed before: stored rows in place of forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.images.arrays import checked_labels
from vitprobe.images.sources import Images
from vitprobe.models.loading import Model
from vitprobe.running.features import Source, from_plain, open_features
from vitprobe.running.measurement import Measurement, check_batch_size
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_prepared
from vitprobe.running.session import Batch, Session
from vitprobe.tracing.attention_map import AttentionMap
from vitprobe.tracing.layers import Layer, LayerMap
from vitprobe.tracing.places import Places
from vitprobe.tracing.trace import Trace

# What options of a run mean nothing where no model runs.
WITHOUT_MODELS = ("image_size", "precision", "workers", "checkpoint", "save_every", "fresh")


def measure_features(
    measurement: Measurement,
    features: Any,
    options: Options,
    *,
    labels: Any = None,
    in_order: bool = False,
    vectors: bool = False,
) -> Any:
    """The result of a measurement that needs features alone.

    Args:
        measurement: watches layers through ``Session.capture``.
        features: see ``running.features.open_features``.
        options: those of ``WITHOUT_MODELS`` do not count.
        labels: (n,) the class of each image, where the features have none with them.
        in_order: take the images as they come, not in an order of the seed. What ``vitprobe
            extract`` wrote comes in a seeded order.
        vectors: whether one vector an image will do for a layer.

    Raises:
        VitprobeError: features of other images, in another order or number; not finite.
    """
    options = replace(options, **{name: getattr(Options(), name) for name in WITHOUT_MODELS})
    sources = _named(open_features(features), options.names)
    images = _images(sources, labels, options, in_order)
    if len(images) < measurement.at_least:
        raise VitprobeError(
            f"The features are of {len(images)} images: at least {measurement.at_least} images are "
            f"needed."
        )
    ready = StoredSession(sources, images, options, measurement.at_least, vectors)
    check_batch_size(options, measurement.at_least)
    options = replace(options, num_images=None)
    measurement, chosen, _ = measurement.on(ready.models, images, options, False)
    return measure_prepared(measurement, ready if chosen is images else ready.on(chosen))


@dataclass(frozen=True)
class _StoredModel(Model):
    """A model of which features are all there is."""

    facts: dict[str, Any] = field(default_factory=dict)

    def provenance(self) -> dict[str, Any]:
        return self.facts


class _StoredLayers(LayerMap):
    """The layers that are stored; the sets of ``--layers`` mean all of them."""

    attends: bool | None = None

    @property
    def has_attention(self) -> bool | None:  # type: ignore[override]
        """None where that is not known."""
        return self.attends

    def _everything(self) -> list[Layer]:
        return self.layers

    _blocks = _paper = _all = _everything


class StoredSession(Session):
    """Features of several models, as a session in which each pass gives stored rows."""

    def __init__(
        self, sources: list[Source], images: Images, options: Options, at_least: int, vectors: bool
    ) -> None:
        models: list[Model] = [
            _StoredModel(
                source.name, nn.Identity(), origin=source.provenance()["weights"],
                facts=source.provenance(),
            )
            for source in sources
        ]  # fmt: skip
        super().__init__(models, images, options, at_least)
        self.sources, self.one_vector = dict(zip(map(id, models), sources)), vectors
        self._maps = {id(model): _layers(self.source(m)) for m, model in enumerate(models)}
        self._watching: dict[int, list[tuple[Sequence[Layer], Callable[[int, Tensor], None]]]] = {}

    def source(self, m: int) -> Source:
        return self.sources[id(self.models[m])]

    def layers(self, m: int) -> LayerMap:
        return self._maps[id(self.models[m])]

    def attention(self, m: int) -> AttentionMap:
        raise NotApplicable(f"The features of {self.models[m].name} hold no attention.")

    def places(self, m: int, layers: Sequence[Layer]) -> list[Places | str]:
        return [self._places(self.source(m), layer.label) for layer in layers]

    def _places(self, source: Source, label: str) -> Places | str:
        shape = source.layers[label].shape[1:]
        if len(shape) == 1:
            if not self.one_vector or source.readout == "all":
                return f"{shape[0]} features an image were stored"
            of_class = source.readout == "class"
            return Places(np.array([[0]]), (1,), (1,), shape[0], (0,) * of_class, of_class)
        if source.readout == "tokens":
            rows, columns, width = shape
            order = np.arange(rows * columns).reshape(rows, columns)
            return Places(order, (1, 2), (rows, columns), width)
        facts = source.about(label).get("places")
        if facts:
            return from_plain(facts)
        size = " × ".join(map(str, shape))
        if source.readout:
            return f"an image's part of it is {size}"
        raise VitprobeError(
            f"The features {label} of {source.name} are {size} an image, and nothing says where in "
            f"the image they stand. Give one vector an image (n, features): their mean, say."
        )

    @contextmanager
    def _capture(
        self, m: int, layers: Sequence[Layer], reduce: Callable[[int, Tensor], None]
    ) -> Iterator[None]:
        mine = self._watching.setdefault(id(self.models[m]), [])
        mine.append((layers, reduce))
        try:
            yield
        finally:
            mine.pop()

    def capture(
        self, m: int, layers: Sequence[Layer], reduce: Callable[[int, Tensor], None]
    ) -> AbstractContextManager[None]:
        return self._capture(m, layers, reduce)

    def forward(self, m: int, batch: Batch) -> None:
        source, rows = self.source(m), self.images.order[batch.positions]
        for layers, reduce in self._watching.get(id(self.models[m]), ()):
            for i, layer in enumerate(layers):
                reduce(i, _rows(source, layer.label, rows).to(self.device))

    def meta(self, analysis: str) -> dict[str, Any]:
        known = next((one.meta for one in self.sources.values() if one.meta.get("images")), {})
        return {
            **super().meta(analysis),
            "images": known.get("images", {"source": "given features"}),
            "precision": known.get("precision", "features"),
        }


def _rows(source: Source, label: str, rows: np.ndarray) -> Tensor:
    """These rows of a layer; memory maps are read in the order of the file."""
    by_place = np.argsort(rows)
    values = np.asarray(source.layers[label][rows[by_place]])[np.argsort(by_place)]
    # torch has numbers of this machine's byte order only.
    tensor = torch.from_numpy(np.ascontiguousarray(values, values.dtype.newbyteorder("=")))
    tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
    if not torch.isfinite(tensor).all():
        raise VitprobeError(f"The features {label} of {source.name} are not finite.")
    return tensor[:, None] if tensor.ndim == 2 else tensor


def _named(sources: list[Source], names: str | Sequence[str] | None) -> list[Source]:
    if names is None:
        return sources
    names = [names] if isinstance(names, str) else list(names)
    if len(names) != len(sources) or len(set(names)) < len(names):
        raise VitprobeError(
            f"--names: expected {len(sources)} different names, one for the features of each model."
        )
    return [replace(source, name=name) for source, name in zip(sources, names)]


def _images(sources: list[Source], labels: Any, options: Options, in_order: bool) -> Images:
    """The images that the features are of: their number, names, classes and order."""
    known = next((one for one in sources if one.meta.get("image_names")), sources[0])
    n = len(next(iter(known.layers.values())))
    found, classes = next((one.labels for one in sources if one.labels[0] is not None), (None, ()))
    if labels is not None:
        found, classes = checked_labels(labels, n, "the features")
    order = np.arange(n)
    if not in_order and not all(source.readout for source in sources):
        order = np.random.default_rng(options.seed).permutation(n)
    if options.num_images is not None:
        if not 1 <= options.num_images <= n:
            raise VitprobeError(
                f"--num-images: the features are of {n} images, not {options.num_images}."
            )
        order = order[: options.num_images]
    about = known.meta.get("images", {})
    return Images(
        about.get("source", "given features"),
        _NoPixels(),
        order,
        about.get("sha256", ""),
        names=known.meta.get("image_names"),
        labels=found,
        classes=classes,
    )


@dataclass(frozen=True)
class _NoPixels:
    """Stands where images do; nobody looks at it."""

    tensors: bool = True

    def __getitem__(self, index: int) -> Tensor:
        return torch.zeros(1, 1, 1)


def _layers(source: Source) -> LayerMap:
    layers = [
        Layer(name, time, name, shape=tuple(source.about(name).get("of_image", array.shape[1:])))
        for time, (name, array) in enumerate(source.layers.items())
    ]
    found = _StoredLayers(source.name, layers, [], Trace([], [], [], []), [], {}, {}, {})
    object.__setattr__(found, "attends", source.attends)
    return found
