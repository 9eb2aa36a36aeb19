"""Whether a feature varies, or is merely rounded."""

from __future__ import annotations

import torch
from torch import Tensor

# How many roundings a feature may be off by without varying.
ROUNDINGS = 8


def varying(spread: Tensor, level: Tensor, rounding: float) -> Tensor:
    """(..., features) whether each feature deviates by more than rounding explains.

    That is by more than a few roundings of its own mean, or of the means of other features if
    these are seen to be rounded: what is computed from large numbers has their rounding.

    Args:
        spread: (..., features) standard deviations; exactly 0 where all values are equal.
        level: (..., features) absolute means.
        rounding: relative, of the type in which features were computed.
    """
    rounded = (spread > 0) & (spread <= rounding * level)
    count = rounded.sum(-1, keepdim=True)
    noise = (torch.where(rounded, level.square(), 0).sum(-1, keepdim=True) / count).nan_to_num(0)
    return spread > rounding * torch.maximum(level, noise.sqrt())
