"""One image: decoded within bounds, upright, 8-bit RGB; and where images come from.

A source opens the image at a position and raises what its decoder raises, or ``GoneError``.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps

# Files are opened as one of these formats only: some others run a program (EPS) to be read.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Pillow's own bound against small files that unfold to fill the memory; callers can lift that one.
MAX_PIXELS = 178_956_970
# A resized shorter side makes an image beyond this as long as a large one is big.
MAX_ASPECT = 100
# Errors of a file for itself; all others of the system mean that the images cannot be reached.
_OF_THE_FILE = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


class GoneError(Exception):
    """An image that was there when the run began cannot be reached any more."""


def decoded(file: IO[bytes] | Path) -> Image.Image:
    """The image in a file, as ``rgb`` gives it.

    Raises:
        ValueError: more pixels, or longer in one direction, than can be decoded within bounds.
        Exception: anything else that a decoder of a damaged image raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.init()
        try:
            image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
        except Image.DecompressionBombError:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels are not decoded") from None
    with image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"more than {MAX_PIXELS:,} pixels are not decoded")
        _check_aspect(width, height)
        return rgb(image)


def _check_aspect(width: int, height: int) -> None:
    if not width or not height:
        raise ValueError(f"{width} × {height} pixels are no image")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"{width} × {height} pixels are longer than {MAX_ASPECT} to 1")


def rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it: upright, first frame, 8-bit RGB.

    16-bit and floating-point greys are scaled to 8 bits; PIL's own conversion clips them to white.

    Raises:
        ValueError: no pixels, or longer in one direction than can be resized within bounds.
    """
    _check_aspect(*image.size)
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        top = 65535.0 if image.mode.startswith("I") else max(float(grey.max()), 0.0) or 1.0
        image = Image.fromarray((255 * (grey / top).clip(0, 1)).round().astype(np.uint8))
    if image.mode == "P":
        # A palette with transparency warns unless it goes through RGBA.
        image = image.convert("RGBA")
    return image.convert("RGB")


class FileSource:
    """Image files of a folder.

    Args:
        root: the folder.
        names: of the files below it.
        absent: indices of files that were not there from the start (links to nowhere).
    """

    def __init__(
        self, root: Path, names: Sequence[str], absent: frozenset[int] = frozenset()
    ) -> None:
        self.root, self.names, self.absent = root, names, absent

    def __getitem__(self, index: int) -> Image.Image:
        with _reachable(index in self.absent), (self.root / self.names[index]).open("rb") as file:
            return decoded(file)


class ReaderSource:
    """Images behind one of timm's readers: a tar, a Hugging Face dataset.

    Args:
        reader: gives (file or PIL image, label).
        rows: the reader's indices of the images that count; all by default.
    """

    def __init__(self, reader: Any, rows: np.ndarray | None = None) -> None:
        self.reader, self.rows = reader, rows

    def __getitem__(self, index: int) -> Image.Image:
        row = index if self.rows is None else int(self.rows[index])
        with _reachable():
            image = self.reader[row][0]
            if isinstance(image, Image.Image):
                return rgb(image)
            with image:
                return decoded(image)


@contextmanager
def _reachable(absent: bool = False) -> Iterator[None]:
    """Tells an image that cannot be reached any more from one that is damaged."""
    try:
        yield
    except OSError as error:
        # Decoders' own errors have no number of the system's.
        if error.errno is None or error.errno in _OF_THE_FILE or absent:
            raise
        raise GoneError(error.strerror) from error


class DatasetSource:
    """Images of a map-style dataset that gives (PIL image, label)."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Image.Image:
        return rgb(self.dataset[index][0])


class ArraySource:
    """A uint8 array (n, H, W, 3), or (n, H, W) and (n, H, W, 1), grey."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __getitem__(self, index: int) -> Image.Image:
        pixels = self.array[index]
        return rgb(Image.fromarray(pixels[..., 0] if pixels.shape[-1:] == (1,) else pixels))


class TensorSource:
    """A float tensor (n, C, H, W) that goes to every model as it is."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.tensor[index]
