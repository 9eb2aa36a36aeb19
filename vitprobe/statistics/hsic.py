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

from collections.abc import Callable, Iterator
from math import isfinite, sqrt

import numpy as np
import torch
from torch import Tensor

from vitprobe.statistics.norms import SMALLEST_SQUARE, exact
from vitprobe.statistics.varying import ROUNDINGS, varying

MIN_BATCH = 4
MAX_GROUPS = 32
# The share of a piece's squares that its mean may hold before it is subtracted first. A Gram then
# loses at most log2(20) = 4.3 of its 24 bits: measured, 4e-6 of its largest value and 3e-6 of CKA.
MEAN_ALLOWED = 0.95


def gram(features: Tensor) -> Tensor:
    """The Gram matrix of features, up to terms c_i + c_j, which U-centring annihilates.

    What the batch mean adds is such a term, so whether it is subtracted before the product changes
    nothing but the rounding: float32 digits are lost where the mean is far above the deviation. On
    a CPU the product of a piece of the features is made first, since it tells how far that is;
    where the mean holds more than ``MEAN_ALLOWED`` of the piece's squares, the piece is centred
    and multiplied again, and so are those that follow. Elsewhere every piece is centred first.
    Products are float32 over blocks of features that fit the cache, sums of blocks are float64.
    What is too small or too large for that, and what may not vary at all, is computed in float64.

    Args:
        features: (n, ...) one row per image; any floating type.

    Returns:
        (n, n) float64; exactly 0 where no feature varies by more than rounding.
    """
    rows = _rows(features)
    n = len(rows)
    mean_first = rows.device.type != "cpu"
    plain: Tensor | None = None
    centred: Tensor | None = None
    mean_square: float | Tensor = 0.0
    for piece in _pieces(rows):
        if not mean_first:
            product = _product(piece)
            squares, of_mean = product.trace().item(), product.sum().item() / n
            # Squares may overflow where deviations do not.
            mean_first = not (isfinite(squares) and of_mean <= MEAN_ALLOWED * squares)
            if not mean_first:
                plain = product if plain is None else plain.add_(product)
                continue
        mean = piece.mean(1, keepdim=True)
        product = _product(piece - mean)
        centred = product if centred is None else centred.add_(product)
        mean_square += mean.to(product.device).double().square().sum()
    total = torch.zeros(n, n, dtype=torch.float64, device=rows.device) if plain is None else plain
    varied: bool | Tensor = True
    if centred is not None:
        rounding = ROUNDINGS * torch.finfo(piece.dtype).eps
        varied = centred.trace() > n * mean_square * rounding**2
        total = centred if plain is None else plain.add_(centred)
    trace = total.trace()
    sound = trace.isfinite() & (trace >= SMALLEST_SQUARE * rows.numel()) & varied
    return total if sound else careful_gram(rows).to(total.device)


def careful_gram(rows: Tensor) -> Tensor:
    """(..., n, features) -> (..., n, n) Grams in float64 of the features that vary.

    A feature varies where it deviates from its batch mean by more than rounding explains; see
    ``varying``.
    """
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    rounding = ROUNDINGS * torch.finfo(dtype).eps
    home = torch.device("cpu") if rows.device.type == "mps" else rows.device
    grams = torch.zeros(*rows.shape[:-1], rows.shape[-2], dtype=torch.float64, device=home)
    size = max(1, 2**24 // rows.shape[:-1].numel())
    spreads, levels = [], []
    for piece in rows.split(size, -1):
        # Equal values do not vary, however their mean is rounded.
        top = exact(piece.amax(-2))
        moving = top != exact(piece.amin(-2))
        if not moving.any():
            spreads.append(top - top)
            levels.append(top.abs())
            continue
        wide = exact(piece)
        mean = wide.mean(-2)
        spread = (wide - mean[..., None, :]).square().mean(-2).sqrt()
        spreads.append(spread.where(moving | spread.isnan(), 0))
        levels.append(mean.abs())
    spread, level = torch.cat(spreads, -1), torch.cat(levels, -1)
    alive = varying(spread, level, rounding)
    for piece, kept in zip(rows.split(size, -1), alive.split(size, -1)):
        if kept.any():
            wide = exact(piece)
            wide = (wide - wide.mean(-2, keepdim=True)).masked_fill(~kept[..., None, :], 0)
            with torch.autocast(home.type, enabled=False):
                grams += wide @ wide.mT
    return grams.masked_fill(~spread.isfinite().all(-1)[..., None, None], torch.nan)


def _pieces(rows: Tensor) -> Iterator[Tensor]:
    """(n, features) -> (blocks, n, block), views whose blocks are multiplied side by side."""
    n, size = rows.shape
    # Measured: blocks in the second-level cache on CPU, few large launches elsewhere.
    block, elements = (1024, 2**20) if rows.device.type == "cpu" else (8192, 2**26)
    whole = size - size % block
    pieces: tuple[Tensor, ...] = ()
    if whole:
        blocks = rows[:, :whole].unflatten(1, (-1, block)).transpose(0, 1)
        pieces = blocks.split(max(1, elements // (n * block)))
    if whole < size:
        pieces += (rows[:, whole:][None],)
    for piece in pieces:
        yield piece if piece.dtype == torch.float64 else piece.float()


def _product(blocks: Tensor) -> Tensor:
    """(blocks, n, features) -> (n, n) float64 sum of the blocks' Grams, on CPU if it must be."""
    # Under the models' autocast the product would be one of bfloat16.
    if torch.is_autocast_enabled(blocks.device.type):
        with torch.autocast(blocks.device.type, enabled=False):
            return _product(blocks)
    products = torch.bmm(blocks, blocks.mT)
    if products.device.type == "mps":
        products = products.cpu()
    return products.sum(0, dtype=torch.float64)


def _rows(features: Tensor) -> Tensor:
    """(n, features) without a copy where the storage allows it: a Gram ignores their order."""
    n = features.shape[0]
    if not features.is_contiguous():
        strides = features.stride()
        order = sorted(range(1, features.ndim), key=lambda axis: -strides[axis])
        features = features.permute(0, *order)
    return features.reshape(n, -1)


def centre(gram: Tensor) -> Tensor:
    """(n, n) Gram of the features centred over the images."""
    rows = gram - gram.mean(0)
    return rows - rows.mean(1, keepdim=True)


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


def half_sample_bias(
    statistic: Callable[[Tensor], Tensor], groups: Tensor, used: Tensor, splits: int = 8
) -> np.ndarray:
    """The bias of a statistic of summed groups that is not linear, by the delete-half jackknife.

    A bias of the order of 1/n is twice as large in either half of the groups. Leaving out one group
    at a time tells the same, but from differences that are multiplied by the number of groups: with
    them whatever in a statistic jumps, such as a count of pixels.

    Args:
        statistic: of a sum of groups.
        groups: (g, ...) additive parts, of about equally many images.
        used: (g,) how many batches each holds; empty groups are no replicates.
        splits: how many times the groups are halved, at most.

    Returns:
        what is to be subtracted from the statistic; 0 where fewer than two groups are used.
    """
    value = statistic(groups.sum(0)).cpu().numpy()
    filled = groups[used > 0]
    count, half = len(filled), len(filled) // 2
    if count < 2:
        return np.zeros_like(value)
    found = []
    for split in range(min(splits, count)):
        first, second = filled.roll(-split, 0).split([half, count - half])
        both = sum(statistic(part.sum(0)).cpu().numpy() for part in (first, second))
        found.append((both - 2 * value) / (count / half + count / (count - half) - 2))
    return np.mean(found, axis=0)


def bootstrap_error(
    statistic: Callable[[Tensor], Tensor], groups: Tensor, used: Tensor, draws: int = 200
) -> np.ndarray:
    """Standard error of a statistic of summed groups, by drawing groups with replacement.

    For statistics that jump, such as ranks and places of a maximum: the jackknife's errors are 0
    wherever leaving out any one group changes none of them, and twice too large elsewhere.

    Args:
        statistic: of a sum of groups.
        groups: (g, ...) additive parts.
        used: (g,) how many batches each holds; empty groups are not drawn.
        draws: how many times as many groups are drawn; always the same ones.

    Returns:
        the standard error; NaN where fewer than two groups are used.
    """
    filled = groups[used > 0]
    count = len(filled)
    if count < 2:
        return np.full_like(statistic(groups.sum(0)).cpu().numpy(), np.nan)
    drawn = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(0))
    times = torch.nn.functional.one_hot(drawn, count).sum(1).to(groups)
    sums = ((row @ filled.flatten(1)).view(groups.shape[1:]) for row in times)
    values = np.stack([statistic(total).cpu().numpy() for total in sums])
    # Groups drawn from k vary by (k - 1) / k of what groups from the whole would.
    return values.std(0, ddof=1) * sqrt(count / (count - 1))


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
    k, m = centre(gram(x)), centre(gram(y))
    return float((k * m).sum() / sqrt((k * k).sum() * (m * m).sum()))
