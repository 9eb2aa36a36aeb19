"""A path, a dataset name or an array -> the same images in the same order for every model.

Images are opened by position, so that a run can be resumed or shared out over processes. The
order is a seeded permutation of the source's natural order: batches are then draws without
replacement also from folders that are sorted by class (Raghu et al. 2021, section 3).
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitprobe.errors import VitprobeError, nearest
from vitprobe.images.decoding import ArraySource, DatasetSource, ReaderSource, TensorSource

TIMM_PREFIXES = ("hfds/", "torch/")
STREAM_PREFIXES = ("hfids/", "tfds/", "wds/")
BROKEN_FRACTION_ALLOWED = 0.01
# Every command on the bundled models stays under a minute on two cores with these.
DEFAULT_SCENES = 512
# Besides timm's .png, .jpg and .jpeg.
MORE_SUFFIXES = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Images:
    """An ordered choice of images from one source.

    Attributes:
        source: what the figure's caption calls it.
        items: opens the image at a position of the source: a PIL image in RGB, or a tensor.
        order: (n,) positions in the source, in the order in which every model sees them.
        digest: sha256 of the names and sizes (or bytes) of the chosen images, in order.
        names: names of all images of the source, where it has names.
        labels: (size of the source,) class indices, where it has classes.
        classes: names of the classes.
        version: digest of what else tells whether an unfinished run saw the same images: when
            their files were last changed.
    """

    source: str
    items: Any
    order: np.ndarray
    digest: str
    names: Sequence[str] | None = None
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    version: str = ""

    def __len__(self) -> int:
        return len(self.order)

    @property
    def are_tensors(self) -> bool:
        return isinstance(self.items, TensorSource)

    def name(self, position: int) -> str:
        """The name of the image at a position of ``order``."""
        index = int(self.order[position])
        return self.names[index] if self.names is not None else f"image {index}"

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
        return replace(self, order=order, digest=key.hexdigest())


def open_images(
    source: str | Path | np.ndarray | torch.Tensor | Images | None = None,
    num_images: int | None = None,
    seed: int = 0,
) -> Images:
    """Open images and fix their order.

    Args:
        source: a folder (searched recursively), a ``.tar``, an ``.npz``/``.npy`` of uint8
            (n, H, W, 3), a timm dataset name (``hfds/...``, ``torch/...``, a split after ``:``),
            such an array itself, a float tensor (n, C, H, W), or None: the bundled digit scenes.
        num_images: how many, drawn without replacement by ``seed``; all of them by default.
        seed: of the order and the choice.

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
    elif str(source).startswith(TIMM_PREFIXES + STREAM_PREFIXES):
        images = _from_timm(str(source))
    else:
        images = _from_path(Path(source).expanduser())
    available = len(images)
    if num_images is not None and num_images < 1:
        raise VitprobeError(f"--num-images must be at least 1, not {num_images}.")
    if num_images is not None and num_images > available:
        raise VitprobeError(
            f"{num_images} images were asked for, but {images.source} has {available}."
        )
    if isinstance(source, Images) and num_images is None:
        return images
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
    digest = hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()
    return Images("a tensor", TensorSource(tensor), _all(len(tensor)), digest)


def _from_array(array: np.ndarray, label: str, labels: np.ndarray | None = None) -> Images:
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise VitprobeError(
            f"Images in {label} must be uint8 (n, H, W, 3), not {array.dtype} {array.shape}."
        )
    if not len(array):
        raise VitprobeError(f"There are no images in {label}.")
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return Images(label, ArraySource(array), _all(len(array)), digest, labels=labels)


def _from_path(path: Path) -> Images:
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise VitprobeError(f"There is no {path}.{nearest(path.name, siblings)}")
    if path.is_dir():
        return _from_folder(path)
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
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    try:
        with _more_suffixes():
            reader = ReaderImageFolder(str(path))
    except RuntimeError:
        raise VitprobeError(f"There are no images in the folder {path}.") from None
    except OSError as error:
        raise VitprobeError(f"{path} cannot be read: {error.strerror}.") from error
    files = [Path(name) for name, _ in reader.samples]
    names = [file.relative_to(path).as_posix() for file in files]
    # Names and sizes decide; reading every byte before the first batch would cost a pass.
    stats = [_stat(file) for file in files]
    parts = [f"{n}\t{s.st_size if s else -1}" for n, s in zip(names, stats)]
    absent = frozenset(i for i, found in enumerate(stats) if found is None)
    images = _labelled(path.absolute().name, ReaderSource(reader, absent), names, parts)
    return replace(images, version=_digest([str(s.st_mtime_ns if s else 0) for s in stats]))


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


@contextmanager
def _more_suffixes() -> Iterator[None]:
    """Within it timm's readers take the further kinds of pictures."""
    from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions

    before = get_img_extensions()
    set_img_extensions((*before, *MORE_SUFFIXES))
    try:
        yield
    finally:
        set_img_extensions(before)


def _from_tar(path: Path) -> Images:
    import tarfile

    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    try:
        # The cache of the tar's index is a pickle beside the tar: neither read nor written.
        # An open tar would be shared with the processes that decode, which then move its place
        # under each other's hands: it is opened anew for each image.
        with _more_suffixes():
            reader = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise VitprobeError(f"{path} cannot be read as a tar: {error}") from error
    except ValueError:
        raise VitprobeError(f"There are no images in the tar {path}.") from None
    members = [sample[0] for sample in reader.samples]
    names = [member.path for member in members]
    parts = [f"{member.path}\t{member.size}" for member in members]
    images = _labelled(path.name, ReaderSource(reader), names, parts)
    return replace(images, version=_digest([str(path.stat().st_mtime_ns)]))


def _labelled(label: str, items: ReaderSource, names: list[str], parts: list[str]) -> Images:
    reader = items.reader
    targets = getattr(reader, "targets", None)
    if targets is None:
        targets = [target for _, target in reader.samples]
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", {})
    classes = tuple(sorted(index, key=lambda name: index[name]))
    labels = np.asarray(targets, dtype=np.int64) if len(classes) > 1 else None
    return Images(
        label,
        items,
        _all(len(names)),
        _digest(parts),
        names=names,
        labels=labels,
        classes=classes if labels is not None else (),
    )


def _from_array_file(path: Path) -> Images:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return _from_array(loaded, path.name)
        with loaded:
            keys = list(loaded.files)
            key = next((k for k in ("images", "x", "arr_0", *keys) if k in keys), None)
            if key is None:
                raise VitprobeError(f"There are no arrays in {path}.")
            labels = next((loaded[k] for k in ("labels", "y") if k in keys), None)
            return _from_array(loaded[key], f"{path.name} ({key})", labels)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise VitprobeError(f"{path} cannot be read as arrays of images: {error}") from error


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
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise VitprobeError(f"The dataset {name} cannot be opened: {reason}") from error
    items = ReaderSource(dataset.reader) if hasattr(dataset, "reader") else DatasetSource(dataset)
    return Images(name, items, _all(size), _digest([name, str(size)]))
