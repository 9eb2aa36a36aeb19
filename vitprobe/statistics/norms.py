"""Lengths of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

# Values that are multiplied at a time: products of more leave the cache.
PIECE = 2**20
# Mean squares from here on keep their digits in float32, and so do those of values a thousandth of
# theirs: its smallest number of full digits is 1e-38.
SMALLEST_SQUARE = 1e-30


def norms(vectors: Tensor) -> Tensor:
    """‖x‖₂ along the last axis (n, ..., features) -> (n, ...), in float64 where float32 fails."""
    images = max(1, PIECE // max(1, vectors[:1].numel()))
    found = []
    for piece in vectors.split(images):
        wide = piece if piece.dtype == torch.float64 else piece.float()
        found.append(torch.linalg.vecdot(wide, wide))
    squares = torch.cat(found)
    if not held(squares, vectors):
        return norms(exact(vectors))
    return squares.sqrt()


def held(squares: Tensor, vectors: Tensor, axis: int = -1) -> bool:
    """Whether sums of squares along an axis are neither too small nor too large for float32."""
    if squares.dtype == torch.float64:
        return True
    if not bool(squares.isfinite().all()):
        return False
    small = squares < SMALLEST_SQUARE * vectors.shape[axis]
    return not bool(small.any()) or not bool((small & (vectors != 0).any(axis)).any())


def exact(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
