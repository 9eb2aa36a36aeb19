"""Which heads of the first block compute what a CNN's lowest layers do.

Raghu et al. 2021 (arXiv 2108.08810), Figure 5.

The quantities: for each subset of heads, its mean attention distance in input pixels, and the CKA
of what these heads put out, side by side and before the output projection, with each of the CNN's
lowest layers; for each layer Spearman's ρ of the two over the subsets.

Choices made: heads are sorted by their distance over all images, and a subset is a window of them,
a quarter of the heads wide (at least one). The lowest layers are the CNN's first four
of ``--layers``. CKA is summed over minibatches as in ``vitprobe.cka``, with standard errors by the
jackknife over batches; those of ρ are the bootstrap's, since ranks jump. Class and register tokens
count for the CKA and not for the distance.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from vitprobe import cli
from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.papers.raghu2021 import attention
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.statistics.hsic import (
    MAX_GROUPS,
    MIN_BATCH,
    bootstrap_error,
    gram,
    hsic,
    jackknife,
    normalise,
)
from vitprobe.tracing.attention import AttentionMap, observe
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Choice, Layer

LOWEST = 4


def windows(heads: int) -> list[slice]:
    """Sliding windows of the sorted heads, a quarter of them wide."""
    width = max(1, heads // 4)
    return [slice(start, start + width) for start in range(heads - width + 1)]


@dataclass(frozen=True)
class HeadSubsetsResult(Result):
    """CKA of head subsets with a CNN's lowest layers.

    Attributes:
        cka: (layers, subsets) over subsets from the most local one to the most global one.
        cka_se: (layers, subsets) jackknife standard error.
        distance_px: (subsets,) mean attention distance in input pixels.
        heads: (subsets, heads of a subset) which heads.
        rho: (layers,) Spearman's ρ of ``cka`` with ``distance_px``.
        rho_se: (layers,) bootstrap standard error.
        layers: (layers,) names of the CNN's layers.
    """

    cka: np.ndarray
    cka_se: np.ndarray
    distance_px: np.ndarray
    heads: np.ndarray
    rho: np.ndarray
    rho_se: np.ndarray
    layers: np.ndarray

    analysis: ClassVar[str] = "head_subsets"
    text: ClassVar[Text] = Text(
        "Heads of the first block and a CNN's lowest layers",
        "CKA of subsets of the first block's heads, sorted by attention distance, with the CNN's "
        "lowest layers; Raghu et al., Figure 5.",
        "A line that falls says that local heads compute what the convolutions do and global heads "
        "do not. ρ is Spearman's correlation of the two axes.",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "cka": ("layer", "subset"),
        "cka_se": ("layer", "subset"),
        "distance_px": ("subset",),
        "heads": ("subset", "place"),
        "rho": ("layer",),
        "rho_se": ("layer",),
        "layers": ("layer",),
    }

    def plot(self, ax: Any = None) -> Any:
        """A line of CKA against distance for each layer of the CNN."""
        with drawing.style():
            figure = None if ax is not None else drawing.new_figure(6.2, 4.2)
            ax = ax if figure is None else figure.add_subplot()
            for i, layer in enumerate(self.layers):
                ax.errorbar(
                    self.distance_px, self.cka[i], self.cka_se[i], marker="o", markersize=3.5,
                    linewidth=1.2, label=f"{drawing.short(str(layer))}: ρ = {self.rho[i]:.2f}",
                )  # fmt: skip
            vit, cnn = (model["name"] for model in self.meta["models"])
            ax.set_xlabel(f"mean attention distance of the subset (px), {vit}")
            ax.set_ylabel("CKA with the layer")
            ax.set_title(f"Heads of {self.meta['attention_layer']} against {cnn}")
            ax.legend()
            if figure is None:
                return ax
            text = drawing.provenance_line(self.meta)
            text += f" Subsets of {self.heads.shape[1]} of {self.meta['heads']} heads. Bars: one"
            text += " standard error."
            drawing.caption(figure, text)
            return figure

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claim of Figure 5 for each layer."""
        return attention.head_subsets(self)


GROUP = "compare"
RESULT = HeadSubsetsResult


@dataclass(frozen=True)
class HeadSubsets(Measurement):
    """Options of ``measure``."""

    layers: Choice = option(
        "blocks",
        "of the CNN; blocks, paper, all, or names: the lowest four",
        nargs="+",
        metavar="L",
    )

    analysis: ClassVar[str] = "head_subsets"
    at_least: ClassVar[int] = MIN_BATCH

    def over(self, ready: Session) -> list[list[int]]:
        """Every model with attention beside the first without."""
        attend: list[int] = []
        do_not: list[int] = []
        for m in range(len(ready.models)):
            try:
                (attend if ready.attention(m).layers else do_not).append(m)
            except NotApplicable:
                continue  # its tokens cannot be placed, nor can its distances be measured
        if not attend or not do_not:
            raise NotApplicable("needs a model with attention and one without.", "")
        return [[m, do_not[0]] for m in attend]

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self.layers)


MEASUREMENT = HeadSubsets


class _Watch(Watch):
    """Grams of each head of the first block and of the CNN's lowest layers.

    Which heads make a subset is known at the end: sum over all pairs of heads until then, as the
    Gram of heads side by side is the sum of theirs.
    """

    def __init__(self, ready: Session, layers: Choice) -> None:
        self.attention, self.lowest = _choose(ready, layers)
        first = self.attention.layers[0]
        self.heads = first.heads
        self.labels = [layer.label for layer in self.lowest]
        self.pixels = torch.from_numpy(np.nan_to_num(first.distances())).float().to(ready.device)
        self.placed = int(np.isfinite(first.queries[..., 0]).sum())
        size, groups = self.heads + len(self.lowest), min(MAX_GROUPS, len(ready.batches))
        sums = ready.sums(hsic=(groups, size, size), distance=(self.heads,), seen=())
        super().__init__(ready, sums, {"layers": self.labels})
        self._grams = torch.empty(0)

    def watching(self, m: int, batch: Batch) -> Any:
        model, n = self.ready.models[m], len(batch)
        if m == 1:
            return capture(model.module, self.lowest, partial(self._take, batch))
        size, device = self.heads + len(self.lowest), self.sums["hsic"].device
        self._grams = torch.zeros(size, n, n, dtype=torch.float64, device=device)
        return observe(model.module, self.attention, self._reduce, self._outputs, only=(0,))

    def _reduce(self, i: int, block: Tensor, images: slice, queries: slice) -> None:
        part = (block * self.pixels[:, None, queries]).sum((0, 1, 3, 4)) / self.placed
        self.sums["distance"] += part.to(self.sums["distance"])

    def _outputs(self, i: int, tensor: Tensor) -> None:
        for head in range(self.heads):
            self._grams[head] = gram(tensor[:, :, head]).to(self._grams)

    def _take(self, batch: Batch, i: int, tensor: Tensor) -> None:
        model, layer = self.ready.models[1], self.lowest[i]
        self._grams[self.heads + i] = batch.gram(model, layer, tensor).to(self._grams)

    def end(self, batch: Batch) -> None:
        labels = [self.attention.layers[0].label] * self.heads + self.labels
        for i in (~torch.isfinite(self._grams).all(-1).all(-1)).nonzero().flatten().tolist():
            check_finite(False, labels[i], self.ready.models[int(i >= self.heads)])
        self.sums["hsic"][self.group(batch)] += hsic(self._grams)
        self.sums["seen"] += len(batch)

    def result(self, meta: dict[str, Any]) -> HeadSubsetsResult:
        distance = (self.sums["distance"] / self.sums["seen"]).cpu().numpy()
        order = np.argsort(distance)
        subsets = np.array([order[window] for window in windows(self.heads)])
        of_subset = distance[subsets].mean(1)

        def statistic(total: Tensor) -> Tensor:
            return subset_cka(total, subsets)

        def correlation(total: Tensor) -> Tensor:
            values = subset_cka(total, subsets).cpu().numpy()
            return torch.tensor([_rho(row, of_subset) for row in values])

        cka, cka_error = jackknife(statistic, self.sums["hsic"], self.used)
        rho = correlation(self.sums["hsic"].sum(0)).numpy()
        rho_error = bootstrap_error(correlation, self.sums["hsic"], self.used)
        meta["attention_layer"], meta["heads"] = self.attention.layers[0].label, self.heads
        labels = np.array(self.labels)
        return HeadSubsetsResult(meta, cka, cka_error, of_subset, subsets, rho, rho_error, labels)


def measure(
    models: Any, images: Any = None, *, layers: Choice = "blocks", **options: Any
) -> HeadSubsetsResult:
    """CKA of head subsets of a ViT's first block with a CNN's lowest layers.

    Args:
        models: two, a model with attention and then one without.
        images: see ``open_images``; the bundled digit scenes by default.
        layers: of the CNN; ``blocks``, ``paper``, ``all`` or names, the lowest four of them.
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: not one model with attention and one without; too few images.
    """
    return measure_one(HeadSubsets(layers), models, images, Options(**options))


def subset_cka(total: Tensor, subsets: np.ndarray) -> Tensor:
    """(layers, subsets) from HSIC sums over (heads + layers)².

    The heads' Grams of a subset add up, and HSIC is bilinear in them.
    """
    heads = int(subsets.max()) + 1  # the windows cover all of them
    choice = torch.zeros(len(subsets), total.shape[-1], dtype=total.dtype, device=total.device)
    choice[torch.arange(len(subsets))[:, None], torch.from_numpy(subsets)] = 1
    rest = torch.eye(total.shape[-1], dtype=total.dtype, device=total.device)[heads:]
    both = torch.cat([choice, rest])
    return normalise(both @ total @ both.T)[len(subsets) :, : len(subsets)]


def _rho(values: np.ndarray, distance: np.ndarray) -> float:
    if len(values) < 3 or not np.isfinite(values).all():
        return float("nan")
    return float(spearmanr(values, distance).statistic)


def _choose(ready: Session, layers: Choice) -> tuple[AttentionMap, list[Layer]]:
    """The attention of the first model and the lowest layers of the second."""
    names = " and ".join(model.name for model in ready.models)
    if len(ready.models) != 2:
        raise VitprobeError(
            f"head_subsets compares one model with attention and one without, not "
            f"{len(ready.models)} models."
        )
    maps = [ready.attention(m) for m in (0, 1)]
    if len([found for found in maps if found.layers]) != 1:
        raise VitprobeError(
            f"head_subsets compares one model with attention and one without, not {names}."
        )
    if not maps[0].layers:
        raise VitprobeError(
            f"--models: name the model with attention first: {ready.models[1].name} "
            f"{ready.models[0].name}."
        )
    return maps[0], ready.layers(1).choose(layers)[:LOWEST]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.head_subsets``."""
    return cli.command(HeadSubsets, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
