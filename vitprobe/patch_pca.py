"""Principal components of patch tokens as colours, beside the images.

Oquab et al. 2023 (arXiv 2304.07193), Figure 1.

The quantity: the first three principal components of the patch tokens (or the locations of a CNN's
map) of a layer, over all patches of the images, centred; shown as red, green and blue. One basis
for all images, so that a colour means the same in each. Without unit.

Choices made: the last block unless ``--layers`` names others (of several the last one); 16 images
unless ``--num-images`` says otherwise, of which the figure shows the first. The sign of a component
is that in which its third moment is positive: fewer patches, farther out, on the positive side.
``--foreground`` fits a second basis to the patches on the positive side of the first component
alone. Colours span the 1st to the 99th percentile. Where the truth is known (the bundled digit
scenes) the area under the curve tells how well the first component finds the object, with a
standard error over images. A few tokens of large norm can take the first component for themselves:
their share is told.
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
from vitprobe.errors import VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.loading import Model
from vitprobe.models.visible import visible
from vitprobe.papers import oquab2023
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text
from vitprobe.running.grids import OnGrid, with_grids
from vitprobe.running.measurement import Measurement, Watch, check_finite
from vitprobe.running.options import Options, option
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.statistics.patch_components import (
    COUNT,
    area_under_curve,
    components,
    foreground_components,
)
from vitprobe.tracing.capture import capture
from vitprobe.tracing.layers import Choice, words

LAST = "last"
IMAGES, SHOWN = 16, 6
# Norms above this many medians stand out.
TIMES = 5.0
SCENES = "digit scenes (test)"


@dataclass(frozen=True)
class PatchPCAResult(Result):
    """Principal components of the patches of a layer a model.

    Attributes:
        components: (models, images, rows, columns, 3) float32; NaN beyond a model's grid, and with
            ``--foreground`` for all other patches.
        explained_variance_ratio: (models, 3) share of the variance of the patches.
        auc: (models,) area under the curve of the first component (of all patches) against the
            object's mask, 0.5 for chance; NaN where the truth is not known.
        auc_se: (models,) jackknife standard error over images.
        outlier_share: (models,) share of patches whose norm is above 5 times the median.
        pictures: (images, height, width, 3) uint8, as the first model saw them.
        layers: (models,) names, one a model.
        model_of_layer: (models,) index into ``meta["models"]``.
    """

    components: np.ndarray
    explained_variance_ratio: np.ndarray
    auc: np.ndarray
    auc_se: np.ndarray
    outlier_share: np.ndarray
    pictures: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "patch_pca"
    text: ClassVar[Text] = Text(
        "Principal components of patches",
        "The first three principal components of the last block's patches as red, green and blue, "
        "one basis for all images of a model; Oquab et al. 2023, Figure 1.",
        "Patches of one colour are alike. Where objects stand out from the background in colour, "
        "the network has parted them.",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "components": ("layer", "image", "row", "column", "component"),
        "explained_variance_ratio": ("layer", "component"),
        "auc": ("layer",),
        "auc_se": ("layer",),
        "outlier_share": ("layer",),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }

    def colours(self, model: int) -> np.ndarray:
        """(images, rows, columns, 4) RGBA from 0 to 1; transparent where there is no component."""
        rows, columns = self.meta["grids"][model]
        scores = self.components[model][:, :rows, :columns]
        found = np.zeros((*scores.shape[:-1], 4))
        for k in range(COUNT):
            known = np.isfinite(scores[..., k])
            if known.any():
                low, high = np.percentile(scores[..., k][known], (1, 99))
                scaled = (scores[..., k] - low) / (high - low if high > low else 1.0)
                found[..., k] = np.where(known, np.clip(scaled, 0, 1), 0)
        found[..., 3] = np.isfinite(scores[..., 0])
        return found

    def plot(self, ax: Any = None) -> Any:
        """The first images above, each model's colours below; on ``ax`` the first image's."""
        with drawing.style():
            if ax is not None:
                ax.imshow(self.colours(0)[0], interpolation="nearest")
                ax.set_axis_off()
                return ax
            count, shown = len(self.models), min(SHOWN, len(self.pictures))
            figure = drawing.new_figure(1.5 * shown + 1.3, 1.55 * (count + 1) + 0.5)
            axes = figure.subplots(count + 1, shown, squeeze=False)
            for picture, one in zip(self.pictures, axes[0]):
                one.imshow(picture, interpolation="nearest")
            for model, row in enumerate(axes[1:]):
                for image, one in zip(self.colours(model), row):
                    one.imshow(image, interpolation="nearest")
                share = self.explained_variance_ratio[model]
                label = f"{drawing.short(self.models[model], 22)}\n{self.layers[model]}\n"
                label += " + ".join(f"{100 * s:.0f}" for s in share if np.isfinite(s)) + " %"
                if np.isfinite(self.auc[model]):
                    label += f"\nAUC {self.auc[model]:.2f}"
                row[0].set_ylabel(label, fontsize=6.5)
            for one in axes.ravel():
                one.set(xticks=[], yticks=[])
                one.spines[:].set_visible(False)
            drawing.caption(figure, self._caption())
            return figure

    def _caption(self) -> str:
        text = drawing.provenance_line(self.meta)
        text += " Red, green, blue: components 1 to 3, one basis for all images of a model; per"
        text += " cent: share of the variance; signs: third moment positive."
        if self.meta["foreground"]:
            text += " Fitted to the patches on the positive side of the first component alone."
        if np.isfinite(self.auc).any():
            text += " AUC: first component against the object's mask."
        for name, share in zip(self.models, self.outlier_share):
            if share > 0:
                text += f" {share:.2%} of the patches of {name} have norms above {TIMES:g} medians"
                text += " and may take the first component."
        return text

    def findings(self) -> list[Finding]:
        """Oquab et al.'s Figure 1, where the object's place is known."""
        return oquab2023.findings(self)


GROUP = "tokens"
RESULT = PatchPCAResult


@dataclass(frozen=True)
class PatchPCA(Measurement):
    """Options of ``measure``."""

    layers: Choice = option(
        LAST, "last (default): the last block; or names with wildcards", nargs="+", metavar="L"
    )
    foreground: bool = option(
        False, "fit to the patches on the positive side of the first component", action="store_true"
    )

    analysis: ClassVar[str] = "patch_pca"

    def on(
        self, models: list[Model], images: Any, options: Options, shared: bool
    ) -> tuple[Measurement, Any, Options]:
        if shared:
            return replace(self, first=IMAGES), images, options
        opened = open_images(images, options.num_images, options.seed)
        if options.num_images is None and len(opened) > IMAGES:
            opened = opened.choose(np.arange(IMAGES))
        return self, opened, replace(options, num_images=None)

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self)


MEASUREMENT = PatchPCA


class _Watch(Watch):
    """The patches of the first images in one layer a model."""

    def __init__(self, ready: Session, asked: PatchPCA) -> None:
        self.foreground = asked.foreground
        self.n = min(len(ready.images), asked.first or len(ready.images))
        self.chosen = [_layer(ready, m, asked.layers) for m in range(len(ready.models))]
        self.labels = [layer.label for layer, _ in self.chosen]
        height, width = ready.example()[0].shape[-2:]
        sums = ready.sums(pictures=(self.n, 3, height, width), seen=(self.n,))
        for m, (_, places) in enumerate(self.chosen):
            size = self.n, len(places), places.features
            sums[f"patches{m}"] = torch.zeros(size, device=ready.device)
        super().__init__(ready, sums, {"layers": self.labels, "first": self.n})

    def watching(self, m: int, batch: Batch) -> Any:
        model, (layer, places) = self.ready.models[m], self.chosen[m]
        mine = np.flatnonzero(batch.positions < self.n)
        at = batch.positions[mine]
        if m == 0 and len(mine):
            self.sums["seen"][at] += 1
            self.sums["pictures"][at] += visible(model, batch.inputs[0][mine]).to(
                self.sums["pictures"]
            )

        def reduce(i: int, tensor: Tensor) -> None:
            patches = places.spatial(tensor[mine]).float()
            check_finite(torch.isfinite(patches).all(), layer.label, model)
            self.sums[f"patches{m}"][at] += patches

        return capture(model.module, [layer] if len(mine) else [], reduce)

    def result(self, meta: dict[str, Any]) -> PatchPCAResult:
        sums = {name: total.cpu().numpy() for name, total in self.sums.items()}
        kept = sums["seen"] > 0
        n, count = int(kept.sum()), len(self.chosen)
        high, wide = np.max([(places.rows, places.columns) for _, places in self.chosen], axis=0)
        scores = np.full((count, n, high, wide, COUNT), np.nan, np.float32)
        shares, areas, outliers = np.full((count, COUNT), np.nan), [], []
        for m, (_, places) in enumerate(self.chosen):
            patches = sums[f"patches{m}"][kept].reshape(-1, places.features)
            found, shares[m] = components(patches)
            areas.append(self._area(m, kept, found[:, 0].reshape(n, -1)))
            norms = np.linalg.norm(patches.astype(np.float64), axis=1)
            outliers.append((norms > TIMES * np.median(norms)).mean())
            if self.foreground:
                found, shares[m] = foreground_components(patches, found[:, 0])
            grid = n, places.rows, places.columns, COUNT
            scores[m, :, : places.rows, : places.columns] = found.reshape(grid)
        meta["n"], meta["foreground"] = n, self.foreground
        meta["grids"] = [[places.rows, places.columns] for _, places in self.chosen]
        auc, error = np.array(areas).T
        return PatchPCAResult(
            meta,
            components=scores,
            explained_variance_ratio=shares,
            auc=auc,
            auc_se=error,
            outlier_share=np.array(outliers),
            pictures=(255 * sums["pictures"][kept]).round().astype(np.uint8).transpose(0, 2, 3, 1),
            layers=np.array(self.labels),
            model_of_layer=np.arange(count),
        )

    def _area(self, m: int, kept: np.ndarray, first: np.ndarray) -> tuple[float, float]:
        """How well a model's first component finds the objects of scenes; NaN for other images."""
        model, places = self.ready.models[m], self.chosen[m][1]
        if self.ready.images.source != SCENES or model.transform is None:
            return np.nan, np.nan
        from PIL import Image

        from vitprobe.data.scenes import scenes

        order = self.ready.images.order[: self.n][kept]
        masks = scenes(int(order.max()) + 1, seed=self.ready.options.seed).mask[order]
        # Through the model's own transform, so that the truth lies where the image does.
        seen = [model.transform(Image.fromarray(mask).convert("RGB")) for mask in masks]
        shown = visible(model, torch.stack(seen)).mean(1, keepdim=True)
        size = places.rows, places.columns
        covered = torch.nn.functional.adaptive_avg_pool2d(shown, size)[:, 0] > 0.5
        return area_under_curve(first, covered.flatten(1).numpy())


def _layer(ready: Session, m: int, layers: Choice) -> OnGrid:
    """The layer of a model that is looked at: the last one of those that are chosen."""
    found = ready.layers(m)
    if layers in (LAST, [LAST]):
        return with_grids(ready, m, found.choose("blocks"))[-1]
    chosen, errors = [], []
    for name in words(layers):
        # Names of one model need not be names of another.
        try:
            chosen += found.choose(name)
        except VitprobeError as error:
            errors.append(error)
    if not chosen:
        raise errors[0]
    last = max(chosen, key=lambda layer: layer.time)
    return with_grids(ready, m, [last], last.label)[-1]


def measure(
    models: Any,
    images: Any = None,
    *,
    layers: Choice = LAST,
    foreground: bool = False,
    **options: Any,
) -> PatchPCAResult:
    """The first three principal components of the patches of a layer of each model.

    Args:
        models: specs (``vit_b16``, ``NAME@random``, ``NAME@FILE``), modules or ``Model``; one or a
            list.
        images: see ``open_images``; the bundled digit scenes by default, whose truth is known.
        layers: ``last`` (the last block that has a grid), or names with wildcards, each of which
            need not be in every model; of several the last one is taken.
        foreground: fit to the patches on the positive side of the first component alone.
        options: fields of ``running.Options`` (``num_images``, 16 by default, ``seed`` ...).

    Raises:
        VitprobeError: unknown models, images or layers; a layer without a grid of places;
            activations that are not finite.
    """
    asked = PatchPCA(layers=layers, foreground=foreground)
    return measure_one(asked, models, images, Options(**options))


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.patch_pca``."""
    return cli.command(PatchPCA, measure, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
