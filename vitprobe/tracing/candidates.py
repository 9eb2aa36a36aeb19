"""Which operations may be attention, before anyone has looked at what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_SOFTMAXES = {torch.softmax, Tensor.softmax, F.softmax, torch.special.softmax}
_FUSED_ATTENTION = {F.scaled_dot_product_attention, F.multi_head_attention_forward}


def is_fused(function: Any) -> bool:
    """Attention in one operation; flexible attention is no function of torch's own."""
    return function in _FUSED_ATTENTION or getattr(function, "__name__", "") == "flex_attention"


def attends(function: Any, args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Fused attention, or a softmax over the last of at least 3 axes, the last two above 1."""
    if is_fused(function):
        return True
    if function not in _SOFTMAXES:
        return False
    scores = args[0] if args else kwargs["input"]
    axis = args[1] if len(args) > 1 else kwargs.get("dim")
    return scores.ndim >= 3 and axis in (-1, scores.ndim - 1) and min(scores.shape[-2:]) > 1
