"""The heat maps of a drawn figure as data that a page can point into: where, and the values."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

# Beyond this a figure's values are left out of the page: they are images rather than tables.
MAX_CELLS = 400_000
# Values are kept as 16-bit steps between a panel's extremes; the last step stands for undefined.
STEPS = 65_534


def find_panels(figure: Any) -> list[dict[str, Any]]:
    """Every heat map of a figure that has been rendered; none where they hold too many cells.

    Returns:
        for each, as JSON has it: ``box`` (left, top, width, height in per cent of the figure),
        ``rows``, ``columns``, ``flip`` (whether row 0 is at the bottom), ``low``, ``high`` and
        ``data`` (base64 of little-endian 16-bit steps between the two, row by row), ``title``,
        ``y``, ``x`` (names of rows and columns, where the figure has them), ``ylabel``, ``xlabel``.
    """
    found = []
    cells = 0
    for ax in figure.axes:
        for image in ax.get_images():
            values: np.ndarray = np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)
            if values.ndim == 2 and values.size > 1:
                cells += values.size
                found.append((ax, values))
    if cells > MAX_CELLS:
        return []
    return [_panel(figure, ax, values) for ax, values in found]


def _panel(figure: Any, ax: Any, values: np.ndarray) -> dict[str, Any]:
    rows, columns = values.shape
    corners = ax.transData.transform([(-0.5, -0.5), (columns - 0.5, rows - 0.5)])
    (left, first), (right, last) = corners / figure.bbox.size
    low, high = (float(f(values)) if np.isfinite(values).any() else 0.0
                 for f in (np.nanmin, np.nanmax))  # fmt: skip
    scale = STEPS / (high - low) if high > low else 0.0
    steps = np.nan_to_num((values - low) * scale, nan=STEPS + 1).round().astype("<u2")
    box = [left, 1 - max(first, last), right - left, abs(last - first)]
    return {
        "box": [round(100 * side, 3) for side in box],
        "rows": rows,
        "columns": columns,
        "flip": bool(last > first),
        "low": low,
        "high": high,
        "data": base64.b64encode(steps.tobytes()).decode(),
        "title": ax.get_title().replace("\n× ", " × ").replace("\n", ", "),
        "y": _names(ax.yaxis, rows),
        "x": _names(ax.xaxis, columns),
        "ylabel": ax.get_ylabel().replace("\n", " "),
        "xlabel": ax.get_xlabel().replace("\n", " "),
    }


def _names(axis: Any, count: int) -> list[str]:
    """The layers along an axis, as ``drawing.layer_axis`` left them there."""
    names = getattr(axis, "layer_names", [])
    return names if len(names) == count else []
