"""Which images are neighbours in each layer: shared by two networks, and of one class.

Huh et al. 2024 (arXiv 2405.07987), mutual k-nearest-neighbour alignment; Caron et al. 2021
(arXiv 2104.14294) and Oquab et al. 2023 (arXiv 2304.07193), the k-NN classifier.

The quantities: alignment of two layers, the mean over images of the share of common images among
the k nearest in each (0 to 1, chance k / (n − 1)); and with labels the accuracy of the class for
which the 20 nearest others vote, weighted e^(cosine / 0.07).

Choices made: neighbours by cosine of the mean over patches or locations (``--readout class``: of
the class token, in layers that have one), among all n images, which takes n rows of features a
layer in memory. Standard errors over images. What unrelated networks would share is told by
permuting the images of one of them ``--null`` times (Gröger et al. 2026, arXiv 2602.14486): cells
that are not above 95 % of that are outlined.
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
from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.papers import huh2024
from vitprobe.results import chance, drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.features import open_features
from vitprobe.running.grids import on_grids
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.running.stored import measure_features
from vitprobe.statistics.neighbours import nearest, overlap, permuted_overlap, votes
from vitprobe.tracing.layers import Choice

MEAN, CLASS = "mean", "class"
CLASS_TOKEN, MEAN_OF_PLACES, AS_GIVEN = "class token", "mean of places", "as given"
K, VOTERS, PERMUTATIONS = 10, 20, 200


@dataclass(frozen=True)
class NeighboursResult(Result):
    """Shared neighbours of all pairs of layers, and k-NN accuracy.

    Attributes:
        alignment: (L, L) mean share of common images among the k nearest, over the layers of all
            models in order; NaN where a layer does not vary over the images.
        alignment_se: (L, L) standard error over images.
        chance: () k / (n − 1).
        null_q95: (L, L) 95 % quantile with the images of one network permuted; NaN without
            permutations.
        null_max_q95: (models, models) the same of the largest over all pairs of their layers.
        accuracy: (L,) leave-one-out k-NN accuracy; NaN where images have no labels.
        accuracy_se: (L,) standard error over images.
        readout: (L,) ``mean of places``, ``class token`` or ``as given``, what the features are.
        layers: (L,) names.
        model_of_layer: (L,) index into ``meta["models"]``.
    """

    alignment: np.ndarray
    alignment_se: np.ndarray
    chance: np.ndarray
    null_q95: np.ndarray
    null_max_q95: np.ndarray
    accuracy: np.ndarray
    accuracy_se: np.ndarray
    readout: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "neighbours"
    text: ClassVar[Text] = Text(
        "Neighbours",
        "How many of an image's nearest neighbours two layers share (mutual k-NN alignment), and "
        "how often neighbours are of its class; Huh et al. 2024, Caron et al. 2021.",
        "1: the same neighbours; chance is marked on the colour bar, and outlined cells are not "
        "above what permuted images give. Compare with untrained twins (NAME@random): on small "
        "images pixels alone make neighbours.",
        "share of common neighbours",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "alignment": ("layer", "layer_2"),
        "alignment_se": ("layer", "layer_2"),
        "chance": (),
        "null_q95": ("layer", "layer_2"),
        "null_max_q95": ("model", "model_2"),
        "accuracy": ("layer",),
        "accuracy_se": ("layer",),
        "readout": ("layer",),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }

    def of(self, a: int | str, b: int | str | None = None) -> np.ndarray:
        """The block of ``alignment`` of two models (rows of ``a``), or of one."""
        return self.alignment[np.ix_(self.rows_of(a), self.rows_of(a if b is None else b))]

    def plot(self, ax: Any = None) -> Any:
        """Alignment of all layers, and accuracy against depth; on ``ax`` the alignment."""
        with drawing.style():
            if ax is not None:
                self._map(ax)
                return ax
            known = np.isfinite(self.accuracy).any()
            figure = drawing.new_figure(10.5 if known else 6.2, 5.6)
            axes = np.atleast_1d(figure.subplots(1, 1 + known, width_ratios=[1.5, 1][: 1 + known]))
            self._map(axes[0])
            if known:
                self._accuracies(axes[1])
            drawing.caption(figure, self._caption())
            return figure

    def _map(self, ax: Any) -> None:
        shown, label = self.alignment, "share of common neighbours"
        there = np.isfinite(self.null_q95) & np.isfinite(shown)
        if self.meta["calibrated"]:
            shown, label = chance.calibrated(shown, self.null_q95), f"{label}, calibrated"
        others = ~np.eye(len(shown), dtype=bool) & np.isfinite(shown)
        # A layer shares all with itself; the others fill the scale.
        high = float(shown[others].max()) if others.any() else 1.0
        image = drawing.heat_map(ax, shown, vmin=0, vmax=max(high, 1e-6))
        bar = ax.figure.colorbar(image, ax=ax, label=label, extend="max")
        if not self.meta["calibrated"]:
            chance.mark(bar, float(self.chance))
        chance.outline(ax, there & (self.alignment <= self.null_q95))
        names = [str(name) for name in self.layers]
        drawing.layer_axis(ax.xaxis, names, "")
        drawing.layer_axis(ax.yaxis, names, "")
        for edge in np.flatnonzero(np.diff(self.model_of_layer)) + 0.5:
            ax.axhline(edge, color="white", linewidth=1.2)
            ax.axvline(edge, color="white", linewidth=1.2)
        middles = [self.rows_of(m).mean() for m in range(len(self.models))]
        above = ax.secondary_xaxis("top")
        above.set_xticks(middles, [drawing.short(name, 24) for name in self.models])
        above.tick_params(length=0, rotation=12)
        above.spines[:].set_visible(False)

    def _accuracies(self, ax: Any) -> None:
        for model, name in enumerate(self.models):
            rows = self.rows_of(model)
            depth = np.arange(len(rows)) / max(1, len(rows) - 1)
            ax.errorbar(depth, self.accuracy[rows], self.accuracy_se[rows], marker="o",
                        markersize=3, capsize=2, label=name)  # fmt: skip
        ax.set(xlabel="depth (share of layers)",
               ylabel=f"leave-one-out k-NN accuracy, k = {self.meta['voters']}")  # fmt: skip
        ax.legend()

    def _caption(self) -> str:
        meta = self.meta
        text = drawing.provenance_line(meta)
        text += f" k = {meta['k']} nearest of n by cosine; chance (line on the colour bar) "
        text += f"{float(self.chance):.4f}."
        kinds = [sorted(set(self.readout[self.rows_of(m)])) for m in range(len(self.models))]
        if all(kind == kinds[0] for kind in kinds):
            text += f" Features: {' or '.join(kinds[0])}."
        else:
            each = (f"{n}: {' or '.join(kind)}" for n, kind in zip(self.models, kinds))
            text += f" Features of {'; '.join(each)}."
        if meta["null"]:
            text += f" Outlined: not above 95 % of {meta['null']} permutations of the images."
        if meta["calibrated"]:
            text += " Shown: (s − τ) / (1 − τ), τ that 95 % quantile; 0 below."
        if not any(one["weights"].startswith("random") for one in meta["models"]):
            text += " Untrained twins (NAME@random), which can score as high, are not among them."
        if np.isnan(self.alignment).any():
            text += " Hatched: undefined, the layer does not vary."
        return text

    def findings(self) -> list[Finding]:
        """Alignment above chance for every pair of trained models, and class tokens' gain."""
        return huh2024.findings(self)


GROUP = "compare"
RESULT = NeighboursResult


@dataclass(frozen=True)
class Neighbours(Measurement):
    """Options of ``measure``."""

    layers: Choice = option(
        "blocks", "blocks (default), paper, all, or names with wildcards", nargs="+", metavar="L"
    )
    k: int = option(K, "how many nearest images are compared", type=int, metavar="K")
    readout: str = option(
        MEAN,
        "mean of all patches or locations (default), or the class token where there is one",
        choices=(MEAN, CLASS),
    )
    null: int = option(
        PERMUTATIONS, "permutations for the chance level; 0: none", type=int, metavar="P"
    )
    calibrated: bool = option(
        False, "draw (s - t) / (1 - t), t the chance level", action="store_true"
    )

    analysis: ClassVar[str] = "neighbours"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise VitprobeError(f"--k must be at least 1, not {self.k}.")
        if self.null < 0:
            raise VitprobeError(f"--null must be at least 0, not {self.null}.")
        if self.readout not in (MEAN, CLASS):
            raise VitprobeError(f"--readout must be {MEAN} or {CLASS}, not {self.readout!r}.")
        if self.calibrated and not self.null:
            raise VitprobeError("--calibrated needs a chance level: --null above 0.")

    def prepare(self, ready: Session) -> Watch:
        if len(ready.images) <= self.k:
            raise NotApplicable(
                f"{len(ready.images)} images of {ready.images.source} are too few for --k {self.k} "
                f"neighbours of each: more than {self.k} are needed."
            )
        return _Watch(ready, self)


MEASUREMENT = Neighbours


class _Watch(Watch):
    """The features of every image in every layer."""

    def __init__(self, ready: Session, asked: Neighbours) -> None:
        self.asked = asked
        self.chosen = on_grids(ready, asked.layers)
        everything = [one for mine in self.chosen for one in mine]
        self.owner = np.repeat(np.arange(len(self.chosen)), [len(mine) for mine in self.chosen])
        self.starts = np.searchsorted(self.owner, np.arange(len(self.chosen))).tolist()
        self.labels = [layer.label for layer, _ in everything]
        self.of_class = [asked.readout == CLASS and places.has_class for _, places in everything]
        if asked.readout == CLASS and not any(self.of_class):
            name = ready.models[0].name
            raise NotApplicable(f"{name} has no class token to read out: try --readout mean.", name)
        decides = {"layers": self.labels, "readout": asked.readout}
        super().__init__(ready, {}, decides)
        widths = [places.features for _, places in everything]
        self.columns = np.cumsum([0, *widths]).tolist()
        # On the host, in the precision of the passes: n rows are many.
        self.sums = {
            "features": torch.zeros(len(ready.images), self.columns[-1]),
            "seen": torch.zeros(len(ready.images), dtype=torch.float64),
        }

    def watching(self, m: int, batch: Batch) -> Any:
        model, start = self.ready.models[m], self.starts[m]
        at = torch.from_numpy(batch.positions)
        if m == 0:
            self.sums["seen"][at] += 1

        def reduce(i: int, tensor: Tensor) -> None:
            places, row = self.chosen[m][i][1], start + i
            if self.of_class[row]:
                found = places.rest(tensor)[:, 0].float()
            else:
                found = places.spatial(tensor).mean(1, dtype=torch.float32)
            check_finite(torch.isfinite(found).all(), self.labels[row], model)
            self.sums["features"][at, self.columns[row] : self.columns[row + 1]] = found.cpu()

        return self.ready.capture(m, [layer for layer, _ in self.chosen[m]], reduce)

    def result(self, meta: dict[str, Any]) -> NeighboursResult:
        seen = self.sums["seen"] > 0
        n, k = int(seen.sum()), self.asked.k
        if n <= k:
            raise VitprobeError(f"{n} readable images are too few for --k {k} neighbours of each.")
        labels = self.ready.images.chosen_labels()
        labels = None if labels is None else np.asarray(labels)[seen.numpy()]
        known = None if labels is None else labels >= 0
        enough = known is not None and known.sum() > 1 and len(set(labels[known])) > 1  # type: ignore[index]
        found, right = [], []
        for start, stop in zip(self.columns, self.columns[1:]):
            features = self.sums["features"][seen, start:stop].to(self.ready.device)
            found.append(nearest(features, k)[0].cpu())
            if enough:
                right.append(_right(features, known, labels))
        neighbours = torch.stack(found)
        alignment, error = overlap(neighbours)
        draws = np.array(
            list(permuted_overlap(neighbours, self.asked.null, self.ready.options.seed)), np.float32
        )
        null, largest = chance.quantiles(draws, self.owner)
        told = np.array(right, np.float64) if right else np.full((len(found), 1), np.nan)
        meta["k"], meta["voters"] = k, min(VOTERS, n - 1)
        meta["null"], meta["calibrated"] = self.asked.null, self.asked.calibrated
        return NeighboursResult(
            meta,
            alignment=alignment,
            alignment_se=error,
            chance=np.array(k / (n - 1)),
            null_q95=null,
            null_max_q95=largest,
            accuracy=told.mean(1),
            accuracy_se=told.std(1) / np.sqrt(max(1, told.shape[1] - 1)),
            readout=np.array([CLASS_TOKEN if one else MEAN_OF_PLACES for one in self.of_class]),
            layers=np.array(self.labels),
            model_of_layer=self.owner,
        )


def _right(features: Tensor, known: Any, labels: Any) -> np.ndarray:
    """Whether the nearest labelled images tell the class of each labelled image."""
    some = features[torch.from_numpy(known).to(features.device)]
    indices, cosines = nearest(some, min(VOTERS, len(some) - 1))
    if indices[0, 0] < 0:
        return np.full(len(some), np.nan)
    return votes(indices.cpu(), cosines.cpu(), labels[known]).astype(np.float64)


def measure(
    models: Any,
    images: Any = None,
    *,
    layers: Choice = "blocks",
    k: int = K,
    readout: str = MEAN,
    null: int = PERMUTATIONS,
    calibrated: bool = False,
    **options: Any,
) -> NeighboursResult:
    """Shared nearest neighbours of all layers of one model or several, and k-NN accuracy.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        images: see ``open_images``; the bundled digit scenes by default.
        layers: ``blocks``, ``paper``, ``all``, or names with wildcards.
        k: how many nearest images are compared.
        readout: ``mean`` of all patches or locations, or ``class``: the class token in layers that
            have one, the mean in others.
        null: permutations for the chance level; 0 for none.
        calibrated: draw (s − τ) / (1 − τ), τ the chance level's 95 % quantile.
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: unknown models, images or layers; a layer named that has no grid of places;
            no more than ``k`` images; no class token to read out; activations that are not finite.
    """
    asked = Neighbours(layers, k, readout, null, calibrated)
    return measure_one(asked, models, images, Options(**options))


def from_features(
    features: Any,
    *,
    labels: Any = None,
    layers: Choice = "blocks",
    k: int = K,
    readout: str = MEAN,
    null: int = PERMUTATIONS,
    calibrated: bool = False,
    **options: Any,
) -> NeighboursResult:
    """The same of features that were computed before, by vitprobe or by others.

    Args:
        features: model -> layer -> array (n, features), or paths; see ``running.features``. Of what
            ``vitprobe extract`` wrote whole, ``readout`` is taken; all else is taken as it is.
        labels: (n,) classes of the images, where the features have none with them.
        layers: names with wildcards; all by default.
        k: as in ``measure``, as are ``readout``, ``null`` and ``calibrated``.
        options: fields of ``running.Options`` (``names``, ``num_images``, ``seed`` ...).

    Raises:
        VitprobeError: features of other images, in another order or number; of several vectors an
            image that stand nobody knows where; not finite.
    """
    sources = open_features(features)
    stored = [source.readout for source in sources]
    if "class" in stored and set(stored) - {"class", "all"}:
        raise VitprobeError(
            "--features: class tokens of one model and means of another were stored: extract both "
            "with one --readout."
        )
    if "class" in stored:
        readout = CLASS
    elif readout == CLASS and "all" not in stored:
        raise VitprobeError("--readout class: no class tokens are among the features.")
    asked = Neighbours(layers, k, readout, null, calibrated)
    found = measure_features(asked, sources, Options(**options), labels=labels, vectors=True)
    given = np.array([not stored[m] for m in found.model_of_layer])
    return replace(found, readout=np.where(given, AS_GIVEN, found.readout))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.neighbours``."""
    twins = ("vit_small_box", "resnet_box", "vit_small_box@random", "resnet_box@random")
    return cli.command(Neighbours, measure, __doc__, argv, twins, from_features)


if __name__ == "__main__":
    sys.exit(main())
