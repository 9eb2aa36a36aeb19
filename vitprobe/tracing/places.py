"""Where on the picture the parts of a layer lie: tokens or map locations on a grid.

A layer's output is a list of tokens, of which some before the patches (class token, registers) lie
nowhere, or a map with its channels first or last. The grid has the picture's proportions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt

import numpy as np
from torch import Tensor, nn

from vitprobe.errors import NotApplicable
from vitprobe.models.loading import Model
from vitprobe.tracing.layers import Layer, map_layers

MAX_PREFIX = 16
TOKENS, CHANNELS_FIRST, CHANNELS_LAST = "tokens", "channels first", "channels last"
# What a trained model's own output reads; the papers' claims are about models of one kind.
CLASS_TOKEN, MEAN_OF_TOKENS, ON_MAPS = "class token", "mean of tokens", "attention on maps"
CONVOLUTION, UNTRAINED = "convolution", "untrained"


@dataclass(frozen=True)
class Places:
    """The grid of a layer.

    Attributes:
        rows: of the grid.
        columns: of the grid.
        form: ``tokens``, ``channels first`` or ``channels last``.
        prefix: tokens before those of the patches.
        has_class: whether the first of these is a class token.
        step: 1, or k where only every k-th row and column of a map is looked at.
    """

    rows: int
    columns: int
    form: str = TOKENS
    prefix: int = 0
    has_class: bool = False
    step: int = 1

    def __len__(self) -> int:
        return self.rows * self.columns

    def spatial(self, tensor: Tensor) -> Tensor:
        """(n, places, features), row by row, of a layer's tensor with its images first."""
        if self.form == TOKENS:
            return tensor[:, self.prefix :]
        if self.form == CHANNELS_FIRST:
            tensor = tensor.permute(0, 2, 3, 1)
        chosen = slice(self.step // 2, None, self.step)
        return tensor[:, chosen, chosen][:, : self.rows, : self.columns].flatten(1, 2)

    def thinned(self, most: int) -> Places:
        """The same grid if it is of tokens or has at most so many a side, else a regular subset."""
        step = -(-max(self.rows, self.columns) // most)
        if self.form == TOKENS or step == 1:
            return self
        kept = [max(1, (side - step // 2 - 1) // step + 1) for side in (self.rows, self.columns)]
        return replace(self, rows=kept[0], columns=kept[1], step=step)


@dataclass(frozen=True)
class Placed:
    """A layer with its grid.

    Attributes:
        layer: of ``map_layers``.
        places: its grid.
        model: index of its model.
        depth: how many of the model's blocks but the first are done by then, from 0 to 1.
    """

    layer: Layer
    places: Places
    model: int
    depth: float


def placed_layers(
    models: Sequence[Model], examples: Sequence[Tensor], choice: str | Sequence[str]
) -> tuple[list[Placed], list[str]]:
    """The chosen layers of all models with their grids, and each model's kind.

    Args:
        models: to be watched, in the precision of the caller's context.
        examples: for each model two images as it takes them.
        choice: ``last`` (the last block that has a grid), ``blocks``, or names with wildcards.

    Raises:
        VitprobeError: unknown layers, or one named that has no grid; sets pass over those.
    """
    wanted = [choice] if isinstance(choice, str) else list(choice)
    names = ["blocks" if name == "last" else name for name in wanted]
    found, kinds = [], []
    for index, (model, example) in enumerate(zip(models, examples)):
        layer_map = map_layers(model.name, model.module, example)
        side = (int(example.shape[-2]), int(example.shape[-1]))
        chosen = [
            (layer, find_places(layer, model.module, side)) for layer in layer_map.choose(names)
        ]
        kept = [(layer, places) for layer, places in chosen if places is not None]
        if not kept or (len(kept) < len(chosen) and not {"blocks", "all", "paper"} & set(names)):
            bare = next(layer for layer, places in chosen if places is None)
            raise NotApplicable(
                f"The layer {bare.label} of {model.name} has no grid of places: an image's part of "
                f"it is {' × '.join(map(str, bare.shape))}.",
                model.name,
            )
        if wanted == ["last"]:
            kept = kept[-1:]
        later = [block.time for block in layer_map.choose("blocks")][1:]
        for layer, places in kept:
            depth = float(np.mean([layer.time >= time for time in later])) if later else 1.0
            found.append(Placed(layer, places, index, depth))
        kinds.append(_kind(model, layer_map.has_attention, kept[-1][1]))
    return found, kinds


def find_places(layer: Layer, module: nn.Module, side: tuple[int, int]) -> Places | None:
    """The grid of a layer, or None where its parts have no place on the picture.

    Args:
        layer: of ``map_layers``.
        module: the model. timm's ``num_prefix_tokens``, ``cls_token`` and ``output_fmt`` are
            believed; without them the fewest leading tokens that leave a grid of the picture's
            proportions are the prefix, and the first of them is the class token.
        side: height and width of the model's input in pixels.
    """
    shape = layer.shape
    if layer.fold > 1 or len(shape) not in (2, 3):
        return None
    if len(shape) == 3:
        return _map(shape, module, side)
    known = getattr(module, "num_prefix_tokens", None)
    has_class = known is None or getattr(module, "cls_token", None) is not None
    # Tokens without any come second: CaiT's and XCiT's class tokens join after the patches' blocks.
    for prefix in range(MAX_PREFIX + 1) if known is None else dict.fromkeys((known, 0)):
        grid = _grid(shape[0] - prefix, side)
        if grid:
            return Places(*grid, TOKENS, prefix, prefix > 0 and has_class)
    return None


def _kind(model: Model, has_attention: bool, places: Places) -> str:
    if model.untrained:
        return UNTRAINED
    if not has_attention:
        return CONVOLUTION
    if places.has_class and getattr(model.module, "global_pool", "token") in ("token", ""):
        return CLASS_TOKEN
    return MEAN_OF_TOKENS if places.form == TOKENS else ON_MAPS


def _map(shape: tuple[int, ...], module: nn.Module, side: tuple[int, int]) -> Places | None:
    first, last = _proportional(shape[1:], side), _proportional(shape[:2], side)
    if first and last:
        # As many channels as rows: the model's own word decides.
        first = getattr(module, "output_fmt", "NCHW") != "NHWC"
    if first:
        return Places(shape[1], shape[2], CHANNELS_FIRST)
    return Places(shape[0], shape[1], CHANNELS_LAST) if last else None


def _proportional(grid: tuple[int, ...], side: tuple[int, int]) -> bool:
    """Whether rows and columns divide the picture alike; rounding shows only if it is oblong."""
    rows, columns = grid
    if rows > side[0] or columns > side[1]:
        return False
    allowed = 0 if side[0] == side[1] else max(side)
    return abs(rows * side[1] - columns * side[0]) <= allowed


def _grid(count: int, side: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many patches, with the picture's proportions exactly."""
    square, rest = divmod(max(count, 0) * side[0], side[1])
    rows = isqrt(square)
    if rest or not rows or rows * rows != square or count % rows:
        return None
    return rows, count // rows
