"""How values on a grid go together: neighbours, distance, rows and columns."""

from __future__ import annotations

import numpy as np
from scipy.stats import spearmanr


def smoothness(tile: np.ndarray) -> float:
    """Correlation of neighbouring weights of a tile (height, width, channels), within channels.

    About 0, not about the tile's mean: a tile of one colour is the smoothest that there is, and
    white noise has a correlation of 0 also where tiles are small.
    """
    power = (tile**2).mean()
    beside = (tile[:, 1:] * tile[:, :-1]).mean() + (tile[1:] * tile[:-1]).mean()
    return float(beside / (2 * power)) if power > 0 else 1.0


def _pairs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Similarity, squared distance, and whether in one row or column, of all pairs of patches."""
    rows, columns = values.shape[:2]
    y, x = np.indices((rows, columns))
    dy = (y[:, :, None, None] - y).ravel()
    dx = (x[:, :, None, None] - x).ravel()
    other = (dy != 0) | (dx != 0)
    return values.ravel()[other], (dy**2 + dx**2)[other], ((dy == 0) | (dx == 0))[other]


def decay(values: np.ndarray) -> tuple[float, float]:
    """Spearman correlation of similarity with distance over all pairs of different patches.

    Returns:
        the correlation, and the standard deviation that it has where places mean nothing: of P
        pairs, 1 / √(P - 1).
    """
    alike, squared, _ = _pairs(values)
    error = 1 / np.sqrt(max(1, len(alike) // 2 - 1))
    return float(spearmanr(alike, squared).statistic) if np.ptp(alike) > 0 else 0.0, float(error)


def axis_gain(values: np.ndarray) -> tuple[float, float]:
    """Mean similarity within a row or column minus that of other pairs of the same length.

    Other pairs of exactly that length are rare on a grid: their mean similarity is interpolated
    between the lengths that they have.

    Returns:
        the difference, and the standard deviation that it has where places mean nothing: it is a
        weighted sum of similarities, then independent ones of the variance that they have here.
    """
    alike, squared, axial = _pairs(values)
    lengths, of_length, counts = np.unique(squared[~axial], return_inverse=True, return_counts=True)
    means = np.bincount(of_length, alike[~axial]) / counts
    inside = axial & (squared >= lengths[0]) & (squared <= lengths[-1])
    steps, at = np.sqrt(lengths), np.sqrt(squared[inside])
    expected = np.interp(at, steps, means)
    above = np.clip(np.searchsorted(steps, at), 1, len(steps) - 1)
    share = (at - steps[above - 1]) / (steps[above] - steps[above - 1])
    taken = np.bincount(above, share, len(steps)) + np.bincount(above - 1, 1 - share, len(steps))
    count = inside.sum()
    squares = 1 / count + ((taken / count) ** 2 / counts).sum()
    # Every pair is there twice, with the same weight.
    error = np.sqrt(2 * squares * alike.var())
    return float((alike[inside] - expected).mean()), float(error)
