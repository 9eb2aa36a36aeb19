"""A DataLoader as images: its own batches in its own order, as its collate function makes them.

Which images are in a batch is asked of the loader once. A batch is then made where it is needed,
so that every model sees the same one, a run can be resumed, and processes share the batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from vitprobe.errors import VitprobeError, describe, is_error
from vitprobe.images.datasets import KEYS, image_of, plain_repr

_SHUFFLES = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# Batches that stand for all in a digest.
_SAMPLED = 4


class LoaderSource:
    """The images of a DataLoader, by their number in the order in which it gives them.

    Args:
        loader: over a map-style dataset, in batches, in an order that does not change.

    Attributes:
        batches: (number of images in it,) positions of each batch.
        tensors: whether it gives float tensors, which go to every model as they are.

    Raises:
        VitprobeError: it shuffles, has no batches of its own, or gives no images.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.dataset: Any = loader.dataset
        self.collate: Any = loader.collate_fn
        self.indices = _indices(loader)
        ends = np.cumsum([len(some) for some in self.indices])
        self.batches = tuple(np.split(np.arange(ends[-1]), ends[:-1]))
        self._ends = ends
        self._made: tuple[int, Sequence[Any]] = (-1, ())
        try:
            self.tensors = isinstance(self[0], Tensor)
        except BaseException as error:
            if not is_error(error):
                raise
            reason = str(error) if isinstance(error, ValueError) else describe(error)
            raise VitprobeError(
                f"The first batch of a DataLoader holds no images: {reason}"
            ) from error

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, position: int) -> Image.Image | Tensor:
        number = int(np.searchsorted(self._ends, position, side="right"))
        if self._made[0] != number:
            self._made = number, self._batch(number)
        return image_of(self._made[1][position - int(self.batches[number][0])])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": (-1, ())}

    def _batch(self, number: int) -> Sequence[Any]:
        chosen = self.indices[number]
        together = getattr(self.dataset, "__getitems__", None)
        items = together(chosen) if together else [self.dataset[index] for index in chosen]
        rows = _rows(self.collate(items), len(chosen))
        if len(rows) != len(chosen):
            raise ValueError(
                f"its collate function gives {len(rows)} images for {len(chosen)} of its dataset"
            )
        return rows

    def flat(self) -> np.ndarray:
        """(n,) which item of the dataset each image is."""
        return np.array([index for some in self.indices for index in some])

    def digest(self) -> str:
        """sha256 of which items make the batches, and of the images of a few."""
        text = f"{plain_repr(self.dataset)} {self.indices}"
        digest = hashlib.sha256(text.encode(errors="replace"))
        count = len(self.batches)
        for number in np.unique(np.linspace(0, count - 1, min(count, _SAMPLED)).astype(int)):
            for position in self.batches[number].tolist():
                try:
                    image = self[position]
                except BaseException as error:
                    if not is_error(error):
                        raise
                    # It is told when its turn comes.
                    digest.update(type(error).__name__.encode())
                    break
                array = image.float().numpy() if isinstance(image, Tensor) else np.asarray(image)
                digest.update(f"{array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def _indices(loader: DataLoader) -> list[list[Any]]:
    """The items of each batch."""
    if isinstance(loader.dataset, IterableDataset):
        raise VitprobeError(
            "A DataLoader over an IterableDataset has no fixed order: give one over a dataset with "
            "__len__ and __getitem__."
        )
    if loader.batch_sampler is None:
        raise VitprobeError("A DataLoader with batch_size=None has no batches: give it one.")
    samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        raise VitprobeError(
            "A DataLoader with a DistributedSampler gives each process other images, and vitprobe "
            "shares out the batches itself: give one without."
        )
    shuffles = any(isinstance(sampler, _SHUFFLES) for sampler in samplers)
    found = [] if shuffles else [list(some) for some in loader.batch_sampler]
    if shuffles or found != [list(some) for some in loader.batch_sampler]:
        raise VitprobeError(
            "The DataLoader shuffles, and all models and a resumed run must see the same images in "
            "the same order: give it shuffle=False, or its dataset (loader.dataset)."
        )
    found = [some for some in found if some]
    if not found:
        raise VitprobeError("There are no images in a DataLoader.")
    return found


def _rows(batch: Any, count: int) -> Any:
    """What a batch holds of each of its images, alone or with more."""
    if isinstance(batch, Mapping):
        key = next((key for key in KEYS if key in batch), None)
        if key is None:
            raise ValueError(f"a dict with {', '.join(map(str, batch))}, without {KEYS[0]!r}")
        return batch[key]
    if isinstance(batch, (list, tuple)) and batch and _is_stack(batch[0], count):
        return batch[0]
    if isinstance(batch, (list, tuple)) and batch and len(batch) != count:
        first = batch[0]
        what = type(first).__name__
        if isinstance(first, Tensor):
            what = f"tensor of {first.dtype} {tuple(first.shape)}"
        raise ValueError(f"a {type(batch).__name__} that begins with a {what}")
    if isinstance(batch, (list, tuple, Tensor, np.ndarray)):
        return batch
    raise ValueError(f"a {type(batch).__name__}")


def _is_stack(first: Any, count: int) -> bool:
    """Whether this is all images of a batch, rather than one image (with its label)."""
    if isinstance(first, (Tensor, np.ndarray)):
        return first.ndim == 4 or (first.ndim == 3 and len(first) == count and _is_grey(first))
    if not isinstance(first, (list, tuple)) or len(first) != count:
        return False
    return all(isinstance(one, (Image.Image, Tensor, np.ndarray)) for one in first) and not any(
        isinstance(one, (Tensor, np.ndarray)) and one.ndim < 2 for one in first
    )


def _is_grey(first: Any) -> bool:
    """A stack of grey uint8 images (n, H, W), not one image (C, H, W) or (H, W, C)."""
    byte = first.dtype in (torch.uint8, np.uint8)
    return byte and first.shape[0] not in (1, 3) and first.shape[-1] not in (1, 3)
