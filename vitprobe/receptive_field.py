"""The effective receptive field: how far the centre of every layer looks into the image.

Raghu et al. 2021 (arXiv 2108.08810), Figure 6 and C.1 to C.4; Luo et al. 2016.

The quantity: |∂ (a channel of a layer's centre location) / ∂ (input pixel)|, in units of the layer
per unit of the model's normalised input; its mean over channels, images and RGB. The centre is
index size // 2 of the grid; class tokens and registers have no place and are left out.

Choices made: the mean over images and channels is one expectation, so both are sampled at once:
every image has a channel of its own in every layer, drawn by the seed and stratified over the
channels (``channels=N`` draws N for each image, ``channels="all"`` takes every one). ``signed`` is
another quantity, |mean over channels of ∂|, in which channels cancel. ``pre_residual`` gives what
every residual branch adds, alone, beside the sum it goes into. Areas are the smallest fraction of
the image's pixels, wherever they lie, that holds a share of the mass. Sampled areas are too small
by what the noise of a mean over few images and channels does to a sorted field: the delete-half
jackknife's estimate of that is taken off (``meta["bias"]``). Standard errors are jackknifed over
images with their channels. A field that reaches the border of the image is cut off by it: its area
is then a share of the image, not a width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vitprobe import cli
from vitprobe.errors import BatchFailure, VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.models.loading import Model
from vitprobe.papers.raghu2021 import fields
from vitprobe.results import drawing, field_figure
from vitprobe.results.printing import on_terminal
from vitprobe.results.result import Finding, Result, Text, plain
from vitprobe.running import processes
from vitprobe.running.centre_plans import failed, no_gradient, plan_of
from vitprobe.running.heap import kept_for_reuse
from vitprobe.running.measurement import Measurement, Watch
from vitprobe.running.options import Options
from vitprobe.running.passes import measure_one
from vitprobe.running.session import Batch, Session
from vitprobe.statistics.fields import SHARES, reaches_border, summarise
from vitprobe.statistics.fields import area as area
from vitprobe.statistics.fields import centre_cell as centre_cell
from vitprobe.tracing.centre_gradients import Site, centres, frozen, rows_of_jacobian
from vitprobe.tracing.layers import Choice

CHANNELS, NUM_IMAGES, BATCH_SIZE = 1, 48, 8
# Into so many groups images are dealt out for standard errors; each holds every field once.
GROUPS = 16


@dataclass(frozen=True)
class ReceptiveFieldResult(Result):
    """Effective receptive fields of the centre of every layer.

    Attributes:
        gradient: (layers, H, W) mean |∂centre/∂input|, float32; where models see images of
            several sizes, smaller ones end in NaN.
        gradient_se: (layers, H, W) jackknife standard error, to three digits.
        area50: (layers,) fraction of the image that holds half of the mass.
        area50_se: (layers,) standard error.
        area90: (layers,) fraction of the image that holds nine tenths of the mass.
        area90_se: (layers,) standard error.
        centre: (layers,) fraction of the mass within the layer's own centre cell of the image.
        centre_se: (layers,) standard error.
        box: (layers, 4) theoretical field: first row, first column, last row, last column; NaN
            where there is no smaller one than the image.
        trends: (models, 5) ``area90`` of the lowest third of the layers on average, of the layer at
            half depth, of the highest third; how much more of the mass the
            centre cell holds at half depth than the largest other; and how much larger ``centre``
            is for the sums than for attention branches alone (NaN without ``pre_residual``).
        trends_se: (models, 5) standard error.
        layers: (layers,) names.
        model_of_layer: (layers,) index into ``meta["models"]``.
    """

    gradient: np.ndarray
    gradient_se: np.ndarray
    area50: np.ndarray
    area50_se: np.ndarray
    area90: np.ndarray
    area90_se: np.ndarray
    centre: np.ndarray
    centre_se: np.ndarray
    box: np.ndarray
    trends: np.ndarray
    trends_se: np.ndarray
    layers: np.ndarray
    model_of_layer: np.ndarray

    analysis: ClassVar[str] = "receptive_field"
    text: ClassVar[Text] = Text(
        "Effective receptive fields",
        "The mean absolute gradient of each layer's centre with respect to the input pixels; Raghu "
        "et al., Figures 6 and C.1 to C.4.",
        "From left to right through the layers; linear above, logarithmic below, each panel over "
        "its maximum. The lines give the share of the image that holds 50 % and 90 % of the "
        "gradient: a line that starts high sees far from the first layer on. Hollow marks: the "
        "field reaches the border of the image, which cuts it off.",
        "gradient, share of the panel's maximum (its log₁₀ in logarithmic rows)",
    )
    axes: ClassVar[dict[str, tuple[str, ...]]] = {
        "area50": ("layer",),
        "area50_se": ("layer",),
        "area90": ("layer",),
        "area90_se": ("layer",),
        "centre": ("layer",),
        "centre_se": ("layer",),
        "box": ("layer", "edge"),
        "trends": ("model", "trend"),
        "trends_se": ("model", "trend"),
        "gradient": ("layer", "row", "column"),
        "gradient_se": ("layer", "row", "column"),
        "layers": ("layer",),
        "model_of_layer": ("layer",),
    }
    names: ClassVar[dict[str, tuple[str, ...]]] = {
        "edge": ("first row", "first column", "last row", "last column"),
        "trend": (
            "area90, lowest third",
            "area90, half depth",
            "area90, highest third",
            "centre cell minus largest other, half depth",
            "centre, sum minus attention",
        ),
    }

    def field(self, layer: int) -> np.ndarray:
        """(H, W) of a layer, without the end that pads it."""
        rows, columns = self.meta["sides"][self.model_of_layer[layer]]
        return self.gradient[layer, :rows, :columns]

    def plot(self, ax: Any = None) -> Any:
        """Fields of up to eight layers a model, linear and logarithmic, and areas against depth.

        On ``ax``, the areas.
        """
        with drawing.style():
            if ax is not None:
                field_figure.areas(self, ax)
                return ax
            return field_figure.whole(self)

    def _caption(self) -> str:
        return field_figure.caption(self)

    def reaching(self) -> np.ndarray:
        """(layers,) whether the area with 90 % of the gradient is cut off by the border."""
        fields = (self.field(layer) for layer in range(len(self.layers)))
        return np.array([reaches_border(torch.from_numpy(f), SHARES[1]) for f in fields])

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claims of Figure 6 and C for every ViT, CNN and pair of them."""
        return fields.fields(self)


GROUP = "tokens"
RESULT = ReceptiveFieldResult


@dataclass(frozen=True)
class ReceptiveField(Measurement):
    """Options of ``measure``."""

    layers: Choice = "blocks"
    channels: int | str = CHANNELS
    signed: bool = False
    pre_residual: bool = False

    analysis: ClassVar[str] = "receptive_field"
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        channels = self.channels
        if channels != "all" and (not isinstance(channels, int) or channels < 1):
            raise VitprobeError(f"--channels: expected all or a number above 0, not {channels!r}.")

    def on(
        self, models: list[Model], images: Any, options: Options, shared: bool
    ) -> tuple[Measurement, Any, Options]:
        count = options.num_images
        if count is None or shared:
            there = NUM_IMAGES if images is None else len(open_images(images))
            count = min(NUM_IMAGES, there, count or there)
        if shared:
            # A graph of gradients takes smaller batches than plain passes.
            options = replace(options, batch_size=min(BATCH_SIZE, options.batch_size))
        return self, images, replace(options, num_images=count)

    def prepare(self, ready: Session) -> Watch:
        return _Watch(ready, self)


class _Watch(Watch):
    """Fields of all chosen layers of all models, summed by groups of images."""

    def __init__(self, ready: Session, asked: ReceptiveField) -> None:
        self.asked, self.modules = asked, [model.module for model in ready.models]
        with frozen(self.modules):
            self.plans = [
                plan_of(
                    ready, m, asked.layers, asked.channels, asked.signed, asked.pre_residual, GROUPS
                )
                for m in range(len(self.modules))
            ]
        labels = [site.label for plan in self.plans for site in plan.sites]
        # The last column counts how many gradients are summed.
        shapes = [(GROUPS, len(plan.sites), plan.side[0] * plan.side[1] + 1) for plan in self.plans]
        super().__init__(
            ready,
            ready.sums(**{f"images_{m}": shape for m, shape in enumerate(shapes)}),
            {"layers": labels, "channels": asked.channels, "signed": asked.signed},
        )

    def end(self, batch: Batch) -> None:
        count = sum(len(plan.sites) * -(-len(batch) // plan.at_once) for plan in self.plans)
        silent = self.ready.options.quiet or not on_terminal(sys.stderr)
        silent = silent or not processes.is_main_process()
        progress = tqdm(
            total=count,
            unit=" layers",
            dynamic_ncols=True,
            disable=silent,
            leave=False,
            position=1,
        )
        with frozen(self.modules), kept_for_reuse(), progress:
            for m, plan in enumerate(self.plans):
                for start in range(0, len(batch), plan.at_once):
                    piece = slice(start, start + plan.at_once)
                    for _ in self._add(m, batch.inputs[m][piece], batch.positions[piece]):
                        progress.update()

    def _add(self, m: int, pixels: Tensor, positions: np.ndarray) -> Iterator[None]:
        """|Gradients| of some images into the sums, layer by layer; yields after each."""
        plan, table = self.plans[m], self.sums[f"images_{m}"]
        model, inputs = self.ready.models[m], pixels.detach().requires_grad_()
        # Side by side is faster where launches cost more than arithmetic; on CPU it is slower.
        on_card = self.ready.device.type == "cuda"
        together = max(1, plan.at_once // len(positions)) if on_card else 1
        group = torch.from_numpy(positions % GROUPS).to(table.device)
        found = centres(model.module, plan.sites, inputs, self.ready.autocast)
        for i, (site, centre) in enumerate(zip(plan.sites, found)):
            if centre.cut:
                raise no_gradient(model.name, site.label, centre.cut)
            total: Any = 0
            cotangents = self._cotangents(site, plan.drawn[i], positions)
            try:
                for row in rows_of_jacobian(centre.value, inputs, cotangents, together):
                    # The mean over RGB.
                    total = total + row.abs().mean(1).flatten(1)
            except RuntimeError as error:
                raise failed(model.name, error) from error
            if not torch.isfinite(total).all():
                raise BatchFailure(
                    f"The gradient of layer {site.label} of {model.name} is not finite; it is the "
                    f"first such layer."
                )
            table[:, i, :-1].index_add_(0, group, total.to(table.device).double())
            counts = torch.full((len(positions),), float(len(cotangents))).to(table)
            table[:, i, -1].index_add_(0, group, counts)
            yield

    def _cotangents(self, site: Site, drawn: Tensor | None, positions: np.ndarray) -> Tensor:
        """(k, channels) or (k, n, channels): what is differentiated."""
        if self.asked.signed:
            return torch.full((1, site.channels), 1 / site.channels)
        everything = torch.eye(site.channels)
        return everything if drawn is None else everything[drawn[positions].T]

    def result(self, meta: dict[str, Any]) -> ReceptiveFieldResult:
        asked, plans, tables = self.asked, self.plans, list(self.sums.values())
        names = [model.name for model in self.ready.models]
        meta |= {
            "channels": asked.channels,
            "signed": asked.signed,
            "pre_residual": asked.pre_residual,
            "replicates": int((tables[0][:, 0, -1] > 0).sum()),
            "sides": [plan.side for plan in plans],
            "attends": [plan.attends for plan in plans],
            "without_gradient": {n: plan.cut for n, plan in zip(names, plans) if plan.cut},
        }
        found = [
            summarise(
                table, plan.side, [(site.places.rows, site.places.columns) for site in plan.sites],
                [i for i, site in enumerate(plan.sites) if site.branch and site.layer.addition
                 and site.layer.addition.attends],
                correct=any(one is not None for one in plan.drawn),
            )
            for plan, table in zip(plans, tables)
        ]  # fmt: skip
        meta["bias"] = {
            name: [plain(one) for part in found for one in part.bias[i]]
            for i, name in enumerate(("area50", "area90"))
        }
        most = np.max([plan.side for plan in plans], axis=0)

        def padded(field: np.ndarray) -> np.ndarray:
            ends = [(0, int(one)) for one in most - field.shape[1:]]
            return np.pad(field, [(0, 0), *ends], constant_values=np.nan)

        arrays = [np.concatenate([padded(part.field[end]) for part in found]) for end in (0, 1)]
        arrays += [
            np.concatenate([part.scalars[end][i] for part in found])
            for i in range(3) for end in (0, 1)
        ]  # fmt: skip
        arrays.append(
            np.array([box or [np.nan] * 4 for plan in plans for box in plan.boxes], dtype=float)
        )
        arrays += [np.stack([part.trends[end] for part in found]) for end in (0, 1)]
        arrays.append(np.array([site.label for plan in plans for site in plan.sites]))
        arrays.append(np.repeat(np.arange(len(plans)), [len(plan.sites) for plan in plans]))
        return ReceptiveFieldResult(meta, *arrays)


MEASUREMENT = ReceptiveField


def measure(
    models: Any,
    images: Any = None,
    *,
    layers: Choice = "blocks",
    channels: int | str = CHANNELS,
    signed: bool = False,
    pre_residual: bool = False,
    num_images: int | None = None,
    batch_size: int = BATCH_SIZE,
    **options: Any,
) -> ReceptiveFieldResult:
    """Effective receptive fields of the centre of layers of one model or several.

    Args:
        models: specs, modules or ``Model``; one or a list. ``NAME`` and ``NAME@random`` together
            show trained beside untrained.
        images: see ``open_images``; the bundled digit scenes by default.
        layers: ``blocks``, ``paper``, ``all``, or names with wildcards. Those without places on the
            image (pooled vectors, mixtures of all tokens), and those that no gradient leads from
            to the image, are left out; of the latter a line tells.
        channels: how many channels of a layer are drawn for each image, or ``all``.
        signed: |mean over channels of ∂|, another quantity: channels cancel.
        pre_residual: instead of the layers, the residual additions of their modules: what the
            branch adds, and the sum.
        num_images: how many images; 48 by default, or as many as there are.
        batch_size: images per batch. The graph of one batch is in memory, or of as much of it as
            fits into half of what is free.
        options: further fields of ``running.Options``.

    Raises:
        VitprobeError: unknown models, images or layers; no layer with places; no layer with a
            gradient; gradients that are not finite.
    """
    asked = ReceptiveField(layers, channels, signed, pre_residual)
    given = Options(num_images=num_images, batch_size=batch_size, **options)
    return measure_one(asked, models, images, given)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.receptive_field``."""
    parser = cli.parser("receptive_field", __doc__)
    add = parser.add_argument
    add("--channels", type=lambda text: text if text == "all" else int(text), default=CHANNELS,
        metavar="N", help="channels of a layer drawn for each image, or all (%(default)s)",
    )  # fmt: skip
    add("--signed", action="store_true", help="|mean over channels|, in which channels cancel")
    add("--pre-residual", action="store_true", help="what residual branches add, beside the sums")
    parser.set_defaults(batch_size=BATCH_SIZE)
    return cli.run(
        parser,
        argv,
        "receptive_field",
        lambda args: measure(
            args.models, args.images, layers=args.layers, channels=args.channels,
            signed=args.signed, pre_residual=args.pre_residual,
            **cli.options(args, "receptive_field"),
        ),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
