"""Features that were computed before, or elsewhere: arrays with the images along the first axis."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import VitprobeError
from vitprobe.results.provenance import command_line, versions
from vitprobe.running.session import even_batches
from vitprobe.statistics.hsic import MAX_GROUPS, gram, hsic

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
    def stages(self) -> list[tuple[int, ...]]:
        """What ``papers`` tell stages of a CNN by, for each layer."""
        return [tuple(layer["stage"]) for layer in self.meta.get("layers", {}).values()]

    def provenance(self) -> dict[str, Any]:
        """What a result says of the model."""
        known = (self.meta.get("models") or [{}])[0]
        return {**known, "name": self.name, "weights": known.get("weights", "given features")}


def open_features(given: Any) -> list[Source]:
    """Features of several models.

    Args:
        given: a mapping model -> layer -> array or tensor (n, ...); or paths, each a folder that
            ``vitprobe extract`` wrote (or one of such folders), an ``.npz`` of layers, an ``.npy``
            of one layer.

    Raises:
        VitprobeError: no such file, arrays that are none, other numbers or orders of images.
    """
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
            sources[i] = Source(f"{source.name} #{count + 1}", source.layers, source.meta)
    _check_same_images(sources)
    return sources


@dataclass(frozen=True)
class Summed:
    """HSIC₁ of all pairs of layers.

    Attributes:
        sources: the features of each model.
        labels: (layers,) names.
        owner: (layers,) number of the model.
        hsic: (groups, layers, layers) sums over batches.
        used: (groups,) batches in each.
        meta: what a result says of how it was made.
    """

    sources: list[Source]
    labels: np.ndarray
    owner: np.ndarray
    hsic: Tensor
    used: Tensor
    meta: dict[str, Any]


def summed(features: Any, batch_size: int, seed: int | None, at_least: int) -> Summed:
    """Features, batch after batch, as the passes of a model would give them.

    Args:
        features: see ``open_features``.
        batch_size: images per batch, at most.
        seed: of their order; None takes them as they come, as is done with a seeded order of
            ``vitprobe extract``.
        at_least: images that a batch needs.
    """
    sources = open_features(features)
    n = len(next(iter(sources[0].layers.values())))
    if min(n, batch_size) < at_least:
        raise VitprobeError(
            f"CKA needs batches of at least {at_least} images, not {min(n, batch_size)}."
        )
    order = np.arange(n)
    if seed is not None and not all(source.meta for source in sources):
        order = np.random.default_rng(seed).permutation(n)
    labels = [layer for source in sources for layer in source.layers]
    owner = np.repeat(np.arange(len(sources)), [len(source.layers) for source in sources])
    parts = even_batches(n, batch_size, at_least)
    groups = min(MAX_GROUPS, len(parts))
    sums = torch.zeros(groups, len(labels), len(labels), dtype=torch.float64)
    used, left_out = torch.zeros(groups, dtype=torch.float64), 0
    for index, tensors in enumerate(batches(sources, order, parts)):
        if len(parts[index]) < at_least:
            left_out += len(parts[index])
            continue
        sums[index % groups] += hsic(torch.stack([gram(tensor) for tensor in tensors]))
        used[index % groups] += 1
    about = sources[0].meta
    meta = {
        "models": [source.provenance() for source in sources],
        "seed": seed,
        "versions": versions(),
        "command": command_line(),
        "images": about.get("images", {"source": "given features"}),
        "n": n - left_out,
        "batch_size": batch_size,
        "precision": about.get("precision", "features"),
        "replicates": int((used > 0).sum()),
        "left_out": left_out,
    }
    return Summed(sources, np.array(labels), owner, sums, used, meta)


def batches(
    sources: Sequence[Source], order: np.ndarray, sizes: Sequence[np.ndarray]
) -> Iterator[list[Tensor]]:
    """All layers of all models, batch after batch: (n, ...) float tensors, images in ``order``."""
    for positions in sizes:
        rows = order[positions]
        sorted_rows = np.argsort(rows)
        back = np.argsort(sorted_rows)
        found = []
        for source in sources:
            for name, array in source.layers.items():
                # Memory maps are read in the order of the file.
                values = np.asarray(array[rows[sorted_rows]])[back]
                tensor = torch.from_numpy(np.ascontiguousarray(values))
                tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
                if not torch.isfinite(tensor).all():
                    raise VitprobeError(f"The features {name} of {source.name} are not finite.")
                found.append(tensor)
        yield found


def _arrays(model: str, layers: Any) -> dict[str, Any]:
    if not isinstance(layers, Mapping):
        layers = {"features": layers}
    found = {}
    for name, array in layers.items():
        if isinstance(array, Tensor):
            array = array.detach().cpu()
            array = (array if array.dtype == torch.float64 else array.float()).numpy()
        array = np.asanyarray(array)
        if array.ndim < 2 or array.dtype.kind not in "fiu":
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
    try:
        if path.suffix == ".npy":
            layers = {path.stem: np.load(path, mmap_mode="r", allow_pickle=False)}
        else:
            with np.load(path, allow_pickle=False) as loaded:
                layers = {name: loaded[name] for name in loaded.files}
    except Exception as error:
        raise VitprobeError(f"--features: {path} is no .npz or .npy of numbers: {error}") from error
    yield Source(path.stem, _arrays(path.stem, layers))


def _folder(folder: Path) -> Source:
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        layers = {
            name: np.load(folder / Path(layer["file"]).name, mmap_mode="r", allow_pickle=False)
            for name, layer in meta["layers"].items()
        }
        name = meta["models"][0]["name"]
    except Exception as error:
        raise VitprobeError(f"--features: {folder} is no folder of vitprobe extract.") from error
    return Source(name, _arrays(name, layers), meta)


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
