"""Quantiles and shares of positive numbers from additive counts in logarithmic bins.

Numbers far from 1 are counted in a unit of their own, a power of two near them: see ``octaves``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, log2

import torch
from torch import Tensor

# Bins of 1/64 octave, 1.1 % wide, from 2^-14 to 2^22; what lies outside counts in the outermost.
LOWEST, HIGHEST, PER_OCTAVE = -14, 22, 64
BINS = (HIGHEST - LOWEST) * PER_OCTAVE
# What is at least so many octaves from either end needs no unit of its own.
MARGIN = 8


def edges() -> Tensor:
    """(BINS + 1,) float64."""
    steps = torch.arange(BINS + 1, dtype=torch.float64)
    return torch.exp2(LOWEST + steps / PER_OCTAVE)


def octaves(typical: float) -> int:
    """To what power of two numbers around ``typical`` are counted: 0 unless they lie far off."""
    if not typical > 0 or not isfinite(typical):
        return 0
    power = log2(typical)
    if LOWEST + MARGIN <= power <= HIGHEST - MARGIN:
        return 0
    return round(power) - (LOWEST + HIGHEST) // 2


def coarser(counts: Tensor, times: int, units: Sequence[int]) -> Tensor:
    """Counts (rows, BINS) in bins so many times as wide, all rows in the unit 1.

    What lies outside then counts in the outermost.

    Args:
        counts: each row in a unit of its own.
        times: what divides ``PER_OCTAVE``.
        units: (rows,) in octaves.
    """
    found = []
    for row, unit in zip(counts.unflatten(1, (-1, times)).sum(2), units):
        at = torch.arange(len(row), device=row.device) + PER_OCTAVE // times * unit
        found.append(torch.zeros_like(row).index_add_(0, at.clamp(0, len(row) - 1), row))
    return torch.stack(found)


def counts_and_sums(values: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the values are in each bin, and what they add up to there: (BINS,) each."""
    values = values.flatten()
    position = (values.clamp_min(2.0**LOWEST).log2_() - LOWEST) * PER_OCTAVE
    which = position.long().clamp_(0, BINS - 1)
    return (
        torch.bincount(which, minlength=BINS),
        torch.bincount(which, weights=values, minlength=BINS),
    )


def means_of_bins(counts: Tensor, sums: Tensor) -> Tensor:
    """(..., BINS) the mean of the values in each bin; its middle where it is empty."""
    bounds = edges().to(sums)
    middles = (bounds[1:] * bounds[:-1]).sqrt()
    return torch.where(counts > 0, sums / counts.clamp_min(1), middles)


def quantile(counts: Tensor, means: Tensor, share: float) -> Tensor:
    """(...) the quantile of what was counted (..., BINS), as ``numpy.quantile`` defines it.

    A value is known as the mean of its bin: to 1.1 % at worst. NaN where nothing was counted.
    """
    cumulative = counts.cumsum(-1)
    total = cumulative[..., -1:]
    rank = share * (total - 1).clamp_min(0)
    low, high = rank.floor(), rank.ceil()
    ends = [torch.searchsorted(cumulative, at, right=True) for at in (low, high)]
    one, other = (means.gather(-1, end.clamp_max(BINS - 1)) for end in ends)
    found = one + (rank - low) * (other - one)
    return found.where(total > 0, torch.nan)[..., 0]


def share_above(counts: Tensor, threshold: Tensor) -> Tensor:
    """(...) the share of what was counted (..., BINS) that is above a threshold (...).

    The bin that holds the threshold counts in proportion, on the logarithmic scale.
    """
    position = (threshold.clamp_min(2.0**LOWEST).log2() - LOWEST) * PER_OCTAVE
    bins = torch.arange(BINS, dtype=counts.dtype, device=counts.device)
    above = (bins + 1 - position[..., None]).clamp(0, 1)
    return (counts * above).sum(-1) / counts.sum(-1)
