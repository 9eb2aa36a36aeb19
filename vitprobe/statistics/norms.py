"""Lengths of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

# Values that are multiplied at a time: products of more leave the cache.
PIECE = 2**20


def norms(vectors: Tensor) -> Tensor:
    """‖x‖₂ along the last axis (n, ..., features) -> (n, ...), at least in float32."""
    images = max(1, PIECE // max(1, vectors[:1].numel()))
    found = []
    for piece in vectors.split(images):
        wide = piece if piece.dtype == torch.float64 else piece.float()
        found.append(torch.linalg.vecdot(wide, wide))
    return torch.cat(found).sqrt()
