"""Images and labels in ``.npz`` and ``.npy`` files: which array is which, checked before use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from vitprobe.errors import VitprobeError, describe
from vitprobe.images.folders import shown_classes
from vitprobe.results.archives import Declared, declared, header, memory, refuse_objects

IMAGE_KEYS = ("images", "x", "data", "arr_0")
LABEL_KEYS = ("labels", "y", "targets", "label", "target")
EXPECTED = "uint8 (n, H, W, 3), or (n, H, W) for grey ones"


def read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None, str, str]:
    """The images in a file and their labels.

    Returns:
        the images, the labels or None, what the images are called, and why there are no labels
        where the file has something that may have been meant as such.

    Raises:
        VitprobeError: it cannot be read, or which array holds the images cannot be told.
    """
    if not path.is_file():
        raise VitprobeError(f"{path} is not a regular file.")
    try:
        if path.suffix.lower() == ".npy":
            return _npy(path), None, path.name, ""
        return _npz(path)
    except VitprobeError:
        raise
    except MemoryError:
        raise VitprobeError(f"{path} holds more than fits into memory.") from None
    except Exception as error:
        # Readers of damaged files raise anything; whatever it is, the file is the reason.
        raise VitprobeError(
            f"{path} cannot be read as arrays of images: {describe(error)}"
        ) from error


def _npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        shape, dtype, size = header(file)
    refuse_objects(dtype)
    declared = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if declared > path.stat().st_size - size:
        raise VitprobeError(f"{path} ends before its {' × '.join(map(str, shape))} values do.")
    # Mapped: pages of images that nobody asks for are never read.
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _npz(path: Path) -> tuple[np.ndarray, np.ndarray | None, str, str]:
    held = declared(path)
    if not held:
        raise VitprobeError(f"There are no arrays in {path}.")
    key = _key_of_images(path, held)
    refuse_objects(held[key].dtype)
    size = held[key].size
    if size > (memory() or size):
        raise VitprobeError(
            f"The {size / 2**30:.1f} GiB of {key!r} in {path} are more than the memory here."
        )
    with np.load(path, allow_pickle=False) as loaded:
        name = f"{path.name} ({key})"
        labels_key = next((k for k in LABEL_KEYS if k in held and k != key), None)
        if labels_key is None:
            return loaded[key], None, name, _no_labels(name, key, held)
        if held[labels_key].dtype.hasobject:
            why = f"The labels of {name} must be integers, strings or booleans, not Python objects."
            return loaded[key], None, name, why
        return loaded[key], loaded[labels_key], name, ""


def _no_labels(name: str, images: str, held: Mapping[str, Declared]) -> str:
    """Why a file has no labels, where it has other arrays; an empty string where it has none."""
    others = [f"{key} {one}" for key, one in held.items() if key != images]
    if not others:
        return ""
    return (
        f"{name} has no labels: none of {', '.join(LABEL_KEYS)} is in the file, which has "
        f"{', '.join(others)} beside the images."
    )


def _key_of_images(path: Path, held: Mapping[str, Declared]) -> str:
    known = next((key for key in IMAGE_KEYS if key in held), None)
    if known:
        return known
    alike = [key for key, one in held.items() if one.dtype == np.uint8 and len(one.shape) in (3, 4)]
    if len(alike) == 1:
        return alike[0]
    if len(held) == 1:
        return next(iter(held))  # its shape or type is told as wrong
    listed = ", ".join(f"{key} {one}" for key, one in held.items())
    raise VitprobeError(
        f"Which array of {path} holds the images is not clear: it has {listed}. Their key should "
        f"be 'images', that of their labels 'labels'."
    )


def checked_images(array: np.ndarray, label: str) -> np.ndarray:
    """The array, if it holds images: uint8 (n, H, W, 3), or (n, H, W) and (n, H, W, 1), grey.

    Raises:
        VitprobeError: another type or shape, or no images.
    """
    shape = array.shape
    good = array.ndim == 3 or (array.ndim == 4 and shape[-1] in (1, 3))
    if array.dtype != np.uint8 or not good:
        raise VitprobeError(
            f"Images in {label} must be {EXPECTED}, not {array.dtype} {shape}.{_hint(array)}"
        )
    if not array.size:
        raise VitprobeError(f"There are no images in {label}.")
    if array.ndim == 3 and shape[-1] in (1, 3, 4):
        # As grey images they would be a few pixels wide.
        raise VitprobeError(
            f"{label} is {shape}, which looks like one image: n of them are {EXPECTED}."
        )
    if np.ma.is_masked(array):
        raise VitprobeError(f"Images in {label} are masked: all of their pixels are needed.")
    return array


def _hint(array: np.ndarray) -> str:
    if array.ndim == 4 and array.shape[-1] == 4:
        return " Leave out the fourth channel (transparency)."
    if array.ndim == 4 and array.shape[1] in (1, 3) and array.dtype == np.uint8:
        return " Move the channels to the end: array.transpose(0, 2, 3, 1)."
    if array.ndim == 4 and array.dtype.kind == "f":
        return " What is ready for a model can be given in Python as a float tensor (n, C, H, W)."
    return ""


def checked_labels(
    labels: Any, count: int, label: str, names: Sequence[str] = ()
) -> tuple[np.ndarray, tuple[str, ...]]:
    """One class for each image.

    Args:
        labels: (n,) or (n, 1): integers, strings or booleans.
        count: of the images.
        label: what messages call their source.
        names: of the classes, where the labels are indices into them.

    Returns:
        (n,) indices, and the names of the classes. Integers are named as they are written.

    Raises:
        VitprobeError: another shape, type or length.
    """
    labels = _as_array(labels, label)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 0:
        raise VitprobeError(
            f"The labels of {label} are a single value: one for each image is needed."
        )
    if labels.ndim == 2 and len(labels) == count:
        raise VitprobeError(
            f"The labels of {label} have the shape {labels.shape}; if they are one-hot, give "
            f"labels.argmax(1)."
        )
    if labels.ndim != 1:
        raise VitprobeError(f"The labels of {label} must be (n,), not {labels.shape}.")
    if len(labels) != count:
        raise VitprobeError(
            f"{label} has {len(labels)} labels for {count} images: one for each is needed."
        )
    if labels.dtype.kind not in "iubUS":
        raise VitprobeError(
            f"The labels of {label} must be integers, strings or booleans, not {labels.dtype}."
        )
    if names and labels.dtype.kind in "iu":
        if labels.min(initial=0) < 0 or labels.max(initial=0) >= len(names):
            raise VitprobeError(f"The labels of {label} go beyond its {len(names)} classes.")
        return labels.astype(np.int64), tuple(names)
    values, indices = np.unique(labels, return_inverse=True)
    # Bytes that are no text come as what stands for them in names of files.
    texts = [one.decode("utf-8", "surrogateescape") if isinstance(one, bytes) else str(one)
             for one in values.tolist()]  # fmt: skip
    return indices.reshape(-1).astype(np.int64), shown_classes(texts)


def by_position(labels: Any) -> Any:
    """Labels that are found by their positions, also where they are a column of a data frame.

    Raises:
        VitprobeError: its index counts the rows, in another order than they are in.
    """
    if not (hasattr(labels, "iloc") and hasattr(labels, "to_numpy")):
        return labels
    index = np.asarray(labels.index)
    rows = np.arange(len(index))
    if index.dtype.kind in "iu" and (index != rows).any() and (np.sort(index) == rows).all():
        raise VitprobeError(
            "The labels are a column of a data frame whose index counts the rows in another order "
            "than they are in: give labels.to_numpy() if they are in the order of the images, "
            "labels.sort_index().to_numpy() if the index is right."
        )
    return labels.to_numpy()


def _as_array(labels: Any, label: str) -> np.ndarray:
    """Labels as an array that holds what they are, and not numbers written as text."""
    if isinstance(labels, str | bytes | Mapping | Set):
        raise VitprobeError(
            f"The labels of {label} are a {type(labels).__name__}: a list or array with one for "
            f"each image is needed."
        )
    if np.ma.is_masked(labels):
        raise VitprobeError(f"Labels of {label} are masked: one for each image is needed.")
    try:
        labels = by_position(labels)
        array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
        # NumPy makes text of all where there is some: 1 and "1" would be one class, a NaN another.
        made_text = array.dtype.kind == "U" and array.ndim == 1
        mixed = made_text and not all(isinstance(one, str) for one in labels)
    except VitprobeError:
        raise
    except Exception as error:
        raise VitprobeError(
            f"The labels of {label} cannot be taken as an array: {describe(error)}"
        ) from error
    if mixed:
        raise VitprobeError(
            f"Some labels of {label} are text and some are not: all must be of one kind."
        )
    if array.dtype == object and array.ndim == 1:
        # Columns of data frames hold text as objects.
        for kind in (str, int):
            if all(isinstance(one, kind) for one in array):
                return np.array(array.tolist())
    return array
