"""CKA of subsets of the first block's heads with a CNN's lowest layers, against their distance.

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
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from vitprobe import cli
from vitprobe.errors import VitprobeError
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, decide, plus_minus
from vitprobe.running.loop import run
from vitprobe.running.options import Options
from vitprobe.running.session import Batch, Session, session
from vitprobe.statistics.hsic import (
    MAX_GROUPS,
    MIN_BATCH,
    bootstrap_error,
    gram,
    hsic,
    jackknife,
    normalise,
)
from vitprobe.tracing.attention import AttentionMap, map_attention, observe
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Layer, map_layers

LOWEST = 4
# "Close to -1" is what the paper's figure shows; how close is ours.
STRONG = 0.7


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
        if len(self.distance_px) < 3:
            return []
        vit, cnn = (model["name"] for model in self.meta["models"])
        return [
            Finding(
                f"the more local the heads of {vit}, the more alike {layer} of {cnn}",
                "Raghu et al. 2021, Fig. 5",
                decide(-float(rho), float(error), STRONG, self.meta.get("replicates")),
                f"Spearman's ρ over {len(self.distance_px)} subsets {plus_minus(rho, error)} (less "
                f"than -{STRONG} asked)",
            )
            for layer, rho, error in zip(self.layers, self.rho, self.rho_se)
        ]


RESULT = HeadSubsetsResult


def measure(
    models: Any, images: Any = None, *, layers: str | Sequence[str] = "blocks", **options: Any
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
    with session(models, images, Options(**options), at_least=MIN_BATCH) as ready:
        _check_batches(ready)
        attention, lowest = _choose(ready, layers)
        heads, count = attention.layers[0].heads, len(lowest)
        table = np.nan_to_num(attention.layers[0].distances())
        placed = int(np.isfinite(attention.layers[0].queries[..., 0]).sum())
        pixels = torch.from_numpy(table).float().to(ready.device)
        groups = min(MAX_GROUPS, len(ready.batches))
        # Which heads make a subset is known at the end: sum over all pairs of heads until then,
        # as the Gram of heads side by side is the sum of theirs.
        size = heads + count
        sums = ready.sums(hsic=(groups, size, size), used=(groups,), distance=(groups, heads))
        sums |= ready.sums(seen=(groups,))

        def step(batch: Batch) -> None:
            if len(batch) < MIN_BATCH:
                return
            group = batch.index % groups
            grams = torch.zeros(
                size, len(batch), len(batch), dtype=torch.float64, device=sums["hsic"].device
            )

            def reduce(i: int, block: Tensor, images: slice, queries: slice) -> None:
                if i == 0:
                    part = (block * pixels[:, None, queries]).sum((0, 1, 3, 4)) / placed
                    sums["distance"][group] += part.to(sums["distance"])

            def outputs(i: int, tensor: Tensor) -> None:
                if i == 0:
                    for head in range(heads):
                        grams[head] = gram(tensor[:, :, head]).to(grams)

            def take(i: int, tensor: Tensor) -> None:
                grams[heads + i] = gram(tensor).to(grams)

            with observe(ready.models[0].module, attention, reduce, outputs), ready.autocast():
                ready.models[0].module(batch.inputs[0])
            with capture(ready.models[1].module, lowest, take), ready.autocast():
                ready.models[1].module(batch.inputs[1])
            bad = (~torch.isfinite(grams).all(-1).all(-1)).nonzero()
            if len(bad):
                at = int(bad[0])
                label = attention.layers[0].label if at < heads else lowest[at - heads].label
                owner = ready.models[0 if at < heads else 1].name
                raise VitprobeError(
                    f"The layer {label} of {owner} is not finite; it is the first such layer."
                )
            sums["hsic"][group] += hsic(grams)
            sums["used"][group] += 1
            sums["seen"][group] += len(batch)

        labels = [layer.label for layer in lowest]
        run(ready, step, sums, decides={"analysis": "head_subsets", "layers": labels})
        if not sums["used"].sum():
            raise VitprobeError(f"No batch of at least {MIN_BATCH} readable images was left.")
        distance = (sums["distance"].sum(0) / sums["seen"].sum()).cpu().numpy()
        order = np.argsort(distance)
        subsets = np.array([order[window] for window in windows(heads)])
        of_subset = distance[subsets].mean(1)

        def statistic(total: Tensor) -> Tensor:
            return subset_cka(total, subsets)

        def correlation(total: Tensor) -> Tensor:
            values = subset_cka(total, subsets).cpu().numpy()
            return torch.tensor([_rho(row, of_subset) for row in values])

        cka, cka_error = jackknife(statistic, sums["hsic"], sums["used"])
        rho = correlation(sums["hsic"].sum(0)).numpy()
        rho_error = bootstrap_error(correlation, sums["hsic"], sums["used"])
        meta = ready.meta("head_subsets")
        meta["n"] = int(sums["seen"].sum())
        meta["replicates"] = int((sums["used"] > 0).sum())
        meta["attention_layer"], meta["heads"] = attention.layers[0].label, heads
    return HeadSubsetsResult(
        meta, cka, cka_error, of_subset, subsets, rho, rho_error, np.array(labels)
    )


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


def _check_batches(ready: Session) -> None:
    if len(ready.models) != 2:
        raise VitprobeError(
            f"head_subsets compares one model with attention and one without, not "
            f"{len(ready.models)} models."
        )
    if ready.options.batch_size < MIN_BATCH:
        raise VitprobeError(
            f"CKA needs batches of at least {MIN_BATCH} images, not --batch-size "
            f"{ready.options.batch_size}."
        )


def _choose(ready: Session, layers: str | Sequence[str]) -> tuple[AttentionMap, list[Layer]]:
    """The attention of the first model and the lowest layers of the second."""
    examples = ready.example()
    with ready.autocast():
        maps = [
            map_attention(model.name, model.module, example)
            for model, example in zip(ready.models, examples)
        ]
        if len([found for found in maps if found.layers]) != 1:
            names = " and ".join(model.name for model in ready.models)
            raise VitprobeError(
                f"head_subsets compares one model with attention and one without, not {names}."
            )
        if not maps[0].layers:
            raise VitprobeError(
                f"Name the model with attention first: {ready.models[1].name} "
                f"{ready.models[0].name}."
            )
        cnn = ready.models[1]
        found = map_layers(cnn.name, cnn.module, examples[1])
    return maps[0], found.choose(layers)[:LOWEST]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.head_subsets``."""
    parser = cli.parser("head_subsets", __doc__)
    return cli.run(
        parser,
        argv,
        "head_subsets",
        lambda args: measure(
            args.models, args.images, layers=args.layers, **cli.options(args, "head_subsets")
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
