"""Nearest neighbours of images in a representation, and how far two representations share them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from vitprobe.statistics.varying import ROUNDINGS, varying

# Elements of a block of similarities.
BLOCK = 2**22
TEMPERATURE = 0.07


def nearest(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest other images of each image by cosine, and their cosines.

    Of unit vectors the nearest by cosine are those at the least distance. Distances are taken of
    vectors less their mean: where that is far above the deviation, cosines differ only in digits
    that float32 does not have. Features that vary by no more than rounding tell nothing.

    Args:
        features: (n, d), n > k.
        k: how many.

    Returns:
        (n, k) indices, nearest first, and (n, k) cosines. Indices are -1 where the features do not
        vary over the images: no image is nearer than another.
    """
    wide = features.double()
    lengths = wide.norm(dim=1, keepdim=True)
    unit = wide / lengths.where(lengths > 0, 1)
    rounding = ROUNDINGS * torch.finfo(torch.float32).eps
    # What varies by its length alone does not vary as a direction.
    alive = varying(_spread(wide), wide.mean(0).abs(), rounding)
    alive &= _spread(unit) > rounding * unit.mean(0).abs()
    if not alive.any():
        empty = torch.full((len(unit), k), -1, device=unit.device)
        return empty, torch.full_like(empty, torch.nan, dtype=torch.float64)
    centred = (unit - unit.mean(0))[:, alive]
    squares = centred.square().sum(1)
    found, cosines = [], []
    for rows in torch.arange(len(unit), device=unit.device).split(max(1, BLOCK // len(unit))):
        closeness = centred[rows] @ centred.T - squares / 2
        closeness[torch.arange(len(rows)), rows] = -torch.inf
        best = closeness.topk(k, dim=1)
        found.append(best.indices)
        # |a - b|² = 2 - 2 cos(a, b).
        distance = squares[rows][:, None] - 2 * best.values
        cosines.append(1 - distance / 2)
    return torch.cat(found), torch.cat(cosines)


def _spread(rows: Tensor) -> Tensor:
    """(features,) standard deviations; 0 where all values are equal, however their mean rounds."""
    return rows.std(0, correction=0).where(rows.amax(0) != rows.amin(0), 0)


def overlap(neighbours: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean share of common neighbours of every pair of layers, and its standard error over images.

    Args:
        neighbours: (layers, n, k) of ``nearest``.

    Returns:
        (layers, layers) each; NaN for layers that do not vary.
    """
    layers, n, k = neighbours.shape
    total = torch.zeros(layers, layers, dtype=torch.float64)
    squares = torch.zeros_like(total)
    for rows in torch.arange(n).split(max(1, BLOCK // (layers * n))):
        which = neighbours[:, rows].transpose(0, 1)  # images first
        member = torch.zeros(len(rows), layers, n)
        member.scatter_(2, which.clamp_min(0), 1.0)
        shared = (member @ member.mT).double() / k
        total += shared.sum(0)
        squares += shared.square().sum(0)
    mean = total / n
    error = ((squares / n - mean.square()).clamp_min(0) / (n - 1)).sqrt()
    dead = (neighbours[:, 0, 0] < 0).numpy()
    result = mean.numpy(), error.numpy()
    for array in result:
        array[dead], array[:, dead] = np.nan, np.nan
    return result


def permuted_overlap(neighbours: Tensor, times: int, seed: int) -> Iterator[np.ndarray]:
    """``overlap`` with the images of the first layer of each pair permuted: (layers, layers) each.

    The permutation is the same for all layers. Sparse: permuted sets hardly meet.

    Args:
        neighbours: (layers, n, k) of ``nearest``.
        times: how many permutations.
        seed: of them.
    """
    layers, n, k = neighbours.shape
    image = np.arange(n)[None, :, None]
    dead = (neighbours[:, 0, 0] < 0).numpy()
    neighbour = neighbours.clamp_min(0).numpy()
    starts = np.arange(layers + 1) * n * k
    ones = np.ones(layers * n * k, np.float32)

    def members(image: np.ndarray, neighbour: np.ndarray) -> scipy.sparse.csr_array:
        pairs = np.broadcast_to(image, neighbour.shape) * n + neighbour
        return scipy.sparse.csr_array((ones, pairs.ravel(), starts), shape=(layers, n * n))

    plain = members(image, neighbour).T.tocsr()
    generator = np.random.default_rng(seed)
    for _ in range(times):
        moved = generator.permutation(n)
        shared = (members(moved[image], moved[neighbour]) @ plain).toarray() / (n * k)
        shared[dead], shared[:, dead] = np.nan, np.nan
        yield shared


def votes(indices: Tensor, cosines: Tensor, labels: np.ndarray) -> np.ndarray:
    """(n,) whether the neighbours of each image tell its class, votes weighted e^(cosine / 0.07).

    Args:
        indices: (n, k) of ``nearest``.
        cosines: (n, k).
        labels: (n,) from 0 on.
    """
    weights = (cosines / TEMPERATURE - 1 / TEMPERATURE).exp()
    of_them = torch.from_numpy(labels)[indices.clamp_min(0)]
    count = torch.zeros(len(labels), int(labels.max()) + 1, dtype=weights.dtype)
    count.scatter_add_(1, of_them, weights)
    return count.argmax(1).numpy() == labels
