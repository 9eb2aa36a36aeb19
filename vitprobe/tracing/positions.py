"""What a model knows of positions: a table of one vector a patch, or biases in its attention."""

from __future__ import annotations

import re
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitprobe.models.loading import Model

_TABLE = re.compile(
    r"(^|[._])((abs\w*_)?pos(ition)?(al)?_?(emb|embed|embedding|embeddings)|patch_pos)"
    r"(_?\d+)?(\.weight)?$"
)
# Whatever else a table holds beside a square of patches: class, distillation and register tokens.
MOST_PREFIX_TOKENS = 16
# How a module says its bias, heads first; the names of the families that have one.
BIASES = {
    "_get_rel_pos_bias": "Swin, BEiT",
    "_relative_positional_encodings": "Swin v2 CR",
    "get_bias": "MaxViT, CoAtNet, ViT with relative positions",
}


def resample(table: Tensor, rows: int, columns: int) -> Tensor:
    """A table (rows, columns, features) at another resolution, as fine-tuning does it."""
    from timm.layers import resample_abs_pos_embed

    height, width, features = table.shape
    flat = table.detach().float().reshape(1, height * width, features)
    new = resample_abs_pos_embed(
        flat, new_size=[rows, columns], old_size=[height, width], num_prefix_tokens=0
    )
    return new.reshape(rows, columns, features)


def by_offset(bias: Tensor, rows: int, columns: int) -> np.ndarray:
    """A bias (heads, tokens, tokens) of a window against the offset from query to key.

    Returns:
        (heads, 2 rows - 1, 2 columns - 1); the middle is a token's bias to itself.
    """
    heads = len(bias)
    pairs = bias.detach().double().reshape(heads, rows, columns, rows, columns).cpu().numpy()
    found = np.full((heads, 2 * rows - 1, 2 * columns - 1), np.nan)
    for y in range(rows):
        for x in range(columns):
            # This query's keys, moved so that it stands in the middle.
            top, left = rows - 1 - y, columns - 1 - x
            found[:, top : top + rows, left : left + columns] = pairs[:, y, x]
    return found


def find_table(model: Model) -> Tensor | None:
    """(rows, columns, features) of a model's table of positions, prefix tokens left out."""
    named = [*model.module.named_parameters(), *model.module.named_buffers()]
    for name, tensor in named:
        if not _TABLE.search(name) or not tensor.is_floating_point():
            continue
        while tensor.ndim > 2 and len(tensor) == 1:
            tensor = tensor[0]
        owner = model.module.get_submodule(name.removesuffix(".weight").rpartition(".")[0])
        if tensor.ndim == 3 and hasattr(owner, "block_size"):
            return _by_blocks(tensor)
        if tensor.ndim == 3:
            # Features come last, or first in tables that are added to maps.
            first = tensor.shape[1] == tensor.shape[2] != tensor.shape[0]
            return tensor.permute(1, 2, 0) if first else tensor
        shape = _grid(model, len(tensor)) if tensor.ndim == 2 else None
        if shape is not None:
            return tensor[len(tensor) - shape[0] * shape[1] :].unflatten(0, shape)
    return None


def _by_blocks(table: Tensor) -> Tensor:
    """NesT's table (blocks, tokens of a block, features) as (rows, columns, features)."""
    blocks, tokens = (isqrt(size) for size in table.shape[:2])
    return (
        table.unflatten(1, (tokens, tokens)).unflatten(0, (blocks, blocks)).transpose(1, 2)
    ).reshape(blocks * tokens, blocks * tokens, -1)  # fmt: skip


def _grid(model: Model, tokens: int) -> tuple[int, int] | None:
    """Rows and columns of a table of so many tokens: the model's word, or else a square."""
    said = getattr(getattr(model.module, "patch_embed", None), "grid_size", None)
    side = isqrt(tokens)
    # A table may be larger than the grid, and is then resampled (Qwen3).
    for rows, columns in [tuple(said), (side, side)] if said else [(side, side)]:
        if 0 <= tokens - rows * columns <= MOST_PREFIX_TOKENS:
            return rows, columns
    return None


def find_biases(model: Model) -> list[tuple[str, np.ndarray]]:
    """Label and (heads, offsets, offsets) of each module that adds a bias to its attention."""
    found = []
    for name, module in model.module.named_modules():
        bias = _bias(module)
        if bias is None or bias.shape[-1] != bias.shape[-2]:
            continue
        window = getattr(module, "window_size", None)
        if window is None and hasattr(module, "attention_bias_idxs"):
            window = isqrt(bias.shape[-1])
        if window is None:
            continue
        rows, columns = (window, window) if isinstance(window, int) else tuple(window)
        bias = bias.reshape(-1, *bias.shape[-2:])
        prefix = bias.shape[-1] - rows * columns
        if prefix >= 0:
            found.append((name or "output", by_offset(bias[:, prefix:, prefix:], rows, columns)))
    return found


@torch.no_grad()
def _bias(module: nn.Module) -> Tensor | None:
    if getattr(module, "relative_position_bias_table", 0) is None:
        return None
    if hasattr(module, "cpb_mlp"):
        return _swin_v2_bias(module)
    if hasattr(module, "attention_bias_idxs"):  # LeViT and its kin
        levit: Any = module
        return levit.attention_biases[:, levit.attention_bias_idxs.long()]
    for method in BIASES:
        if callable(getattr(module, method, None)):
            return getattr(module, method)()
    return None


def _swin_v2_bias(module: Any) -> Tensor:
    """Swin v2 makes its bias from offsets, and squeezes it to (0, 16)."""
    rows, columns = module.window_size
    table = module.cpb_mlp(module.relative_coords_table).flatten(0, 2)
    pairs = table[module.relative_position_index.flatten()]
    return 16 * pairs.sigmoid().unflatten(0, (rows * columns, -1)).permute(2, 0, 1)
