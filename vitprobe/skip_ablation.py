"""CKA between the layers before and after a block whose skips are removed.

Raghu et al. 2021 (arXiv 2108.08810), Figure 8.

The quantity: linear CKA (see ``vitprobe.cka``) between all layers of a model, and its mean across
the block (layers before it with layers from its output on) and within the two sides (different
layers of one side). The layers inside the block belong to neither side.

Two experiments, labelled apart. The paper trains a network without the skips of one block:
``trained_without`` compares given models, trained with and without them. By default the skips
of a trained network are taken away at test time instead, every residual addition of the block
giving its branch alone; the network never learned to do without, so this is no reproduction of the
figure. Standard errors by the jackknife over batches.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import Model
from vitprobe.papers.raghu2021 import skips
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.statistics.hsic import MAX_GROUPS, MIN_BATCH, gram, hsic, jackknife, normalise
from vitprobe.tracing.ablation import WithoutSkips, block_names, choose_blocks
from vitprobe.tracing.ablation import sides as sides_of
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Choice, Layer, LayerMap

MARK = drawing.COLOURS[5]
# Four passes of every model over the bundled scenes stay under a minute on two cores.
DEFAULT_SCENES = 128
REMOVED, TRAINED = "removed at test time", "trained without"


@dataclass(frozen=True)
class SkipAblationResult(Result):
    """CKA of models with and without the skips of a block.

    Attributes:
        cka: (panels, L, L) CKA between the layers of the panel's model; NaN where undefined, and
            beyond the layers of models that have fewer.
        layers: (panels, L) names, empty beyond the last.
        model_of_panel: (panels,) index into ``meta["models"]``.
        block: (panels,) the block without skips; empty for the model as it is.
        side: (panels, L) 0 before the block, 2 from its output on, 1 between and everywhere where
            there is no block.
        means: (panels, 4) mean CKA across the block and within the sides, and the same two of the
            model that has its skips; NaN for the latter's own panel.
        means_se: (panels, 4) jackknife standard error.
        loss: (panels, 2) how much CKA across the block is lost with the skips, and its standard
            error.
    """

    cka: np.ndarray
    layers: np.ndarray
    model_of_panel: np.ndarray
    block: np.ndarray
    side: np.ndarray
    means: np.ndarray
    means_se: np.ndarray
    loss: np.ndarray

    analysis: ClassVar[str] = "skip_ablation"
    text: ClassVar[Text] = Text(
        "Without the skips of one block",
        "CKA between all layers with the skips of one block taken away at test time. Raghu et al., "
        "Figure 8, train such networks; this is another experiment on the trained network.",
        "Dark off-diagonal corners say that layers before and after the block are no longer alike. "
        "The first panel of a row has all skips; blue lines bound the block.",
        "CKA",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "means": ("panel", "mean"),
        "means_se": ("panel", "mean"),
        "loss": ("panel", "statistic"),
        "side": ("panel", "layer"),
        "cka": ("panel", "layer", "layer_2"),
        "layers": ("panel", "layer"),
        "block": ("panel",),
        "model_of_panel": ("panel",),
    }
    names: ClassVar[dict[str, tuple[str, ...]]] = {
        "mean": ("across", "within", "across, with skips", "within, with skips"),
        "statistic": ("loss across", "its standard error"),
    }

    def plot(self, ax: Any = None) -> Any:
        """One heat map per panel, the block marked; on ``ax``, CKA across each block."""
        with drawing.style():
            if ax is not None:
                return self._bars(ax)
            owners = [0] * len(self.block) if self.meta["trained_without"] else self.model_of_panel
            rows = [np.flatnonzero(np.array(owners) == row) for row in np.unique(owners)]
            columns = max(len(row) for row in rows)
            figure = drawing.new_figure(3.1 * columns + 0.7, 3.5 * len(rows) + 0.5)
            # Given models may differ in their layers; panels of one model do not.
            shared: Any = "none" if self.meta["trained_without"] else "row"
            axes = figure.subplots(len(rows), columns, squeeze=False, sharex=shared, sharey=shared)
            for line, row in zip(axes, rows):
                for one in line[len(row) :]:
                    one.axis("off")
                for place, (one, panel) in enumerate(zip(line, row)):
                    first = place == 0 or self.meta["trained_without"]
                    image = self._panel(one, int(panel), first)
            figure.colorbar(image, ax=axes, label="CKA", aspect=30, pad=0.01)
            drawing.caption(figure, self._caption())
            return figure

    def _panel(self, ax: Any, panel: int, first: bool) -> Any:
        names = [str(name) for name in self.layers[panel] if name]
        values = self.cka[panel, : len(names), : len(names)]
        low = min(0.0, float(np.nanmin(self.cka))) if np.isfinite(self.cka).any() else 0.0
        image = drawing.heat_map(ax, values, vmin=low, vmax=1)
        for axis in (ax.xaxis, ax.yaxis):
            drawing.layer_axis(axis, names, "")
        if not first:
            ax.set_ylabel("")
            ax.tick_params(left=False, labelleft=False)
        ax.set(xticks=[], xlabel="layer, same order")
        title = drawing.short(self.models[self.model_of_panel[panel]], 34)
        if self.block[panel]:
            across, within, across_with, within_with = self.means[panel]
            title += f"\nskips of {self.block[panel]} {self.meta['experiment']}"
            title += f"\nacross {across:.2f} (with skips {across_with:.2f}), "
            title += f"within {within:.2f} ({within_with:.2f})"
            for value in (0, 2):
                places = np.flatnonzero(self.side[panel] == value)
                if len(places):
                    edge = places[-1] + 0.5 if value == 0 else places[0] - 0.5
                    ax.axhline(edge, color=MARK, linewidth=1.2)
                    ax.axvline(edge, color=MARK, linewidth=1.2)
        else:
            title += "\nwith all skips\n"
        ax.set_title(title, fontsize=7.5)
        return image

    def _bars(self, ax: Any) -> Any:
        panels = np.flatnonzero(self.block != "")
        places = np.arange(len(panels))
        for shift, column, label in ((-0.2, 2, "with skips"), (0.2, 0, self.meta["experiment"])):
            ax.bar(
                places + shift, self.means[panels, column], 0.4,
                yerr=self.means_se[panels, column], label=label,
            )  # fmt: skip
        ax.set_xticks(places, [str(self.block[panel]) for panel in panels])
        ax.set_ylabel("mean CKA across the block")
        ax.legend()
        return ax

    def _caption(self) -> str:
        text = drawing.provenance_line(self.meta)
        text += f" Unbiased minibatch CKA, batches of {self.meta['batch_size']}."
        text += " Blue lines: the block without skips; across: layers before it with layers from "
        text += "its output on; within: different layers of one side."
        if not self.meta["trained_without"]:
            text += " The weights are those of the network with skips, not trained without."
        return text

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claim of Figure 8 for every block without skips."""
        return skips.ablation(self)


GROUP = "compare"
RESULT = SkipAblationResult


@dataclass(frozen=True)
class _Panel:
    """A model, the block whose skips it lacks, and the panel that it is compared with."""

    model: int
    found: LayerMap
    layers: list[Layer]
    block: str = ""
    base: int = 0
    removes: bool = False


@dataclass(frozen=True)
class SkipAblation(Measurement):
    """Options of ``measure``."""

    layers: Choice = option(
        "paper", "paper, blocks, all, or names with wildcards", nargs="+", metavar="L"
    )
    blocks: Sequence[str | int] | None = option(
        None, "names or indices of blocks that lose their skips", nargs="+", metavar="B"
    )
    trained_without: str | int | Sequence[str | int] | None = option(
        None, "blocks whose skips the models after the first were trained without, one each",
        nargs="+", metavar="B",
    )  # fmt: skip

    analysis: ClassVar[str] = "skip_ablation"
    at_least: ClassVar[int] = MIN_BATCH

    def on(
        self, models: list[Model], images: Any, options: Options, shared: bool
    ) -> tuple[Measurement, Any, Options]:
        # A pass for every block that loses its skips: by default on fewer scenes than other
        # measurements look at.
        if images is None and options.num_images is None:
            if shared:
                return replace(self, first=DEFAULT_SCENES), images, options
            options = replace(options, num_images=DEFAULT_SCENES)
        return self, images, options

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self)


MEASUREMENT = SkipAblation


class _Watch(Watch):
    """Grams of the intact networks in the shared passes, of those without skips in its own."""

    def __init__(self, ready: Session, asked: SkipAblation) -> None:
        self.trained = asked.trained_without is not None
        self.panels = _panels(ready, asked.layers, asked.blocks, asked.trained_without)
        self.size = max(len(panel.layers) for panel in self.panels)
        groups = min(MAX_GROUPS, len(ready.batches))
        facts = [[p.model, p.block, *(layer.label for layer in p.layers)] for p in self.panels]
        sums = ready.sums(hsic=(groups, len(self.panels), self.size, self.size))
        super().__init__(ready, sums, {"panels": facts})
        self._grams: dict[int, list[Tensor]] = {}
        self._without = {
            p: WithoutSkips(
                ready.models[panel.model].module, panel.found, panel.block, panel.layers,
                ready.example()[panel.model], ready.autocast,
            )
            for p, panel in enumerate(self.panels) if panel.removes
        }  # fmt: skip

    def watching(self, m: int, batch: Batch) -> Any:
        stack, model = ExitStack(), self.ready.models[m]
        for p, panel in enumerate(self.panels):
            if panel.model == m and panel.removes:
                stack.enter_context(self._without[p].keeping())
            elif panel.model == m:
                grams = self._grams[p] = [torch.empty(0)] * len(panel.layers)

                def reduce(i: int, tensor: Tensor, p: int = p, grams: Any = grams) -> None:
                    grams[i] = batch.gram(model, self.panels[p].layers[i], tensor)

                stack.enter_context(capture(model.module, panel.layers, reduce))
        return stack

    def _remove(self, p: int, batch: Batch) -> None:
        """Grams of a panel in a pass of its own; those before the block are the intact model's."""
        panel, without = self.panels[p], self._without[p]
        grams = self._grams[p] = list(self._grams[panel.base])

        def reduce(i: int, tensor: Tensor) -> None:
            grams[without.start + i] = gram(tensor)

        with without.capture(reduce):
            self.ready.forward(panel.model, batch)

    def end(self, batch: Batch) -> None:
        for p, panel in enumerate(self.panels):
            model = self.ready.models[panel.model]
            if panel.removes:
                self._remove(p, batch)
            grams = torch.stack(self._grams[p])
            where = f" without the skips of {panel.block}" if panel.block else ""
            for i in (~torch.isfinite(grams).all((1, 2))).nonzero().flatten().tolist():
                named = replace(model, name=model.name + where)
                check_finite(False, panel.layers[i].label, named)
            value = hsic(grams)
            self.sums["hsic"][self.group(batch), p, : len(value), : len(value)] += value
        self._grams.clear()

    def result(self, meta: dict[str, Any]) -> SkipAblationResult:
        meta["trained_without"] = self.trained
        meta["experiment"] = TRAINED if self.trained else REMOVED
        panels, sums = self.panels, self.sums["hsic"]
        sides = np.ones((len(panels), self.size), dtype=np.int64)
        names = np.full((len(panels), self.size), "", dtype="U200")
        for p, panel in enumerate(panels):
            names[p, : len(panel.layers)] = [layer.label for layer in panel.layers]
            if panel.block:
                sides[p, : len(panel.layers)] = sides_of(panel.found, panel.layers, panel.block)
        means, error = jackknife(
            lambda total: _means(normalise(total).cpu(), panels, sides), sums, self.used
        )
        value = normalise(sums.sum(0)).cpu().numpy()
        return SkipAblationResult(
            meta, value, names, np.array([panel.model for panel in panels]),
            np.array([panel.block for panel in panels]), sides, means[:, :4], error[:, :4],
            np.stack([means[:, 4], error[:, 4]], axis=1),
        )  # fmt: skip


def measure(
    models: Any,
    images: Any = None,
    *,
    layers: Choice = "paper",
    blocks: Sequence[str | int] | None = None,
    trained_without: str | int | Sequence[str | int] | None = None,
    **options: Any,
) -> SkipAblationResult:
    """CKA between all layers, with and without the skips of chosen blocks.

    Args:
        models: specs, modules or ``Model``; one or a list.
        images: see ``open_images``; the bundled digit scenes by default.
        layers: ``paper``, ``blocks``, ``all``, or names with wildcards.
        blocks: by name or index among the modules that make residual additions (0 is the first,
            -1 the last); about 1/12, 7/12 and 10/12 of the depth by default.
        trained_without: blocks, by name or index, whose skips the models after the first were
            trained without, one for each. Nothing is removed then.
        options: fields of ``running.session.Options``.

    Raises:
        VitprobeError: unknown models, images, layers or blocks; a model that has skips in its
            block after all; fewer than 4 images; activations that are not finite.
    """
    asked = SkipAblation(layers, blocks, trained_without)
    return measure_one(asked, models, images, Options(**options))


def _panels(
    ready: Session, layers: Any, blocks: Sequence[str | int] | None, without: Any
) -> list[_Panel]:
    maps = [ready.layers(m) for m in range(len(ready.models))]
    intact = [_Panel(m, found, found.choose(layers)) for m, found in enumerate(maps)]
    panels: list[_Panel] = []
    if without is not None:
        lacking = [without] if isinstance(without, (str, int)) else list(without)
        if blocks is not None or not 1 <= len(lacking) == len(maps) - 1:
            raise VitprobeError(
                "--trained-without takes a model with all skips, then one for each block that it "
                "names, trained without that block's skips, and no --blocks."
            )
        for m, block in enumerate(choose_blocks(maps[0], [one])[0] for one in lacking):
            found, name = maps[m + 1], maps[m + 1].model
            if block not in found.modules or block in block_names(found):
                raise VitprobeError(f"{name} was not trained without the skips of {block}.")
            panels.append(_Panel(m + 1, found, intact[m + 1].layers, block, 0))
        return [intact[0], *panels]
    for panel in intact:
        base = len(panels)
        panels.append(panel)
        for block in choose_blocks(panel.found, blocks):
            panels.append(_Panel(panel.model, panel.found, panel.layers, block, base, True))
    return panels


def _means(values: Tensor, panels: list[_Panel], sides: np.ndarray) -> Tensor:
    """(panels, 5): across and within, the same with skips, and the loss across."""

    def across_and_within(panel: int, side: np.ndarray) -> list[Tensor]:
        before, after = (torch.from_numpy(side == value) for value in (0, 2))
        one = before[:, None] & before | after[:, None] & after
        other = ~torch.eye(len(side), dtype=torch.bool)
        return [values[panel][where].nanmean() for where in (before[:, None] & after, one & other)]

    rows = []
    for p, panel in enumerate(panels):
        if not panel.block:
            rows.append(values.new_full((5,), torch.nan))
            continue
        side = sides[p]
        if panels[panel.base].found is not panel.found:
            with_skips = np.ones_like(side)
            names = sides_of(panels[panel.base].found, panels[panel.base].layers, panel.block)
            with_skips[: len(names)] = names
        else:
            with_skips = side
        row = across_and_within(p, side) + across_and_within(panel.base, with_skips)
        rows.append(torch.stack([*row, row[2] - row[0]]))
    return torch.stack(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.skip_ablation``."""
    return cli.command(SkipAblation, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
