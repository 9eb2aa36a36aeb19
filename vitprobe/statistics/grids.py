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


def decay(values: np.ndarray) -> float:
    """Spearman correlation of similarity with distance over all pairs of different patches."""
    alike, squared, _ = _pairs(values)
    return float(spearmanr(alike, squared).statistic) if np.ptp(alike) > 0 else 0.0


def axis_gain(values: np.ndarray) -> float:
    """Mean similarity within a row or column minus that of other pairs of the same length.

    Other pairs of exactly that length are rare on a grid: their mean similarity is interpolated
    between the lengths that they have.
    """
    alike, squared, axial = _pairs(values)
    lengths = np.unique(squared[~axial])
    means = np.array([alike[~axial & (squared == one)].mean() for one in lengths])
    inside = axial & (squared >= lengths[0]) & (squared <= lengths[-1])
    expected = np.interp(np.sqrt(squared[inside]), np.sqrt(lengths), means)
    return float((alike[inside] - expected).mean())
