"""Whether tokens keep their place: CKA of each token with each input patch.

Raghu et al. 2021 (arXiv 2108.08810), Figures 9 and 10 and Appendix D.

The quantity: cka[t, r, c] in [-1, 1], how alike the images are arranged by one token (its features
alone; in a CNN one map location, all channels) and by the pixels of one input patch. A token that
still holds its own patch peaks there; one that holds the whole image is flat. The contrast is the
mean over tokens of the CKA with the own patch minus the mean CKA with all others.

Choices made: the patches are the pixels as the model receives them, normalised, in a grid of the
tokens' own shape, so patches of different models can differ in size; a border that the grid does
not divide is left out on both sides. Maps of more than 16 locations a side are measured on a
regular subset of locations, each with the patch around it. Unbiased minibatch CKA as in
``vitprobe.cka``, in batches of at least 4; standard errors by the jackknife over groups of batches,
for the share of peaks by the bootstrap.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor

from vitprobe import cli
from vitprobe.papers.raghu2021 import tokens
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text, plus_minus
from vitprobe.results.tables import Label
from vitprobe.running.grids import Placed, placed_layers
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session, Sums
from vitprobe.statistics.hsic import MAX_GROUPS, MIN_BATCH, bootstrap_error, jackknife
from vitprobe.statistics.place_hsic import input_patches, place_cka, place_hsic, scratch_bytes
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Choice
from vitprobe.tracing.places import Places

DEFAULT_MODELS = ("vit_small_box", "vit_gap_box", "resnet_box")
MAX_MAP_SIDE = 16
# The sums of all groups together; more layers or tokens mean fewer groups for the jackknife.
SUM_BYTES = 2**28
# Colours span at least this much CKA, so that the noise of a flat map does not look like a map.
MIN_RANGE = 0.1


def contrast(values: Tensor) -> Tensor:
    """(t, t) CKA -> mean over tokens of that with the own patch minus the mean with the others."""
    own = torch.eye(len(values), dtype=torch.bool, device=values.device)
    others = values.masked_fill(own, torch.nan).nanmean(1)
    return (values.diagonal() - others).nanmean()


def peak_share(values: Tensor, rows: int, columns: int) -> Tensor:
    """The share of interior tokens whose greatest CKA is that with their own patch.

    Of those that have a CKA with any; NaN where none has.
    """
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    chosen = inside.flatten().nonzero()[:, 0].to(values.device)
    chosen = chosen[~values[chosen].isnan().all(1)]
    best = values.nan_to_num(-2)[chosen].argmax(1)
    return (best == chosen).double().mean()


@dataclass(frozen=True)
class LocalizationResult(Result):
    """CKA between the tokens of one block or several and the patches of the input.

    Attributes:
        cka: (tokens, grid rows, grid columns) float32; all tokens of the first layer, row by row,
            then those of the next; NaN where undefined and beyond a smaller grid.
        tokens: (tokens, 2) row and column of each token.
        layer_of_token: (tokens,) index into ``layers``.
        layers: (L,) names, model by model.
        model_of_layer: (L,) index into ``meta["models"]``.
        depth: (L,) place among all blocks of the model, from 0 to 1.
        grids: (L, 2) rows and columns.
        contrast: (L,) CKA with the own patch minus the mean with the others, over tokens.
        contrast_se: (L,) jackknife standard error; NaN with fewer than two batches.
        peak_share: (L,) share of interior tokens that peak at their own patch.
        peak_share_se: (L,) bootstrap standard error.
    """

    cka: np.ndarray
    tokens: np.ndarray
    layer_of_token: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray
    depth: np.ndarray
    grids: np.ndarray
    contrast: np.ndarray
    contrast_se: np.ndarray
    peak_share: np.ndarray
    peak_share_se: np.ndarray

    analysis: ClassVar[str] = "localization"
    text: ClassVar[Text] = Text(
        "Do tokens keep their place?",
        "CKA between single tokens of the last block and every patch of the input; Raghu et al., "
        "Figures 9 and 10.",
        "A token that is still about its own patch (in the square) peaks there; a flat map belongs "
        "to a token that holds the whole image. Every row has its own scale.",
        "CKA",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "contrast": ("layer",),
        "contrast_se": ("layer",),
        "peak_share": ("layer",),
        "peak_share_se": ("layer",),
        "depth": ("layer",),
        "cka": ("token", "row", "column"),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
        "layer_of_token": ("token",),
    }

    def labels(self) -> list[Label]:
        """Each token's number within its layer, row by row, and where it stands."""
        down, along = self.tokens.T
        number = down * self.grids[self.layer_of_token, 1] + along
        return [
            Label(name, values, ("token",))
            for name, values in (("token", number), ("token_row", down), ("token_column", along))
        ]

    def of(self, layer: int) -> np.ndarray:
        """(rows, columns, rows, columns) of one layer: row and column of token, then of patch."""
        rows, columns = self.grids[layer]
        part = self.cka[self.layer_of_token == layer, :rows, :columns]
        return part.reshape(rows, columns, rows, columns)

    def plot(self, ax: Any = None) -> Any:
        """Heat maps of a few tokens of each model's last layer, the own place in a square.

        With several layers of a model, or on ``ax``, contrast against depth.
        """
        with drawing.style():
            if ax is not None:
                return self._contrast_lines(ax)
            last = self._last_layers()
            deep = len(self.layers) > len(last)
            count = 5 if max(self.grids.max(0)) > 1 else 1
            height = max(1.75 * len(last) + 0.9, 3.4 * deep)
            figure = drawing.new_figure(1.55 * count + 1.6 + 3.8 * deep, height)
            parts: Any = figure.subfigures(
                1, 1 + deep, squeeze=False, width_ratios=[1.5 * count + 1.6, 3.8][: 1 + deep]
            )[0]
            maps, lines = parts[0], parts[-1]
            axes = maps.subplots(len(last), count, squeeze=False)
            # One scale for all: whether one model is less localised must be seen.
            scale = self._scale(last)
            for row, layer in zip(axes, last):
                image = self._token_maps(row, layer, scale)
            maps.colorbar(image, ax=axes, label="CKA with input patch", pad=0.01, panchor=False)
            if deep:
                self._contrast_lines(lines.subplots())
            drawing.caption(figure, self._caption())
            return figure

    def _last_layers(self) -> list[int]:
        return [int(self.rows_of(m)[-1])
                for m in np.unique(self.model_of_layer)]  # fmt: skip

    def _scale(self, layers: list[int]) -> tuple[float, float]:
        """From 0, or the lowest where that is negative, to the highest CKA of these layers."""
        values = np.concatenate([self.of(layer).ravel() for layer in layers])
        defined = values[np.isfinite(values)]
        return min(float(defined.min(initial=0)), 0), max(float(defined.max(initial=0)), MIN_RANGE)

    def _token_maps(self, row: Any, layer: int, scale: tuple[float, float]) -> Any:
        rows, columns = self.grids[layer]
        values = self.of(layer)
        # A corner, an edge, and three within, as far as the grid has them.
        spots = [(0, 0), (0, 1 / 2), (1 / 4, 1 / 4), (1 / 2, 1 / 2), (3 / 4, 1 / 4)]
        for ax, (down, along) in zip(row, spots):
            r, c = min(int(down * rows), rows - 1), min(int(along * columns), columns - 1)
            image = drawing.heat_map(ax, values[r, c], vmin=scale[0], vmax=scale[1])
            ax.invert_yaxis()  # an image's first row is at its top
            ax.set(aspect="equal", xticks=[], yticks=[])
            ax.set_title(f"token {r * columns + c} ({r}, {c})", fontsize=7)
            for colour, width in (("black", 2.4), ("white", 1.0)):  # seen on light and dark
                ax.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, ec=colour, lw=width, fc="none"))
        model = self.models[self.model_of_layer[layer]]
        name = str(self.layers[layer])
        row[0].set_ylabel(f"{drawing.short(model, 26)}\n{drawing.short(name)}", fontsize=7)
        return image

    def _contrast_lines(self, ax: Any) -> Any:
        for m in np.unique(self.model_of_layer):
            mine = self.model_of_layer == m
            ax.errorbar(self.depth[mine], self.contrast[mine], self.contrast_se[mine],
                        marker="o", markersize=3, capsize=2, label=self.models[m])  # fmt: skip
        ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        ax.set(xlabel="depth (share of blocks)", ylabel="CKA, own patch − mean of others")
        ax.legend()
        return ax

    def _caption(self) -> str:
        meta = self.meta
        text = drawing.provenance_line(meta) + " Squares: the token's own place."
        text += f" Unbiased minibatch CKA, batches of {meta['batch_size']}, {meta['precision']}."
        if meta["left_out"]:
            text += f" {meta['left_out']} images in batches under {MIN_BATCH} left out."
        for i in self._last_layers():
            own = plus_minus(self.contrast[i], self.contrast_se[i])
            text += f" {self.models[self.model_of_layer[i]]}: contrast {own}."
        return text

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claims of Figures 9 and 10 on the trained models at hand."""
        return tokens.localization(self)


GROUP = "tokens"
RESULT = LocalizationResult


@dataclass(frozen=True)
class Localization(Measurement):
    """Options of ``measure``."""

    layers: Choice = option(
        "last",
        "last: the last block; blocks: all, with contrast against depth; or names with wildcards",
        nargs="+",
        metavar="L",
    )

    analysis: ClassVar[str] = "localization"
    at_least: ClassVar[int] = MIN_BATCH

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self.layers)


MEASUREMENT = Localization


class _Watch(Watch):
    """HSIC₁ of every token and location of the chosen layers with every patch of the input."""

    def __init__(self, ready: Session, layers: Choice) -> None:
        self.placed, self.kinds = placed_layers(ready, layers)
        self.grids = [one.places.thinned(MAX_MAP_SIDE) for one in self.placed]
        self.labels = [one.layer.label for one in self.placed]
        # One matrix a layer and group, tokens and patches with themselves at its edge.
        sizes = [len(grid) + 1 for grid in self.grids]
        affordable = SUM_BYTES // (8 * sum(size**2 for size in sizes))
        groups = min(MAX_GROUPS, len(ready.batches), max(2, affordable))
        shapes = {f"hsic{i}": (groups, size, size) for i, size in enumerate(sizes)}
        super().__init__(
            ready,
            ready.sums(**shapes),
            {"layers": self.labels},
            scratch=_scratch(ready, self.placed, self.grids),
            groups=groups,
        )
        self._found: list[tuple[int, Tensor]] = []

    def watching(self, m: int, batch: Batch) -> Any:
        model, inputs = self.ready.models[m], batch.inputs[m]
        mine = [i for i, one in enumerate(self.placed) if one.model == m]

        def reduce(k: int, tensor: Tensor) -> None:
            grid = self.grids[mine[k]]
            value = place_hsic(grid.spatial(tensor), input_patches(inputs, grid.rows, grid.columns))
            check_finite(torch.isfinite(value).all(), self.labels[mine[k]], model)
            self._found.append((mine[k], value))

        return capture(model.module, [self.placed[i].layer for i in mine], reduce)

    def end(self, batch: Batch) -> None:
        for i, value in self._found:
            self.sums[f"hsic{i}"][self.group(batch)] += value
        self._found = []

    def result(self, meta: dict[str, Any]) -> LocalizationResult:
        meta["kinds"] = self.kinds
        return LocalizationResult(
            meta,
            layers=np.array(self.labels),
            model_of_layer=np.array([one.model for one in self.placed]),
            depth=np.array([one.depth for one in self.placed]),
            **_arrays(self.grids, self.sums, self.used),
        )


def _scratch(ready: Session, placed: list[Placed], grids: list[Places]) -> int:
    """Bytes for the layer that needs most of them, one being looked at after the other."""
    n, most = min(ready.options.batch_size, len(ready.images)), 0
    examples = ready.example()
    for one, grid in zip(placed, grids):
        places, example = grid.rows * grid.columns, examples[one.model]
        patch = example[0].numel() // places
        most = max(most, scratch_bytes(n, places, max(one.places.features, patch)))
    return most


def measure(
    models: Any, images: Any = None, *, layers: Choice = "last", **options: Any
) -> LocalizationResult:
    """CKA between every token of a block and every patch of the input.

    Args:
        models: specs, modules or ``Model``; one or a list.
        images: see ``open_images``; the bundled digit scenes by default.
        layers: ``last`` (the last block), ``blocks`` (all of them: contrast against depth), or
            names with wildcards.
        options: fields of ``running.session.Options``.

    Raises:
        VitprobeError: unknown models, images or layers; a layer named that has no grid; fewer than
            4 images per batch; activations that are not finite.
    """
    return measure_one(Localization(layers), models, images, Options(**options))


def _arrays(grids: list[Places], sums: Sums, used: Tensor) -> dict[str, np.ndarray]:
    sides = np.array([(grid.rows, grid.columns) for grid in grids])
    maps, numbers = [], []
    for i, (rows, columns) in enumerate(sides.tolist()):

        def share(total: Tensor, rows: int = rows, columns: int = columns) -> Tensor:
            return peak_share(place_cka(total), rows, columns)

        groups = sums[f"hsic{i}"]
        values = place_cka(groups.sum(0))
        # The place of a maximum jumps, so the jackknife will not do.
        numbers.append(
            [
                *jackknife(lambda total: contrast(place_cka(total)), groups, used),
                peak_share(values, rows, columns).cpu().numpy(),
                bootstrap_error(share, groups, used),
            ]
        )
        padded = np.full((rows * columns, *sides.max(0)), np.nan, np.float32)
        padded[:, :rows, :columns] = values.cpu().numpy().reshape(-1, rows, columns)
        maps.append(padded)
    contrasts, contrast_se, shares, share_se = np.transpose(numbers)
    return {
        "cka": np.concatenate(maps),
        "tokens": np.concatenate([np.indices(side).reshape(2, -1).T for side in sides]),
        "layer_of_token": np.repeat(np.arange(len(grids)), sides.prod(1)),
        "grids": sides,
        "contrast": contrasts,
        "contrast_se": contrast_se,
        "peak_share": shares,
        "peak_share_se": share_se,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.localization``."""
    return cli.command(Localization, measure, __doc__, argv, default_models=DEFAULT_MODELS)


if __name__ == "__main__":
    sys.exit(main())
