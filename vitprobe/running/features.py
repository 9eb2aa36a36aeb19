"""Features that were computed before, or elsewhere: arrays with the images along the first axis."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import VitprobeError, ran_out
from vitprobe.images.arrays import LABEL_KEYS, checked_labels
from vitprobe.results.archives import read_all
from vitprobe.tracing.places import Places

META = "meta.json"


@dataclass(frozen=True)
class Source:
    """The features of one model.

    Attributes:
        name: of the model.
        layers: name -> array (n, ...), often a memory map.
        meta: of the folder that ``vitprobe extract`` wrote, else empty.
    """

    name: str
    layers: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def attends(self) -> bool | None:
        """Whether the model has attention, where that is known."""
        return self.meta.get("attends")

    @property
    def readout(self) -> str:
        """What ``vitprobe extract`` took of each layer; empty for features of others."""
        return str(self.meta.get("readout", ""))

    @property
    def labels(self) -> tuple[np.ndarray | None, tuple[str, ...]]:
        """(n,) class indices, or None, and the names of the classes."""
        labels = self.meta.get("labels")
        return None if labels is None else np.array(labels), tuple(self.meta.get("classes", ()))

    def about(self, layer: str) -> dict[str, Any]:
        """What is known of a layer beside its array."""
        return self.meta.get("layers", {}).get(layer, {})

    def provenance(self) -> dict[str, Any]:
        """What a result says of the model."""
        known = (self.meta.get("models") or [{}])[0]
        return {**known, "name": self.name, "weights": known.get("weights", "given features")}


def open_features(given: Any) -> list[Source]:
    """Features of several models.

    Args:
        given: a mapping model -> layer -> array or tensor (n, ...); or paths, each a folder that
            ``vitprobe extract`` wrote (or one of such folders), an ``.npz`` of layers (and
            ``labels``), an ``.npy`` of one layer.

    Raises:
        VitprobeError: no such file, arrays that are none, other numbers or orders of images.
    """
    if isinstance(given, list) and given and all(isinstance(one, Source) for one in given):
        return given
    if isinstance(given, Mapping):
        sources = [Source(str(name), _arrays(str(name), one)) for name, one in given.items()]
    else:
        paths = [given] if isinstance(given, str | Path) else list(given)
        sources = [source for path in paths for source in _read(Path(path))]
    if not sources:
        raise VitprobeError("--features: no features were given.")
    names: list[str] = []
    for i, source in enumerate(sources):
        count = sum(other == source.name for other in names)
        names.append(source.name)
        if count:
            sources[i] = replace(source, name=f"{source.name} #{count + 1}")
    _check_same_images(sources)
    return sources


def as_plain(places: Places | str | None) -> dict[str, Any] | None:
    """Where the vectors of a layer stand, as plain values; None where they have no grid."""
    if not isinstance(places, Places):
        return None
    order = places.order.ravel()
    row_by_row = np.array_equal(order, np.arange(order[0], order[0] + order.size))
    return {
        "grid": [places.rows, places.columns],
        "order": int(order[0]) if row_by_row else order.tolist(),
        "axes": list(places.axes),
        "lengths": list(places.lengths),
        "features": places.features,
        "without_place": list(places.without_place),
        "has_class": places.has_class,
    }


def from_plain(facts: Mapping[str, Any]) -> Places:
    """The inverse of ``as_plain``."""
    rows, columns = facts["grid"]
    order = facts["order"]
    if isinstance(order, int):
        order = range(order, order + rows * columns)
    return Places(
        np.array(order).reshape(rows, columns),
        tuple(facts["axes"]),
        tuple(facts["lengths"]),
        facts["features"],
        tuple(facts["without_place"]),
        facts["has_class"],
    )


def _arrays(model: str, layers: Any) -> dict[str, Any]:
    if not isinstance(layers, Mapping):
        layers = {"features": layers}
    found = {}
    for name, array in layers.items():
        if isinstance(array, Tensor):
            array = array.detach().cpu()
            array = (array if array.dtype == torch.float64 else array.float()).numpy()
        array = np.asanyarray(array)
        if array.ndim < 2 or array.dtype.kind not in "fiu" or 0 in array.shape[1:]:
            raise VitprobeError(
                f"The features {name} of {model} must be numbers (n, ...), not {array.dtype} "
                f"{array.shape}."
            )
        found[str(name)] = array
    if not found:
        raise VitprobeError(f"--features: {model} has no layers.")
    return found


def _read(path: Path) -> Iterator[Source]:
    if path.is_dir():
        folders = (
            [path] if (path / META).is_file() else sorted(p.parent for p in path.glob(f"*/{META}"))
        )
        if not folders:
            raise VitprobeError(
                f"--features: {path} holds no finished folder of vitprobe extract ({META})."
            )
        for folder in folders:
            yield _folder(folder)
        return
    if not path.is_file():
        raise VitprobeError(f"--features: no such file or folder: {str(path)!r}.")
    meta: dict[str, Any] = {}
    try:
        if path.suffix == ".npy":
            layers = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            layers = read_all(path)
    except VitprobeError:
        raise
    except Exception as error:
        if ran_out(error):
            raise
        raise VitprobeError(f"--features: {path} is no .npz or .npy of numbers: {error}") from error
    key = next((key for key in LABEL_KEYS if key in layers and _are_labels(layers[key])), None)
    if key is not None and len(layers) > 1:
        given = layers.pop(key)
        count = len(next(iter(_arrays(path.stem, layers).values())))
        labels, classes = checked_labels(given, count, str(path))
        meta = {"labels": labels.tolist(), "classes": list(classes)}
    yield Source(path.stem, _arrays(path.stem, layers), meta)


def _are_labels(array: np.ndarray) -> bool:
    """Whether an array under the name of labels is one: two layers may well be called x and y."""
    wide = array.ndim > 1 and array.shape[1:] != (1,)
    return not (wide and array.dtype.kind == "f")


def _folder(folder: Path) -> Source:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        layers = {
            name: np.load(folder / Path(layer["file"]).name, mmap_mode="r", allow_pickle=False)
            for name, layer in meta["layers"].items()
        }
        name = meta["models"][0]["name"]
        _check_meta(meta, layers)
    except Exception as error:
        if ran_out(error):
            raise
        raise VitprobeError(f"--features: {folder} is no folder of vitprobe extract.") from error
    return Source(name, _arrays(name, layers), meta)


def _check_meta(meta: Mapping[str, Any], layers: Mapping[str, np.ndarray]) -> None:
    """See that what a folder says of itself is what ``vitprobe extract`` writes.

    Raises:
        Exception: it is not.
    """
    n = len(next(iter(layers.values())))
    about, model = meta.get("images", {}), meta["models"][0]
    texts = [model["name"], model.get("weights", ""), meta.get("readout", "")]
    texts += [about.get("source", ""), about.get("sha256", "").encode("ascii").decode()]
    names, labels, classes = meta.get("image_names"), meta.get("labels"), meta.get("classes", [])
    if not all(isinstance(one, str) for one in (*texts, *(names or ()), *classes)):
        raise TypeError("names are text")
    counted = [one for one in (names, labels) if one is not None]
    if not all(isinstance(one, list) and len(one) == n for one in counted):
        raise ValueError("one for each image is needed")
    # Images directly in the root of a folder of class folders have none: -1.
    if not set(labels or ()) <= set(range(-1, len(classes))) or not isinstance(classes, list):
        raise ValueError("labels are indices into the classes")
    for layer, array in layers.items():
        facts = meta["layers"][layer]
        if list(array.shape) != facts.get("shape", list(array.shape)):
            raise ValueError(f"{layer} has another shape")
        if not all(isinstance(size, int) for size in facts.get("of_image", ())):
            raise TypeError("sizes are whole numbers")
        if facts.get("places"):
            from_plain(facts["places"])


def _check_same_images(sources: Sequence[Source]) -> None:
    first = sources[0]
    counts = {name: len(array) for name, array in first.layers.items()}
    n = next(iter(counts.values()))
    for source in sources:
        for name, array in source.layers.items():
            if len(array) != n:
                raise VitprobeError(
                    f"The features {name} of {source.name} are of {len(array)} images, those of "
                    f"{first.name} of {n}."
                )
        mine, theirs = (one.meta.get("image_names") for one in (source, first))
        if mine and theirs and mine != theirs:
            at = next((i for i, pair in enumerate(zip(mine, theirs)) if pair[0] != pair[1]), 0)
            raise VitprobeError(
                f"The features of {source.name} and {first.name} are of other images, or in "
                f"another order: image {at} is {mine[at]!r} and {theirs[at]!r}."
            )
