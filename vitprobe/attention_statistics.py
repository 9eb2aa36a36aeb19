"""Entropy of attention, and how much it depends on the query.

Park et al. 2023 (arXiv 2305.00729), Figures 2 and 3; Walmer et al. 2023 (arXiv 2212.03862).

The quantities, per head, means over images: entropy −Σ a ln a / ln N of a query's attention to N
patches, 1 for uniform attention and 0 for attention to one patch; normalised mutual information
I(q; k) / √(H(q) H(k)) of query and key, with p(q) = 1/N and p(k) the mean of the rows, 1 where
every query has a key of its own and 0 where all queries attend alike; and the shares of attention
that patches give to the class token and to registers.

Choices made: queries and keys that stand nowhere in the image are dropped, and what is left of a
row is brought back to sum 1, however little it is; their shares are those before that. A row whose
float32 map has nothing for patches is left out. Within windows N is the number of the window's
patches, and the mean over windows is taken. Standard errors over images.
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
from vitprobe.papers import park2023
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.statistics.attention_information import AttentionInformation
from vitprobe.statistics.moments import add_moments, mean_and_error, moment_shapes
from vitprobe.tracing.attention import AttentionLayer, observe
from vitprobe.tracing.places import Places

QUANTITIES = ("entropy", "nmi", "class_mass", "register_mass")


@dataclass(frozen=True)
class AttentionStatisticsResult(Result):
    """Statistics of the attention of all heads.

    Attributes:
        entropy: (layers, heads) mean over images and queries of −Σ a ln a / ln N, from 0 to 1; NaN
            where a layer has fewer heads.
        entropy_se: (layers, heads) standard error over images.
        nmi: (layers, heads) normalised mutual information of query and key, from 0 to 1.
        nmi_se: (layers, heads) standard error over images.
        class_mass: (layers, heads) share of the patches' attention that goes to the class token;
            NaN where there is none, or none that can be told.
        class_mass_se: (layers, heads) standard error over images.
        register_mass: (layers, heads) share that goes to all other tokens without a place.
        register_mass_se: (layers, heads) standard error over images.
        layers: (layers,) names of the attention modules.
        model_of_layer: (layers,) index into ``meta["models"]``.
    """

    entropy: np.ndarray
    entropy_se: np.ndarray
    nmi: np.ndarray
    nmi_se: np.ndarray
    class_mass: np.ndarray
    class_mass_se: np.ndarray
    register_mass: np.ndarray
    register_mass_se: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "attention_statistics"
    text: ClassVar[Text] = Text(
        "Attention statistics",
        "How evenly each head attends (entropy), how much that depends on the query (mutual "
        "information of query and key), and what goes to the class token and to registers; Park "
        "et al. 2023, Walmer et al. 2023.",
        "Entropy 1 is attention spread evenly over all patches, 0 is attention to one. A head "
        "whose mutual information is near 0 gives every query the same: its attention has "
        "collapsed. One dot per head, against depth.",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **{f"{name}{end}": ("layer", "head") for name in QUANTITIES for end in ("", "_se")},
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }

    def plot(self, ax: Any = None) -> Any:
        """Dots per head against depth: entropy, mutual information, class token and registers.

        On ``ax``, the mutual information.
        """
        with drawing.style():
            if ax is not None:
                self._dots(ax, "nmi")
                ax.legend()
                return ax
            figure = drawing.new_figure(11, 3.9)
            entropy, nmi, mass = figure.subplots(1, 3)
            self._dots(entropy, "entropy")
            self._dots(nmi, "nmi")
            self._masses(mass)
            entropy.set_ylim(-0.02, 1.04)
            nmi.set_ylim(-0.02, max(0.1, 1.1 * float(np.nanmax(self.nmi))))
            entropy.legend(loc="lower left")
            drawing.caption(figure, self._caption())
            return figure

    def _depth(self, rows: np.ndarray) -> np.ndarray:
        return np.arange(len(rows)) / max(1, len(rows) - 1)

    def _dots(self, ax: Any, what: str) -> None:
        values, errors = getattr(self, what), getattr(self, f"{what}_se")
        for model, name in enumerate(self.models):
            rows = self.rows_of(model)
            colour = drawing.COLOURS[model % len(drawing.COLOURS)]
            depth = np.broadcast_to(self._depth(rows)[:, None], values[rows].shape)
            ax.errorbar(
                depth.ravel(), values[rows].ravel(), errors[rows].ravel(), color=colour,
                linestyle="", marker="o", markersize=2.5, alpha=0.6, elinewidth=0.8,
            )  # fmt: skip
            ax.plot(self._depth(rows), np.nanmean(values[rows], 1), color=colour, label=name)
        ax.set_xlabel("depth (share of attention layers)")
        ax.set_ylabel(
            {"entropy": "entropy / ln N", "nmi": "mutual information of query and key, NMI"}[what]
        )

    def _masses(self, ax: Any) -> None:
        """Class token and registers, means and extremes over the heads."""
        for model in range(len(self.models)):
            rows = self.rows_of(model)
            colour = drawing.COLOURS[model % len(drawing.COLOURS)]
            for values, style, what in (
                (self.class_mass[rows], "-", "class token"),
                (self.register_mass[rows], ":", "registers"),
            ):
                there = ~np.isnan(values).all(1)
                if not there.any():
                    continue
                depth, shown = self._depth(rows)[there], values[there]
                ax.fill_between(depth, np.nanmin(shown, 1), np.nanmax(shown, 1), color=colour,
                                alpha=0.15, linewidth=0)  # fmt: skip
                known = [line.get_label() for line in ax.lines]
                ax.plot(depth, np.nanmean(shown, 1), color=colour, linestyle=style,
                        label=what if what not in known else "_")  # fmt: skip
        ax.set(xlabel="depth (share of attention layers)", ylabel="share of the patches' attention")
        if ax.lines:
            ax.legend(title="mean and range of heads", title_fontsize=7)
        else:
            ax.text(0.5, 0.5, "no class token, no registers", ha="center",
                    transform=ax.transAxes)  # fmt: skip

    def _caption(self) -> str:
        text = drawing.provenance_line(self.meta)
        text += " Rows of attention renormalised over patches for entropy and NMI; dots:"
        text += " heads, lines: their means. Bars: one standard error over images."
        for name, left_out in zip(self.models, self.meta["left_out"]):
            if left_out:
                label, why = next(iter(left_out.items()))
                others = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
                text += f" Without {label}{others} of {name}: {why}."
        return text

    def findings(self) -> list[Finding]:
        """Park et al.'s claims for networks whose pre-training is known."""
        return park2023.findings(self)


RESULT = AttentionStatisticsResult
GROUP = "attention"


@dataclass(frozen=True)
class AttentionStatistics(Measurement):
    """Options of ``measure``: none of its own."""

    analysis: ClassVar[str] = "attention_statistics"

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready)


MEASUREMENT = AttentionStatistics


class _Watch(Watch):
    """The statistics of every head in every image, and their moments."""

    def __init__(self, ready: Session) -> None:
        self.maps = [ready.attention(m) for m in range(len(ready.models))]
        for found in self.maps:
            found.require("statistics of it")
        self.labels = [layer.label for found in self.maps for layer in found.layers]
        self.starts = np.cumsum([0, *(len(found.layers) for found in self.maps)]).tolist()
        self.heads = max(layer.heads for found in self.maps for layer in found.layers)
        self.tokens = [
            [_Tokens(layer, grids, ready.device) for layer in found.layers]
            for found, grids in zip(self.maps, (_grids(ready, m) for m in range(len(self.maps))))
        ]
        shape = self.starts[-1], self.heads
        super().__init__(
            ready,
            ready.sums(**moment_shapes(**dict.fromkeys(QUANTITIES, shape))),
            {"layers": self.labels},
        )

    @contextmanager
    def watching(self, m: int, batch: Batch) -> Iterator[None]:
        found, tokens, model = self.maps[m], self.tokens[m], self.ready.models[m]
        home = self.sums["entropy"]

        def masses(i: int, block: Tensor, images: slice, queries: slice) -> None:
            one, layer = tokens[i], found.layers[i]
            if images.start == 0 and queries.start == 0:
                one.begin(len(batch), layer.heads, block)
            one.add_masses(block, images, queries)

        def reduce(i: int, block: Tensor, images: slice, queries: slice) -> None:
            one, layer = tokens[i], found.layers[i]
            finite = one.information.add(block, images, queries)
            check_finite(finite, layer.label, model, "attention of")
            if images.stop < len(batch) or queries.stop < layer.queries.shape[1]:
                return
            for name, values in one.statistics().items():
                wide = values.to(home.device, torch.float64)
                place = self.starts[m] + i, slice(0, layer.heads)
                add_moments(self.sums, name, place, wide)

        among = [one.information.keys for one in tokens]
        with (
            observe(model.module, found, masses),
            observe(model.module, found, reduce, among=among),
        ):
            yield

    def result(self, meta: dict[str, Any]) -> AttentionStatisticsResult:
        moments: Any = [array for name in QUANTITIES for array in mean_and_error(self.sums, name)]
        meta["left_out"] = [found.left_out for found in self.maps]
        owner = np.repeat(np.arange(len(self.maps)), np.diff(self.starts))
        arrays = [*moments, np.array(self.labels), owner]
        return AttentionStatisticsResult(meta, *arrays)


class _Tokens:
    """Which tokens of a layer are patches, class token or registers, and what is given to each."""

    def __init__(
        self, layer: AttentionLayer, grids: Sequence[Places], device: torch.device
    ) -> None:
        queries, keys = (
            torch.from_numpy(np.isfinite(side[..., 0])).to(device)
            for side in (layer.queries, layer.keys)
        )
        self.information = AttentionInformation(queries, keys)
        self.count = int(queries.sum())
        nowhere = np.flatnonzero(~np.isfinite(layer.keys[0, :, 0])).tolist()
        # A block whose tokens are these tells which of them is the class token.
        alike = [
            grid
            for grid in grids
            if len(layer.keys) == 1
            and grid.lengths == (layer.keys.shape[1],)
            and sorted(grid.without_place) == nowhere
        ]
        classes = {grid.class_token for grid in alike}
        self.others: dict[str, list[int]] = {}
        if nowhere and len(classes) == 1:
            (of_class,) = classes
            split = {"class_mass": [k for k in nowhere if k == of_class],
                     "register_mass": [k for k in nowhere if k != of_class]}  # fmt: skip
            self.others = {name: keys for name, keys in split.items() if keys}

    def begin(self, images: int, heads: int, like: Tensor) -> None:
        self.information.begin(images, heads, like)
        self.given = {name: like.new_zeros(images, heads) for name in self.others}

    def add_masses(self, block: Tensor, images: slice, queries: slice) -> None:
        from_patches = self.information.queries[0, queries].to(block.dtype)
        for name, keys in self.others.items():
            # One group: the layer's tokens are those of a block.
            to_them = torch.stack([block[:, 0, :, :, key] for key in keys]).sum(0)
            self.given[name][images] += to_them @ from_patches / self.count

    def statistics(self) -> dict[str, Tensor]:
        """Each (images, heads)."""
        return {"entropy": self.information.entropy(), "nmi": self.information.nmi(), **self.given}


def _grids(ready: Session, m: int) -> list[Places]:
    """The grids of tokens of a model's blocks."""
    found = ready.places(m, ready.layers(m).choose("blocks"))
    return [one for one in found if isinstance(one, Places)]


def measure(models: Any, images: Any = None, **options: Any) -> AttentionStatisticsResult:
    """Entropy, mutual information and mass on other tokens of every head's attention.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        images: see ``open_images``; the bundled digit scenes by default.
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: a model without attention between places of the image, or one whose tokens
            cannot be placed; unknown models or images; attention that is not finite.
    """
    return measure_one(AttentionStatistics(), models, images, Options(**options))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.attention_statistics``."""
    return cli.command(
        AttentionStatistics, measure, __doc__, argv, default_models=("vit_small_box",)
    )


if __name__ == "__main__":
    sys.exit(main())
