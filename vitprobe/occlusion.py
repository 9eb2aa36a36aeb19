"""How many predictions survive when cells of the image are dropped or shuffled.

Naseer et al. 2021 (arXiv 2105.10497), Figures 2 and 8.

The quantities, shares of images from 0 to 1: agreement of the predicted class with that on the
clean image, which needs no labels, and accuracy where the images have as many classes as the model.

Choices made: a share of the cells of a 14 × 14 grid of the model's input is filled with 0 after
normalisation, the data's mean (``--fill`` takes another), or the cells of a g × g grid are put in
another order. Each image has its own seeded cells, the same for all models; those of a smaller
share are among those of a larger one. A pass a level beside the clean one; standard errors over
images.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.models.loading import Model
from vitprobe.papers import naseer2021
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.statistics.occlusion import dropped, order_of_cells, shuffled
from vitprobe.tracing.classifier import class_output, scores

LEVELS, GRIDS, CELLS = (0.25, 0.5, 0.75), (2, 4, 8), 14
MEAN, BLACK, OWN = "mean", "black", "image"
FILLS = {MEAN: "the data's mean (0 after normalisation)", BLACK: "black", OWN: "the image's mean"}
# In a run of several measurements that many images, in whole batches: each level is a pass.
FEW = 128


@dataclass(frozen=True)
class OcclusionResult(Result):
    """Predictions that survive.

    Attributes:
        agreement: (models, levels) share of images with the class predicted on the clean image.
        agreement_se: (models, levels) standard error over images.
        accuracy: (models, levels) share of images with the right class; NaN where they have no
            labels, or another number of classes than the model.
        accuracy_se: (models, levels) standard error over images.
        level: (levels,) names: ``clean``, ``0.5 dropped``, ``4×4 shuffled``.
        dropped: (levels,) the share of cells that are dropped; 0 where none are.
        shuffle: (levels,) cells along each side that are shuffled; 1 where none are.
    """

    agreement: np.ndarray
    agreement_se: np.ndarray
    accuracy: np.ndarray
    accuracy_se: np.ndarray
    level: np.ndarray
    dropped: np.ndarray
    shuffle: np.ndarray

    analysis: ClassVar[str] = "occlusion"
    text: ClassVar[Text] = Text(
        "Dropped and shuffled cells",
        "How many predictions stay the same when a share of the image is dropped, or its cells are "
        "shuffled; Naseer et al. 2021, Figures 2 and 8.",
        "A line that stays high belongs to a network that does without the missing parts, or "
        "without their order.",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        **{f"{name}{end}": ("model", "level") for name in ("agreement", "accuracy")
           for end in ("", "_se")},
        "level": ("level",),
        "dropped": ("level",),
        "shuffle": ("level",),
    }  # fmt: skip

    def plot(self, ax: Any = None) -> Any:
        """Agreement, and accuracy below where it is known; on ``ax`` agreement when dropped."""
        with drawing.style():
            if ax is not None:
                self._lines(ax, "agreement", self.shuffle == 1, self.dropped, "share dropped")
                ax.legend()
                return ax
            sides = [
                (self.shuffle == 1, self.dropped, "share of the image dropped"),
                (self.dropped == 0, self.shuffle, "cells shuffled, along each side"),
            ]
            sides = [one for one in sides if one[0].sum() > 1]
            known = np.isfinite(self.accuracy).any()
            rows = ["agreement", "accuracy"] if known else ["agreement"]
            figure = drawing.new_figure(4.2 * len(sides) + 0.6, 2.9 * len(rows) + 0.8)
            axes = figure.subplots(len(rows), len(sides), squeeze=False, sharex="col", sharey="row")
            for line, what in zip(axes, rows):
                for one, side in zip(line, sides):
                    self._lines(one, what, *side)
                    one.label_outer()
            axes[0, 0].legend()
            drawing.caption(figure, self._caption())
            return figure

    def _lines(self, ax: Any, what: str, levels: np.ndarray, x: np.ndarray, label: str) -> None:
        values, errors = getattr(self, what), getattr(self, f"{what}_se")
        at = np.flatnonzero(levels)[np.argsort(x[levels])]
        for model, name in enumerate(self.models):
            ax.errorbar(x[at], values[model, at], errors[model, at], marker="o", markersize=3,
                        capsize=2, label=name)  # fmt: skip
        if x is self.shuffle:
            ax.set_xscale("log", base=2)
            ax.set_xticks(x[at], [f"{g}×{g}" for g in x[at].tolist()], minor=False)
            ax.set_xticks([], minor=True)
        ax.set(xlabel=label, ylim=(-0.02, 1.03))
        ax.set_ylabel("agreement with the clean image" if what == "agreement" else what)

    def _caption(self) -> str:
        text = drawing.provenance_line(self.meta)
        text += f" Dropped: cells of a {CELLS}×{CELLS} grid, filled with "
        text += f"{FILLS[self.meta['fill']]}. Bars: one standard error over images."
        for name, count in zip(self.models, self.meta["classes"]):
            if self.meta["labels"] and self.meta["labels"] != count:
                text += f" No accuracy of {name}: the images have {self.meta['labels']} classes,"
                text += f" it has {count}."
        return text

    def findings(self) -> list[Finding]:
        """Naseer et al.'s claims for every trained ViT beside every trained CNN."""
        return naseer2021.findings(self)


GROUP = "robustness"
RESULT = OcclusionResult


@dataclass(frozen=True)
class Occlusion(Measurement):
    """Options of ``measure``."""

    levels: Sequence[float] = option(
        LEVELS, "shares of the image to drop", nargs="*", type=float, metavar="S"
    )
    shuffle: Sequence[int] = option(
        GRIDS, "cells along each side to shuffle", nargs="*", type=int, metavar="G"
    )
    fill: str = option(
        MEAN,
        "what dropped cells hold: the data's mean (0 after normalisation, default), black, or the "
        "image's own mean",
        choices=tuple(FILLS),
    )

    analysis: ClassVar[str] = "occlusion"

    def __post_init__(self) -> None:
        for share in self.levels:
            if not 0 < share < 1:
                raise VitprobeError(f"--levels must be above 0 and below 1, not {share:g}.")
        for cells in self.shuffle:
            if cells < 2:
                raise VitprobeError(f"--shuffle must be at least 2 cells a side, not {cells}.")
        if not [*self.levels, *self.shuffle]:
            raise VitprobeError("--levels and --shuffle are both empty: nothing would be changed.")
        if self.fill not in FILLS:
            raise VitprobeError(f"--fill must be one of {', '.join(FILLS)}, not {self.fill!r}.")

    def on(
        self, models: list[Model], images: Any, options: Options, shared: bool
    ) -> tuple[Measurement, Any, Options]:
        return replace(self, first=FEW) if shared else self, images, options

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self)


MEASUREMENT = Occlusion


class _Watch(Watch):
    """How many predictions stay, and how many are right, at each level."""

    def __init__(self, ready: Session, asked: Occlusion) -> None:
        self.fill = asked.fill
        shares, grids = sorted(set(asked.levels)), sorted(set(asked.shuffle))
        self.shares = np.array([0.0, *shares, *[0.0] * len(grids)])
        self.grids = np.array([1, *[1] * len(shares), *grids])
        for m, example in enumerate(ready.example()):
            if min(example.shape[-2:]) < max(CELLS if shares else 1, *self.grids):
                name = ready.models[m].name
                side = "×".join(map(str, example.shape[-2:]))
                most = max(CELLS if shares else 1, *self.grids)
                raise NotApplicable(
                    f"{name} sees {side} pixels, fewer than the {most}×{most} cells.", name
                )
        self.outputs = [_classes(ready, m) for m in range(len(ready.models))]
        self.fills = [_fill(ready, m, asked.fill) for m in range(len(ready.models))]
        labels = ready.images.chosen_labels()
        self.labels = None if labels is None else torch.from_numpy(np.asarray(labels))
        self.count = int(self.labels.max()) + 1 if self.labels is not None else 0
        if ready.images.classes:
            self.count = len(ready.images.classes)
        size, most = (len(ready.models), len(self.shares)), max(n for _, n in self.outputs)
        super().__init__(
            ready,
            ready.sums(same=size, right=size, seen=(), labelled=(), told=(size[0], most)),
            {"levels": list(asked.levels), "shuffle": list(asked.shuffle), "fill": asked.fill},
        )
        self._clean: list[Tensor] = [torch.empty(0)] * len(ready.models)

    @contextmanager
    def watching(self, m: int, batch: Batch) -> Iterator[None]:
        def keep(module: Any, inputs: Any, output: Any) -> None:
            self._clean[m] = self._predicted(m, output)

        handle = self.ready.models[m].module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def end(self, batch: Batch) -> None:
        seed, images = self.ready.options.seed, self.ready.images.order[batch.positions]
        drops = np.stack([order_of_cells(seed, i, "drop", CELLS**2) for i in images.tolist()])
        known = None if self.labels is None else self.labels[torch.from_numpy(batch.positions)]
        self.sums["seen"] += len(batch)
        if known is not None:
            self.sums["labelled"] += int((known >= 0).sum())
        for level, (share, cells) in enumerate(zip(self.shares.tolist(), self.grids.tolist())):
            if cells > 1:
                drawn = [order_of_cells(seed, i, f"shuffle {cells}", cells**2) for i in images]
                orders = np.stack(drawn)
            for m, inputs in enumerate(batch.inputs):
                if level == 0:
                    found = self._clean[m]
                    self.sums["told"][m] += torch.bincount(
                        found, minlength=len(self.sums["told"][m])
                    )
                else:
                    changed = (
                        shuffled(inputs, orders, cells) if cells > 1
                        else dropped(inputs, drops, share, CELLS, self._filling(m, inputs))
                    )  # fmt: skip
                    with self.ready.autocast():
                        found = self._predicted(m, self.ready.models[m].module(changed))
                self.sums["same"][m, level] += int((found == self._clean[m]).sum())
                if known is not None:
                    self.sums["right"][m, level] += int((found.cpu() == known).sum())

    def _predicted(self, m: int, output: Any) -> Tensor:
        found = scores(output, self.outputs[m][0])
        check_finite(torch.isfinite(found).all(), "output", self.ready.models[m])
        return found.argmax(1)

    def _filling(self, m: int, inputs: Tensor) -> Tensor:
        if self.fill == OWN:
            return inputs.mean((2, 3), keepdim=True)
        return self.fills[m].to(inputs)

    def result(self, meta: dict[str, Any]) -> OcclusionResult:
        sums = {name: total.cpu().numpy() for name, total in self.sums.items()}
        classes = [count for _, count in self.outputs]
        meta["attends"] = [self.ready.layers(m).has_attention for m in range(len(classes))]
        meta["classes"], meta["labels"], meta["fill"] = classes, self.count, self.fill
        # Who tells one class of all images does so whatever is missing of them.
        meta["commonest"] = (sums["told"].max(1) / sums["seen"]).tolist()
        agreement, agreement_se = _share(sums["same"], sums["seen"])
        accuracy, accuracy_se = _share(sums["right"], sums["labelled"])
        for array in (accuracy, accuracy_se):
            array[np.array(classes) != self.count] = np.nan
        names = ["clean"]
        for share, cells in list(zip(self.shares.tolist(), self.grids.tolist()))[1:]:
            names.append(f"{cells}×{cells} shuffled" if cells > 1 else f"{share:g} dropped")
        return OcclusionResult(
            meta, agreement, agreement_se, accuracy, accuracy_se, np.array(names), self.shares,
            self.grids,
        )  # fmt: skip


def _share(count: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares of images and their standard errors; NaN for none, and for one."""
    n = float(total) if total > 0 else np.nan
    share = count / n
    return share, np.sqrt(share * (1 - share) / (n - 1 if n > 1 else np.nan))


def _classes(ready: Session, m: int) -> tuple[str, int]:
    found = class_output(ready.layers(m))
    if isinstance(found, str):
        name = ready.models[m].name
        raise NotApplicable(f"{name} predicts no classes: {found}.", name)
    return found


def _fill(ready: Session, m: int, fill: str) -> Tensor:
    """What dropped cells hold, a value a channel."""
    if fill != BLACK:
        return torch.zeros(1)
    model = ready.models[m]
    for part in reversed(getattr(model.transform, "transforms", [])):
        if hasattr(part, "mean") and hasattr(part, "std"):
            mean, std = (torch.as_tensor(v).reshape(-1, 1, 1) for v in (part.mean, part.std))
            return -mean / std
    raise NotApplicable(
        f"What is black for {model.name} is not known: its transform shows no normalisation.",
        model.name,
    )


def measure(
    models: Any,
    images: Any = None,
    *,
    levels: Sequence[float] = LEVELS,
    shuffle: Sequence[int] = GRIDS,
    fill: str = MEAN,
    **options: Any,
) -> OcclusionResult:
    """Predictions of one model or several on images with dropped and shuffled cells.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list; all with a classifier.
        images: see ``open_images``; the bundled digit scenes by default.
        levels: shares of a 14 × 14 grid of cells to drop, above 0 and below 1.
        shuffle: for each pass of its own, how many cells along each side to shuffle.
        fill: what dropped cells hold: ``mean`` (0 after normalisation), ``black``, ``image`` (its
            own mean).
        options: fields of ``running.Options`` (``num_images``, ``batch_size``, ``seed`` ...).

    Raises:
        VitprobeError: a model without a classifier; unknown models or images; levels out of range;
            outputs that are not finite.
    """
    asked = Occlusion(levels=tuple(levels), shuffle=tuple(shuffle), fill=fill)
    return measure_one(asked, models, images, Options(**options))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.occlusion``."""
    return cli.command(Occlusion, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
