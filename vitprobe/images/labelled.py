"""Labelled images for probes: seeded draws to fit on, and others to test on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitprobe.errors import NotApplicable, VitprobeError, nearest, some
from vitprobe.images.sources import Images, open_images

BUNDLED_TEST = 500
# So many images tell whether two sources are the same.
COMPARED = 8


@dataclass(frozen=True)
class Task:
    """What to fit on and what to test on; no image is in both.

    Attributes:
        draws: for each draw its images, the same number of each class.
        test: images of the same classes.
        classes: names; labels are indices into them.
        split: how the two were kept apart, in words.
    """

    draws: list[Images]
    test: Images
    classes: tuple[str, ...]
    split: str

    def labels_sha256(self) -> str:
        """Of the labels of all draws and the test, in order."""
        labels: Any = [images.chosen_labels() for images in (*self.draws, self.test)]
        return hashlib.sha256(np.concatenate(labels).astype("<i8").tobytes()).hexdigest()


def open_task(
    images: Any, test_images: Any, shots: int, draws: int, num_test: int | None, seed: int
) -> Task:
    """Draw ``shots`` images per class, ``draws`` times, disjoint where there are enough.

    Args:
        images: to fit on; a folder or tar of class folders, an ``.npz`` with labels, ``Images``.
            None: the bundled digit scenes, whose splits share neither digits nor backgrounds.
        test_images: to test on; None takes what the draws leave of ``images``, at least half.
        shots: a class.
        draws: how many.
        num_test: of the test images, by ``seed``; all by default, 1,000 of the bundled ones.
        seed: of every choice.

    Raises:
        VitprobeError: no labels, too few images of a class, other classes in the test images.
    """
    if shots < 1 or draws < 1:
        raise VitprobeError(f"--shots and --draws must be at least 1, not {shots} and {draws}.")
    if images is None and test_images is not None:
        raise VitprobeError("--test-images needs --images to fit on.")
    fitting, test, split = _sources(images, test_images, shots * draws, num_test, seed)
    fitting = _labelled(fitting, least=2)
    kept = np.array([len(rows) for rows in _by_class(fitting)])
    if test is None:
        half = [rows[: min(shots * draws, len(rows) // 2)] for rows in _by_class(fitting)]
        chosen = np.concatenate(half)
        test = fitting.choose(np.setdiff1d(np.arange(len(fitting)), chosen))
        fitting = fitting.choose(chosen)
        kept = np.array([len(rows) for rows in half])
    else:
        test = _same_classes(_labelled(test), fitting)
    if kept.min() < shots:
        short = int(kept.argmin())
        raise NotApplicable(
            f"--shots: {fitting.source} has {kept[short]} images of the class "
            f"{fitting.classes[short]!r} to fit on, not {shots}."
        )
    if num_test is not None:
        if num_test > len(test):
            raise VitprobeError(
                f"--num-images: {test.source} has {len(test)} test images, not {num_test}."
            )
        # Their order is a seeded permutation already.
        test = test.choose(np.sort(np.random.default_rng(seed).permutation(len(test))[:num_test]))
    return Task(_draws(fitting, shots, draws, seed), test, tuple(fitting.classes), split)


def _sources(
    images: Any, test_images: Any, per_class: int, num_test: int | None, seed: int
) -> tuple[Images, Images | None, str]:
    if images is None:
        from vitprobe.data.scenes import CLASSES, scenes

        # Their classes are drawn by chance: this many hold enough of each.
        pool = scenes(3 * len(CLASSES) * per_class + 300, split="fit", seed=seed)
        fitting = open_images(pool.images, seed=seed)
        fitting = replace(fitting, source="digit scenes (fit)", labels=pool.labels, classes=CLASSES)
        return fitting, open_images(None, num_test or BUNDLED_TEST, seed), "splits fit and test"
    fitting = open_images(images, seed=seed)
    if test_images is None:
        return fitting, None, f"split of {fitting.source} by seed {seed}"
    test = open_images(test_images, seed=seed, option="--test-images")
    if _are_the_same(test, fitting):
        raise VitprobeError(
            f"--test-images are the same images as {fitting.source}; without the option a part of "
            f"those is kept for testing."
        )
    return fitting, test, f"fitted on {fitting.source}, tested on {test.source}"


def _are_the_same(test: Images, fitting: Images) -> bool:
    """Whether two sources are copies of each other.

    Names and sizes in bytes, which make the digest of files, may well agree between the images to
    fit on and those to test on: a few are opened.
    """
    if test.digest != fitting.digest:
        return False
    for position in np.unique(np.linspace(0, len(test) - 1, COMPARED).astype(int)).tolist():
        try:
            one, other = (np.asarray(images.open(position)) for images in (test, fitting))
        except Exception:
            # It is told when its turn comes.
            continue
        if not np.array_equal(one, other):
            return False
    return True


def _labelled(images: Images, least: int = 1) -> Images:
    """The images with labels 0, 1, ... for the classes that occur, which all have names.

    Images of no class, directly in the root of a folder of class folders, are left out.
    """
    labels = images.chosen_labels()
    if images.labels is None or labels is None:
        raise NotApplicable(
            images.no_labels
            or f"{images.source} has no labels: probes need a folder or .tar with a folder per "
            f"class, or an .npz with 'labels' beside 'images'."
        )
    stray = np.flatnonzero(labels < 0)
    if len(stray):
        images = _without(images, stray)
        labels = labels[labels >= 0]
    present = np.unique(labels)
    if len(present) < least:
        only = f" ({images.classes[int(present[0])]!r})" if len(present) else ""
        raise NotApplicable(
            f"{images.source} has one class only{only}; probes need at least two: classes are the "
            f"folders directly under the root."
        )
    names = tuple(images.classes[c] if images.classes else str(c) for c in present.tolist())
    # Classes of the source that were not chosen have no index.
    compact = np.searchsorted(present, images.labels).astype(np.int64)  # type: ignore[arg-type]
    compact[~np.isin(images.labels, present)] = -1  # type: ignore[arg-type]
    return replace(images, labels=compact, classes=names)


def _without(images: Images, stray: np.ndarray) -> Images:
    """Without the images at these positions, which have no class, and with a remark on them."""
    named = some(sorted(images.name(int(i)) for i in stray))
    many = f"{len(stray)} images" if len(stray) > 1 else "1 image"
    remark = (
        f"{many} directly in {images.source} belong{'' if len(stray) > 1 else 's'} to no class and "
        f"{'are' if len(stray) > 1 else 'is'} left out: {named}."
    )
    kept = images.choose(np.setdiff1d(np.arange(len(images)), stray))
    return replace(kept, remarks=(*images.remarks, remark))


def _same_classes(test: Images, fitting: Images) -> Images:
    """The test images with the fitting images' classes, matched by name."""
    other = [name for name in test.classes if name not in fitting.classes]
    if other:
        raise VitprobeError(
            f"The class {other[0]!r} of the test images {test.source} is not in {fitting.source}."
            f"{nearest(other[0], fitting.classes)}"
        )
    place = np.array([*(fitting.classes.index(name) for name in test.classes), -1])
    assert test.labels is not None
    return replace(test, labels=place[test.labels], classes=fitting.classes)


def _by_class(images: Images) -> list[np.ndarray]:
    """Positions of the images of each class, in their (seeded) order."""
    labels = images.chosen_labels()
    return [np.flatnonzero(labels == c) for c in range(len(images.classes))]


def _draws(images: Images, shots: int, draws: int, seed: int) -> list[Images]:
    generator = np.random.default_rng(seed)
    positions: list[list[np.ndarray]] = [[] for _ in range(draws)]
    for rows in _by_class(images):
        enough = len(rows) >= shots * draws
        for k, mine in enumerate(positions):
            apart = rows[k * shots : (k + 1) * shots]
            mine.append(apart if enough else generator.permutation(rows)[:shots])
    chosen = [images.choose(np.concatenate(mine)) for mine in positions]
    # What is to be said of the images is said once.
    return [replace(one, remarks=one.remarks if k == 0 else ()) for k, one in enumerate(chosen)]
