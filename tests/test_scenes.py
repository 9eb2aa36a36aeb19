"""Digit scenes: the same everywhere, disjoint splits, true labels and places, no short cut."""

import hashlib

import numpy as np
import pytest

from vitprobe.data.scenes import (
    SPLITS,
    digit_cells,
    photographs,
    scenes,
    split_columns,
    split_digits,
)

FIELDS = ("images", "labels", "place", "mask")


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def ridge_accuracy(fit_x, fit_y, test_x, test_y, penalty=3_000.0) -> float:
    """Test accuracy of the closed-form linear classifier on ±1 targets, features standardised."""
    mean, deviation = fit_x.mean(0), fit_x.std(0) + 1e-5
    fit_x, test_x = (
        np.c_[(x - mean) / deviation, np.ones(len(x))].astype(np.float32) for x in (fit_x, test_x)
    )
    gram = fit_x.T @ fit_x + penalty * np.eye(fit_x.shape[1], dtype=np.float32)
    targets = 2 * np.eye(10, dtype=np.float32)[fit_y] - 1
    weights = np.linalg.solve(gram, fit_x.T @ targets)
    return float(((test_x @ weights).argmax(1) == test_y).mean())


@pytest.fixture(scope="module")
def training():
    return scenes(6_000, split="train")


@pytest.fixture(scope="module")
def testing():
    return scenes(2_000, split="test")


def test_the_bytes_are_the_same_on_every_platform():
    drawn = scenes(64, split="train", seed=3)
    assert {field: digest(getattr(drawn, field)) for field in FIELDS} == {
        "images": "2bb1bde6fd033bea",
        "labels": "9944053f8e8deba2",
        "place": "cc1431081285a593",
        "mask": "26633cecd7120f44",
    }


def test_shapes_and_types():
    drawn = scenes(3, size=48)
    assert drawn.images.shape == (3, 48, 48, 3) and drawn.images.dtype == np.uint8
    assert drawn.labels.shape == (3,) and drawn.labels.dtype == np.int64
    assert drawn.place.shape == (3, 4) and drawn.place.dtype == np.float64
    assert drawn.mask.shape == (3, 48, 48) and drawn.mask.dtype == np.uint8
    assert len(drawn) == 3 and len(scenes(0)) == 0


@pytest.mark.parametrize(("start", "n"), [(5, 10), (127, 3), (250, 20)])
def test_any_range_can_be_drawn_by_itself(start, n):
    whole, part = scenes(start + n, seed=1), scenes(n, seed=1, start=start)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(whole, field)[start:], getattr(part, field))


def test_streams_differ_between_seeds_and_splits():
    drawn = [
        digest(scenes(8, split=split, seed=seed).images) for split in SPLITS for seed in (0, 1)
    ]
    assert len(set(drawn)) == 6


def test_a_larger_picture_shows_the_same_scene():
    small, large = scenes(40, size=32), scenes(40, size=96)
    np.testing.assert_array_equal(small.labels, large.labels)
    np.testing.assert_allclose(large.place, 3 * small.place)
    shrunk = large.images.reshape(40, 32, 3, 32, 3, 3).mean((2, 4))
    assert np.abs(shrunk - small.images).mean() < 6


def test_splits_share_neither_a_digit_nor_a_background_pixel():
    for owned, count in ((split_digits, len(digit_cells()[1])), (split_columns, 640)):
        together = np.concatenate([owned(split) for split in SPLITS])
        np.testing.assert_array_equal(np.sort(together), np.arange(count))


@pytest.mark.parametrize("split", SPLITS)
def test_pictures_use_only_what_their_split_owns(split, monkeypatch):
    """Change every digit and photograph pixel of the other splits: nothing may change."""
    from vitprobe.data import scenes as module  # the module, not the function

    before = scenes(300, split=split)
    cells, labels = (array.copy() for array in digit_cells())
    pixels = photographs().copy()
    foreign = np.setdiff1d(np.arange(len(labels)), split_digits(split))
    cells[foreign], labels[foreign] = 16 - cells[foreign], -1
    columns = np.setdiff1d(np.arange(640), split_columns(split))
    pixels[:, :, columns] = 255 - pixels[:, :, columns]
    monkeypatch.setattr(module, "digit_cells", lambda: (cells, labels))
    monkeypatch.setattr(module, "photographs", lambda: pixels)
    after = scenes(300, split=split)
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(before, field), getattr(after, field))


def test_the_mask_lies_in_the_place_and_the_place_in_the_picture(testing):
    top, left, height, width = testing.place.T
    assert (testing.place >= 0).all()
    assert (top + height <= 32).all() and (left + width <= 32).all()
    centre = np.arange(32) + 0.5
    in_rows = (centre >= top[:, None]) & (centre <= (top + height)[:, None])
    in_columns = (centre >= left[:, None]) & (centre <= (left + width)[:, None])
    inside = in_rows[:, :, None] & in_columns[:, None, :]
    assert not testing.mask[~inside].any()
    assert (testing.mask.max((1, 2)) > 200).all()


def test_the_mask_shows_the_labels_digit():
    """Cut out by its truth, a digit is most like a training digit of its label."""
    drawn = scenes(400, size=96)
    cells, labels = digit_cells()
    known = split_digits("train")
    looked_up = np.empty((len(drawn), 8, 8))
    for row, (mask, place) in enumerate(zip(drawn.mask, drawn.place, strict=True)):
        top, left, height, width = place
        rows = (top + height * (np.arange(8) + 1) / 9).astype(int)
        columns = (left + width * (np.arange(8) + 1) / 9).astype(int)
        looked_up[row] = mask[np.ix_(rows, columns)]

    def unit(images):
        flat = images.reshape(len(images), 64) - images.mean((1, 2))[:, None]
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    nearest = labels[known][(unit(looked_up) @ unit(cells[known]).T).argmax(1)]
    assert (nearest == drawn.labels).mean() > 0.7  # the slant is not undone here


def test_covered_pixels_have_one_colour_and_uncovered_ones_are_background():
    drawn = scenes(100, size=64)
    for image, mask in zip(drawn.images, drawn.mask, strict=True):
        ink = image[mask == 255]
        assert len(ink) == 0 or (ink == ink[0]).all()
        bare = image[mask == 0]
        assert bare.min() >= 72 and bare.max() <= 72 + 255 * 7 // 16


def test_neither_pixels_nor_place_nor_colour_give_the_label_away(training, testing):
    def pixels(drawn):
        return drawn.images.reshape(len(drawn), -1).astype(np.float32)

    def centre_patch(drawn):
        return drawn.images[:, 12:20, 12:20].reshape(len(drawn), -1).astype(np.float32)

    def place(drawn):
        return np.c_[drawn.place, drawn.place**2, drawn.place[:, 3] / drawn.place[:, 2]]

    def colour(drawn):
        return np.c_[drawn.images.mean((1, 2)), drawn.images.std((1, 2))]

    features = {"pixels": pixels, "patch": centre_patch, "place": place, "colour": colour}
    found = {
        name: ridge_accuracy(of(training), training.labels, of(testing), testing.labels)
        for name, of in features.items()
    }
    assert found["pixels"] < 0.25, found
    assert found["patch"] < 0.20, found
    assert max(found["place"], found["colour"]) < 0.13, found


def test_every_digit_is_about_as_frequent(training):
    share = np.bincount(training.labels, minlength=10) / len(training)
    assert share.min() > 0.08 and share.max() < 0.12


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "val"}, "unknown split 'val': expected one of train, fit, test"),
        ({"n": -1}, "n is -1"),
        ({"start": -3}, "start is -3"),
        ({"size": 4}, "size is 4 pixels: expected 8 to 1024"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        scenes(**({"n": 1} | wrong))
