"""A path, a dataset name or an array -> the same images in the same order for every model.

Images are opened by position, so that a run can be resumed or shared out over processes. The
order is a seeded permutation of the source's natural order: batches are then draws without
replacement also from folders that are sorted by class (Raghu et al. 2021, section 3).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitprobe.errors import VitprobeError, nearest, shown
from vitprobe.images.arrays import checked_images, checked_labels, read_arrays
from vitprobe.images.datasets import ItemSource, TableSource, labels_of
from vitprobe.images.decoding import (
    ArraySource,
    DatasetSource,
    FileSource,
    ReaderSource,
    TensorSource,
)  # fmt: skip
from vitprobe.images.folders import (
    below_common_folder,
    classes_of,
    image_files,
    shown_classes,
)  # fmt: skip
from vitprobe.images.loaders import LoaderSource
from vitprobe.images.tars import read_tar

TIMM_PREFIXES = ("hfds/", "torch/")
STREAM_PREFIXES = ("hfids/", "tfds/", "wds/")
BROKEN_FRACTION_ALLOWED = 0.01
# Every command on the bundled models stays under a minute on two cores with these.
DEFAULT_SCENES = 512


@dataclass(frozen=True)
class Images:
    """An ordered choice of images from one source.

    Attributes:
        source: what the figure's caption calls it.
        items: opens the image at a position of the source: a PIL image in RGB, or a tensor.
        order: (n,) positions in the source, in the order in which every model sees them.
        digest: sha256 of the names and sizes (or bytes) of the chosen images, in order.
        names: names of all images of the source, where it has names.
        labels: (size of the source,) class indices, where it has classes; -1 for an image of none.
        classes: names of the classes.
        version: digest of what else tells whether an unfinished run saw the same images: when
            their files were last changed.
        no_labels: why the labels of the source are none; empty where it just has no labels.
        remarks: what the user should know of the source, each in a line.
        batches: positions of each batch, where the source has batches of its own.
        workers: processes that make these batches, where the source says how many.
    """

    source: str
    items: Any
    order: np.ndarray
    digest: str
    names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    version: str = ""
    no_labels: str = ""
    remarks: tuple[str, ...] = ()
    batches: tuple[np.ndarray, ...] | None = None
    workers: int | None = None

    def __len__(self) -> int:
        return len(self.order)

    @property
    def are_tensors(self) -> bool:
        """Whether they go to every model as they are, through no transform."""
        return isinstance(self.items, TensorSource) or getattr(self.items, "tensors", False)

    def name(self, position: int) -> str:
        """The name of the image at a position of ``order``."""
        index = int(self.order[position])
        return shown(self.names[index]) if self.names is not None else f"image {index}"

    def open(self, position: int) -> Image.Image | torch.Tensor:
        """The image at a position of ``order``; raises what its decoder raises."""
        return self.items[int(self.order[position])]

    def chosen_labels(self) -> np.ndarray | None:
        """(n,) class indices in the order of the images, or None."""
        return None if self.labels is None else self.labels[self.order]

    def choose(self, positions: np.ndarray) -> Images:
        """The images at these positions of ``order``."""
        order = self.order[positions]
        key = hashlib.sha256(self.digest.encode() + np.asarray(order, "<i8").tobytes())
        return replace(self, order=order, digest=key.hexdigest(), batches=None)

    def first(self, count: int) -> Images:
        """The first so many images, in the batches that they are in."""
        parts = [part[part < count] for part in self.batches or ()]
        chosen = self.choose(np.arange(count))
        return replace(chosen, batches=tuple(part for part in parts if len(part)))


def open_images(
    source: Any = None,
    num_images: int | None = None,
    seed: int = 0,
    option: str = "--images",
) -> Images:
    """Open images and fix their order.

    Args:
        source: a folder (searched recursively), a ``.tar``, an ``.npz``/``.npy`` of uint8
            (n, H, W, 3) or grey (n, H, W), a timm dataset name (``hfds/...``, ``torch/...``, a
            split after ``:``), such an array itself, a float tensor (n, C, H, W), a list or
            map-style dataset of images, a ``DataLoader`` that does not shuffle (its batches are
            taken as they come), or None: the bundled digit scenes.
        num_images: how many, drawn without replacement by ``seed``, or the first of a
            ``DataLoader``; all of them by default.
        seed: of the order and the choice.
        option: that named the source, for messages.

    Raises:
        VitprobeError: no such source, no images in it, or fewer than asked for.
    """
    if isinstance(source, Images):
        images = source
    elif isinstance(source, torch.Tensor):
        images = _from_tensor(source)
    elif isinstance(source, np.ndarray):
        images = _from_array(source, "an array")
    elif source is None:
        images = _bundled(num_images, seed)
    elif isinstance(source, torch.utils.data.DataLoader):
        images = _from_loader(source)
    elif not isinstance(source, str | Path):
        images = _from_items(source)
    elif not str(source):
        # What a variable that is not set leaves; as a path it would be the folder that one is in.
        raise VitprobeError(f"{option}: expected a path, not an empty text.")
    elif str(source).startswith(TIMM_PREFIXES + STREAM_PREFIXES):
        images = _from_timm(str(source))
    else:
        images = _from_path(Path(os.path.expanduser(source)), option)
    available = len(images)
    if num_images is not None and num_images < 1:
        raise VitprobeError(f"--num-images must be at least 1, not {num_images}.")
    if num_images is not None and num_images > available:
        raise VitprobeError(
            f"--num-images: {images.source} has {available} images, not {num_images}."
        )
    if num_images is None and (isinstance(source, Images) or images.batches is not None):
        return images
    if images.batches is not None:
        return images.first(num_images or available)
    order = np.random.default_rng(seed).permutation(available)
    return images.choose(order[: num_images or available])


def _digest(parts: Sequence[str]) -> str:
    # Names of files are bytes; those that are no text come as surrogates.
    text = "\n".join(parts).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()


def _all(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.int64)


def _bundled(num_images: int | None, seed: int) -> Images:
    from vitprobe.data.scenes import scenes

    drawn = scenes(num_images or DEFAULT_SCENES, split="test", seed=seed)
    images = _from_array(drawn.images, "digit scenes (test)")
    return replace(
        images, labels=np.asarray(drawn.labels), classes=tuple(str(d) for d in range(10))
    )


def _from_tensor(tensor: torch.Tensor) -> Images:
    if tensor.ndim != 4 or not tensor.is_floating_point():
        raise VitprobeError(
            f"Images as a tensor must be float (n, C, H, W), not {tensor.dtype} "
            f"{tuple(tensor.shape)}."
        )
    tensor = tensor.detach().cpu()
    if not len(tensor):
        raise VitprobeError("There are no images in a tensor.")
    digest = hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()
    return Images("a tensor", TensorSource(tensor), _all(len(tensor)), digest)


def _from_array(array: np.ndarray, label: str, labels: np.ndarray | None = None) -> Images:
    array = checked_images(array, label)
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    images = Images(label, ArraySource(array), _all(len(array)), digest)
    return images if labels is None else _with_labels(images, labels)


def _with_labels(images: Images, labels: Any, names: Sequence[str] = ()) -> Images:
    """With a class for each image; or with what is wrong with the labels, for who asks for them."""
    try:
        indices, classes = checked_labels(labels, len(images), images.source, names)
    except VitprobeError as error:
        return replace(images, no_labels=str(error))
    return replace(images, labels=indices, classes=classes)


def _from_items(items: Any) -> Images:
    """A list or a map-style dataset."""
    kind = type(items).__name__
    if not (hasattr(items, "__getitem__") and hasattr(items, "__len__")) or isinstance(
        items, bytes | bytearray | dict
    ):
        raise VitprobeError(
            f"Images cannot be taken from a {kind}: give a path, an array, a float tensor, a list "
            f"of images or a dataset with __len__ and __getitem__."
        )
    every = isinstance(items, list | tuple)
    label = f"a {kind}"
    source = ItemSource(items, label)
    images = Images(label, source, _all(len(source)), source.digest(every))
    return _with_labels_of(images, items)


def _with_labels_of(images: Images, dataset: Any, chosen: Sequence[int] | None = None) -> Images:
    """With the labels of a dataset, or of the items of it that are chosen, where it has any."""
    try:
        labels, names = labels_of(dataset)
    except VitprobeError as error:
        return replace(images, no_labels=str(error))
    if labels is None:
        return images
    if chosen is not None:
        labels = [labels[i] for i in chosen]
    return _with_labels(images, labels, names)


def _from_loader(loader: torch.utils.data.DataLoader) -> Images:
    source = LoaderSource(loader)
    images = Images(
        "a DataLoader", source, _all(len(source)), source.digest(), batches=source.batches,
        # What a process of its own begins with can't be told.
        workers=0 if loader.worker_init_fn else loader.num_workers,
    )  # fmt: skip
    return _with_labels_of(images, loader.dataset, source.flat().tolist())


def _from_path(path: Path, option: str) -> Images:
    # A name that no system can have is none either.
    if not os.path.exists(path):
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise VitprobeError(
            f"{option}: no such file or folder: {str(path)[:200]!r}.{nearest(path.name, siblings)}"
        )
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise VitprobeError(f"{path} is neither a folder nor a regular file.")
    name = path.name.lower()
    if name.endswith((".npz", ".npy")):
        return _from_array_file(path)
    if name.endswith(".tar"):
        return _from_tar(path)
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise VitprobeError(
            f"{path} is a compressed tar, whose images cannot be read in any order: "
            f"decompress it to a .tar or unpack it to a folder."
        )
    raise VitprobeError(
        f"{path} is neither a folder of images nor a .tar, .npz or .npy (uint8 (n, H, W, 3))."
    )


def _from_folder(path: Path) -> Images:
    found = image_files(path)
    if not found.names:
        why = "".join(f" {sentence}" for sentence in found.left_out())
        raise VitprobeError(f"There are no images in the folder {path}.{why}")
    # Names and sizes decide; reading every byte before the first batch would cost a pass.
    parts = [f"{name}\t{size}" for name, size in zip(found.names, found.sizes)]
    absent = frozenset(i for i, size in enumerate(found.sizes) if size < 0)
    files = FileSource(path, found.names, absent)
    images = _labelled(path.absolute().name, files, found.names, parts, found.names)
    version = _digest([str(changed) for changed in found.changed])
    return replace(images, version=version, remarks=found.left_out())


def _from_tar(path: Path) -> Images:
    reader, rows, names, remark = read_tar(path)
    parts = [f"{reader.samples[i][0].path}\t{reader.samples[i][0].size}" for i in rows]
    source = ReaderSource(reader, rows)
    images = _labelled(path.name, source, names, parts, below_common_folder(names))
    version = _digest([str(path.stat().st_mtime_ns)])
    return replace(images, version=version, remarks=(remark,) if remark else ())


def _labelled(
    label: str, items: Any, names: list[str], parts: list[str], below_root: Sequence[str]
) -> Images:
    """Images of files; their classes are the folders directly under the root."""
    classes, labels = classes_of(below_root)
    return Images(
        shown(label),
        items,
        _all(len(names)),
        _digest(parts),
        names=names,
        labels=labels,
        classes=shown_classes(classes),
    )


def _from_array_file(path: Path) -> Images:
    array, labels, label, why = read_arrays(path)
    images = _from_array(array, shown(label), labels)
    return replace(images, no_labels=images.no_labels or why)


def _from_timm(name: str) -> Images:
    if name.startswith(STREAM_PREFIXES):
        raise VitprobeError(
            f"{name} is a stream, whose images have no fixed order; use hfds/..., torch/..., a "
            f"folder, a .tar or an .npz."
        )
    from timm.data.dataset_factory import create_dataset

    dataset_name, _, split = name.partition(":")
    # torchvision has no default place for data sets; torch's own cache is where models go too.
    cache = Path(torch.hub.get_dir()).parent / "datasets"
    root = str(cache) if name.startswith("torch/") else None
    try:
        dataset = create_dataset(
            dataset_name, root=root, split=split or "validation", download=root is not None
        )
        size = len(dataset)
    except ImportError as error:
        raise VitprobeError(f"{name} needs another package: {error}") from error
    except Exception as error:
        # Libraries of data sets raise anything at names, splits and columns that are not there.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise VitprobeError(f"The dataset {name} cannot be opened: {reason}") from error
    if not size:
        raise VitprobeError(f"There are no images in {name}.")
    # timm's reader knows columns of two names; the table that it holds has them all.
    table = getattr(getattr(dataset, "reader", None), "dataset", None)
    items = DatasetSource(dataset) if table is None else TableSource(table, name)
    images = Images(name, items, _all(size), _digest([name, str(size)]))
    return _with_labels_of(images, dataset if table is None else table)
