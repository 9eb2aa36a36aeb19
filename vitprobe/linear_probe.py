"""Where the class can be read off: few-shot linear probes at every block, for every readout.

Raghu et al. 2021 (arXiv 2108.08810), Figures 11 and 13 and Appendix D.4.

The quantity: accuracy (0 to 1) on test images of ridge regression onto ±1 class targets, fitted on
a few images a class. Readouts: ``tokens``, one probe for each patch token, their accuracies
averaged; ``CLS``; ``first patch``; ``mean`` of all patch tokens; ``all``, every token of the layer
side by side. In a CNN the tokens are map locations, averaged down to the last block's resolution.

Choices made: features standardised with the fitting images' mean and deviation (+1e-5), a constant
feature appended; the penalty of each probe chosen among 1e-2 ... 1e6 by the leave-one-out error on
its fitting images, each left out of the mean too, so that test images decide nothing. Several
seeded draws of fitting images, their accuracies averaged; the standard error holds the spread of
the draws and the number of test images.

Memory: the features of one draw are held in float32, a few layers at a time where all would take
more than 2 GiB (the draw then passes more than once); of the test images nothing is.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.images.labelled import Task, open_task
from vitprobe.images.sources import DEFAULT_SCENES
from vitprobe.models.loading import Model
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text, combine, decide, plus_minus
from vitprobe.running.measurement import Measurement, Watch, measure_one
from vitprobe.running.options import Options, option
from vitprobe.running.probes import (
    READOUTS,
    TestCounts,
    captured,
    count_right,
    fit_draw,
    grids_of,
    side_by_side,
    vectors,
)
from vitprobe.running.session import Batch, Session
from vitprobe.tracing.places import CLASS_TOKEN, CONVOLUTION, MEAN_OF_TOKENS, Placed, placed_layers

DEFAULT_MODELS = ("vit_small_box", "vit_gap_box", "resnet_box")
# "Far better", in numbers.
FAR = 0.1
# Colours of the token grid span at least this much accuracy.
MIN_RANGE = 0.1
OWN_READOUT = {CLASS_TOKEN: "CLS", MEAN_OF_TOKENS: "mean", CONVOLUTION: "mean"}


@dataclass(frozen=True)
class LinearProbeResult(Result):
    """Accuracy of linear probes.

    Attributes:
        accuracy: (L, readouts) mean over the draws; NaN where a layer has no such readout.
        accuracy_se: (L, readouts) standard error; NaN with one draw.
        layers: (L,) names, model by model.
        readouts: (readouts,) names.
        model_of_layer: (L,) index into ``meta["models"]``.
        depth: (L,) place among all blocks of the model, from 0 to 1.
        accuracy_of_draw: (draws, L, readouts).
        place_accuracy: (L, rows, columns) of each token's own probe; NaN beyond a smaller grid.
        penalty: (L, readouts) geometric mean of the penalties chosen.
    """

    accuracy: np.ndarray
    accuracy_se: np.ndarray
    layers: np.ndarray
    readouts: np.ndarray
    model_of_layer: np.ndarray
    depth: np.ndarray
    accuracy_of_draw: np.ndarray
    place_accuracy: np.ndarray
    penalty: np.ndarray

    analysis: ClassVar[str] = "linear_probe"
    text: ClassVar[Text] = Text(
        "Few-shot linear probes",
        "The accuracy of linear classifiers on a few images a class, at every block and for every "
        "way of reading it out; Raghu et al., Figures 11 and 13.",
        "Where a line rises, the class becomes readable there. Below: the accuracy of each single "
        "token of the last block.",
        "accuracy",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "accuracy": ("layer", "readout"),
        "accuracy_se": ("layer", "readout"),
        "penalty": ("layer", "readout"),
        "depth": ("layer",),
        "accuracy_of_draw": ("draw", "layer", "readout"),
        "place_accuracy": ("layer", "row", "column"),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
        "readouts": ("readout",),
    }

    def plot(self, ax: Any = None) -> Any:
        """Accuracy against depth, a line a readout and a panel a model; below it the token grid.

        On ``ax``: all models, a colour each, the readouts apart by line style.
        """
        with drawing.style():
            if ax is not None:
                for m in range(len(self.models)):
                    self._lines(ax, m, by_model=True)
                return ax
            count = len(self.models)
            figure = drawing.new_figure(3.1 * count + 1.2, 5.4)
            axes = figure.subplots(2, count, squeeze=False, height_ratios=(1.6, 1))
            grids = [self._grid(self._last(m)) for m in range(count)]
            # One scale for all models, of at least some accuracy: chance is not to look like a map.
            low = min(float(grid.min()) for grid in grids)
            high = max(low + MIN_RANGE, *(float(grid.max()) for grid in grids))
            for m, grid in enumerate(grids):
                self._lines(axes[0, m], m, by_model=False)
                axes[0, m].sharey(axes[0, 0])
                last = self._last(m)
                image = drawing.heat_map(axes[1, m], grid, vmin=low, vmax=high)
                axes[1, m].invert_yaxis()  # a picture's first row is at its top
                axes[1, m].set(aspect="equal", xticks=[], yticks=[])
                axes[1, m].set_title(f"each token, {drawing.short(str(self.layers[last]))}")
            figure.colorbar(image, ax=axes[1], label="accuracy", pad=0.01, panchor=False)
            axes[0, 0].set_ylabel("accuracy on test images")
            handles = [pair for one in axes[0] for pair in zip(*one.get_legend_handles_labels())]
            named = {name: handle for handle, name in handles}
            axes[0, 0].legend(named.values(), named.keys(), loc="upper left")
            drawing.caption(figure, self._caption())
            return figure

    def _lines(self, ax: Any, model: int, by_model: bool) -> None:
        mine = self.model_of_layer == model
        styles = ("-", "--", ":", "-.", (0, (1, 3)))
        for r, readout in enumerate(self.readouts.tolist()):
            if np.isnan(self.accuracy[mine, r]).all():
                continue
            colour = drawing.COLOURS[(model if by_model else r) % len(drawing.COLOURS)]
            ax.errorbar(
                self.depth[mine], self.accuracy[mine, r], self.accuracy_se[mine, r],
                color=colour, linestyle=styles[r] if by_model else "-", marker="o", markersize=3,
                capsize=2, label=f"{self.models[model]}, {readout}" if by_model else readout,
            )  # fmt: skip
        if not by_model or model == 0:
            ax.axhline(1 / len(self.meta["classes"]), color="0.6", linewidth=0.8, label="chance")
        ax.set(xlabel="depth (share of blocks)", ylim=(0, 1.02))
        if by_model:
            ax.set_ylabel("accuracy on test images")
            ax.legend()
        else:
            ax.set_title(self.models[model])

    def _grid(self, layer: int) -> np.ndarray:
        grid = self.place_accuracy[layer]
        there = np.isfinite(grid)
        return grid[np.ix_(there.any(1), there.any(0))]

    def _caption(self) -> str:
        meta = self.meta
        text = drawing.provenance_line(meta)
        text += (
            f" Ridge on {meta['shots']} images a class, {len(meta['classes'])} classes, mean of "
            f"{meta['draws']} draws ({meta['split']}); tested on these n. Bars: standard error "
            f"over draws and test images."
        )
        return text

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claims of Figures 11 and 13 on the trained models at hand."""
        kinds = self.meta["kinds"]
        found = []
        for a, kind in enumerate(kinds):
            if kind == CLASS_TOKEN:
                found += [self._tokens_apart(a, b)
                          for b, other in enumerate(kinds) if other == MEAN_OF_TOKENS]  # fmt: skip
                if (self.model_of_layer == a).sum() > 2:
                    found.append(self._late(a))
            if kind in OWN_READOUT:
                found.append(self._own_is_best(a, OWN_READOUT[kind]))
        return found

    def _difference(self, *terms: tuple[int, str, float]) -> tuple[float, float]:
        """A weighted sum of accuracies (layer, readout, weight) and its standard error.

        The draws are paired. That the test images are, too, is left out of account: wider errors.
        """
        places = [(layer, self.readouts.tolist().index(name)) for layer, name, _ in terms]
        weights = [weight for *_, weight in terms]
        draws = np.sum([w * self.accuracy_of_draw[:, i, r]
                        for w, (i, r) in zip(weights, places)], axis=0)  # fmt: skip
        p = [self.accuracy[place] for place in places]
        tests = sum(w * w * v * (1 - v) for w, v in zip(weights, p)) / self.meta["n"]
        return float(draws.mean()), float(np.sqrt(_variance_of_mean(draws) + tests))

    def _last(self, model: int) -> int:
        return int(self.rows_of(model)[-1])

    def _at(self, layer: int, readout: str) -> str:
        r = self.readouts.tolist().index(readout)
        return f"{readout} {plus_minus(self.accuracy[layer, r], self.accuracy_se[layer, r])}"

    def _tokens_apart(self, by_class: int, by_mean: int) -> Finding:
        i, j = self._last(by_class), self._last(by_mean)
        gap = self._difference((j, "tokens", 1), (i, "tokens", -1))
        return Finding(
            f"spatial tokens of the last block probe far better in {self.models[by_mean]} than in "
            f"{self.models[by_class]}",
            "Raghu et al. 2021, Fig. 11",
            decide(*gap, FAR),
            f"{self.models[by_mean]} {self._at(j, 'tokens')}, {self.models[by_class]} "
            f"{self._at(i, 'tokens')}, difference {plus_minus(*gap)} (more than {FAR} asked)",
        )

    def _own_is_best(self, model: int, own: str) -> Finding:
        last = self._last(model)
        others = [name for name in ("tokens", "CLS", "first patch", "mean") if name != own]
        # ``all`` is no aggregation: it holds every other readout.
        others = [n for n in others
                  if np.isfinite(self.accuracy[last, self.readouts.tolist().index(n)])]  # fmt: skip
        gaps = [self._difference((last, own, 1), (last, name, -1)) for name in others]
        return Finding(
            f"the readout that {self.models[model]} was trained with ({own}) is its best at the "
            f"last block",
            "Raghu et al. 2021, Fig. 11",
            combine([decide(*gap) for gap in gaps]),
            ", ".join(self._at(last, name) for name in (own, *others)),
        )

    def _late(self, model: int) -> Finding:
        rows = self.rows_of(model)
        first, middle, last = int(rows[0]), int(rows[(len(rows) - 1) // 2]), int(rows[-1])
        gap = self._difference((last, "CLS", 1), (middle, "CLS", -2), (first, "CLS", 1))
        return Finding(
            f"the class token of {self.models[model]} becomes useful late: it gains more accuracy "
            f"in the second half of depth than in the first",
            "Raghu et al. 2021, Fig. 11",
            decide(*gap),
            ", ".join(f"{self.layers[i]} {self._at(i, 'CLS')}" for i in (first, middle, last))
            + f"; late gain minus early {plus_minus(*gap)}",
        )


GROUP = "tokens"
RESULT = LinearProbeResult


def _variance_of_mean(draws: np.ndarray) -> np.ndarray:
    """Over the first axis; NaN for one draw."""
    count = len(draws)
    if count < 2:
        return np.full(draws.shape[1:], np.nan)
    return draws.var(0, ddof=1) / count


@dataclass(frozen=True)
class LinearProbe(Measurement):
    """Options of ``measure``; ``task`` is drawn from the images."""

    test_images: Any = option(
        None, "labelled, of the same classes; a seeded part of --images if left out", metavar="PATH"
    )
    shots: int = option(10, "fitting images per class (%(default)s)", type=int, metavar="N")
    draws: int = option(
        3, "times that fitting images are drawn (%(default)s)", type=int, metavar="N"
    )
    layers: str | Sequence[str] = option(
        "blocks", "blocks (default), last, or names with wildcards", nargs="+", metavar="L"
    )
    task: Task | None = None

    analysis: ClassVar[str] = "linear_probe"

    def on(
        self, models: list[Model], images: Any, options: Options, shared: bool
    ) -> tuple[Measurement, Any, Options]:
        drawn = images, self.test_images, self.shots, self.draws
        num_test = options.num_images
        if shared and images is None:
            # The scenes that others look at.
            num_test = num_test or DEFAULT_SCENES
        elif shared and num_test is not None:
            # As many as the images leave when probes have been fitted.
            num_test = min(num_test, len(open_task(*drawn, None, options.seed).test))
        task = open_task(*drawn, num_test, options.seed)
        return replace(self, task=task), task.test, replace(options, num_images=None)

    def prepare(self, ready: Session) -> Watch:
        assert self.task is not None
        return _Watch(ready, self, self.task)


MEASUREMENT = LinearProbe


class _Watch(Watch):
    """How many test images each probe tells right; the probes are fitted in passes of their own."""

    def __init__(self, ready: Session, asked: LinearProbe, task: Task) -> None:
        with ready.autocast():
            self.placed, self.kinds = placed_layers(ready.models, ready.example(), asked.layers)
        self.asked, self.task = asked, task
        fitted = [fit_draw(ready.on(draw), self.placed, len(task.classes)) for draw in task.draws]
        self.probes = [side_by_side(list(layer)) for layer in zip(*fitted)]
        self.grids = grids_of(self.placed)
        self.labels = torch.from_numpy(ready.images.chosen_labels())
        shapes = {f"right{i}": probe.penalty.shape for i, probe in enumerate(self.probes)}
        decides = {
            "layers": [one.layer.label for one in self.placed],
            "fitted on": [draw.digest for draw in task.draws],
            "classes": task.classes,
            "labels": task.labels_sha256(),
        }
        super().__init__(ready, ready.sums(tested=(), **shapes), decides)

    def watching(self, m: int, batch: Batch) -> Any:
        truth = self.labels[batch.positions]

        def take(i: int, tensor: Tensor) -> None:
            found = vectors(tensor, self.placed[i].places, self.grids[i])
            right = self.probes[i].correct(found, truth)
            self.sums[f"right{i}"] += right.to(self.sums["tested"])

        return captured(self.ready, m, self.placed, range(len(self.placed)), take)

    def end(self, batch: Batch) -> None:
        self.sums["tested"] += len(batch)

    def result(self, meta: dict[str, Any]) -> LinearProbeResult:
        counts = count_right(self.placed, self.grids, self.probes, self.sums)
        meta |= {
            "shots": self.asked.shots,
            "draws": self.asked.draws,
            "classes": list(self.task.classes),
            "split": self.task.split,
            "kinds": self.kinds,
            "fitted_on": [draw.digest for draw in self.task.draws],
        }
        return _result(meta, counts, self.placed)


def measure(
    models: Any,
    images: Any = None,
    *,
    test_images: Any = None,
    shots: int = 10,
    draws: int = 3,
    layers: str | Sequence[str] = "blocks",
    **options: Any,
) -> LinearProbeResult:
    """Few-shot linear probes at every block.

    Args:
        models: specs, modules or ``Model``; one or a list.
        images: labelled, to fit on: a folder or tar of class folders, an ``.npz`` with ``labels``,
            ``Images``. The bundled digit scenes by default, split ``fit``.
        test_images: labelled, of the same classes. Without them a seeded part of ``images`` is
            kept for testing.
        shots: fitting images a class and draw.
        draws: seeded draws, disjoint where there are enough images.
        layers: ``blocks``, ``last``, or names with wildcards.
        options: fields of ``running.session.Options``; ``num_images`` counts the test images.

    Raises:
        VitprobeError: unknown models, images or layers; images without labels, too few of a class;
            activations that are not finite.
    """
    asked = LinearProbe(test_images, shots, draws, layers)
    return measure_one(asked, models, images, Options(**options))


def _result(meta: dict[str, Any], counts: TestCounts, placed: list[Placed]) -> LinearProbeResult:
    accuracy = counts.accuracy.mean(0)
    tests = accuracy * (1 - accuracy) / meta["n"]
    return LinearProbeResult(
        meta,
        accuracy=accuracy,
        accuracy_se=np.sqrt(_variance_of_mean(counts.accuracy) + tests),
        layers=np.array([one.layer.label for one in placed]),
        readouts=np.array(READOUTS),
        model_of_layer=np.array([one.model for one in placed]),
        depth=np.array([one.depth for one in placed]),
        accuracy_of_draw=counts.accuracy,
        place_accuracy=counts.places,
        penalty=counts.penalty,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.linear_probe``."""
    return cli.command(LinearProbe, measure, __doc__, argv, DEFAULT_MODELS)


if __name__ == "__main__":
    sys.exit(main())
