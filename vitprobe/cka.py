"""CKA between all layers of any number of models, as heat maps.

Raghu et al. 2021 (arXiv 2108.08810), Figures 1, 2, 8, 12; the estimator is Nguyen et al. 2021's
(arXiv 2010.15327): unbiased HSIC, summed over minibatches, one ratio at the end.

The quantity: cka[i, j] in [-1, 1], how alike layers i and j arrange the images; 0 is expected of
independent representations (small negative values are right), 1 means equal up to rotation and
scale. A representation is everything of an image at a layer: all tokens, CLS included, or all
H·W·C values of a map. Layers that do not vary are undefined (NaN, hatched). ``--pairwise A B A2 B2
...`` draws networks of one depth against each other, layer by layer: the diagonals as lines.

``--null P`` tells what unrelated networks would give (Gröger et al. 2026, arXiv 2602.14486): the
images of one of two networks are permuted within each batch, P times, alike for all its layers.
Cells that are not above 95 % of that are outlined.

Choices made: even batches without replacement in a seeded random order, one pass; standard errors
by the jackknife over batches (in at most 32 groups of batches); a last batch under 4 images, too
small for the estimator, is left out where even ones would be under 4, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.errors import VitprobeError
from vitprobe.papers import groeger2026
from vitprobe.papers.raghu2021 import alike, same_depth
from vitprobe.results import chance, drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.features import open_features
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.running.stored import measure_features
from vitprobe.statistics.hsic import MAX_GROUPS, MIN_BATCH, hsic, jackknife, normalise
from vitprobe.statistics.permuted_hsic import affordable, normalise_by, permuted_hsic
from vitprobe.tracing.layers import Choice

# Letters of a title that fit over a panel.
LONG_TITLE = 38


@dataclass(frozen=True)
class CKAResult(Result):
    """CKA between all layers.

    Attributes:
        cka: (L, L) over the layers of all models in order; NaN where undefined.
        cka_se: (L, L) jackknife standard error; NaN with fewer than two batches.
        layers: (L,) names.
        model_of_layer: (L,) index into ``meta["models"]``.
        null_q95: (L, L) 95 % quantile with the images of one of the networks permuted, or NaN.
        null_max_q95: (models, models) the same of the largest over all pairs of their layers.
    """

    cka: np.ndarray
    cka_se: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray
    # Files of earlier versions have none.
    null_q95: np.ndarray = field(default=None)  # type: ignore[arg-type]
    null_max_q95: np.ndarray = field(default=None)  # type: ignore[arg-type]

    analysis: ClassVar[str] = "cka"
    text: ClassVar[Text] = Text(
        "CKA between all layers",
        "How alike any two layers arrange the images (linear CKA, unbiased, summed over "
        "minibatches); Raghu et al., Figures 1 and 2.",
        "Both axes go from input (lower left) to output. 1: equal up to rotation and scale; 0 is "
        "expected of independent representations. A light square along the diagonal is a stage of "
        "layers that do much the same; a map that is light all over has no stages. Hatched: "
        "undefined, the layer does not vary over the images.",
        "CKA",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(("cka", "cka_se", "null_q95"), ("layer", "layer_2")),
        **dict.fromkeys(("layers", "model_of_layer"), ("layer",)),
        "null_max_q95": ("model", "model_2"),
    }

    def __post_init__(self) -> None:
        if self.null_q95 is None:
            each, largest = chance.quantiles(np.empty(0), self.model_of_layer)
            object.__setattr__(self, "null_q95", each)
            object.__setattr__(self, "null_max_q95", largest)

    def of(self, a: int | str, b: int | str | None = None) -> np.ndarray:
        """The block of ``cka`` of two models (rows of ``a``, columns of ``b``), or of one."""
        return self.cka[np.ix_(self.rows_of(a), self.rows_of(a if b is None else b))]

    def diagonal(self, a: int | str, b: int | str) -> tuple[np.ndarray, np.ndarray]:
        """CKA of two models of one depth at each layer, and its standard error."""
        rows, columns = self.rows_of(a), self.rows_of(b)
        same_depth.check_lengths(
            [[int(self.model_of_layer[rows[0]]), int(self.model_of_layer[columns[0]])]],
            self.models,
            self.model_of_layer,
        )
        return self.cka[rows, columns], self.cka_se[rows, columns]

    def plot(self, ax: Any = None) -> Any:
        """Heat maps from input to output on both axes; on ``ax``, one square of all models.

        Measured in pairs: CKA at the same depth, a line per pair.
        """
        with drawing.style():
            if "same_depth" in self.meta:
                if ax is not None:
                    return same_depth.draw(ax, self)
                figure = drawing.new_figure(6.5, 4.2)
                same_depth.draw(figure.subplots(), self)
                drawing.caption(figure, self._caption())
                return figure
            if ax is not None:
                self._bar(ax.figure, self._panel(ax, None, None), ax)
                return ax
            count = len(self.models)
            pairs = {1: [[(0, 0)]], 2: [[(0, 0), (1, 1), (0, 1)]]}.get(
                count, [[(a, b) for b in range(count)] for a in reversed(range(count))]
            )
            rows, columns = len(pairs), len(pairs[0])
            side = 3.4 if count <= 2 else max(2.4, 10 / count)
            figure = drawing.new_figure(side * columns + 0.7, side * rows + 0.6)
            axes = figure.subplots(rows, columns, squeeze=False)
            for line, row in zip(axes, pairs):
                for one, (a, b) in zip(line, row):
                    image = self._panel(one, a, b)
            self._bar(figure, image, axes, aspect=30, pad=0.01)
            drawing.caption(figure, self._caption())
            return figure

    def _bar(self, figure: Any, image: Any, axes: Any, **options: Any) -> None:
        calibrated = ", calibrated" if self.meta.get("calibrated") else ""
        bar = figure.colorbar(image, ax=axes, label=f"CKA{calibrated}", **options)
        if not calibrated:
            chance.mark(bar, chance.to_beat(self.null_max_q95))

    def _panel(self, ax: Any, a: int | None, b: int | None) -> Any:
        everything = np.arange(len(self.layers))
        rows = everything if a is None else self.rows_of(a)
        columns = everything if b is None else self.rows_of(b)
        # One scale for all panels: 0 to 1, lower only where an unbiased value is negative.
        low = min(0.0, float(np.nanmin(self.cka))) if np.isfinite(self.cka).any() else 0.0
        shown, block = self.cka, np.ix_(rows, columns)
        if self.meta.get("calibrated"):
            shown, low = chance.calibrated(shown, self.null_q95), 0.0
        image = drawing.heat_map(ax, shown[block], vmin=low, vmax=1)
        chance.outline(ax, self.cka[block] <= self.null_q95[block])
        names = self.models
        for axis, chosen, model in ((ax.yaxis, rows, a), (ax.xaxis, columns, b)):
            label = names[model] if model is not None else "all models"
            drawing.layer_axis(axis, [str(name) for name in self.layers[chosen]], label)
        if a is None or b is None:
            for edge in np.flatnonzero(np.diff(self.model_of_layer)) + 0.5:
                ax.axhline(edge, color="white", linewidth=1)
                ax.axvline(edge, color="white", linewidth=1)
        else:
            title = names[a] if a == b else f"{names[a]} × {names[b]}"
            ax.set_title(title if len(title) <= LONG_TITLE else title.replace(" × ", "\n× "))
        return image

    def _caption(self) -> str:
        meta = self.meta
        text = drawing.provenance_line(meta)
        text += f" Unbiased minibatch CKA, batches of {meta['batch_size']}, {meta['precision']}."
        if meta["left_out"]:
            text += f" {meta['left_out']} images in batches under {MIN_BATCH} left out."
        text += chance.caption(meta, self.null_max_q95)
        if np.isnan(self.cka).any():
            text += " Hatched: undefined, the layer does not vary."
        return text

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claims of Figures 1, 2 and 12 that apply, and what beats chance.

        Figures 1 and 2 for every pair of a ViT and a CNN, Figure 12 for those given in pairs.
        """
        if "same_depth" in self.meta:
            return same_depth.findings(self)
        found = alike.findings(self.meta["pairs"], self.meta.get("replicates"))
        return found + groeger2026.findings(self)


GROUP = "compare"
RESULT = CKAResult


@dataclass(frozen=True)
class CKA(Measurement):
    """Options of ``measure``; ``pairs`` are numbers of models that are compared at equal depth."""

    layers: Choice = "blocks"
    pairs: tuple[tuple[int, int], ...] = ()
    null: int = 0
    calibrated: bool = False

    analysis: ClassVar[str] = "cka"
    at_least: ClassVar[int] = MIN_BATCH

    def __post_init__(self) -> None:
        if self.null < 0:
            raise VitprobeError(f"--null must be at least 0, not {self.null}.")
        if self.calibrated and not self.null:
            raise VitprobeError("--calibrated needs a chance level: --null above 0.")

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self)


class _Watch(Watch):
    """Grams of all chosen layers of a batch, and HSIC₁ of all their pairs."""

    def __init__(self, ready: Session, asked: CKA) -> None:
        self.maps = [ready.layers(m) for m in range(len(ready.models))]
        self.chosen = [found.choose(asked.layers) for found in self.maps]
        self.labels = [layer.label for one in self.chosen for layer in one]
        counts = [len(one) for one in self.chosen]
        self.owner = np.repeat(np.arange(len(counts)), counts)
        self.starts = np.cumsum([0, *counts]).tolist()
        self.pairs = [list(pair) for pair in asked.pairs]
        same_depth.check_lengths(self.pairs, [model.name for model in ready.models], self.owner)
        size, groups = len(self.labels), min(MAX_GROUPS, len(ready.batches))
        n = min(ready.options.batch_size, len(ready.images))
        self.asked, self.null = asked, affordable(asked.null, size, n) if asked.null else 0
        super().__init__(
            ready,
            ready.sums(hsic=(groups, size, size), null=(self.null, size, size)),
            {"layers": self.labels, "null": self.null},
            # Grams of a batch and what U-centring makes of them, in float64.
            scratch=5 * 8 * size * n**2,
        )
        self._grams: list[Tensor] = []

    def watching(self, m: int, batch: Batch) -> Any:
        model, layers, start = self.ready.models[m], self.chosen[m], self.starts[m]
        if m == 0:
            self._grams = [torch.empty(0)] * len(self.labels)

        def reduce(i: int, tensor: Tensor) -> None:
            self._grams[start + i] = batch.gram(model, layers[i], tensor)

        return self.ready.capture(m, layers, reduce)

    def end(self, batch: Batch) -> None:
        grams = torch.stack(self._grams)
        for i in (~torch.isfinite(grams).all((1, 2))).nonzero()[:1].flatten().tolist():
            check_finite(False, self.labels[i], self.ready.models[self.owner[i]])
        self.sums["hsic"][self.group(batch)] += hsic(grams)
        if self.null:
            key = [self.ready.options.seed, batch.index]
            self.sums["null"] += permuted_hsic(grams, self.null, key)

    def result(self, meta: dict[str, Any]) -> CKAResult:
        sums = {**self.sums, "used": self.used}
        value, error = jackknife(normalise, sums["hsic"], sums["used"])
        names = [model.name for model in self.ready.models]
        attend = [found.has_attention for found in self.maps]
        stages = [[alike.stage(layer) for layer in one] for one in self.chosen]
        # Whether features of others are of a model that attends is not known.
        known = None not in attend
        meta["pairs"] = alike.statistics(names, self.owner, attend, stages, sums) if known else []
        if self.pairs:
            meta["same_depth"] = same_depth.summaries(
                self.pairs, self.owner, sums["hsic"], sums["used"]
            )
        meta["null"], meta["null_asked"] = self.null, self.asked.null
        meta["calibrated"] = self.asked.calibrated
        draws = normalise_by(sums["null"], sums["hsic"].sum(0)).cpu().numpy()
        null = chance.quantiles(draws, self.owner)
        return CKAResult(meta, value, error, np.array(self.labels), self.owner, *null)


MEASUREMENT = CKA


def measure(
    models: Any,
    images: Any = None,
    *,
    layers: Choice = "blocks",
    pairwise: bool = False,
    null: int = 0,
    calibrated: bool = False,
    **options: Any,
) -> CKAResult:
    """CKA between all layers of one model or several.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        images: see ``open_images``; the bundled digit scenes by default.
        layers: ``blocks`` (the residual stream after each block), ``paper``, ``all``, or names
            with wildcards.
        pairwise: the models come as A B A2 B2 ..., each pair of one depth; a model can be in
            several. The figure and findings are about the pairs.
        null: permutations of the images of one of two networks, for the chance level (200 are
            enough); fewer where they would cost much, as the caption says.
        calibrated: draw (s − τ) / (1 − τ), τ the chance level's 95 % quantile.
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: unknown models, images or layers; fewer than 4 images; activations that are
            not finite.
    """
    pairs: list[list[int]] = []
    if pairwise:
        models, pairs = same_depth.in_pairs(models)
    asked = CKA(layers, tuple((a, b) for a, b in pairs), null, calibrated)
    return measure_one(asked, models, images, Options(**options))


def from_features(
    features: Any,
    *,
    layers: Choice = "blocks",
    pairwise: bool = False,
    null: int = 0,
    calibrated: bool = False,
    seed: int | None = 0,
    **options: Any,
) -> CKAResult:
    """CKA between layers whose features were computed before, by vitprobe or by others.

    Args:
        features: model -> layer -> array (n, ...), or paths; see ``running.features``.
        layers: names with wildcards; all by default.
        pairwise: as in ``measure``, as are ``null`` and ``calibrated``.
        seed: of the order of the images, where they do not come from ``vitprobe extract``, whose
            order is seeded; None takes them as they come.
        options: fields of ``running.Options`` (``batch_size``, ``names``, ``num_images`` ...).

    Raises:
        VitprobeError: features of other images, in another order or number; not finite.
    """
    sources = open_features(features)
    pairs = same_depth.in_pairs([source.name for source in sources])[1] if pairwise else []
    asked = CKA(layers, tuple((a, b) for a, b in pairs), null, calibrated)
    chosen = Options(seed=seed or 0, **options)
    return measure_features(asked, sources, chosen, in_order=seed is None)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.cka``."""
    parser = cli.parser("cka", __doc__)
    parser.add_argument(
        "--pairwise", nargs="+", metavar="M", action=cli.Instead,
        help="in place of --models: models in pairs, A B A2 B2 ..., to be compared at the same "
        "depth; from little to much training data",
    )  # fmt: skip
    parser.add_argument(
        "--null", type=int, default=0, metavar="P",
        help="permutations for the chance level, 200 are enough (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--calibrated", action="store_true", help="draw (s - t) / (1 - t), t the chance level"
    )
    cli.add_features(parser)

    def from_arguments(args: argparse.Namespace) -> CKAResult:
        given = args.models
        args.models = list(dict.fromkeys(given))  # the file's name has each model once
        own = {"layers": args.layers, "null": args.null, "calibrated": args.calibrated}
        if args.features:
            return from_features(args.features, **own, **cli.features_options(args, "cka"))
        pairwise = args.pairwise is not None
        return measure(given, args.images, pairwise=pairwise, **own, **cli.options(args, "cka"))

    return cli.run(parser, argv, "cka", from_arguments)


if __name__ == "__main__":
    sys.exit(main())
