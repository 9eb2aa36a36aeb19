"""HSIC₁ between all places of a layer and all patches of the input, as one matrix product.

The estimator is that of ``statistics.hsic``: an inner product of U-centred Grams. Here every token
has a Gram of its own, so they are made side by side.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vitprobe.statistics.hsic import careful_gram, u_centre
from vitprobe.statistics.norms import SMALLEST_SQUARE
from vitprobe.statistics.varying import ROUNDINGS

# Grams of one block of places stay below this; a block is all of them unless batches are large.
BLOCK_BYTES = 2**27


def input_patches(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """(n, C, H, W) -> (n, rows·columns, C·h·w): non-overlapping patches, row by row.

    A border that the grid does not divide is left out, half of it on each side.
    """
    height, width = pixels.shape[-2] // rows, pixels.shape[-1] // columns
    top = (pixels.shape[-2] - rows * height) // 2
    left = (pixels.shape[-1] - columns * width) // 2
    inner = pixels[..., top : top + rows * height, left : left + columns * width]
    cells = inner.unflatten(3, (columns, width)).unflatten(2, (rows, height))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def place_grams(features: Tensor) -> Tensor:
    """(n, places, features) -> (places, n, n) float64 Grams of batch-centred features.

    Exactly 0 where no feature varies by more than rounding.
    """
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    rows = features.to(wide).transpose(0, 1)
    mean = rows.mean(1, keepdim=True)
    centred = rows - mean
    # Under the models' autocast the product would be one of bfloat16.
    with torch.autocast(features.device.type, enabled=False):
        grams = torch.bmm(centred, centred.mT)
    home = torch.device("cpu") if grams.device.type == "mps" else grams.device
    grams = grams.to(home).double()
    rounding = ROUNDINGS * torch.finfo(wide).eps
    squares = grams.diagonal(dim1=1, dim2=2).sum(1)
    level = rows.shape[1] * mean.to(home).double().square().sum((1, 2)) * rounding**2
    sound = (squares > level) & squares.isfinite()
    sound &= squares >= SMALLEST_SQUARE * rows.shape[1:].numel()
    if not sound.all():
        doubtful = (~sound).nonzero()[:, 0]
        grams[doubtful] = careful_gram(rows[doubtful.to(rows.device)])
    return grams


def place_hsic(tokens: Tensor, patches: Tensor) -> Tensor:
    """(n, t, d) and (n, p, q) -> (t + 1, p + 1): HSIC₁ of every token with every patch, n >= 4.

    The last column holds the tokens' HSIC with themselves, the last row the patches'.
    """
    n = len(tokens)
    home = torch.device("cpu") if tokens.device.type == "mps" else tokens.device
    shape = tokens.shape[1] + 1, patches.shape[1] + 1
    result = torch.zeros(shape, dtype=torch.float64, device=home)
    for rows, left in _centred_blocks(tokens):
        result[rows, -1] = left.square().sum(1)
        for columns, right in _centred_blocks(patches):
            result[rows, columns] = left @ right.T
            result[-1, columns] = right.square().sum(1)
    return result / (n * (n - 3))


def scratch_bytes(n: int, places: int, features: int) -> int:
    """What ``place_hsic`` needs beside what it is given: centred features, and Grams twice over."""
    return 4 * n * places * features + 5 * min(8 * places * n * n, BLOCK_BYTES)


def place_cka(sums: Tensor) -> Tensor:
    """(t + 1, p + 1) sums of HSIC₁ -> (t, p) CKA; NaN where a token or patch does not vary."""
    token, patch = (
        torch.where(own > 0, own, torch.nan).sqrt() for own in (sums[:-1, -1], sums[-1, :-1])
    )
    return sums[:-1, :-1] / token[:, None] / patch


def _centred_blocks(features: Tensor) -> Iterator[tuple[slice, Tensor]]:
    n, places = features.shape[:2]
    size = max(1, BLOCK_BYTES // (n * n * 8))
    for start in range(0, places, size):
        stop = min(start + size, places)
        yield slice(start, stop), u_centre(place_grams(features[:, start:stop])).flatten(1)
