"""Digit scenes: labelled images composed from what scikit-learn installs, with their truth.

A handwritten digit (``load_digits``, 8x8) stands at a random place, in a random size, slant and
colour on a random crop of a photograph (``china.jpg`` or ``flower.jpg``), in the manner of
MNIST-M (Ganin et al., 2016).  The label is the digit.  The truth comes with the image: where
the digit's box lies and how much of every pixel the digit covers.

Choices:

- Digits and photograph strips are dealt out once, so that the splits ``train``, ``fit`` (for
  probes) and ``test`` share neither a digit nor a background pixel.
- Place, size, slant, colour, polarity (light on darker or dark on lighter) and background are
  drawn without regard to the label.
- Image i of a stream depends on (split, seed, i) alone, and its layout not even on the size
  asked for: a larger image shows the same scene in more pixels.

The same bytes everywhere: the random numbers are the raw output of the counter-based Philox
generator (whose stream NumPy guarantees, unlike that of ``Generator``'s methods), and every step
from there to the pixels is integer arithmetic.  The one step outside this file is the decoding of
the two JPEGs: Pillow's wheels carry libjpeg-turbo, whose default inverse transform is exact by
specification; a Pillow built on another JPEG library may differ by a grey level in a background.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

SPLITS = ("train", "fit", "test")
CLASSES = tuple("0123456789")

_FRAME = 4096  # units per image side in which places are drawn, whatever the size in pixels
_CELL = 256  # fixed-point units per cell of a digit's grid, and per photograph pixel
_WORDS = 8  # 64-bit words of randomness per image: two whole Philox blocks of four
_CHUNK = 128  # images composed at a time, few enough for the processor's cache
_STRIP_PX = 64  # photographs are dealt out in upright strips; a crop stays within its strip
_STRIPS = {"train": (0, 1, 3, 5, 6, 9), "fit": (2, 7), "test": (4, 8)}  # of the 10 strips of each
_DIGITS_HELD_OUT = 300  # for each of fit and test; the other 1,197 are for training


@dataclass(frozen=True)
class Scenes:
    """``n`` images with their truth.

    images: (n, size, size, 3) uint8, RGB.
    labels: (n,) int64, the digit, 0 to 9.
    place: (n, 4) float64, the digit's box as (top, left, height, width) in pixels.  It frames the
        slanted 8x8 grid that the digit was written in, so that its shape does not tell the digit.
    mask: (n, size, size) uint8, how much of the pixel the digit covers, 0 to 255; 0 outside place.
    """

    images: np.ndarray
    labels: np.ndarray
    place: np.ndarray
    mask: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def scenes(n: int, *, split: str = "test", seed: int = 0, size: int = 32, start: int = 0) -> Scenes:
    """Images ``start`` to ``start + n`` of the stream (split, seed), ``size`` x ``size`` pixels.

    split: 'train', 'fit' (for fitting probes) or 'test'.
    seed: a non-negative integer; other seeds give other images from the same digits and strips.

    Any range can be drawn by itself: ``scenes(10, start=5)`` equals images 5 to 15 of
    ``scenes(15)``.  Raises ValueError for an unknown split, a negative n, seed or start, or a size
    outside 8 to 1024.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    for name, value in (("n", n), ("seed", seed), ("start", start)):
        if value < 0:
            raise ValueError(f"{name} is {value}: expected 0 or more")
    if not 8 <= size <= 1024:
        raise ValueError(f"size is {size} pixels: expected 8 to 1024")
    result = Scenes(
        images=np.empty((n, size, size, 3), np.uint8),
        labels=np.empty(n, np.int64),
        place=np.empty((n, 4), np.float64),
        mask=np.empty((n, size, size), np.uint8),
    )
    for first in range(0, n, _CHUNK):
        rows = slice(first, min(first + _CHUNK, n))
        drawn = _draws(split, seed, start + first, rows.stop - rows.start)
        digit, box, glyph_width, slant = _layout(drawn, split)
        mask = _mask(digit_cells()[0][digit], box, glyph_width, slant, size)
        result.labels[rows] = digit_cells()[1][digit]
        result.place[rows] = box * (size / _FRAME)  # exact: both integers are small
        result.mask[rows] = mask
        result.images[rows] = _blend(_background(drawn, split, size), mask, _colour(drawn))
    return result


@cache
def digit_cells() -> tuple[np.ndarray, np.ndarray]:
    """All digits as (1797, 8, 8) int32 ink from 0 to 16, and their (1797,) labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images.astype(np.int32), digits.target.astype(np.int64)


@cache
def photographs() -> np.ndarray:
    """The photographs, (2, 427, 640, 3) uint8."""
    from sklearn.datasets import load_sample_image

    return np.stack([load_sample_image(name) for name in ("china.jpg", "flower.jpg")])


@cache
def split_digits(split: str) -> np.ndarray:
    """Which digits (indices into ``digit_cells``) a split may use, ascending."""
    order = np.argsort(np.random.Philox(key=0).random_raw(1797), kind="stable")
    held_out = {
        "fit": order[:_DIGITS_HELD_OUT],
        "test": order[_DIGITS_HELD_OUT:][:_DIGITS_HELD_OUT],
    }
    return np.sort(held_out.get(split, order[2 * _DIGITS_HELD_OUT :]))


def split_columns(split: str) -> np.ndarray:
    """Which pixel columns of the photographs a split may use, ascending."""
    return np.concatenate(
        [np.arange(strip * _STRIP_PX, (strip + 1) * _STRIP_PX) for strip in _STRIPS[split]]
    )


def _draws(split: str, seed: int, start: int, n: int) -> np.ndarray:
    """(16, n) uniform integers below 2**32, as int64, for images start to start + n."""
    # A Philox block of four words is a function of (key, counter), so image i owns two counters.
    philox = np.random.Philox(
        key=np.array([SPLITS.index(split) + 1, seed], np.uint64), counter=start * _WORDS // 4
    )
    words = philox.random_raw(n * _WORDS).reshape(n, _WORDS)
    return np.concatenate([words >> np.uint64(32), words & np.uint64(0xFFFFFFFF)], 1).T.astype(
        np.int64
    )


def _between(draw: np.ndarray, low: int | np.ndarray, high: int | np.ndarray) -> np.ndarray:
    """Uniform integers from low to high, both included, out of draws below 2**32."""
    return low + (draw * (high - low + 1) >> 32)


def _layout(drawn: np.ndarray, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Digit, box (n, 4) in frame units, width of the unslanted digit, slant in 1/1024."""
    choices = split_digits(split)
    digit = choices[_between(drawn[0], 0, len(choices) - 1)]
    height = _between(drawn[1], _FRAME * 65 // 100, _FRAME * 85 // 100)
    glyph_width = height * _between(drawn[2], 665, 870) >> 10  # 0.65 to 0.85 of the height
    slant = _between(drawn[3], -256, 256)  # up to a quarter sideways per unit of height
    width = glyph_width + (height * np.abs(slant) >> 10)
    top = _between(drawn[4], 0, _FRAME - height)
    left = _between(drawn[5], 0, _FRAME - width)
    return digit, np.stack([top, left, height, width], 1), glyph_width, slant


def _centres(size: int) -> np.ndarray:
    """Pixel centres along one side, in frame units."""
    return (2 * np.arange(size) + 1) * _FRAME // (2 * size)


def _mask(
    cells: np.ndarray, box: np.ndarray, glyph_width: np.ndarray, slant: np.ndarray, size: int
) -> np.ndarray:
    """(n, size, size) uint8 coverage: the 8x8 digits, slanted and interpolated into their boxes."""
    n = len(cells)
    top, left, height, _ = box.T[:, :, None]
    down = _centres(size)[None] - top  # (n, size) from the top of the box
    # The side that does not lean stays at the box's edge; rows above or below move away from it.
    lean = np.where(slant[:, None] > 0, (height - down) * slant[:, None], -down * slant[:, None])
    right = _centres(size)[None, None] - left[:, :, None] - (lean >> 10)[:, :, None]
    # The box runs from the centre of an empty cell before the grid to that of one behind it, nine
    # cells on, so that interpolation fades to nothing just within the box.
    row = np.clip(down * (9 * _CELL) // height, 0, 9 * _CELL - 1).astype(np.int32)
    column = right * (9 * _CELL) // glyph_width[:, None, None]
    column = np.clip(column, 0, 9 * _CELL - 1).astype(np.int32)
    padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)))
    flat = padded.reshape(-1)
    corner = np.arange(n, dtype=np.int32)[:, None, None] * 100
    corner = corner + (row >> 8)[:, :, None] * 10 + (column >> 8)
    across, along = column & 255, (row & 255)[:, :, None]
    upper = flat[corner] * (_CELL - across) + flat[corner + 1] * across
    lower = flat[corner + 10] * (_CELL - across) + flat[corner + 11] * across
    ink = (upper * (_CELL - along) + lower * along) >> 12  # 0 to 256
    return np.clip(2 * ink - 128, 0, 255).astype(np.uint8)  # a firmer edge than the scan's


def _background(drawn: np.ndarray, split: str, size: int) -> np.ndarray:
    """(n, size, size, 3) int32: square crops of a strip, 32 to 64 photograph pixels wide."""
    photos = photographs()
    count, rows, columns, _ = photos.shape
    strips = np.array(_STRIPS[split])
    photo = _between(drawn[6], 0, count - 1)
    strip = strips[_between(drawn[7], 0, len(strips) - 1)]
    side = _between(drawn[8], 32, _STRIP_PX)
    top = _between(drawn[9], 0, rows - side) + photo * rows
    left = _between(drawn[10], 0, _STRIP_PX - side) + strip * _STRIP_PX
    at = _centres(size)[None] * (side * _CELL)[:, None] // _FRAME - _CELL // 2
    at = np.clip(at, 0, ((side - 1) * _CELL - 1)[:, None]).astype(np.int32)
    pixels = photos.reshape(-1, 3)
    corner = (top[:, None] + (at >> 8))[:, :, None] * columns + (left[:, None] + (at >> 8))[:, None]
    across, along = (at & 255)[:, None, :, None], (at & 255)[:, :, None, None]
    upper = pixels[corner] * (_CELL - across) + pixels[corner + 1] * across
    lower = pixels[corner + columns] * (_CELL - across) + pixels[corner + columns + 1] * across
    return (upper * (_CELL - along) + lower * along) >> 16


def _colour(drawn: np.ndarray) -> np.ndarray:
    """(n, 3) ink colours: all channels light (two images in three) or all dark, each differently.

    With as many light as dark digits no pixel's mean depends on the label, and in trials a small
    ViT was still at chance after 45,000 images; with this imbalance it left chance at 20,000.
    """
    light = np.minimum(_between(drawn[11], 0, 2), 1)
    return np.stack([light * 175 + _between(channel, 0, 80) for channel in drawn[12:15]], 1)


def _blend(background: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Ink over a background faded to the middle greys, where light and dark ink both show."""
    faded = 72 + background * 7 // 16
    cover = mask[..., None].astype(np.int32)
    ink = colour[:, None, None, :].astype(np.int32)
    return ((faded * (255 - cover) + ink * cover + 127) // 255).astype(np.uint8)
