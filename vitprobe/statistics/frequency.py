"""Amplitudes of maps at diagonal frequencies, and their variance over locations.

Of the two-dimensional Fourier transform only the diagonal is needed, so it is a product with a few
sines and cosines; what is constant over the map is taken away first, as its digits would be lost.
"""

from __future__ import annotations

from functools import lru_cache
from math import log, pi, sqrt

import numpy as np
import torch
from torch import Tensor

from vitprobe.statistics.norms import exact, held

# Values of maps that are transformed at a time: more leave the cache.
PIECE = 2**20
# Means up to here have squares in float32, and sums of them.
LARGEST = 1e18


def diagonal(rows: int, columns: int) -> np.ndarray:
    """(frequencies,) ω of the diagonal of a grid, from 0 to 1, in units of π.

    On oblong grids those of the shorter side; along the longer one the nearest of its own.
    """
    shorter = min(rows, columns)
    return 2 * np.arange(shorter // 2 + 1) / shorter


def below_nyquist(rows: int, columns: int) -> int:
    """The index of the highest of these frequencies below 1; 0 where there is none."""
    return (min(rows, columns) - 1) // 2


def log_amplitudes(maps: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """ln|F(ω, ω)| − ln|F(0, 0)| and variance of each image's maps, in float64 where float32 fails.

    Args:
        maps: (n, rows · columns, channels), any floating type.
        rows: of the grid.
        columns: of the grid.

    Returns:
        delta: (n, frequencies), mean over channels; NaN where all of them were left out.
        variance: (n,) over locations, mean over channels.
        zeros: (n,) how many channels have an amplitude of 0 (or of nothing but rounding) at a
            frequency, which has no logarithm: left out there.
    """
    given = torch.float64 if maps.dtype == torch.float64 else torch.float32
    # Roundings of as many terms of either sign, with room to spare.
    rounding = 8 * torch.finfo(given).eps * sqrt(rows * columns)
    images = max(1, PIECE // max(1, maps[:1].numel()))
    parts = []
    for piece in maps.split(images):
        part = _of_piece(piece.to(given), rows, columns, rounding)
        if part is None:
            wide = exact(maps)
            whole = [_of_piece(one, rows, columns, rounding) for one in wide.split(images)]
            parts = [one for one in whole if one is not None]
            break
        parts.append(part)
    delta, variance, zeros = (torch.cat(part) for part in zip(*parts))
    return delta, variance, zeros


def _of_piece(
    wide: Tensor, rows: int, columns: int, rounding: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    """``log_amplitudes`` of some images; None where float32 cannot hold the squares."""
    count = rows * columns
    mean = wide.mean(1, keepdim=True)
    centred = wide - mean
    squares = torch.linalg.vecdot(centred, centred, dim=1)
    if not held(squares, centred, 1):
        return None
    if wide.dtype == torch.float32 and not bool((mean.abs() < LARGEST).all()):
        return None
    variance = squares / count
    waves = _waves(rows, columns, wide.dtype).to(wide.device)
    cosine, sine = (waves @ centred).chunk(2, 1)
    power = cosine.square() + sine.square()
    # What the roundings of the values and of their sums leave where there is nothing.
    least = rounding**2 * (variance + mean[:, 0].square())[:, None]
    constant = mean.abs().log() + log(count)
    logs = torch.cat([torch.zeros_like(constant), 0.5 * power.log() - constant], 1)
    nothing = torch.cat([mean == 0, power <= least], 1)
    nothing |= mean == 0  # without it there is nothing to compare with
    delta = logs.masked_fill(nothing, torch.nan).nanmean(2)
    return delta, variance.mean(1), nothing.any(1).sum(1)


@lru_cache(maxsize=64)
def _waves(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(2 · frequencies, places): cosines, then sines, of all diagonal frequencies but 0."""
    shorter = min(rows, columns)
    k = np.arange(1, shorter // 2 + 1)[:, None, None]
    down, along = (np.floor(k * side / shorter + 0.5) / side for side in (rows, columns))
    y, x = np.mgrid[:rows, :columns]
    phase = 2 * pi * (down * y + along * x)
    waves = np.concatenate([np.cos(phase), -np.sin(phase)]).reshape(-1, rows * columns)
    return torch.from_numpy(waves).to(dtype)
