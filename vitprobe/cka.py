"""Linear CKA between all layers of any number of models, as heat maps.

Raghu et al. 2021 (arXiv 2108.08810), Figures 1, 2, 8, 12; the estimator is Nguyen et al. 2021's
(arXiv 2010.15327): unbiased HSIC, summed over minibatches, one ratio at the end.

The quantity: cka[i, j] in [-1, 1], how alike layers i and j arrange the images; 0 is expected of
independent representations (small negative values are right), 1 means equal up to rotation and
scale. A representation is everything of an image at a layer: all tokens, CLS included, or all
H·W·C values of a map. Layers that do not vary are undefined (NaN, hatched). ``--pairwise A B A2 B2
...`` draws networks of one depth against each other, layer by layer: the diagonals as lines.

Choices made: even batches without replacement in a seeded random order, one pass; standard errors
by the jackknife over batches (in at most 32 groups of batches); a last batch under 4 images, too
small for the estimator, is left out where even ones would be under 4, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.errors import VitprobeError
from vitprobe.papers import same_depth, vit_and_cnn
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result
from vitprobe.running.session import Batch, Options, Session, session
from vitprobe.statistics.hsic import MAX_GROUPS, MIN_BATCH, gram, hsic, jackknife, normalise
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Layer, map_layers

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
    """

    cka: np.ndarray
    cka_se: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "cka"
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "cka": ("layer", "layer_2"),
        "cka_se": ("layer", "layer_2"),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }

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

        Measured in pairs: CKA at the same depth, a line a pair.
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
                image = self._panel(ax, None, None)
                ax.figure.colorbar(image, ax=ax, label="CKA")
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
            figure.colorbar(image, ax=axes, label="CKA", aspect=30, pad=0.01)
            drawing.caption(figure, self._caption())
            return figure

    def _panel(self, ax: Any, a: int | None, b: int | None) -> Any:
        everything = np.arange(len(self.layers))
        rows = everything if a is None else self.rows_of(a)
        columns = everything if b is None else self.rows_of(b)
        # One scale for all panels: 0 to 1, lower only where an unbiased value is negative.
        low = min(0.0, float(np.nanmin(self.cka))) if np.isfinite(self.cka).any() else 0.0
        image = drawing.heat_map(ax, self.cka[np.ix_(rows, columns)], vmin=low, vmax=1)
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
        if np.isnan(self.cka).any():
            text += " Hatched: undefined, the layer does not vary."
        return text

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claims of Figures 1, 2 and 12 that apply.

        Figures 1 and 2 for every pair of a ViT and a CNN, Figure 12 for those given in pairs.
        """
        if "same_depth" in self.meta:
            return same_depth.findings(self)
        return vit_and_cnn.findings(self.meta["pairs"], self.meta.get("replicates"))


RESULT = CKAResult


def measure(
    models: Any,
    images: Any = None,
    *,
    layers: str | Sequence[str] = "blocks",
    pairwise: bool = False,
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
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: unknown models, images or layers; fewer than 4 images; activations that are
            not finite.
    """
    pairs: list[list[int]] = []
    if pairwise:
        models, pairs = same_depth.in_pairs(models)
    with session(models, images, Options(**options), at_least=MIN_BATCH) as ready:
        if ready.options.batch_size < MIN_BATCH:
            raise VitprobeError(
                f"CKA needs batches of at least {MIN_BATCH} images, not --batch-size "
                f"{ready.options.batch_size}."
            )
        chosen, has_attention = _choose(ready, layers)
        labels = [layer.label for one in chosen for layer in one]
        owner = np.repeat(np.arange(len(chosen)), [len(one) for one in chosen])
        same_depth.check_lengths(pairs, [model.name for model in ready.models], owner)
        groups = min(MAX_GROUPS, len(ready.batches))
        size = len(labels)
        sums = ready.sums(hsic=(groups, size, size), used=(groups,), left_out=())

        def step(batch: Batch) -> None:
            if len(batch) < MIN_BATCH:
                sums["left_out"] += len(batch)
                return
            grams = _grams(ready, batch, chosen)
            bad = (~torch.isfinite(grams).all((1, 2))).nonzero()
            if len(bad):
                first = int(bad[0])
                raise VitprobeError(
                    f"The layer {labels[first]} of {ready.models[owner[first]].name} is not "
                    f"finite; it is the first such layer."
                )
            sums["hsic"][batch.index % groups] += hsic(grams)
            sums["used"][batch.index % groups] += 1

        # Grams of a batch and what U-centring makes of them, in float64.
        scratch = 5 * 8 * size * min(ready.options.batch_size, len(ready.images)) ** 2
        ready.run(step, sums, decides={"analysis": "cka", "layers": labels}, scratch=scratch)
        if not sums["used"].sum():
            raise VitprobeError(f"No batch of at least {MIN_BATCH} readable images was left.")
        value, error = jackknife(normalise, sums["hsic"], sums["used"])
        stages = [[vit_and_cnn.stage(layer) for layer in one] for one in chosen]
        meta = ready.meta("cka")
        meta["replicates"] = int((sums["used"] > 0).sum())
        meta["left_out"] = int(sums["left_out"])
        meta["n"] -= meta["left_out"]
        meta["pairs"] = vit_and_cnn.statistics(
            [model.name for model in ready.models], owner, has_attention, stages, sums
        )
        if pairs:
            meta["same_depth"] = same_depth.summaries(pairs, owner, sums["hsic"], sums["used"])
    return CKAResult(meta, value, error, np.array(labels), owner)


def _choose(ready: Session, layers: str | Sequence[str]) -> tuple[list[list[Layer]], list[bool]]:
    chosen, has_attention = [], []
    for model, example in zip(ready.models, ready.example()):
        with ready.autocast():
            found = map_layers(model.name, model.module, example)
        chosen.append(found.choose(layers))
        has_attention.append(found.has_attention)
    return chosen, has_attention


def _grams(ready: Session, batch: Batch, chosen: list[list[Layer]]) -> Tensor:
    """(L, n, n) of all layers of all models; one forward pass each."""
    n = len(batch)
    device = "cpu" if ready.device.type == "mps" else ready.device
    total = sum(len(one) for one in chosen)
    grams = torch.empty(total, n, n, dtype=torch.float64, device=device)
    start = 0
    for model, one, inputs in zip(ready.models, chosen, batch.inputs):

        def reduce(i: int, tensor: Tensor, start: int = start) -> None:
            grams[start + i] = gram(tensor)

        with capture(model.module, one, reduce), ready.autocast():
            model.module(inputs)
        start += len(one)
    return grams


class _Pairs(argparse.Action):
    """Models are models, however they were given."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        namespace.pairwise = namespace.models = values


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.cka``."""
    parser = cli.parser("cka", __doc__)
    parser.add_argument(
        "--pairwise", nargs="+", metavar="M", action=_Pairs,
        help="in place of --models: models in pairs, A B A2 B2 ..., to be compared at the same "
        "depth; from little to much training data",
    )  # fmt: skip

    def from_arguments(args: argparse.Namespace) -> CKAResult:
        given = args.models
        args.models = list(dict.fromkeys(given))  # the file's name has each model once
        return measure(
            given,
            args.images,
            layers=args.layers,
            pairwise=args.pairwise is not None,
            **cli.options(args, "cka"),
        )

    return cli.run(parser, argv, "cka", from_arguments)


if __name__ == "__main__":
    sys.exit(main())
