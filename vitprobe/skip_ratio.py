"""What skip connections carry and what branches add, at every block.

Raghu et al. 2021 (arXiv 2108.08810), Figure 7, E.1 and E.2.

The quantities: ‖z‖ / ‖f(z)‖ and cos(z, f(z)), z what the skip carries and f(z) what the branch
adds, as they stand just before the addition: after layer scale, and z before it is normalised.
Norms run over the channels of one token or one location, without unit.

Choices made: every residual addition of the forward pass, told by its operations;
z of a projection shortcut is what the projection gives. Models that have the same tokens at every
addition keep them apart; for maps, and for tokens that change in number, the mean over locations.
A branch that is exactly 0 has no ratio: such cases are left out of the means, counted, and hatched
where nothing else is there. Standard errors over images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, product
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.papers.raghu2021 import skips
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.statistics.moments import add_moments, mean_and_error, moment_shapes
from vitprobe.statistics.norms import PIECE, exact, held
from vitprobe.tracing.branches import ATTENTION, CONVOLUTION, MLP
from vitprobe.tracing.skips import find_skips
from vitprobe.tracing.trace import AdditionHooks

_LINES = {ATTENTION: "-", MLP: "--", CONVOLUTION: "-"}


def norms_and_product(skip: Tensor, branch: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """‖z‖, ‖f(z)‖ and z·f(z) along the channel axis, images first; float64 where float32 fails."""
    if skip.dtype != torch.float64:
        skip, branch = skip.float(), branch.float()
    found: list[list[Tensor]] = [[], [], []]
    # Products of more at a time leave the cache, and beyond 32 MB the system maps their memory anew
    # each time: for the maps of a ResNet's first stage eight times as slow.
    images = max(1, PIECE // max(1, skip[:1].numel()))
    for z, f in zip(skip.split(images), branch.split(images)):
        # Along the channels of maps, vecdot takes half of vector_norm's time on CPU.
        for part, (one, other) in zip(found, ((z, z), (f, f), (z, f))):
            part.append(torch.linalg.vecdot(one, other, dim=axis))
    of_skip, of_branch, product = (torch.cat(part) for part in found)
    if not (held(of_skip, skip, axis) and held(of_branch, branch, axis)):
        return norms_and_product(exact(skip), exact(branch), axis)
    return of_skip.sqrt(), of_branch.sqrt(), product


def ratio_and_cosine(of_skip: Tensor, of_branch: Tensor, product: Tensor) -> tuple[Tensor, Tensor]:
    """‖z‖ / ‖f(z)‖, NaN where the branch is exactly 0, and the cosine, NaN where either is."""
    branch = of_branch.where(of_branch != 0, torch.nan)
    return of_skip / branch, product / (branch * of_skip.where(of_skip != 0, torch.nan))


@dataclass(frozen=True)
class SkipRatioResult(Result):
    """Norm ratios and cosines of skip and branch.

    Attributes:
        ratio: (additions, tokens) mean over images of ‖z‖ / ‖f(z)‖; NaN where there is no such
            token or the branch was 0 for every image. For maps there is one column.
        ratio_se: (additions, tokens) standard error over images.
        cosine: (additions, tokens) mean over images of cos(z, f(z)).
        cosine_se: (additions, tokens) standard error over images.
        spatial: (additions,) ratio averaged over the patch tokens, or the locations of a map.
        spatial_se: (additions,) standard error over images.
        log_ratio: (models, 3) means over additions of natural logarithms of the ratio: the class
            token's minus the spatial mean's, in the first and in the second half of the
            additions, and the spatial mean's over all.
        log_ratio_se: (models, 3) standard error over images.
        zeros: (additions, tokens) how many images had a branch of exactly 0 there (for maps: at
            any location).
        kind: (additions,) ``attention``, ``MLP`` or ``convolution``, what the branch does.
        layers: (additions,) names.
        model_of_layer: (additions,) index into ``meta["models"]``.
    """

    ratio: np.ndarray
    ratio_se: np.ndarray
    cosine: np.ndarray
    cosine_se: np.ndarray
    spatial: np.ndarray
    spatial_se: np.ndarray
    log_ratio: np.ndarray
    log_ratio_se: np.ndarray
    zeros: np.ndarray
    kind: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "skip_ratio"
    text: ClassVar[Text] = Text(
        "What skips carry and branches add",
        "The norm of what the skip carries divided by that of what the branch adds, and the cosine "
        "between the two, at every residual addition; Raghu et al., Figures 7, E.1 and E.2.",
        "A ratio above 1 says that the representation passes a block mostly through the skip. "
        "Hatched, or without a line: the branch is exactly 0.",
        "‖z‖ / ‖f(z)‖",
        logarithms=True,
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "ratio": ("layer", "token"),
        "ratio_se": ("layer", "token"),
        "cosine": ("layer", "token"),
        "cosine_se": ("layer", "token"),
        "spatial": ("layer",),
        "spatial_se": ("layer",),
        "log_ratio": ("model", "part"),
        "log_ratio_se": ("model", "part"),
        "zeros": ("layer", "token"),
        "kind": ("layer",),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }
    names: ClassVar[dict[str, tuple[str, ...]]] = {
        "part": ("class minus spatial, first half", "class minus spatial, second half", "spatial"),
    }

    def of(self, model: int, kind: str | None = None) -> np.ndarray:
        """Rows of a model, or of one kind of its additions."""
        mine = self.rows_of(model)
        return mine if kind is None else mine[self.kind[mine] == kind]

    def plot(self, ax: Any = None) -> Any:
        """Heat maps (tokens × additions) and lines against depth; on ``ax``, the ratio lines."""
        with drawing.style():
            if ax is not None:
                self._lines(ax, "ratio")
                ax.legend()
                return ax
            maps = [m for m, layout in enumerate(self.meta["layouts"]) if layout["tokens"] > 1]
            figure = drawing.new_figure(9, 4 + 2.9 * len(maps))
            grid = figure.add_gridspec(len(maps) + 2, 1, height_ratios=[2.9] * len(maps) + [0.4, 3])
            values = self._logs(maps)
            for line, model in enumerate(maps):
                self._heat_maps(figure, grid[line], model, values)
            below = grid[len(maps) + 1].subgridspec(1, 2)
            ratio, cosine = (figure.add_subplot(below[0, i]) for i in (0, 1))
            self._lines(ratio, "ratio")
            self._lines(cosine, "cosine")
            key = figure.add_subplot(grid[len(maps)])
            key.axis("off")
            key.legend(*ratio.get_legend_handles_labels(), fontsize=6.5, loc="center", ncols=3)
            drawing.caption(figure, self._caption())
            return figure

    def _logs(self, models: list[int]) -> np.ndarray:
        """(additions, tokens) log10 of the ratios of these models, NaN elsewhere."""
        with np.errstate(divide="ignore"):
            values = np.log10(self.ratio)
        values[~np.isfinite(values) | ~np.isin(self.model_of_layer, models)[:, None]] = np.nan
        return values

    def _heat_maps(self, figure: Any, place: Any, model: int, values: np.ndarray) -> None:
        kinds = [kind for kind in _LINES if len(self.of(model, kind))]
        tokens = self.meta["layouts"][model]["tokens"]
        axes = place.subgridspec(1, len(kinds)).subplots(squeeze=False)[0]
        # One scale for all models.
        low, high = (0.0, 1.0) if np.isnan(values).all() else np.nanpercentile(values, (0.5, 99.5))
        for one, kind in zip(axes, kinds):
            shown = values[self.of(model, kind), :tokens]
            image = drawing.heat_map(one, shown, vmin=low, vmax=max(high, low + 1e-6))
            number = self.class_token(model)
            one.set_xlabel("token" + ("" if number is None else f", {number} = class"))
            names = [str(name) for name in self.layers[self.of(model, kind)]]
            drawing.layer_axis(one.yaxis, names, "")
            one.set_title(f"{self.models[model]}: {kind}")
        bar = figure.colorbar(image, ax=axes, aspect=30, pad=0.01, extend="both")
        ticks, labels = _ticks(low, high)
        bar.set_ticks(np.log10(ticks).tolist(), labels=labels)
        bar.set_label("‖z‖ / ‖f(z)‖")

    def class_token(self, model: int) -> int | None:
        layout = self.meta["layouts"][model]
        # Files of earlier versions hold tokens before the patches only.
        return layout.get("class_token", 0) if layout["has_class"] else None

    def _without_place(self, model: int) -> list[int]:
        layout = self.meta["layouts"][model]
        return layout.get("without_place", list(range(layout.get("prefix", 0))))

    def _lines(self, ax: Any, what: str) -> None:
        """Against depth from 0 to 1: spatial mean and class token, one line for each kind."""
        values, errors = (self.ratio, self.ratio_se) if what == "ratio" else (
            self.cosine, self.cosine_se
        )  # fmt: skip
        colours = cycle(drawing.COLOURS)
        for model, name in enumerate(self.models):
            order, number = self.of(model), self.class_token(model)
            there = np.setdiff1d(np.arange(values.shape[1]), self._without_place(model))
            mean = self.spatial if what == "ratio" else _nanmean(values[:, there])
            error = self.spatial_se if what == "ratio" else np.full_like(mean, np.nan)
            tokens = {"": (mean, error, next(colours), "")}
            if number is not None:
                tokens = {" spatial tokens": tokens[""]}
                tokens[" class token"] = values[:, number], errors[:, number], next(colours), "o"
            for (label, line), kind in product(tokens.items(), _LINES):
                value, error, colour, marker = line
                rows = self.of(model, kind)
                if not len(rows):
                    continue
                depth = (np.searchsorted(order, rows) + 1) / len(order)
                ax.plot(
                    depth, value[rows], color=colour, linestyle=_LINES[kind], marker=marker,
                    markersize=3.5, linewidth=1.2, label=f"{name}{label}, {kind}",
                )  # fmt: skip
                low, high = (value[rows] + side * error[rows] for side in (-1, 1))
                ax.fill_between(depth, low, high, color=colour, alpha=0.2, linewidth=0)
        ax.set_xlabel("depth (fraction of the residual additions)")
        if what == "ratio":
            ax.set_ylabel("‖z‖ / ‖f(z)‖")
            if not (self.spatial > 0).any():
                return
            ax.set_yscale("log")
            ax.set_yticks(*_ticks(*np.log10(ax.get_ylim())), minor=False)
            ax.set_yticks([], minor=True)
        else:
            ax.axhline(0, color="0.7", linewidth=0.8, zorder=0)
            ax.set_ylabel("cos(z, f(z))")

    def _caption(self) -> str:
        text = drawing.provenance_line(self.meta)
        text += " z: what the skip carries, f(z): what the branch adds. Bands: one standard error."
        if self.zeros.any():
            where = int((self.zeros > 0).sum())
            text += (
                f" {int(self.zeros.sum()):,} cases of a branch of exactly 0 (in {where:,} cells) "
                f"left out; hatched, or without a line, where nothing else was."
            )
        return text

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claims of Figure 7."""
        return skips.ratio(self)


GROUP = "tokens"
RESULT = SkipRatioResult


@dataclass(frozen=True)
class SkipRatio(Measurement):
    """It has no options of its own."""

    analysis: ClassVar[str] = "skip_ratio"

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready)


MEASUREMENT = SkipRatio


class _Watch(Watch):
    """Norms and products of skip and branch at every residual addition."""

    def __init__(self, ready: Session) -> None:
        with ready.autocast():
            self.plans = [
                find_skips(ready.layers(m), model.module, example)
                for m, (model, example) in enumerate(zip(ready.models, ready.example()))
            ]
        self.labels = [layer.label for plan in self.plans for layer in plan.layers]
        self.starts = np.cumsum([0, *(len(plan.layers) for plan in self.plans)]).tolist()
        size = len(self.labels), max(plan.tokens for plan in self.plans)
        self.shapes: dict[str, Sequence[int]] = {
            "ratio": size,
            "cosine": size,
            "spatial": size[:1],
            "log_ratio": (len(self.plans), 3),
        }
        sums = ready.sums(**moment_shapes(**self.shapes), zeros=size)
        super().__init__(ready, sums, {"layers": self.labels})

    @contextmanager
    def watching(self, m: int, batch: Batch) -> Iterator[None]:
        model, plan, sums = self.ready.models[m], self.plans[m], self.sums
        number = plan.layout["class_token"] or 0
        logs: list[tuple[Tensor, Tensor]] = [(batch.inputs[m],) * 2] * len(plan.layers)

        def take(i: int, skip: Tensor, branch: Tensor) -> None:
            layer, row = plan.layers[i], self.starts[m] + i
            found = norms_and_product(layer.by_image(skip), layer.by_image(branch), plan.axes[i])
            parts = [part.flatten(1).to(sums["zeros"].device).double() for part in found]
            check_finite(torch.isfinite(torch.stack(parts)).all(), layer.label, model)
            ratio, cosine = ratio_and_cosine(*parts)
            there = np.setdiff1d(np.arange(ratio.shape[1]), plan.without_place[i])
            spatial = ratio[:, there].nanmean(1)
            zeros = ratio.isnan()
            if plan.tokens == 1:
                ratio, cosine = ratio.nanmean(1, True), cosine.nanmean(1, True)
                zeros = zeros.any(1, True)
            tokens = slice(0, plan.tokens)
            add_moments(sums, "ratio", (row, tokens), ratio)
            add_moments(sums, "cosine", (row, tokens), cosine)
            add_moments(sums, "spatial", (row,), spatial)
            sums["zeros"][row, tokens] += zeros.sum(0)
            logs[i] = spatial.log(), ratio[:, number].log()

        hooks: Any = {layer.addition: partial(take, i) for i, layer in enumerate(plan.layers)}
        with AdditionHooks(model.module, before=hooks):
            yield
        spatial, first = (torch.stack(column, 1) for column in zip(*logs))
        gap, half = _finite(first - spatial), (len(logs) + 1) // 2
        three = (gap[:, :half].nanmean(1), gap[:, half:].nanmean(1), _finite(spatial).nanmean(1))
        add_moments(sums, "log_ratio", (m,), torch.stack(three, 1))

    def result(self, meta: dict[str, Any]) -> SkipRatioResult:
        moments = [array for name in self.shapes for array in mean_and_error(self.sums, name)]
        meta["layouts"] = [plan.layout for plan in self.plans]
        zeros = self.sums["zeros"].cpu().numpy().astype(np.int64)
        kinds = np.array([kind for plan in self.plans for kind in plan.kinds])
        owner = np.repeat(np.arange(len(self.plans)), np.diff(self.starts))
        arrays = [*moments, zeros, kinds, np.array(self.labels), owner]
        return SkipRatioResult(meta, *arrays)


def measure(models: Any, images: Any = None, **options: Any) -> SkipRatioResult:
    """Norm ratio and cosine of skip and branch at every residual addition of the models.

    Args:
        models: specs, modules or ``Model``; one or a list.
        images: see ``open_images``; the bundled digit scenes by default.
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: unknown models or images; a model without residual additions; activations
            that are not finite.
    """
    return measure_one(SkipRatio(), models, images, Options(**options))


def _finite(values: Tensor) -> Tensor:
    return values.where(values.isfinite(), torch.nan)


def _nanmean(values: np.ndarray) -> np.ndarray:
    """Mean of each row's numbers; NaN where it has none."""
    count = (~np.isnan(values)).sum(1)
    return np.where(count, np.nansum(values, 1) / np.maximum(count, 1), np.nan)


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """1, 2, 5, 10 ... between two powers of ten, and how they are written."""
    steps = [step * 10.0**power for power in range(-9, 10) for step in (1, 2, 5)]
    if high - low > 3:
        steps = steps[::3]
    chosen = [step for step in steps if low <= np.log10(step) <= high]
    return chosen, [f"{step:g}" for step in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.skip_ratio``."""
    return cli.command(SkipRatio, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
