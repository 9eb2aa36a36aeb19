"""Lists and map-style datasets as images: what an item holds, and a digest of them."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from vitprobe.errors import VitprobeError, describe, is_error
from vitprobe.images.arrays import by_position
from vitprobe.images.decoding import decoded, rgb

# Where datasets of the usual libraries keep the image of an item.
KEYS = ("image", "pixel_values", "img", "jpg", "png")
# And its class.
LABELS = ("label", "labels", "fine_label")
# So many items, evenly spread, stand for a dataset that would take a pass to read whole.
SAMPLED = 16


class ItemSource:
    """Images of a list or of a map-style dataset.

    Args:
        items: of PIL images, uint8 arrays (H, W, 3) or (H, W), float tensors (C, H, W) that go to
            every model as they are, or paths; alone, first in a tuple, or in a dict.
        what: what messages call it.

    Attributes:
        tensors: whether the first item is a float tensor; all must then be.

    Raises:
        VitprobeError: no items, or the first one is no image.
    """

    def __init__(self, items: Any, what: str) -> None:
        self.items, self.what = items, what
        try:
            count = len(items)
        except BaseException as error:
            if not is_error(error):
                raise
            # What a sequence or no sequence says is plain; others raise anything.
            plain = isinstance(error, TypeError | ValueError)
            reason = str(error) if plain else describe(error)
            raise VitprobeError(f"How many images {what} holds is not clear: {reason}.") from error
        if not count:
            raise VitprobeError(f"There are no images in {what}.")
        try:
            self.tensors = isinstance(image_of(items[0]), Tensor)
        except BaseException as error:
            if not is_error(error):
                raise
            reason = str(error) if isinstance(error, ValueError) else describe(error)
            raise VitprobeError(f"The first item of {what} is not an image: {reason}") from error

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Image.Image | Tensor:
        image = image_of(self.items[index])
        if isinstance(image, Tensor) != self.tensors:
            kinds = ("a float tensor", "another kind of image")
            raise ValueError(
                f"{kinds[not isinstance(image, Tensor)]}, where the first item is "
                f"{kinds[not self.tensors]}"
            )
        return image

    def digest(self, every: bool) -> str:
        """sha256 of the items: of all of them, or of a few and of what the dataset says."""
        count = len(self.items)
        chosen = (
            range(count) if every else np.linspace(0, count - 1, min(count, SAMPLED)).astype(int)
        )
        said = "" if every else plain_repr(self.items)
        digest = hashlib.sha256(f"{count} {said}".encode(errors="replace"))
        for index in chosen:
            try:
                image = image_of(self.items[int(index)])
            except BaseException as error:
                if not is_error(error):
                    raise
                # It is told when its turn comes.
                digest.update(f"{type(error).__name__}".encode())
                continue
            array = image.float().numpy() if isinstance(image, Tensor) else np.asarray(image)
            digest.update(f"{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


class TableSource:
    """Images of a table of Hugging Face's ``datasets``, decoded here and not by it.

    Args:
        table: rows with an image, decoded or as ``{"bytes": ..., "path": ...}``.
        name: what messages call it.

    Raises:
        VitprobeError: it has no column of images.
    """

    def __init__(self, table: Any, name: str) -> None:
        # timm's reader adds an empty column of the name that it expects.
        first = table[0]
        column = next((key for key in KEYS if first.get(key) is not None), None)
        if column is None:
            raise VitprobeError(f"{name} has no images under {', '.join(KEYS)}: it has "
                                f"{', '.join(first)}.")  # fmt: skip
        self.table, self.column = table.select_columns([column]), column
        if column != "image":
            as_they_are = type(table.features[column])(decode=False)
            self.table = self.table.cast_column(column, as_they_are)

    def __getitem__(self, index: int) -> Image.Image:
        held = self.table[int(index)][self.column]
        if isinstance(held, Image.Image):
            return rgb(held)
        return decoded(io.BytesIO(held["bytes"]) if held.get("bytes") else Path(held["path"]))


def plain_repr(thing: Any) -> str:
    """What something says of itself, without where it lies in memory."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(thing))


def image_of(item: Any) -> Image.Image | Tensor:
    """The image in an item: PIL in RGB, or a float tensor (C, H, W) as it is.

    Raises:
        ValueError: there is none.
    """
    if isinstance(item, Mapping):
        key = next((key for key in KEYS if key in item), None)
        if key is None:
            raise ValueError(f"a dict with {', '.join(map(str, item))}, without {KEYS[0]!r}")
        item = item[key]
    elif isinstance(item, tuple | list) and item:
        item = item[0]
    if isinstance(item, str | Path):
        return decoded(Path(item))
    if isinstance(item, Image.Image):
        return rgb(item)
    if isinstance(item, Tensor):
        check_plain(item)
        return _from_tensor(item.detach().cpu())
    if isinstance(item, np.ndarray):
        return _from_array(item)
    raise ValueError(f"a {type(item).__name__}")


def check_plain(tensor: Tensor) -> None:
    """Raise where a tensor does not hold the values of its pixels one by one.

    Raises:
        ValueError: a sparse one, one without values, one of complex numbers.
    """
    if tensor.layout != torch.strided:
        raise ValueError(f"a sparse tensor of {tuple(tensor.shape)}")
    if tensor.is_meta:
        raise ValueError(f"a tensor of {tuple(tensor.shape)} without values (on meta)")
    if tensor.is_complex():
        raise ValueError(f"a tensor of {tensor.dtype} {tuple(tensor.shape)}")


def _from_tensor(tensor: Tensor) -> Image.Image | Tensor:
    if tensor.ndim == 3 and tensor.is_floating_point():
        return tensor
    if tensor.ndim == 3 and tensor.dtype == torch.uint8 and tensor.shape[0] in (1, 3):
        return _from_array(tensor.permute(1, 2, 0).numpy())
    if tensor.dtype == torch.uint8 and (tensor.ndim == 2 or tensor.shape[-1:] in ((1,), (3,))):
        return _from_array(tensor.numpy())
    raise ValueError(f"a tensor of {tensor.dtype} {tuple(tensor.shape)}, not float (C, H, W)")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)
    ):
        raise ValueError(f"an array of {array.dtype} {array.shape}, not uint8 (H, W, 3) or (H, W)")
    if not array.size:
        # Older versions of Pillow have words of their own for it.
        raise ValueError(f"{array.shape[1]} × {array.shape[0]} pixels are no image")
    return rgb(Image.fromarray(array))


def labels_of(dataset: Any) -> tuple[Sequence[Any] | None, Sequence[str]]:
    """The labels and class names of a dataset, where they can be had without opening its images.

    Those that torchvision's and Hugging Face's datasets carry, the second tensor of a
    ``TensorDataset``, and of these through ``Subset`` and ``ConcatDataset``; None and () elsewhere.
    """
    if isinstance(dataset, Subset):
        # Subset asks for the items at its indices, whatever an index of a data frame says.
        labels, names = labels_of(dataset.dataset)
        return (None, ()) if labels is None else ([labels[i] for i in dataset.indices], names)
    if isinstance(dataset, ConcatDataset):
        parts = [labels_of(part) for part in dataset.datasets]
        if any(labels is None or names != parts[0][1] for labels, names in parts):
            return None, ()
        return [label for labels, _ in parts for label in labels or ()], parts[0][1]
    if isinstance(dataset, TensorDataset):
        rest = dataset.tensors[1:]
        return (rest[0].tolist(), ()) if rest and rest[0].ndim == 1 else (None, ())
    targets, classes = getattr(dataset, "targets", None), getattr(dataset, "classes", ())
    if targets is None:
        targets = getattr(dataset, "labels", None)  # of torchvision's STL10 and SVHN
    column = next((key for key in LABELS if key in getattr(dataset, "column_names", ())), None)
    if targets is None and column is not None:
        targets = list(dataset[column])
        classes = getattr(dataset.features[column], "names", None) or ()
    try:
        if targets is None or len(targets) != len(dataset):
            return None, ()
    except TypeError:
        return None, ()
    return by_position(targets), _distinct(classes if isinstance(classes, list | tuple) else ())


def _distinct(classes: Sequence[Any]) -> list[str]:
    """Names by which classes stay as many as they are: ImageNet has two cranes."""
    # ImageNet's classes are tuples of synonyms.
    names = [", ".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in classes]
    counts = Counter(names)
    return [f"{name} ({i})" if counts[name] > 1 else name for i, name in enumerate(names)]
