"""At which depth the class can be read: few-shot probes at every block.

Raghu et al. 2021 (arXiv 2108.08810), Figures 11 and 13 and Appendix D.4.

The quantity: accuracy (0 to 1) on test images of ridge regression onto ±1 class targets, fitted on
a few images per class. Readouts: ``tokens``, one probe for each patch token, their accuracies
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
from vitprobe.papers.raghu2021 import tokens
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.features import open_features
from vitprobe.running.grids import Placed, placed_layers
from vitprobe.running.measurement import Measurement, Watch
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
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
from vitprobe.running.stored import measure_features
from vitprobe.statistics.moments import variance_of_mean
from vitprobe.tracing.layers import Choice

DEFAULT_MODELS = ("vit_small_box", "vit_gap_box", "resnet_box")
# Colours of the token grid span at least this much accuracy.
MIN_RANGE = 0.1


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
        "The accuracy of linear classifiers on a few images per class, at every block and for each "
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
        """Accuracy against depth, a line per readout, a panel per model; below, the token grid.

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
            grids = [self._grid(int(self.rows_of(m)[-1])) for m in range(count)]
            # One scale for all models, of at least some accuracy: chance is not to look like a map.
            low = min(float(grid.min()) for grid in grids)
            high = max(low + MIN_RANGE, *(float(grid.max()) for grid in grids))
            for m, grid in enumerate(grids):
                self._lines(axes[0, m], m, by_model=False)
                axes[0, m].sharey(axes[0, 0])
                last = int(self.rows_of(m)[-1])
                image = drawing.heat_map(axes[1, m], grid, vmin=low, vmax=high)
                axes[1, m].invert_yaxis()  # an image's first row is at its top
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
            f" Ridge on {meta['shots']} images per class, {len(meta['classes'])} classes, mean of "
            f"{meta['draws']} draws ({meta['split']}); tested on these n. Bars: standard error "
            f"over draws and test images."
        )
        return text

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claims of Figures 11 and 13 on the trained models at hand."""
        return tokens.linear_probe(self)


GROUP = "tokens"
RESULT = LinearProbeResult


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
    layers: Choice = option(
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
        self.placed, self.kinds = placed_layers(ready, asked.layers)
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
    layers: Choice = "blocks",
    **options: Any,
) -> LinearProbeResult:
    """Few-shot linear probes at every block.

    Args:
        models: specs, modules or ``Model``; one or a list.
        images: labelled, to fit on: a folder or tar of class folders, an ``.npz`` with ``labels``,
            ``Images``. The bundled digit scenes by default, split ``fit``.
        test_images: labelled, of the same classes. Without them a seeded part of ``images`` is
            kept for testing.
        shots: fitting images per class and draw.
        draws: seeded draws, disjoint where there are enough images.
        layers: ``blocks``, ``last``, or names with wildcards.
        options: fields of ``running.session.Options``; ``num_images`` counts the test images.

    Raises:
        VitprobeError: unknown models, images or layers; images without labels, too few of a class;
            activations that are not finite.
    """
    asked = LinearProbe(test_images, shots, draws, layers)
    return measure_one(asked, models, images, Options(**options))


def from_features(
    features: Any,
    *,
    labels: Any = None,
    shots: int = 10,
    draws: int = 3,
    layers: Choice = "blocks",
    **options: Any,
) -> LinearProbeResult:
    """The same of features that were computed before, by vitprobe or by others.

    Args:
        features: model -> layer -> array (n, features), or paths; see ``running.features``. What
            ``vitprobe extract`` wrote whole has a probe for every token; of one vector an image
            there is that alone.
        labels: (n,) classes of the images, where the features have none with them.
        shots: as in ``measure``, as are ``draws`` and ``layers``; what the draws leave is tested.
        options: fields of ``running.Options`` (``batch_size``, ``names``, ``seed`` ...).

    Raises:
        VitprobeError: features of other images, in another order or number; no labels; not finite.
    """
    asked = LinearProbe(None, shots, draws, layers)
    sources = open_features(features)
    found = measure_features(asked, sources, Options(**options), labels=labels, vectors=True)
    # What a model's own output reads can't be told from a part of a layer.
    whole = [source.readout == "all" for source in sources]
    found.meta["kinds"] = [kind * known for kind, known in zip(found.meta["kinds"], whole)]
    for row, model in enumerate(found.model_of_layer):
        only = {"mean": "mean", "class": "CLS", "": "mean"}.get(sources[model].readout)
        if only:
            # All readouts of one vector are that vector.
            others = [i for i, name in enumerate(READOUTS) if name != only]
            found.accuracy[row, others] = found.accuracy_se[row, others] = np.nan
            found.accuracy_of_draw[:, row, others] = np.nan
    return found


def _result(meta: dict[str, Any], counts: TestCounts, placed: list[Placed]) -> LinearProbeResult:
    accuracy = counts.accuracy.mean(0)
    tests = accuracy * (1 - accuracy) / meta["n"]
    return LinearProbeResult(
        meta,
        accuracy=accuracy,
        accuracy_se=np.sqrt(variance_of_mean(counts.accuracy) + tests),
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
    return cli.command(LinearProbe, measure, __doc__, argv, DEFAULT_MODELS, from_features)


if __name__ == "__main__":
    sys.exit(main())
