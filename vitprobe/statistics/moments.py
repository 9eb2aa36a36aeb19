"""Means over images with their standard errors, from additive float64 sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARTS = ("", "_squares", "_seen")


def moment_shapes(**shapes: Sequence[int]) -> dict[str, Sequence[int]]:
    """What to ask ``Session.sums`` for: sum, sum of squares and count of each quantity."""
    return {f"{name}{part}": shape for name, shape in shapes.items() for part in PARTS}


def add_moments(sums: dict[str, Tensor], name: str, place: tuple[Any, ...], values: Tensor) -> None:
    """Add images (n, ...) at a place of the quantity's sums; NaN counts as not seen."""
    sums[name][place] += values.nansum(0)
    sums[f"{name}_squares"][place] += values.square().nansum(0)
    sums[f"{name}_seen"][place] += (~values.isnan()).sum(0)


def mean_and_error(sums: dict[str, Tensor], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the images seen and its standard error; NaN for none, or only one."""
    total, squares, seen = (sums[f"{name}{part}"] for part in PARTS)
    count = seen.where(seen > 0, torch.nan)
    mean = total / count
    # Rounding can leave a variance of nothing slightly below it.
    spread = (squares / count - mean.square()).clamp_min(0)
    error = (spread / (count - 1).where(count > 1, torch.nan)).sqrt()
    return mean.cpu().numpy(), error.cpu().numpy()


def variance_of_mean(draws: np.ndarray) -> np.ndarray:
    """Over the first axis; NaN for one draw."""
    count = len(draws)
    if count < 2:
        return np.full(draws.shape[1:], np.nan)
    return draws.var(0, ddof=1) / count
