"""What ``train_family.py`` trains on: digit scenes, or images in one folder per class."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from vitprobe.data.scenes import CLASSES, scenes

MEAN, STD = [0.5] * 3, [0.25] * 3
SIDE_PX, MONITOR_PICTURES = 32, 1_000
SUFFIXES = (".jpg", ".jpeg", ".png")
Pictures = tuple[np.ndarray, np.ndarray]  # (n, side, side, 3) uint8 and (n,) int64 labels


class SceneStream:
    """The training scenes; with ``train_size``, the first so many, drawn once and reshuffled."""

    classes, flip = CLASSES, False
    description = "digit scenes, split 'train', seed 0"

    def __init__(self, train_size: int | None, seed: int) -> None:
        self.seed = seed
        self.fixed = scenes(train_size, split="train", size=SIDE_PX) if train_size else None
        test = scenes(MONITOR_PICTURES, split="test", size=SIDE_PX)
        self.test: Pictures = (test.images, test.labels)

    def batch(self, start: int, n: int) -> Pictures:
        """Pictures start to start + n of the whole run."""
        if self.fixed is None:
            drawn = scenes(n, split="train", size=SIDE_PX, start=start)
            return drawn.images, drawn.labels
        rows = shuffled_rows(len(self.fixed), self.seed, start, n)
        return self.fixed.images[rows], self.fixed.labels[rows]


class ClassFolders:
    """A folder or tar of one folder per class, in memory; every tenth image is for test."""

    flip, description = True, "class folders"

    def __init__(self, path: Path, train_size: int | None, seed: int) -> None:
        resized, names = [], []
        for name, file in tqdm(class_pictures(path), desc="reading", disable=None):
            with Image.open(file) as image:
                resized.append(np.asarray(image.convert("RGB").resize((SIDE_PX, SIDE_PX))))
            names.append(name)
        if not names:
            raise SystemExit(f"{path}: no images in class folders (CLASS/NAME.jpg and the like)")
        self.seed, self.classes = seed, tuple(sorted(set(names)))
        images, labels = np.stack(resized), np.searchsorted(self.classes, names).astype(np.int64)
        is_test = np.arange(len(labels)) % 10 == 9
        self.test: Pictures = (images[is_test], labels[is_test])
        # Shuffled once, so that the first train_size images are of all classes.
        order = np.random.default_rng(seed).permutation(np.flatnonzero(~is_test))[:train_size]
        self.images, self.labels = images[order], labels[order]

    def batch(self, start: int, n: int) -> Pictures:
        """Pictures start to start + n of the whole run."""
        rows = shuffled_rows(len(self.labels), self.seed, start, n)
        return self.images[rows], self.labels[rows]


def class_pictures(path: Path) -> Iterator[tuple[str, IO[bytes] | Path]]:
    """Class name and image file, for each image CLASS/NAME in a folder or (compressed) tar."""
    if path.is_dir():
        for file in sorted(path.glob("*/*")):
            if file.suffix.lower() in SUFFIXES:
                yield file.parent.name, file
        return
    # timm's tar reader refuses compressed archives; one pass from front to back needs no seeking.
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if member.isfile() and name.suffix.lower() in SUFFIXES:
                file = archive.extractfile(member)
                assert file is not None
                yield name.parent.name, io.BytesIO(file.read())


def shuffled_rows(size: int, seed: int, start: int, n: int) -> np.ndarray:
    """Rows start to start + n of an endless list of epochs, each in an order of its own."""
    position = np.arange(start, start + n)
    rows = np.empty(n, np.int64)
    for epoch in np.unique(position // size):
        order = np.random.default_rng([seed, epoch]).permutation(size)
        here = position // size == epoch
        rows[here] = order[position[here] % size]
    return rows


def normalised(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """(n, 3, side, side) float32 as the networks take them."""
    pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return (pixels - mean) / std


def augment(images: np.ndarray, rng: np.random.Generator, flip: bool) -> np.ndarray:
    """Shift by up to 2 px, brightness and contrast by up to 20 %, for photographs also a flip."""
    n, side = len(images), images.shape[1]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    rows, columns = (rng.integers(0, 5, (n, 1)) + np.arange(side) for _ in range(2))
    if flip:
        columns = np.where(rng.random((n, 1)) < 0.5, columns[:, ::-1], columns)
    shifted = padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    contrast, brightness = rng.uniform(0.8, 1.2, (2, n, 1, 1, 1)).astype(np.float32)
    changed = (shifted - 127.5) * contrast + 127.5 * brightness
    return np.clip(changed, 0, 255).astype(np.uint8)
