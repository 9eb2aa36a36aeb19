"""Norms of tokens at every block: outliers among patches, and registers.

Darcet et al. 2024 (arXiv 2309.16588), Figures 3 to 7.

The quantity: ‖x‖₂ over the channels of one token (of one location of a CNN's map), without unit,
as the block puts it out, before the final normalisation: after that all norms are alike. Patches,
the class token and other tokens without a place (registers, prompts) are kept apart.

Choices made: an outlier is a patch whose norm is more than ``--times`` (5) times the layer's
median; the paper's 150 is a number for one network. Medians and quantiles are taken over all
patches of all images, from counts in bins 1.1 % wide. Standard errors by the jackknife over
batches; those of class token and registers over images.
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
from vitprobe.errors import VitprobeError
from vitprobe.models.visible import visible
from vitprobe.papers import darcet2024
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.grids import on_grids, typical_norms
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.statistics import log_histogram
from vitprobe.statistics.hsic import jackknife
from vitprobe.statistics.moments import add_moments, mean_and_error, moment_shapes
from vitprobe.statistics.norms import exact, norms
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Choice

TIMES = 5.0
CLASS, OTHER = "class token", "register"
# Images whose maps of norms are kept; bins of the histogram in the file: 1/8 octave.
SHOWN = 4
COARSE = log_histogram.PER_OCTAVE // 8


@dataclass(frozen=True)
class TokenNormsResult(Result):
    """Norms of patches, class tokens and registers.

    Attributes:
        norm_median: (layers,) over all patches of all images.
        norm_p99: (layers,) their 99th percentile.
        norm_max: (layers,) the largest.
        outlier_share: (layers,) share of patches above ``meta["times"]`` medians.
        outlier_share_se: (layers,) jackknife standard error over batches.
        histogram: (layers, bins) how many patches.
        edges: (bins + 1,) norms between the bins, 1/8 octave apart; what is beyond the outermost
            counts in the outermost bins.
        mean_map: (layers, rows, columns) mean over images; NaN beyond a layer's grid.
        prefix_norm: (layers, prefix tokens) mean over images of each token without a place, the
            class token first where it is known; NaN where a layer has fewer.
        prefix_norm_se: (layers, prefix tokens) standard error over images.
        prefix_kind: (layers, prefix tokens) ``class token``, ``register`` (any other token without
            a place) or empty.
        last_map: (models, images, rows, columns) norms at the last layer for the first images.
        pictures: (images, height, width, 3) uint8, these images as the first model saw them.
        layers: (layers,) names.
        model_of_layer: (layers,) index into ``meta["models"]``.
    """

    norm_median: np.ndarray
    norm_p99: np.ndarray
    norm_max: np.ndarray
    outlier_share: np.ndarray
    outlier_share_se: np.ndarray
    histogram: np.ndarray
    edges: np.ndarray
    mean_map: np.ndarray
    prefix_norm: np.ndarray
    prefix_norm_se: np.ndarray
    prefix_kind: np.ndarray
    last_map: np.ndarray
    pictures: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "token_norms"
    text: ClassVar[Text] = Text(
        "Norms of tokens",
        "The norms of all patches at every block's output (grey: how many there are), of the "
        "class token and of registers; Darcet et al., Figures 3 to 7.",
        "Patches above the dashed line stand out: in large or long-trained ViTs some take over "
        "what registers are for. Right: the norms of the last layer over a few images.",
        "‖x‖",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(("norm_median", "norm_p99", "norm_max"), ("layer",)),
        "outlier_share": ("layer",),
        "outlier_share_se": ("layer",),
        "histogram": ("layer", "bin"),
        "edges": ("edge",),
        "mean_map": ("layer", "row", "column"),
        "prefix_norm": ("layer", "prefix_token"),
        "prefix_norm_se": ("layer", "prefix_token"),
        "prefix_kind": ("layer", "prefix_token"),
        "last_map": ("model", "image", "row", "column"),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }

    def plot(self, ax: Any = None) -> Any:
        """For each model the norms against depth, and maps of the last layer over some images.

        On ``ax``, the share of outliers against depth, a line per model.
        """
        with drawing.style():
            if ax is not None:
                return self._shares(ax)
            count, shown = len(self.models), len(self.pictures)
            figure = drawing.new_figure(10, 3.1 * count + 0.6)
            grid = figure.add_gridspec(count, 2, width_ratios=[1.45, 1])
            for model in range(count):
                self._depth(figure, figure.add_subplot(grid[model, 0]), model)
                few = grid[model, 1].subgridspec(2, max(1, shown)).subplots(squeeze=False)
                self._maps(figure, few, model)
            drawing.caption(figure, self._caption())
            return figure

    def _shares(self, ax: Any) -> Any:
        for model, name in enumerate(self.models):
            rows = self.rows_of(model)
            depth = np.arange(len(rows)) / max(1, len(rows) - 1)
            ax.errorbar(depth, self.outlier_share[rows], self.outlier_share_se[rows],
                        marker="o", markersize=3, capsize=2, label=name)  # fmt: skip
        ax.set(xlabel="depth (share of blocks)",
               ylabel=f"patches above {self.meta['times']:g} × median")  # fmt: skip
        ax.legend()
        return ax

    def _depth(self, figure: Any, ax: Any, model: int) -> None:
        """The histogram of a model's patches against depth, quantiles and other tokens over it."""
        rows = self.rows_of(model)
        shown = self.histogram[rows]
        there = np.flatnonzero(shown.sum(0))
        bins = slice(max(0, there[0] - 1), there[-1] + 2)
        share = shown[:, bins].T / shown.sum(1)
        edges = self.edges[bins.start : bins.start + len(share) + 1]
        places = np.arange(len(rows) + 1) - 0.5
        image = ax.pcolormesh(
            places, edges, np.ma.masked_equal(share, 0), cmap="Greys", vmin=0, rasterized=True
        )
        figure.colorbar(image, ax=ax, label="share of patches", pad=0.01)
        x = np.arange(len(rows))
        ax.plot(x, self.norm_median[rows], color=drawing.COLOURS[0], label="patches, median")
        ax.plot(x, self.norm_max[rows], color=drawing.COLOURS[0], linestyle=":",
                label="patches, largest")  # fmt: skip
        ax.plot(x, self.meta["times"] * self.norm_median[rows], color=drawing.COLOURS[1],
                linestyle="--", linewidth=1, label=f"{self.meta['times']:g} × median")  # fmt: skip
        for kind, colour in ((CLASS, drawing.COLOURS[2]), (OTHER, drawing.COLOURS[3])):
            for token in range(self.prefix_kind.shape[1]):
                mine = self.prefix_kind[rows, token] == kind
                if mine.any():
                    norm = np.where(mine, self.prefix_norm[rows, token], np.nan)
                    first = kind not in [line.get_label() for line in ax.lines]
                    ax.plot(x, norm, color=colour, linewidth=1.2, marker=".",
                            label=kind if first else "_")  # fmt: skip
        ax.set_yscale("log")
        # Matplotlib's own logarithmic ticks may leave a narrow range without a label.
        ticks = [s * 10.0**p for p in range(-6, 8) for s in (1, 2, 5)]
        inside = [tick for tick in ticks if ax.get_ylim()[0] <= tick <= ax.get_ylim()[1]]
        inside = inside[:: 1 + len(inside) // 9]
        ax.set_yticks(inside, [f"{tick:g}" for tick in inside])
        ax.set_yticks([], minor=True)
        drawing.layer_axis(ax.xaxis, [str(name) for name in self.layers[rows]], "")
        ax.set_ylabel("‖x‖")
        ax.set_title(self.models[model])
        ax.legend(fontsize=6.5, loc="best")

    def _maps(self, figure: Any, axes: Any, model: int) -> None:
        last = self.last_map[model]
        image = None
        for column, (picture, norm) in enumerate(zip(self.pictures, last)):
            axes[0, column].imshow(picture)
            there = np.isfinite(norm)
            shown = norm[there.any(1)][:, there.any(0)]
            high = max(np.nanmax(last), np.nanmin(last) + 1e-12)
            image = axes[1, column].imshow(shown, cmap=drawing.SEQUENTIAL, vmin=np.nanmin(last),
                                           vmax=high)  # fmt: skip
        for one in axes.ravel():
            one.set(xticks=[], yticks=[])
            one.spines[:].set_visible(False)
        if image is not None:
            figure.colorbar(image, ax=axes, label="‖x‖, last layer", pad=0.02, aspect=30)

    def _caption(self) -> str:
        text = drawing.provenance_line(self.meta)
        text += (
            " Norms of the blocks' outputs before the final normalisation, "
            f"{self.meta['precision']}; outliers: patches above {self.meta['times']:g} times the "
            "layer's median."
        )
        for model, name in enumerate(self.models):
            last = self.rows_of(model)[-1]
            text += f" {name}: {self.outlier_share[last]:.2%} of the last layer's patches."
        return text

    def findings(self) -> list[Finding]:
        """Darcet et al.'s claims for every trained network of tokens."""
        return darcet2024.findings(self)


GROUP = "tokens"
RESULT = TokenNormsResult


@dataclass(frozen=True)
class TokenNorms(Measurement):
    """Options of ``measure``."""

    layers: Choice = option(
        "blocks", "blocks (default), paper, all, or names with wildcards", nargs="+", metavar="L"
    )
    times: float = option(
        TIMES, "a patch is an outlier above this many medians", type=float, metavar="K"
    )

    analysis: ClassVar[str] = "token_norms"

    def __post_init__(self) -> None:
        if not self.times > 0:
            raise VitprobeError(f"--times must be above 0, not {self.times:g}.")

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self)


MEASUREMENT = TokenNorms


class _Watch(Watch):
    """Counts of patch norms of every layer, and the moments of all other tokens."""

    def __init__(self, ready: Session, asked: TokenNorms) -> None:
        self.times = asked.times
        self.chosen = on_grids(ready, asked.layers)
        everything = [one for mine in self.chosen for one in mine]
        self.owner = np.repeat(np.arange(len(self.chosen)), [len(mine) for mine in self.chosen])
        self.starts = np.searchsorted(self.owner, np.arange(len(self.chosen))).tolist()
        self.labels = [layer.label for layer, _ in everything]
        self.places = [places for _, places in everything]
        typical = (n for m, mine in enumerate(self.chosen) for n in typical_norms(ready, m, mine))
        self.octaves = [log_histogram.octaves(one) for one in typical]
        rows, columns, prefix = (
            max(sizes)
            for sizes in zip(*((p.rows, p.columns, len(p.without_place)) for p in self.places))
        )
        count, shown = len(everything), min(SHOWN, len(ready.images))
        height, width = ready.example()[0].shape[-2:]
        super().__init__(ready, {}, {"layers": self.labels})
        self.sums = ready.sums(
            counts=(self.groups, count, log_histogram.BINS),
            total=(count, log_histogram.BINS),
            # The largest of each batch: additive, as each has a place of its own.
            largest=(len(ready.batches), count),
            mean_map=(count, rows, columns),
            images=(),
            last_map=(len(self.chosen), shown, rows, columns),
            pictures=(shown, 3, height, width),
            pictured=(shown,),
            **moment_shapes(prefix=(count, prefix)),
        )

    def watching(self, m: int, batch: Batch) -> Any:
        model, start = self.ready.models[m], self.starts[m]
        shown = np.flatnonzero(batch.positions < len(self.sums["pictured"]))
        at = batch.positions[shown]
        if m == 0:
            self.sums["images"] += len(batch)
            self.sums["pictured"][at] += 1
            if len(shown):
                self.sums["pictures"][at] += visible(model, batch.inputs[0][shown]).to(
                    self.sums["pictures"]
                )

        def reduce(i: int, tensor: Tensor) -> None:
            places, row = self.places[start + i], start + i
            found = norms(places.spatial(tensor))
            check_finite(torch.isfinite(found).all(), self.labels[row], model)
            unit = self.octaves[row]
            counts, total = log_histogram.counts_and_sums(
                exact(found) * 2.0**-unit if unit else found
            )
            self.sums["counts"][self.group(batch), row] += counts
            self.sums["total"][row] += total
            self.sums["largest"][batch.index, row] += found.max()
            maps = found.unflatten(1, (places.rows, places.columns))
            self.sums["mean_map"][row, : places.rows, : places.columns] += maps.sum(0)
            if i == len(self.chosen[m]) - 1 and len(shown):
                self.sums["last_map"][m, at, : places.rows, : places.columns] += maps[shown].to(
                    self.sums["last_map"]
                )
            if places.without_place:
                other = norms(places.rest(tensor)).to(self.sums["prefix"])
                add_moments(self.sums, "prefix", (row, slice(0, other.shape[1])), other)

        return capture(model.module, [layer for layer, _ in self.chosen[m]], reduce)

    def result(self, meta: dict[str, Any]) -> TokenNormsResult:
        sums = {name: total.cpu() for name, total in self.sums.items()}
        counts = sums["counts"].sum(0)
        means = log_histogram.means_of_bins(counts, sums["total"])
        units = torch.exp2(torch.tensor(self.octaves, dtype=torch.float64))
        median, p99 = (units * log_histogram.quantile(counts, means, one) for one in (0.5, 0.99))

        def share(total: Tensor) -> Tensor:
            middle = log_histogram.quantile(total, means, 0.5)
            return log_histogram.share_above(total, self.times * middle)

        outliers, error = jackknife(share, sums["counts"], self.used)
        prefix, prefix_error = mean_and_error(sums, "prefix")
        maps, last = (sums[name].numpy() for name in ("mean_map", "last_map"))
        maps /= float(sums["images"])
        for row, places in enumerate(self.places):
            maps[row, places.rows :], maps[row, :, places.columns :] = np.nan, np.nan
        for model in range(len(self.chosen)):
            places = self.chosen[model][-1][1]
            last[model, :, places.rows :], last[model, :, :, places.columns :] = np.nan, np.nan
        kept = sums["pictured"].numpy() > 0
        pictures = sums["pictures"].numpy()[kept].transpose(0, 2, 3, 1)
        meta["times"] = self.times
        meta["attends"] = [self.ready.layers(m).has_attention for m in range(len(self.chosen))]
        meta["tokens"] = [not mine[-1][1].is_map for mine in self.chosen]
        return TokenNormsResult(
            meta,
            norm_median=median.numpy(),
            norm_p99=p99.numpy(),
            norm_max=sums["largest"].amax(0).numpy(),
            outlier_share=outliers,
            outlier_share_se=error,
            histogram=log_histogram.coarser(counts, COARSE, self.octaves).numpy().astype(np.int64),
            edges=log_histogram.edges()[::COARSE].numpy(),
            mean_map=maps,
            prefix_norm=prefix,
            prefix_norm_se=prefix_error,
            prefix_kind=self._kinds(prefix.shape),
            last_map=last[:, kept],
            pictures=(255 * pictures).round().astype(np.uint8),
            layers=np.array(self.labels),
            model_of_layer=self.owner,
        )

    def _kinds(self, shape: tuple[int, ...]) -> np.ndarray:
        kinds = np.full(shape, "", dtype=f"U{len(CLASS)}")
        for row, places in enumerate(self.places):
            kinds[row, : len(places.without_place)] = OTHER
            if places.has_class:
                kinds[row, 0] = CLASS
        return kinds


def measure(
    models: Any,
    images: Any = None,
    *,
    layers: Choice = "blocks",
    times: float = TIMES,
    **options: Any,
) -> TokenNormsResult:
    """Norms of all tokens at the layers of one model or several.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        images: see ``open_images``; the bundled digit scenes by default.
        layers: ``blocks``, ``paper``, ``all``, or names with wildcards.
        times: a patch is an outlier above this many medians of its layer.
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: unknown models, images or layers; a layer named that has no grid of places;
            activations that are not finite.
    """
    return measure_one(TokenNorms(layers, times), models, images, Options(**options))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.token_norms``."""
    return cli.command(TokenNorms, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
