"""What similarities of unrelated networks would be, drawn over a heat map and on its colour bar."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.collections import LineCollection


def calibrated(values: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    """(s − τ) / (1 − τ), τ the 95 % quantile of chance; 0 below it."""
    return np.where(np.isnan(values), np.nan, np.maximum(0, (values - quantiles) / (1 - quantiles)))


def outline(ax: Any, cells: np.ndarray) -> None:
    """A thin line around the regions of a heat map where ``cells`` (rows, columns) is true."""
    padded = np.pad(cells, 1)
    lines = []
    for row, column in np.argwhere(padded[1:] != padded[:-1]):
        lines.append([(column - 1.5, row - 0.5), (column - 0.5, row - 0.5)])
    for row, column in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        lines.append([(column - 0.5, row - 1.5), (column - 0.5, row - 0.5)])
    for colour, width in (("black", 1.4), ("white", 0.7)):  # seen on light and dark
        ax.add_collection(LineCollection(lines, colors=colour, linewidths=width), autolim=False)


def mark(bar: Any, value: float, label: str = "") -> None:
    """A line across a colour bar."""
    if np.isfinite(value):
        bar.ax.axhline(value, color="black", linewidth=2.4)
        bar.ax.axhline(value, color="white", linewidth=1.2)
        if label:
            bar.ax.annotate(label, (0, value), xycoords=("axes fraction", "data"), fontsize=6,
                            xytext=(-2, 0), textcoords="offset points", ha="right",
                            va="center")  # fmt: skip


def quantiles(
    draws: np.ndarray, owner: np.ndarray, share: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles of chance for every pair of layers, and for the largest of every pair of models.

    Args:
        draws: (permutations, layers, layers), the first layer's images permuted; may be empty.
        owner: (layers,) index of the model that a layer is of.
        share: which quantile.

    Returns:
        (layers, layers) and (models, models), symmetric; NaN without draws, and where a layer is
        undefined.
    """
    count, models = len(owner), int(owner.max()) + 1
    each, largest = np.full((count, count), np.nan), np.full((models, models), np.nan)
    if not len(draws):
        return each, largest
    upper = np.triu(np.ones((count, count), dtype=bool))
    each = np.quantile(draws, share, axis=0)
    each = np.where(upper, each, each.T)
    for a in range(models):
        for b in range(a, models):
            block = draws[:, owner == a][:, :, owner == b].reshape(len(draws), -1)
            block = block[:, ~np.isnan(block).any(0)]
            if block.shape[1]:
                largest[a, b] = largest[b, a] = np.quantile(block.max(1), share)
    return each, largest


def to_beat(largest: np.ndarray) -> float:
    """The largest chance level of a search over the pairs of two networks; NaN for none."""
    levels = largest[np.triu_indices(len(largest), int(len(largest) > 1))]
    return float(np.nanmax(levels)) if np.isfinite(levels).any() else np.nan


def caption(meta: dict[str, Any], largest: np.ndarray) -> str:
    """What a caption says of the chance level, where there is one."""
    if not meta.get("null"):
        return ""
    text = f" Outlined: not above 95 % of {meta['null']} permutations of the images"
    if meta["null"] < meta["null_asked"]:
        text += f" (fewer than the {meta['null_asked']} asked for, which would cost much)"
    text += f"; line on the colour bar: 95 % of the largest of a pair, {to_beat(largest):.3f}."
    if meta.get("calibrated"):
        text += " Shown: (s − τ) / (1 − τ), τ that 95 % quantile of each pair; 0 below."
    return text
