"""How far each attention head looks, in input pixels.

Raghu et al. 2021 (arXiv 2108.08810), Figures 3 and 4; Dosovitskiy et al. 2021 (arXiv 2010.11929),
Figure 7 right and Figure 11.

The quantity: mean over images and queries of Σ_k A[q, k] · ‖r_q − r_k‖₂, A the attention
probabilities, r the place of a token in the image: the middle of what it was made from, through
strides, pooling, windows and their shifts.

Choices made: tokens that stand nowhere (class tokens, registers, padding) are neither queries nor
keys, and by default the rest of a row is not brought back to sum 1, as in the papers' code, so that
attention to a class token counts as no distance; ``--renormalise`` does, and leaves out rows whose
float32 map has nothing for patches. The line "uniform" is what equal attention to all patches gives
that a query can see. Standard errors over images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.papers.raghu2021 import attention
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.statistics.attention_information import faint
from vitprobe.statistics.moments import add_moments, mean_and_error, moment_shapes
from vitprobe.tracing.attention import AttentionLayer, observe


def uniform_distance(distances: np.ndarray, masked: np.ndarray | None = None) -> float:
    """Mean distance under equal attention to all patches.

    Args:
        distances: (groups, queries, keys) in pixels; NaN where either stands nowhere.
        masked: (groups, queries, keys) which pairs are masked out; none by default.
    """
    seen = np.isfinite(distances)
    if masked is not None:
        seen &= ~masked
    count = seen.sum(-1)
    total = np.where(seen, distances, 0).sum(-1)
    return float((total[count > 0] / count[count > 0]).mean())


@dataclass(frozen=True)
class AttentionDistanceResult(Result):
    """Attention distance of all heads.

    Attributes:
        distance_px: (layers, heads) mean distance in input pixels; NaN where a layer has fewer
            heads.
        distance_se: (layers, heads) standard error over images.
        uniform_px: (layers,) what equal attention to all patches in reach gives.
        layers: (layers,) names of the attention modules.
        model_of_layer: (layers,) index into ``meta["models"]``.
    """

    distance_px: np.ndarray
    distance_se: np.ndarray
    uniform_px: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "attention_distance"
    text: ClassVar[Text] = Text(
        "Mean attention distance",
        "How far each head looks, in input pixels, averaged over images and queries; Raghu et al., "
        "Figures 3 and 4; Dosovitskiy et al., Figures 7 right and 11.",
        "A head near 0 looks at its own neighbourhood, one near the dashed line spreads its "
        "attention evenly over the image. Left: the heads of the lowest and highest layers in "
        "order of distance; right: all heads against depth.",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "distance_px": ("layer", "head"),
        "distance_se": ("layer", "head"),
        "uniform_px": ("layer",),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }

    def of(self, model: int) -> np.ndarray:
        """Rows of a model."""
        return self.rows_of(model)

    def plot(self, ax: Any = None) -> Any:
        """For each model sorted heads, and all heads against depth; on ``ax``, the latter."""
        with drawing.style():
            if ax is not None:
                for model in range(len(self.models)):
                    self._depth_panel(ax, model, drawing.COLOURS[model % len(drawing.COLOURS)])
                ax.legend()
                return ax
            count = len(self.models)
            figure = drawing.new_figure(9, 3.1 * count + 0.5)
            axes = figure.subplots(count, 2, squeeze=False, sharey="row", width_ratios=[1, 1.4])
            top = 1.08 * max(np.nanmax(self.distance_px), self.uniform_px.max())
            for model, (left, right) in enumerate(axes):
                self._sorted_panel(left, model)
                self._depth_panel(right, model, drawing.COLOURS[0])
                right.legend()
                right.set_ylabel("")
                left.set_ylim(0, top)
            drawing.caption(figure, self._caption())
            return figure

    def _sorted_panel(self, ax: Any, model: int) -> None:
        """The two lowest and two highest blocks, their heads in order of distance."""
        rows = self.of(model)
        chosen = list(dict.fromkeys([*rows[:2], *rows[-2:]]))
        colours = [drawing.COLOURS[0], drawing.COLOURS[5], drawing.COLOURS[4], drawing.COLOURS[1]]
        for row, colour in zip(chosen, colours[:2] + colours[4 - len(chosen) + 2 :]):
            found = np.isfinite(self.distance_px[row])
            values, errors = self.distance_px[row][found], self.distance_se[row][found]
            order = np.argsort(values)
            ax.errorbar(
                np.arange(1, len(values) + 1), values[order], errors[order], color=colour,
                marker="o", markersize=3, linewidth=1.2, label=drawing.short(str(self.layers[row])),
            )  # fmt: skip
        ax.xaxis.set_major_locator(drawing.MaxNLocator(integer=True))
        ax.set_xlabel("head, in order of distance")
        ax.set_ylabel("mean attention distance (px)")
        ax.set_title(self.models[model])
        ax.legend()

    def _depth_panel(self, ax: Any, model: int, colour: str) -> None:
        rows = self.of(model)
        depth = np.broadcast_to(np.arange(len(rows))[:, None], self.distance_px[rows].shape)
        ax.errorbar(
            depth.ravel(), self.distance_px[rows].ravel(), self.distance_se[rows].ravel(),
            color=colour, linestyle="", marker="o", markersize=3, alpha=0.7, elinewidth=1,
            label=f"{self.models[model]}, heads",
        )  # fmt: skip
        ax.plot(
            np.arange(len(rows)), self.uniform_px[rows], color=colour, linestyle="--", linewidth=1,
            label="uniform attention",
        )  # fmt: skip
        drawing.layer_axis(ax.xaxis, [str(name) for name in self.layers[rows]], "attention layer")
        ax.set_ylabel("mean attention distance (px)")

    def _caption(self) -> str:
        text = drawing.provenance_line(self.meta)
        text += (
            " Rows of attention renormalised to sum to 1 over patches."
            if self.meta["renormalise"]
            else " Rows of attention not renormalised: attention to class tokens has no distance."
        )
        text += " Bars: one standard error over images."
        for name, left_out in zip(self.models, self.meta["left_out"]):
            if left_out:
                label, why = next(iter(left_out.items()))
                others = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
                text += f" Without {label}{others} of {name}: {why}."
        return text

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claims of Figure 3 for every model with global attention."""
        return attention.distance(self)


GROUP = "attention"
RESULT = AttentionDistanceResult


@dataclass(frozen=True)
class AttentionDistance(Measurement):
    """Options of ``measure``."""

    renormalise: bool = option(
        False, "divide each query's attention by what it gives to patches", action="store_true"
    )

    analysis: ClassVar[str] = "attention_distance"

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self.renormalise)


MEASUREMENT = AttentionDistance


class _Watch(Watch):
    """The distances of every head in every image, and their moments."""

    def __init__(self, ready: Session, renormalise: bool) -> None:
        self.renormalise = renormalise
        self.maps = [ready.attention(m) for m in range(len(ready.models))]
        for found in self.maps:
            found.require("attention distance")
        self.uniform = [
            uniform_distance(layer.distances(), layer.masked)
            for found in self.maps
            for layer in found.layers
        ]
        self.tables = [_tables(found.layers, ready.device) for found in self.maps]
        self.labels = [layer.label for found in self.maps for layer in found.layers]
        self.starts = np.cumsum([0, *(len(found.layers) for found in self.maps)]).tolist()
        self.heads = max(layer.heads for found in self.maps for layer in found.layers)
        shapes = moment_shapes(distance=(self.starts[-1], self.heads))
        decides = {"layers": self.labels, "renormalise": renormalise}
        super().__init__(ready, ready.sums(**shapes), decides)

    @contextmanager
    def watching(self, m: int, batch: Batch) -> Iterator[None]:
        found, table = self.maps[m], self.tables[m]
        shape = len(batch), len(found.layers), self.heads
        values = torch.full(shape, torch.nan, device=self.ready.device)
        counts = torch.zeros_like(values)

        def reduce(i: int, block: Tensor, images: slice, queries: slice) -> None:
            new, rows = table[i].distance(block, queries, self.renormalise)
            place = values[images, i, : block.shape[2]]
            place.copy_(new if queries.start == 0 else place + new)
            counts[images, i, : block.shape[2]] += rows

        among = [one.placed[:, 0, :, 0] > 0 for one in table] if self.renormalise else None
        with observe(self.ready.models[m].module, found, reduce, among=among):
            yield
        for i, layer in enumerate(found.layers):
            finite = torch.isfinite(values[:, i, : layer.heads]).all()
            check_finite(finite, layer.label, self.ready.models[m], "attention of")
        rows = slice(self.starts[m], self.starts[m + 1])
        each = (values / counts).to(self.sums["distance"].device, torch.float64)
        add_moments(self.sums, "distance", (rows,), each)

    def result(self, meta: dict[str, Any]) -> AttentionDistanceResult:
        value, error = mean_and_error(self.sums, "distance")
        meta["renormalise"] = self.renormalise
        meta["left_out"] = [found.left_out for found in self.maps]
        meta["global"] = [all(la.rows.shape[0] == 1 for la in one.layers) for one in self.maps]
        owner = np.repeat(np.arange(len(self.maps)), np.diff(self.starts))
        labels = np.array(self.labels)
        return AttentionDistanceResult(meta, value, error, np.array(self.uniform), labels, owner)


def measure(
    models: Any, images: Any = None, *, renormalise: bool = False, **options: Any
) -> AttentionDistanceResult:
    """Mean attention distance of every head of one model or several.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        images: see ``open_images``; the bundled digit scenes by default.
        renormalise: divide each query's attention by what it gives to patches.
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: a model without attention between places of the image, or one whose tokens
            cannot be placed; unknown models or images; attention that is not finite.
    """
    return measure_one(AttentionDistance(renormalise), models, images, Options(**options))


@dataclass(frozen=True)
class _Table:
    """What a layer's probabilities are weighted with.

    Attributes:
        pixels: (groups, queries, keys) distances; 0 where either stands nowhere.
        placed: (groups, 1, keys, 1) 1 where a key stands in the image.
        placed_queries: (groups, queries) 1 where a query does.
    """

    pixels: Tensor
    placed: Tensor
    placed_queries: Tensor

    def distance(
        self, block: Tensor, queries: slice, renormalise: bool
    ) -> tuple[Tensor, Tensor | float]:
        """The distances of these queries added up, and how many of all queries they are.

        Both are (images, heads). Renormalised, a row that gives nothing to patches has no distance.
        """
        pixels = self.pixels[:, queries].to(block.dtype)
        if renormalise:
            rows = (block * pixels[:, None]).sum(-1)
            mass = (block @ self.placed.to(block.dtype))[..., 0]
            told = (mass >= faint(block.dtype)) & (self.placed_queries[:, None, queries] > 0)
            return (rows / mass).where(told, 0).sum((1, 3)), told.sum((1, 3))
        if len(pixels) == 1:
            total = (block.flatten(-2) @ pixels.flatten())[:, 0]
        else:
            total = (block * pixels[:, None]).sum((1, 3, 4))
        return total, float(self.placed_queries[:, queries].sum())


def _tables(layers: list[AttentionLayer], device: torch.device) -> list[_Table]:
    """One table a layer; layers whose tokens stand alike share it."""
    made: dict[tuple[bytes, bytes], _Table] = {}
    tables = []
    for layer in layers:
        key = layer.queries.tobytes(), layer.keys.tobytes()
        if key not in made:
            pixels = torch.from_numpy(layer.distances()).nan_to_num(0).float().to(device)
            placed = torch.from_numpy(np.isfinite(layer.keys[..., 0])).float().to(device)
            asking = torch.from_numpy(np.isfinite(layer.queries[..., 0])).float().to(device)
            made[key] = _Table(pixels, placed[:, None, :, None], asking)
        tables.append(made[key])
    return tables


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.attention_distance``."""
    return cli.command(AttentionDistance, measure, __doc__, argv, default_models=("vit_small_box",))


if __name__ == "__main__":
    sys.exit(main())
