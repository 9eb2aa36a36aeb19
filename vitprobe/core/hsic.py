"""Grams, U-centring, and linear CKA summed over minibatches.

Linear CKA (Kornblith et al. 2019, arXiv 1905.00414) of the representations X (n, p) and Y (n, q)
of the same n images compares their Grams K = XXᵀ and L = YYᵀ. Over minibatches (Nguyen et al.
2021, arXiv 2010.15327, eq. 2 and 3) it is

    CKA = Σ HSIC₁(K, L) / sqrt(Σ HSIC₁(K, K) · Σ HSIC₁(L, L)),

sums over batches, with the unbiased HSIC₁ of Song et al. 2012. HSIC₁ is an inner product of
U-centred Grams (Székely and Rizzo 2014), so a batch of Grams, U-centred and flattened to
(layers, n²), gives all pairs of layers as one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import torch
from torch import Tensor

MIN_BATCH = 4
MAX_GROUPS = 32


def gram(features: Tensor) -> Tensor:
    """The Gram matrix of batch-centred features.

    The batch mean is subtracted first. U-centring annihilates what that changes (a term
    c_i + c_j), so HSIC₁ stays the same, but means far above the deviation no longer cancel in
    float32. Products are float32 over blocks of features that fit the cache, sums of blocks are
    float64.

    Args:
        features: (n, ...) one row an image; any floating type.

    Returns:
        (n, n) float64; exactly 0 where no feature varies by more than rounding.
    """
    rows = _rows(features)
    n, size = rows.shape
    wide = rows.dtype == torch.float64
    on_cpu = rows.device.type == "cpu"
    # Measured: blocks in the second-level cache on CPU, few large launches elsewhere.
    block, group = (1024, max(1, 2**19 // (n * 1024))) if on_cpu else (8192, 2**26 // (n * 8192))
    group = max(1, group)
    no_float64 = rows.device.type == "mps"
    home = torch.device("cpu") if no_float64 else rows.device
    total = torch.zeros(n, n, dtype=torch.float64, device=home)
    mean_square = torch.zeros((), dtype=torch.float64, device=home)
    whole = size - size % block
    for piece in [*rows[:, :whole].split(block * group, 1), rows[:, whole:]]:
        if not piece.shape[1]:
            continue
        blocks = max(1, piece.shape[1] // block)
        # (n, blocks, block): a view of the piece, whose blocks are multiplied side by side.
        piece = piece.to(torch.float64 if wide else torch.float32).unflatten(1, (blocks, -1))
        mean = piece.mean(0)
        centred = (piece - mean).transpose(0, 1)
        # Under the models' autocast the product would be one of bfloat16.
        with torch.autocast(rows.device.type, enabled=False):
            products = torch.bmm(centred, centred.mT)
        if no_float64:
            products, mean = products.cpu(), mean.cpu()
        total += products.sum(0, dtype=torch.float64)
        mean_square += mean.double().square().sum()
    rounding = 8 * torch.finfo(torch.float64 if wide else torch.float32).eps
    dead = total.trace() <= n * mean_square * rounding**2
    return torch.where(dead, torch.zeros_like(total), total)


def _rows(features: Tensor) -> Tensor:
    """(n, features) without a copy where the storage allows it: a Gram ignores their order."""
    n = features.shape[0]
    if not features.is_contiguous():
        strides = features.stride()
        order = sorted(range(1, features.ndim), key=lambda axis: -strides[axis])
        features = features.permute(0, *order)
    return features.reshape(n, -1)


def u_centre(grams: Tensor) -> Tensor:
    """U-centred Grams: symmetric, zero diagonal, rows that sum to zero.

    Args:
        grams: (..., n, n) symmetric, n >= 3.

    Source: Székely and Rizzo 2014; the diagonal of ``grams`` plays no part.
    """
    n = grams.shape[-1]
    diagonal = torch.eye(n, dtype=torch.bool, device=grams.device)
    centred = grams.masked_fill(diagonal, 0)
    means = centred.sum(-1) / (n - 2)
    means = means - means.sum(-1, keepdim=True) / (2 * (n - 1))
    centred = centred - means[..., :, None] - means[..., None, :]
    return centred.masked_fill(diagonal, 0)


def hsic(grams: Tensor, others: Tensor | None = None) -> Tensor:
    """Unbiased HSIC₁ of every pair of Grams: (k, n, n) and (l, n, n) -> (k, l), n >= 4."""
    n = grams.shape[-1]
    if n < MIN_BATCH:
        raise ValueError(f"HSIC needs at least {MIN_BATCH} examples, not {n}")
    left = u_centre(grams).flatten(1)
    right = left if others is None else u_centre(others).flatten(1)
    return left @ right.T / (n * (n - 3))


def normalise(sums: Tensor) -> Tensor:
    """CKA from HSIC sums (..., k, k); NaN where a layer's own HSIC is 0 (it does not vary)."""
    own = sums.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(own > 0, own, torch.nan).sqrt()
    # Symmetric to the last digit, which a matrix product need not be.
    return (sums + sums.mT) / 2 / (scale[..., :, None] * scale[..., None, :])


def jackknife(
    statistic: Callable[[Tensor], Tensor], groups: Tensor, used: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """A statistic of summed groups and its standard error, leaving out one group at a time.

    Args:
        statistic: of a sum of groups.
        groups: (g, ...) additive parts.
        used: (g,) how many batches each holds; empty groups are no replicates.

    Returns:
        value and standard error as arrays; the error is NaN where fewer than two groups are used.
    """
    total = groups.sum(0)
    value = statistic(total).cpu().numpy()
    filled = [g for g in range(len(groups)) if used[g] > 0]
    if len(filled) < 2:
        return value, np.full_like(value, np.nan)
    replicates = [statistic(total - groups[g]).cpu().numpy() for g in filled]
    mean = sum(replicates) / len(replicates)
    squares = sum((replicate - mean) ** 2 for replicate in replicates)
    return value, np.sqrt(squares * (len(filled) - 1) / len(filled))


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two representations of the same images, debiased (one batch of all n).

    Args:
        x: (n, ...), n >= 4.
        y: (n, ...).
    """
    sums = hsic(torch.stack([gram(x), gram(y)]))
    return float(normalise(sums)[0, 1])


def biased_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA as Kornblith et al. 2019 define it, with its bias; for comparisons only."""
    k, m = gram(x), gram(y)
    return float((k * m).sum() / sqrt((k * k).sum() * (m * m).sum()))
