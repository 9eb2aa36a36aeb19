"""Principal components of the first filters, as colour tiles.

Dosovitskiy et al. 2021 (arXiv 2010.11929), Figure 7 left.

The quantity: the first 28 principal components of the filters (rows: filters; columns: their
weights), and the share of the filters' variance that each explains.

Choices made: the filters are the first weights that the image meets, each as it lies on the pixels
(a linear layer on flattened patches has them as a convolution does). They are centred, as
scikit-learn's PCA does; a component's sign is that which makes its largest weight positive; in the
figure each tile fills [0, 1] by itself. Fewer filters than 28 have fewer components: the rest is
NaN. Nothing is sampled, so nothing has a standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from vitprobe import cli
from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.models.example import at_an_example
from vitprobe.models.loading import Model, load_models
from vitprobe.papers import dosovitskiy2021
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.results.tables import Label
from vitprobe.running.measurement import WeightsMeasurement
from vitprobe.running.session import models_meta
from vitprobe.tracing.stem import stem_filters

COMPONENTS, ROWS, COLUMNS = 28, 4, 7


def principal_components(filters: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Components of the rows of a matrix, and the share of the variance that each explains.

    Args:
        filters: (filters, weights).
        count: how many components; those that do not exist are NaN.

    Returns:
        (count, weights) of length 1, and (count,).
    """
    centred = filters.astype(np.float64) - filters.mean(0, dtype=np.float64)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    # Centring takes one dimension away: the last component of a full set is rounding.
    kept = min(count, len(filters) - 1, filters.shape[1])
    signs = np.sign(rows[np.arange(len(rows)), np.abs(rows).argmax(1)])
    components = np.full((count, filters.shape[1]), np.nan)
    ratio = np.full(count, np.nan)
    components[:kept] = (rows * signs[:, None])[:kept]
    ratio[:kept] = (singular**2 / (singular**2).sum())[:kept]
    return components, ratio


@dataclass(frozen=True)
class PatchEmbeddingResult(Result):
    """Principal components of patch-embedding filters.

    Attributes:
        components: (28, height, width, channels) components as they are, for one model; those of
            several follow each other, all padded with NaN to the largest filter.
        explained_variance_ratio: (28,) share of the variance, in the same order.
        model_of_component: (28,) index into ``meta["models"]``.
    """

    components: np.ndarray
    explained_variance_ratio: np.ndarray
    model_of_component: np.ndarray

    analysis: ClassVar[str] = "patch_embedding"
    text: ClassVar[Text] = Text(
        "First filters",
        "The leading principal components of the patch-embedding filters, or of the CNN's first "
        "layer; Dosovitskiy et al., Figure 7 left.",
        "Trained filters have smooth, low-frequency and colour-opponent components first; those of "
        "an untrained network look like noise. Each tile is scaled to its own range.",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "explained_variance_ratio": ("component",),
        "components": ("component", "row", "column", "channel"),
        "model_of_component": ("component",),
    }

    def labels(self) -> list[Label]:
        """Components counted within each model."""
        return [Label("component", np.arange(len(self.components)) % COMPONENTS, ("component",))]

    def of(self, model: int) -> np.ndarray:
        """(components, height, width, channels) of a model, without padding."""
        tiles = self.components[self.model_of_component == model]
        about = self.meta["stems"][model]
        height, width = about["size"]
        tiles = tiles[:, :height, :width, : about.get("channels")]
        return tiles[np.isfinite(tiles).all((1, 2, 3))]

    def plot(self, ax: Any = None) -> Any:
        """Four by seven tiles for each model, from the first component on; on ``ax``, the first."""
        with drawing.style():
            if ax is not None:
                self._tiles(ax, 0)
                return ax
            count = len(self.models)
            figure = drawing.new_figure(4.4 * min(2, count), 3.1 * -(-count // 2) + 0.4)
            # Models must stand further apart than tiles.
            engine: Any = figure.get_layout_engine()
            engine.set(wspace=0.08, hspace=0.08)
            axes = figure.subplots(-(-count // 2), min(2, count), squeeze=False).ravel()
            for model, one in enumerate(axes):
                if model < count:
                    self._tiles(one, model)
                else:
                    one.set_axis_off()
            text = drawing.provenance_line(self.meta)
            text += " Principal components row by row, each tile is scaled to [0, 1]."
            text += self._of_other_channels()
            drawing.caption(figure, text)
            return figure

    def _of_other_channels(self) -> str:
        counts = [self.of(model).shape[-1] for model in range(len(self.models))]
        others = [
            f"{count} channels ({self.models[model]})"
            for model, count in enumerate(counts)
            if count not in (1, 3)
        ]
        if not others:
            return ""
        return f" Filters of {' and '.join(others)} are shown by the mean over them."

    def _tiles(self, ax: Any, model: int) -> None:
        tiles = self.of(model)
        height, width, channels = tiles.shape[1:]
        canvas = np.ones((ROWS, height + 1, COLUMNS, width + 1, 3))
        for i, tile in enumerate(tiles):
            low, high = tile.min(), tile.max()
            shown = (tile - low) / (high - low) if high > low else np.full_like(tile, 0.5)
            # Filters of other than three channels are shown by the mean over them.
            shown = shown if channels == 3 else shown.mean(-1, keepdims=True)
            canvas[i // COLUMNS, :height, i % COLUMNS, :width] = shown
        flat = canvas.reshape(ROWS * (height + 1), COLUMNS * (width + 1), 3)[:-1, :-1]
        ax.imshow(flat, interpolation="nearest")
        ax.set_axis_off()
        share = np.nansum(self.explained_variance_ratio[self.model_of_component == model])
        ax.set_title(f"{self.models[model]}\n{len(tiles)} components, {share:.0%} of the variance")

    def findings(self) -> list[Finding]:
        """Dosovitskiy et al.'s claim on the leading components; an untrained stem has noise."""
        return dosovitskiy2021.patch_embedding(self)


GROUP = "weights"
RESULT = PatchEmbeddingResult


@dataclass(frozen=True)
class PatchEmbedding(WeightsMeasurement):
    """It has no options of its own."""

    analysis: ClassVar[str] = "patch_embedding"

    def of(self, models: Sequence[Model], seed: int) -> Result:
        return measure(models, seed=seed)


MEASUREMENT = PatchEmbedding


def measure(
    models: Any,
    *,
    names: str | Sequence[str] | None = None,
    image_size: int | None = None,
    seed: int = 0,
) -> PatchEmbeddingResult:
    """Principal components of the stem filters of one model or several.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        names: what figures call them, one for each.
        image_size: side in pixels for models that allow another one than their own.
        seed: of untrained weights.

    Raises:
        VitprobeError: a model without a filter that looks at pixels.
    """
    loaded = load_models(models, image_size, seed, names)
    meta = models_meta("patch_embedding", loaded, seed)
    meta["stems"], tiles, ratios = [], [], []
    for model in loaded:
        with at_an_example(model) as example:
            found = stem_filters(model.module, example)
        if found is None:
            raise NotApplicable(
                f"{model.name} has no layer of filters that look at pixels as they are.", model.name
            )
        name, filters = found
        weights = filters.detach().float().cpu().numpy()
        if not np.isfinite(weights).all():
            raise VitprobeError(f"The filters {name} of {model.name} are not finite.")
        components, ratio = principal_components(weights.reshape(len(weights), -1), COMPONENTS)
        tiles.append(components.reshape(COMPONENTS, *weights.shape[1:]))
        ratios.append(ratio)
        size, channels = list(weights.shape[1:3]), weights.shape[3]
        meta["stems"].append({"layer": name, "size": size, "channels": channels})
    sizes = np.max([tile.shape for tile in tiles], axis=0)
    tiles = [
        np.pad(t, [(0, s - h) for s, h in zip(sizes, t.shape)], constant_values=np.nan)
        for t in tiles
    ]
    owner = np.repeat(np.arange(len(loaded)), COMPONENTS)
    return PatchEmbeddingResult(meta, np.concatenate(tiles), np.concatenate(ratios), owner)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.patch_embedding``."""
    return cli.command(PatchEmbedding, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
