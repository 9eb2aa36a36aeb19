"""Images with cells of a grid dropped or in another order, each image in its own seeded way."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def cell_edges(side: int, cells: int) -> np.ndarray:
    """(cells + 1,) where the cells of a side begin and end, in pixels; sizes differ by one."""
    return np.floor(np.arange(cells + 1) * side / cells + 0.5).astype(int)


def order_of_cells(seed: int, image: int, what: str, count: int) -> np.ndarray:
    """A permutation of cells that depends on the seed, the image and the purpose alone."""
    key = [seed, image, *what.encode()]
    return np.random.default_rng(key).permutation(count)


def dropped(images: Tensor, orders: np.ndarray, share: float, cells: int, fill: Tensor) -> Tensor:
    """Images (n, C, H, W) with a share of their cells × cells grid replaced by ``fill``.

    Args:
        images: (n, C, H, W); stay as they are.
        orders: (n, cells²) the order in which cells go: those of a smaller share go first.
        share: from 0 to 1; rounded to whole cells.
        cells: along each side.
        fill: what broadcasts over a batch: 0, or a value a channel.
    """
    count = round(share * cells**2)
    gone = np.zeros((len(images), cells**2), dtype=bool)
    np.put_along_axis(gone, orders[:, :count], True, axis=1)
    grid = gone.reshape(-1, cells, cells)
    rows, columns = (
        np.repeat(np.arange(cells), np.diff(cell_edges(side, cells))) for side in images.shape[2:]
    )
    mask = torch.from_numpy(grid[:, rows][:, :, columns]).to(images.device)[:, None]
    return torch.where(mask, fill, images)


def shuffled(images: Tensor, orders: np.ndarray, cells: int) -> Tensor:
    """Images (n, C, H, W) with the cells of a cells × cells grid in another order.

    Where a side is no multiple of ``cells``, the pixels beyond the last whole cell stay.

    Args:
        images: stay as they are.
        orders: (n, cells²) which cell comes in whose place, row by row.
        cells: along each side.
    """
    n, channels, height, width = images.shape
    high, wide = height // cells, width // cells
    inner = images[:, :, : high * cells, : wide * cells]
    tiles = inner.reshape(n, channels, cells, high, cells, wide).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(n, cells**2, channels, high, wide)
    index = torch.from_numpy(orders).to(images.device)[:, :, None, None, None]
    tiles = tiles.gather(1, index.expand_as(tiles))
    moved = tiles.reshape(n, cells, cells, channels, high, wide).permute(0, 3, 1, 4, 2, 5)
    result = images.clone()
    result[:, :, : high * cells, : wide * cells] = moved.reshape(inner.shape)
    return result
