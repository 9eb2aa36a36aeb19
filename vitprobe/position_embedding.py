"""How similar position embeddings are, and relative position biases.

Dosovitskiy et al. 2021 (arXiv 2010.11929), Figure 7 centre.

The quantities: the cosine similarity of each patch's position embedding with every other's, as a
grid of grids; and, where positions enter attention as a bias, that bias against the offset from
query to key, for each head, in units of attention logits.

Choices made: tables are learned or fixed (sine and cosine) alike, prefix tokens left out. Another
resolution's table is the bicubic interpolation that fine-tuning starts from. Nothing is sampled, so
nothing has a standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.models.example import at_an_example
from vitprobe.models.loading import Model, load_models
from vitprobe.papers import dosovitskiy2021
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.results.tables import Label
from vitprobe.running.measurement import WeightsMeasurement
from vitprobe.running.options import option
from vitprobe.running.session import models_meta
from vitprobe.tracing.positions import find_positions, resample

SHOWN_TILES, SHOWN_HEADS = 14, 8


def similarity(table: Tensor) -> np.ndarray:
    """Cosine similarity of every two embeddings.

    Args:
        table: (rows, columns, features).

    Returns:
        (rows, columns, rows, columns) float64; NaN for embeddings that are 0.
    """
    rows, columns, _ = table.shape
    flat = table.detach().double().flatten(0, 1)
    length = flat.norm(dim=1, keepdim=True)
    unit = flat / torch.where(length > 0, length, torch.nan)
    return (unit @ unit.T).reshape(rows, columns, rows, columns).cpu().numpy()


@dataclass(frozen=True)
class PositionEmbeddingResult(Result):
    """Similarities of position embeddings, and relative-position biases.

    Attributes:
        similarity: (rows, columns, rows, columns) cosine of each patch's embedding with every
            other's. Several tables' rows follow each other, all padded with NaN.
        table_of_row: (rows,) index into ``meta["tables"]``.
        bias: (layers, heads, offsets, offsets) bias by vertical and horizontal offset, the middle
            being offset 0; padded with NaN.
        layers: (layers,) names of the modules that have a bias.
        model_of_layer: (layers,) index into ``meta["models"]``.
    """

    similarity: np.ndarray
    table_of_row: np.ndarray
    bias: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "position_embedding"
    text: ClassVar[Text] = Text(
        "Position embeddings",
        "The cosine similarity of every patch's position embedding with every other's, a small map "
        "per patch, and relative-position biases; Dosovitskiy et al., Figure 7 centre.",
        "A bright spot at the patch's own place says that neighbours are alike, a bright cross "
        "that rows and columns are.",
        "similarity, or bias minus its mean",
        places=False,
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "similarity": ("row", "column", "other_row", "other_column"),
        "bias": ("layer", "head", "vertical_offset", "horizontal_offset"),
        "table_of_row": ("row",),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }

    def labels(self) -> list[Label]:
        """Names of tables, rows counted within each, and offsets from the middle."""
        tables = np.array([about["label"] for about in self.meta["tables"]], dtype=str)
        first = np.searchsorted(self.table_of_row, self.table_of_row)
        high, wide = self.bias.shape[2:]
        return [
            Label("table", tables, ("table",)),
            Label("row", np.arange(len(first)) - first, ("row",)),
            Label("vertical_offset", np.arange(high) - high // 2, ("vertical_offset",)),
            Label("horizontal_offset", np.arange(wide) - wide // 2, ("horizontal_offset",)),
        ]

    def of(self, table: int) -> np.ndarray:
        """(rows, columns, rows, columns) of one table."""
        rows, columns = self.meta["tables"][table]["grid"]
        return self.similarity[self.table_of_row == table][:, :columns, :rows, :columns]

    def plot(self, ax: Any = None) -> Any:
        """A grid of grids for each table and heads' biases for each model; on ``ax``, one grid."""
        with drawing.style():
            tables, biased = self.meta["tables"], list(dict.fromkeys(self.model_of_layer.tolist()))
            if ax is not None:
                if not tables:
                    raise VitprobeError(
                        "plot(ax) shows one table of position embeddings, and there is none."
                    )
                self._grids(ax, 0)
                return ax
            count = len(tables)
            columns = max(1, 2 if count == 4 else min(3, count))
            lines = -(-count // columns)
            heights = [4.3] * lines + [3.4] * len(biased)
            figure = drawing.new_figure(max(4.6 * columns, 9 if biased else 5), sum(heights) + 0.4)
            parts = figure.add_gridspec(len(heights), 1, height_ratios=heights)
            for line in range(lines):
                shown = range(line * columns, min(count, (line + 1) * columns))
                row = parts[line].subgridspec(1, columns)
                axes = [figure.add_subplot(row[0, i]) for i in range(len(shown))]
                for one, table in zip(axes, shown):
                    image = self._grids(one, table)
                figure.colorbar(image, ax=axes, label="cosine similarity", aspect=30)
            for line, model in enumerate(biased, lines):
                one = figure.add_subplot(parts[line])
                image = self._biases(one, model)
                figure.colorbar(image, ax=one, label="bias − its mean (logits)", aspect=25)
            drawing.caption(figure, drawing.provenance_line(self.meta))
            return figure

    def _grids(self, ax: Any, table: int) -> Any:
        """Tile (i, j) shows the similarity of the patch in row i, column j with all others."""
        values = self.of(table)
        rows, columns = values.shape[:2]
        # Beyond some tiles nothing can be told apart: every so many are shown then.
        step = max(1, -(-max(rows, columns) // SHOWN_TILES))
        tiles = values[step // 2 :: step, step // 2 :: step]
        high, wide = tiles.shape[:2]
        image = ax.imshow(_mosaic(tiles), vmin=-1, vmax=1, cmap="viridis", interpolation="nearest")
        for axis, count, size in ((ax.yaxis, high, rows), (ax.xaxis, wide, columns)):
            numbers = np.arange(count) * step + step // 2 + 1
            axis.set_ticks(np.arange(count) * (size + 1) + (size - 1) / 2, numbers.tolist())
        _bare(ax)
        ax.set_xlabel("column of the patch")
        ax.set_ylabel("row of the patch")
        ax.set_title(self.meta["tables"][table]["label"])
        return image

    def _biases(self, ax: Any, model: int) -> Any:
        """The first heads of the first, middle and last layer; offset 0 in the middle of a tile."""
        rows = self.rows_of(model)
        chosen = list(dict.fromkeys([rows[0], rows[len(rows) // 2], rows[-1]]))
        shown = self.bias[chosen][:, :SHOWN_HEADS]
        finite = np.isfinite(shown)
        # A constant drops out of the softmax.
        count = finite.sum((2, 3), keepdims=True).clip(1)
        shown = shown - np.nansum(shown, (2, 3), keepdims=True) / count
        shown = shown[:, finite.any((0, 2, 3))][..., finite.any((0, 1, 3)), :]
        shown = shown[..., finite.any((0, 1, 2))]
        reach = float(np.nanmax(np.abs(shown))) or 1.0
        image = ax.imshow(
            _mosaic(shown), vmin=-reach, vmax=reach, cmap=drawing.DIVERGING, interpolation="nearest"
        )
        layers, heads, high, wide = shown.shape
        names = [drawing.short(str(self.layers[row])) for row in chosen]
        ax.set_yticks(np.arange(layers) * (high + 1) + (high - 1) / 2, names)
        ax.set_xticks(np.arange(heads) * (wide + 1) + (wide - 1) / 2, np.arange(heads).tolist())
        _bare(ax)
        ax.set_xlabel("head")
        ax.set_title(f"{self.models[model]}: bias by offset from query to key")
        return image

    def findings(self) -> list[Finding]:
        """Dosovitskiy et al.'s claims on similarity against distance, rows and columns."""
        return dosovitskiy2021.position_embedding(self)


def _mosaic(tiles: np.ndarray) -> np.ndarray:
    """(down, across, height, width) as one map, tiles a pixel apart."""
    down, across, high, wide = tiles.shape
    canvas = np.full((down, high + 1, across, wide + 1), np.nan)
    canvas[:, :high, :, :wide] = tiles.transpose(0, 2, 1, 3)
    return canvas.reshape(down * (high + 1), across * (wide + 1))[:-1, :-1]


def _bare(ax: Any) -> None:
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


GROUP = "weights"
RESULT = PositionEmbeddingResult


@dataclass(frozen=True)
class PositionEmbedding(WeightsMeasurement):
    """Options of ``measure``."""

    grid: Sequence[int] | None = option(
        None,
        "also show the table resampled to this resolution",
        type=int,
        nargs=2,
        metavar=("ROWS", "COLUMNS"),
    )

    analysis: ClassVar[str] = "position_embedding"

    def of(self, models: Sequence[Model], seed: int) -> Result:
        return measure(models, grid=self.grid, seed=seed)


MEASUREMENT = PositionEmbedding


def measure(
    models: Any,
    *,
    grid: Sequence[int] | None = None,
    names: str | Sequence[str] | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> PositionEmbeddingResult:
    """Similarities of the position embeddings of one model or several, and their biases.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        grid: (rows, columns) of another resolution, for a second table of each model.
        names: what figures call them, one for each.
        image_size: side in pixels for models that allow another one than their own.
        seed: of untrained weights.

    Raises:
        VitprobeError: a model that has neither a table nor a bias.
    """
    if grid is not None and (len(grid) != 2 or min(grid) < 1):
        raise VitprobeError(f"--grid: expected two numbers of at least 1, not {list(grid)}.")
    loaded = load_models(models, image_size, seed, names)
    tables, biases, meta = [], [], models_meta("position_embedding", loaded, seed)
    meta["tables"] = []
    for i, model in enumerate(loaded):
        with at_an_example(model) as example:
            found = find_positions(model.module, example)
        if not found.tables and not found.biases:
            raise NotApplicable(
                f"{model.name} has no position embedding to show: it adds no table of one vector a "
                f"patch to its tokens, and no relative-position bias to its attention.",
                model.name,
            )
        biases += [(i, label, bias) for label, bias in found.biases]
        for name, table in found.tables:
            called = f"{model.name}, {name}" if len(found.tables) > 1 else model.name
            for shown in [table] + ([resample(table, *grid)] if grid else []):
                rows, columns = shown.shape[:2]
                label = f"{called}, {rows} × {columns}" if grid else called
                meta["tables"].append(
                    {"model": i, "label": label, "grid": [rows, columns], "name": name}
                )
                tables.append(similarity(shown))
    owners = np.array([i for i, _, _ in biases], dtype=int)
    return PositionEmbeddingResult(
        meta,
        np.concatenate(_padded(tables)) if tables else np.zeros((0, 0, 0, 0)),
        np.repeat(np.arange(len(tables)), [len(table) for table in tables]),
        np.stack(_centred([bias for _, _, bias in biases])) if biases else np.zeros((0, 0, 0, 0)),
        np.array([label for _, label, _ in biases], dtype=str),
        owners,
    )


def _padded(arrays: list[np.ndarray]) -> list[np.ndarray]:
    """Columns, rows and columns of all to the largest; the first axis stays."""
    sizes = np.max([array.shape[1:] for array in arrays], axis=0)
    widths = [[(0, 0), *((0, s - h) for s, h in zip(sizes, a.shape[1:]))] for a in arrays]
    return [np.pad(a, width, constant_values=np.nan) for a, width in zip(arrays, widths)]


def _centred(biases: list[np.ndarray]) -> list[np.ndarray]:
    """Heads filled up at the end, offsets on both sides so that offset 0 stays in the middle."""
    heads, high, wide = np.max([bias.shape for bias in biases], axis=0)
    filled = []
    for bias in biases:
        up, left = (high - bias.shape[1]) // 2, (wide - bias.shape[2]) // 2
        widths = [(0, heads - len(bias)), (up, up), (left, left)]
        filled.append(np.pad(bias, widths, constant_values=np.nan))
    return filled


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.position_embedding``."""
    return cli.command(PositionEmbedding, measure, __doc__, argv, ("vit_small_box",))


if __name__ == "__main__":
    sys.exit(main())
