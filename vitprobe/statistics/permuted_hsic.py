"""HSIC₁ with the images of one of two layers in another order: what unrelated layers would have.

Unbiased HSIC averages 0 under permutation, whatever the number of features; its spread tells what
a value can be by chance. The permutation of a batch is the same for all layers, so a search for the
most alike among many pairs can be compared with the same search under permutation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vitprobe.statistics.hsic import u_centre

# Multiplications per image that permutations may take: about a tenth of a ViT-S's and a ResNet-50's
# passes. Beyond that there are fewer of them.
PER_IMAGE = 800_000_000
BYTES, FEWEST = 2**26, 20


def affordable(asked: int, layers: int, batch: int) -> int:
    """How many permutations there are of those asked for; no fewer than 20 of them."""
    most = min(PER_IMAGE // (layers**2 * max(1, batch)), BYTES // (8 * layers**2))
    return min(asked, max(FEWEST, most))


def permuted_hsic(grams: Tensor, times: int, key: list[int]) -> Tensor:
    """HSIC₁ of every pair of Grams, the images of the first in another order.

    Args:
        grams: (layers, n, n), n >= 4.
        times: how many permutations.
        key: of the random numbers: another one for every batch.

    Returns:
        (times, layers, layers) float64; not symmetric, as the first layer's images are permuted.
    """
    n = grams.shape[-1]
    # Of what chance may give, float32 has digits enough.
    centred = u_centre(grams)
    scale = centred.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    unit = (centred / scale[:, None, None]).float()
    plain = unit.flatten(1).T.contiguous()
    generator = np.random.default_rng(key)
    found = grams.new_empty(times, len(grams), len(grams))
    for draw in found:
        order = torch.from_numpy(generator.permutation(n)).to(grams.device)
        draw.copy_(unit[:, order][:, :, order].flatten(1) @ plain)
    return found * (scale[:, None] * scale) / (n * (n - 3))


def normalise_by(draws: Tensor, sums: Tensor) -> Tensor:
    """CKA of permuted sums (times, k, k) by the layers' own HSIC in ``sums`` (k, k)."""
    own = sums.diagonal()
    scale = torch.where(own > 0, own, torch.nan).sqrt()
    return draws / (scale[:, None] * scale)
