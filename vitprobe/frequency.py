"""What attention, MLPs and convolutions do to the frequencies and the variance of maps.

Park & Kim 2022 (arXiv 2202.06709), Figures 2, 8 and 9.

The quantities, of the map of a layer (tokens without class token and registers on their grid):
Δ(ω) = mean over images and channels of ln|F(ω, ω)| − ln|F(0, 0)|, F the two-dimensional Fourier
transform over the locations; and V, the variance of a channel over locations, averaged over
channels and images. Both stand before and after every sublayer (attention, MLP, convolutional
block); frequencies are in units of π.

Choices made: sublayers are what residual additions add, and a block's output is taken after its
last activation; ``--layers`` takes other tensors. Maps of unlike size are not compared: a step
counts where the map stays as large. On oblong grids ω is the shorter side's, along the longer one
the nearest frequency is taken. An amplitude of 0 (a constant channel) has no logarithm: left out
and counted. Standard errors over images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import matplotlib
import numpy as np
import torch
from matplotlib.patches import Patch
from torch import Tensor

from vitprobe import cli
from vitprobe.papers import park2022
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.grids import OnGrid, with_grids
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.running.stored import measure_features
from vitprobe.statistics.frequency import below_nyquist, diagonal, log_amplitudes
from vitprobe.statistics.moments import add_moments, mean_and_error, moment_shapes
from vitprobe.tracing.branches import ATTENTION, CONVOLUTION, MLP
from vitprobe.tracing.layers import Choice
from vitprobe.tracing.sublayers import Point, sublayers

SUBLAYERS = "sublayers"
KINDS = (ATTENTION, MLP, CONVOLUTION)
SHADES = {ATTENTION: "#56B4E9", MLP: "#E69F00", CONVOLUTION: "#009E73"}


@dataclass(frozen=True)
class FrequencyResult(Result):
    """Amplitudes and variances of the maps of all layers.

    Attributes:
        delta: (layers, frequencies) mean of ln|F(ω, ω)| − ln|F(0, 0)|; NaN where the grid of a
            layer has no such frequency.
        delta_se: (layers, frequencies) standard error over images.
        omega: (frequencies,) in units of π, from 0 to 1 (Nyquist).
        variance: (layers,) over locations, mean over channels and images.
        variance_se: (layers,) standard error over images.
        kind: (layers,) what is between the layer before and this one: ``attention``, ``MLP``,
            ``convolution``, or empty where the two are not compared.
        grid: (layers, 2) rows and columns.
        zeros: (layers,) how many channels of images have an amplitude of 0, left out there.
        step_delta: (models, kinds) mean over the steps of a kind (attention, MLP, convolution) of
            the change of Δ at the highest frequency below Nyquist.
        step_delta_se: (models, kinds) standard error over images.
        step_variance: (models, kinds) the same of the change of ln V.
        step_variance_se: (models, kinds) standard error over images.
        layers: (layers,) names.
        model_of_layer: (layers,) index into ``meta["models"]``.
    """

    delta: np.ndarray
    delta_se: np.ndarray
    omega: np.ndarray
    variance: np.ndarray
    variance_se: np.ndarray
    kind: np.ndarray
    grid: np.ndarray
    zeros: np.ndarray
    step_delta: np.ndarray
    step_delta_se: np.ndarray
    step_variance: np.ndarray
    step_variance_se: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "frequency"
    text: ClassVar[Text] = Text(
        "Frequencies and variance of maps",
        "How much of a map is fine detail (amplitude at high frequencies against the mean's) and "
        "how much it varies over locations, before and after every sublayer; Park & Kim 2022, "
        "Figures 2, 8 and 9.",
        "Where a line falls the sublayer (shaded) smooths the map; where it rises it sharpens it. "
        "Lines end where the size of the maps changes: maps of unlike size are not comparable.",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "delta": ("layer", "frequency"),
        "delta_se": ("layer", "frequency"),
        "omega": ("frequency",),
        "variance": ("layer",),
        "variance_se": ("layer",),
        "kind": ("layer",),
        "grid": ("layer", "side"),
        "zeros": ("layer",),
        **{f"step_{what}{end}": ("model", "step") for what in ("delta", "variance")
           for end in ("", "_se")},
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }  # fmt: skip
    names: ClassVar[dict[str, tuple[str, ...]]] = {"step": KINDS, "side": ("rows", "columns")}

    def highest(self) -> tuple[np.ndarray, np.ndarray]:
        """(layers,) Δ at each layer's highest frequency below Nyquist, and its standard error."""
        at = self.highest_frequency()
        rows = np.arange(len(at))
        there = at > 0
        return (np.where(there, self.delta[rows, at], np.nan),
                np.where(there, self.delta_se[rows, at], np.nan))  # fmt: skip

    def highest_frequency(self) -> np.ndarray:
        """(layers,) index into ``omega``; 0 where a grid is too small to have one."""
        own = [2 * below_nyquist(*side) / min(side) for side in self.grid.tolist()]
        return np.abs(self.omega[None] - np.array(own)[:, None]).argmin(1)

    def plot(self, ax: Any = None) -> Any:
        """For each model Δ against frequency, Δ at the highest, and ln V against depth.

        On ``ax``, Δ at the highest frequency against depth from 0 to 1, a line per model.
        """
        with drawing.style():
            if ax is not None:
                for model, name in enumerate(self.models):
                    rows = self.rows_of(model)
                    depth = np.arange(len(rows)) / max(1, len(rows) - 1)
                    ax.plot(depth, self.highest()[0][rows], label=name)
                ax.set(xlabel="depth (share of sublayers)", ylabel="Δ at the highest frequency")
                ax.legend()
                return ax
            count = len(self.models)
            figure = drawing.new_figure(10.5, 2.9 * count + 0.8)
            axes = figure.subplots(count, 3, squeeze=False, width_ratios=[1, 1.3, 1.3])
            with np.errstate(divide="ignore", invalid="ignore"):
                logs = np.log(self.variance), self.variance_se / self.variance
            for model, (spectra, high, variance) in enumerate(axes):
                self._spectra(figure, spectra, model)
                self._depth(high, model, *self.highest(), "Δ at the highest ω below π")
                self._depth(variance, model, *logs, "ln V")
                variance.sharex(high)
            shades = [
                Patch(facecolor=SHADES[kind], alpha=0.25, label=kind)
                for kind in KINDS
                if kind in self.kind
            ]
            if shades:
                axes[0, 0].legend(handles=shades, loc="lower left", fontsize=6.5)
            drawing.caption(figure, self._caption())
            return figure

    def _spectra(self, figure: Any, ax: Any, model: int) -> None:
        """Δ against ω, a line per layer, dark at the input."""
        rows = self.rows_of(model)
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(rows)))
        for row, colour in zip(rows, colours):
            there = np.isfinite(self.delta[row])
            ax.plot(self.omega[there], self.delta[row, there], color=colour, linewidth=1)
        ax.set(xlabel="ω / π (dark: input, light: output)", ylabel="Δ(ω)")
        ax.set_title(drawing.short(self.models[model]))

    def _depth(
        self, ax: Any, model: int, values: np.ndarray, errors: np.ndarray, label: str
    ) -> None:
        rows = self.rows_of(model)
        grids = self.grid[rows]
        for k in range(1, len(rows)):
            if self.kind[rows[k]]:
                ax.axvspan(k - 1, k, color=SHADES[str(self.kind[rows[k]])], alpha=0.25, linewidth=0)
        # A line ends where the size of the maps changes, and where a sublayer takes up another map.
        apart = (np.diff(grids, axis=0) != 0).any(1)
        if (self.kind[rows] != "").any():
            apart |= self.kind[rows][1:] == ""
        ends = np.flatnonzero(apart) + 1
        values = np.where(np.isfinite(values), values, np.nan)
        for part in np.split(np.arange(len(rows)), ends):
            ax.errorbar(part, values[rows[part]], errors[rows[part]], color="black", marker="o",
                        markersize=2.5, linewidth=1)  # fmt: skip
            size = "×".join(map(str, grids[part[0]]))
            ax.annotate(size, (part[0], 0), xycoords=("data", "axes fraction"), fontsize=6,
                        color="0.4", xytext=(1, 2), textcoords="offset points")  # fmt: skip
        drawing.layer_axis(ax.xaxis, [str(name) for name in self.layers[rows]], "")
        ax.set_ylabel(label)

    def _caption(self) -> str:
        text = drawing.provenance_line(self.meta)
        text += " Δ(ω): ln of the amplitude at (ω, ω) minus that at (0, 0), mean over channels and"
        text += " images. Bars: one standard error over images. Small print: size of the maps."
        if self.zeros.any():
            text += f" {int(self.zeros.sum()):,} channels of images with an amplitude of 0 left out"
            text += f" (in {int((self.zeros > 0).sum())} layers)."
        if any(rows != columns for rows, columns in self.grid.tolist()):
            text += " Oblong maps: the nearest frequency along the longer side."
        return text

    def findings(self) -> list[Finding]:
        """Park & Kim's claims for every trained model that has such sublayers."""
        return park2022.findings(self)


GROUP = "tokens"
RESULT = FrequencyResult


@dataclass(frozen=True)
class Frequency(Measurement):
    """Options of ``measure``."""

    layers: Choice = option(
        SUBLAYERS,
        "sublayers (default): before and after every attention, MLP and convolutional block; or "
        "blocks, paper, all, or names with wildcards",
        nargs="+",
        metavar="L",
    )

    analysis: ClassVar[str] = "frequency"

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self.layers)


MEASUREMENT = Frequency


class _Watch(Watch):
    """Amplitudes and variances of all points of a pass, and what changes from one to the next."""

    def __init__(self, ready: Session, layers: Choice) -> None:
        found = [_points(ready, m, layers) for m in range(len(ready.models))]
        self.points = [[point for point, _ in mine] for mine in found]
        self.grids = [[places for _, (_, places) in mine] for mine in found]
        everything = [places for mine in self.grids for places in mine]
        self.owner = np.repeat(np.arange(len(found)), [len(mine) for mine in found])
        self.starts = np.searchsorted(self.owner, np.arange(len(found))).tolist()
        self.labels = [point.label for mine in self.points for point in mine]
        own = [diagonal(places.rows, places.columns) for places in everything]
        self.omega = np.unique(np.concatenate(own).round(9))
        self.columns = [
            np.abs(self.omega[None] - one[:, None]).argmin(1) for one in own
        ]  # of its frequencies among all
        count = len(self.labels)
        shapes: dict[str, Sequence[int]] = {
            "delta": (count, len(self.omega)),
            "variance": (count,),
            "step_delta": (len(found), len(KINDS)),
            "step_variance": (len(found), len(KINDS)),
        }
        sums = ready.sums(**moment_shapes(**shapes), zeros=(count,))
        super().__init__(ready, sums, {"layers": self.labels})

    @contextmanager
    def watching(self, m: int, batch: Batch) -> Iterator[None]:
        model, points, grids, start = (
            self.ready.models[m], self.points[m], self.grids[m], self.starts[m],
        )  # fmt: skip
        home = self.sums["delta"]
        # (n, 2) of each point: Δ at its highest frequency, and ln V.
        seen: list[Tensor] = [torch.empty(0)] * len(points)

        def reduce(i: int, tensor: Tensor) -> None:
            places, row = grids[i], start + i
            delta, variance, zeros = log_amplitudes(
                places.spatial(tensor), places.rows, places.columns
            )
            check_finite(torch.isfinite(variance).all(), self.labels[row], model)
            delta, variance = (part.to(home.device, torch.float64) for part in (delta, variance))
            add_moments(self.sums, "delta", (row, self.columns[row]), delta)
            add_moments(self.sums, "variance", (row,), variance)
            self.sums["zeros"][row] += zeros.sum()
            top = below_nyquist(places.rows, places.columns)
            high = delta[:, top] if top else torch.full_like(variance, torch.nan)
            seen[i] = torch.stack([high, variance.log()], 1)

        # Before an addition the stream is what its skip carries.
        layers = [
            replace(point.layer, point="skip") if point.before else point.layer for point in points
        ]
        with self.ready.capture(m, layers, reduce):
            yield
        for k, kind in enumerate(KINDS):
            steps = [i for i, point in enumerate(points) if point.kind == kind]
            if steps:
                changes = torch.stack([seen[i] - seen[i - 1] for i in steps])
                changes = changes.where(changes.isfinite(), torch.nan).nanmean(0)
                add_moments(self.sums, "step_delta", (m, k), changes[:, 0])
                add_moments(self.sums, "step_variance", (m, k), changes[:, 1])

    def result(self, meta: dict[str, Any]) -> FrequencyResult:
        delta, delta_se = mean_and_error(self.sums, "delta")
        variance, variance_se = mean_and_error(self.sums, "variance")
        step_delta, step_delta_se = mean_and_error(self.sums, "step_delta")
        step_variance, step_variance_se = mean_and_error(self.sums, "step_variance")
        return FrequencyResult(
            meta,
            delta=delta,
            delta_se=delta_se,
            omega=self.omega,
            variance=variance,
            variance_se=variance_se,
            kind=np.array([point.kind for mine in self.points for point in mine], dtype="U11"),
            grid=np.array([(one.rows, one.columns) for mine in self.grids for one in mine]),
            zeros=self.sums["zeros"].cpu().numpy().astype(np.int64),
            step_delta=step_delta,
            step_delta_se=step_delta_se,
            step_variance=step_variance,
            step_variance_se=step_variance_se,
            layers=np.array(self.labels),
            model_of_layer=self.owner,
        )


def _points(ready: Session, m: int, layers: Choice) -> list[tuple[Point, OnGrid]]:
    """Where a model is looked at, in forward order, with the grids."""
    found, module = ready.layers(m), ready.models[m].module
    points: list[Point] = []
    if layers in (SUBLAYERS, [SUBLAYERS]):
        # Of stored features there is no pass to look at.
        with ready.autocast():
            points = sublayers(module, found, ready.example()[m]) if found.trace.calls else []
        layers = "blocks"
    points = points or [Point(layer) for layer in found.choose(layers)]
    placed = with_grids(ready, m, list(dict.fromkeys(point.layer for point in points)), layers)
    places = dict(placed)
    kept = [
        (point, (point.layer, places[point.layer])) for point in points if point.layer in places
    ]
    # A step is compared where both of its ends are there, and the map keeps its size.
    result: list[tuple[Point, OnGrid]] = []
    for k, (point, one) in enumerate(kept):
        size = one[1].rows, one[1].columns
        before = kept[k - 1][1][1] if k else None
        follows = bool(k) and points.index(point) == points.index(kept[k - 1][0]) + 1
        if before is None or not follows or (before.rows, before.columns) != size:
            point = replace(point, kind="")
        result.append((point, one))
    return result


def measure(
    models: Any,
    images: Any = None,
    *,
    layers: Choice = SUBLAYERS,
    **options: Any,
) -> FrequencyResult:
    """Amplitudes at diagonal frequencies and variance of the maps of one model or several.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        images: see ``open_images``; the bundled digit scenes by default.
        layers: ``sublayers`` (before and after every attention, MLP and convolutional block; the
            blocks of a network without residual additions), ``blocks``, ``paper``, ``all``, or
            names with wildcards.
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: unknown models, images or layers; a model whose layers have no grid of
            places; activations that are not finite.
    """
    return measure_one(Frequency(layers), models, images, Options(**options))


def from_features(features: Any, *, layers: Choice = "blocks", **options: Any) -> FrequencyResult:
    """The same of the maps of features that ``vitprobe extract`` wrote whole or as tokens.

    Which sublayer is between two of them is not known, so that steps are not compared.

    Args:
        features: folders; see ``running.features``.
        layers: names with wildcards; all by default.
        options: fields of ``running.Options`` (``batch_size``, ``names``, ``num_images`` ...).

    Raises:
        VitprobeError: features of other images, or in another order; without a grid of places; not
            finite.
    """
    return measure_features(Frequency(layers), features, Options(**options))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.frequency``."""
    return cli.command(Frequency, measure, __doc__, argv, from_features=from_features)


if __name__ == "__main__":
    sys.exit(main())
