"""The effective receptive field: how far the centre of every layer looks into the picture.

Raghu et al. 2021 (arXiv 2108.08810), Figure 6 and C.1 to C.4; Luo et al. 2016.

The quantity: |∂ (a channel of a layer's centre location) / ∂ (input pixel)|, in units of the layer
per unit of the model's normalised input; its mean over channels, images and RGB. The centre is
index size // 2 of the grid; class tokens and registers have no place and are left out.

Choices made: a random subset of channels, drawn by the seed, estimates the mean over all of them
(``channels="all"`` for every one). ``signed`` is another quantity, |mean over channels of ∂|, in
which channels cancel. ``pre_residual`` gives what every residual branch adds, alone, beside the sum
it goes into. Areas are the smallest fraction of the picture's pixels, wherever they lie, that holds
a share of the mass. Standard errors are jackknifed over images and over the channels drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.patches import Rectangle
from torch import Tensor
from torch.nn import functional as F

from vitprobe import cli
from vitprobe.errors import NotApplicable, VitprobeError
from vitprobe.images.sources import open_images
from vitprobe.results import drawing
from vitprobe.results.result import Finding, Result, Text, combine, decide, plus_minus
from vitprobe.running.loop import run
from vitprobe.running.session import Batch, Options, Session, Sums, session
from vitprobe.statistics.hsic import jackknife
from vitprobe.tracing.centre_gradients import Site, centres, frozen, rows_of_jacobian
from vitprobe.tracing.layers import map_layers
from vitprobe.tracing.places import Places, find_places
from vitprobe.tracing.theoretical_field import theoretical_fields

CHANNELS, NUM_IMAGES, BATCH_SIZE = 32, 32, 8
GROUPS = 8
SHARES = (0.5, 0.9)
MAX_PANELS = 8
# Where the paper says "gradually" and "global", a number has to be chosen: these are ours.
GROWTH, GLOBAL_AREA = 0.1, 0.5


def area(gradient: Tensor, share: float) -> Tensor:
    """Smallest fraction of the pixels (..., H, W) that holds a share of the mass; NaN for none."""
    mass = gradient.flatten(-2).sort(-1, descending=True).values.cumsum(-1)
    needed = (mass < share * mass[..., -1:]).sum(-1) + 1
    fraction = needed.double() / mass.shape[-1]
    return fraction.where(mass[..., -1] > 0, torch.nan)


def centre_cell(gradient: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The centre cell of a grid over the picture (H, W), as a fraction of the whole mass.

    Returns:
        its mass, and how much more that is than the mass of the largest other cell.
    """
    cells = F.adaptive_avg_pool2d(gradient[None], grid)[0].flatten()
    cells = cells / cells.sum()
    middle = grid[0] // 2 * grid[1] + grid[1] // 2
    others = torch.cat([cells[:middle], cells[middle + 1 :], cells.new_zeros(1)])
    return cells[middle], cells[middle] - others.max()


@dataclass(frozen=True)
class ReceptiveFieldResult(Result):
    """Effective receptive fields of the centre of every layer.

    Attributes:
        gradient: (layers, H, W) mean |∂centre/∂input|, float32; where models see pictures of
            several sizes, smaller ones end in NaN.
        gradient_se: (layers, H, W) jackknife standard error.
        area50: (layers,) fraction of the picture that holds half of the mass.
        area50_se: (layers,) standard error.
        area90: (layers,) fraction of the picture that holds nine tenths of the mass.
        area90_se: (layers,) standard error.
        centre: (layers,) fraction of the mass within the layer's own centre cell of the picture.
        centre_se: (layers,) standard error.
        box: (layers, 4) theoretical field: first row, first column, last row, last column; NaN
            where there is no smaller one than the picture.
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
        "its maximum. The lines give the share of the picture that holds 50 % and 90 % of the "
        "gradient: a line that starts high sees far from the first layer on.",
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
                self._areas(ax)
                return ax
            count = len(self.models)
            panels = min(MAX_PANELS, int(np.bincount(self.model_of_layer).max()))
            figure = drawing.new_figure(max(7.0, 1.25 * panels), 2.9 * count + 3.4)
            grid = figure.add_gridspec(count + 1, 1)
            for model in range(count):
                rows = grid[model].subgridspec(2, panels).subplots(squeeze=False)
                for axes, log in zip(rows, (False, True)):
                    self._fields(figure, axes, model, log)
            self._areas(figure.add_subplot(grid[count]))
            drawing.caption(figure, self._caption())
            return figure

    def _fields(self, figure: Any, axes: Any, model: int, log: bool) -> None:
        mine = self.rows_of(model)
        count = min(len(axes), len(mine))
        # Branches are shown beside the sums that follow them.
        together = 2 if self.meta["pre_residual"] else 1
        groups = mine.reshape(-1, together)
        at = np.linspace(0, len(groups) - 1, count // together).round().astype(int)
        chosen = groups[at].ravel()
        for one, layer in zip(axes, chosen):
            field = self.field(layer)
            shown = field / field.max() if field.max() > 0 else field
            if log:
                with np.errstate(divide="ignore"):
                    shown = np.log10(shown).clip(-4, 0)
            image = drawing.heat_map(
                one, shown, vmin=-4 if log else 0, vmax=0 if log else 1, cmap="viridis"
            )
            # Pictures begin at their upper left.
            one.set(xticks=[], yticks=[], aspect="equal", ylim=(len(field) - 0.5, -0.5))
            if not log:
                one.set_title(drawing.short(str(self.layers[layer]), 20), fontsize=7)
            top, left, bottom, right = self.box[layer]
            if np.isfinite(top) and (bottom - top + 1, right - left + 1) != field.shape:
                size = right - left + 1, bottom - top + 1
                one.add_patch(
                    Rectangle((left - 0.5, top - 0.5), *size, fill=False, color="white", lw=0.8)
                )
        for one in axes[count:]:
            one.axis("off")
        axes[0].set_ylabel(f"{drawing.short(self.models[model], 22)}\n{'log' if log else 'linear'}")
        axes[0].yaxis.label.set_size(7)
        bar = figure.colorbar(image, ax=axes, aspect=12, pad=0.01)
        if log:
            bar.set_ticks([-4, -2, 0], labels=["1e-4", "0.01", "1"])

    def _areas(self, ax: Any) -> None:
        """Both areas against depth; untrained models dotted, in the colour of their name.

        Branches have lines of their own, dashed.
        """
        names = [name.removesuffix(" (random)") for name in self.models]
        for model, name in enumerate(self.models):
            rows = self.rows_of(model)
            depth = (np.arange(len(rows)) + 1) / len(rows)
            lines = {"": (rows, depth, ":" if self._untrained(model) else "-")}
            if self.meta["pre_residual"]:
                lines = {
                    " branches": (rows[::2], depth[::2], "--"),
                    " sums": (rows[1::2], depth[1::2], "-"),
                }
            colour = drawing.COLOURS[names.index(names[model]) % len(drawing.COLOURS)]
            for (what, (rows, depth, dashes)), share in product(lines.items(), SHARES):
                mean, error = (
                    getattr(self, f"area{share * 100:.0f}{end}")[rows] for end in ("", "_se")
                )
                ax.plot(
                    depth, mean, color=colour, marker="o" if share == SHARES[0] else "^",
                    markersize=3.5, linewidth=1.2, linestyle=dashes,
                    label=f"{name}{what}, {share:.0%}",
                )  # fmt: skip
                ax.fill_between(depth, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
        ax.set(xlabel="depth (fraction of the layers)", ylim=(0, None))
        ax.set_ylabel("area with 50 % and 90 %\nof the gradient (fraction of picture)")
        ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    def _untrained(self, model: int) -> bool:
        return self.meta["models"][model]["weights"].startswith("random")

    def _caption(self) -> str:
        meta = self.meta
        text = drawing.provenance_line(meta)
        if meta["signed"]:
            text += " Signed: |mean over channels of ∂centre/∂input|, channels cancel."
        else:
            text += " Mean |∂centre/∂input| over images, RGB and "
            text += "all channels." if meta["channels"] == "all" else (
                f"{meta['channels']} random channels a layer."
            )  # fmt: skip
        text += " Each panel divided by its maximum; box: theoretical field."
        return text + " Bands: one standard error, over images and channels."

    def findings(self) -> list[Finding]:
        """Raghu et al.'s claims of Figure 6 and C for every ViT, CNN and pair of them."""
        source, attends = "Raghu et al. 2021, Fig. 6", self.meta["attends"]
        trend = np.stack([self.trends, self.trends_se], axis=2).tolist()
        text = "area with 90 % of the gradient"
        found = []
        decided = partial(decide, replicates=self.meta.get("replicates"))
        for model, name in enumerate(self.models):
            low, middle, high, peak, less = trend[model]
            if not attends[model]:
                growth = high[0] - low[0], float(np.hypot(high[1], low[1]))
                claim, verdict = f"the field of {name} grows gradually", decided(*growth, GROWTH)
                numbers = (
                    f"{text}: lowest third {plus_minus(*low)}, half depth {plus_minus(*middle)}, "
                    f"highest third {plus_minus(*high)} (more than {GROWTH} growth asked)"
                )
            else:
                claim = f"{name} is global by half depth, and its centre patch dominates"
                verdict = combine([decided(middle[0], middle[1], GLOBAL_AREA), decided(*peak)])
                numbers = (
                    f"{text} at half depth {plus_minus(*middle)} ({GLOBAL_AREA} asked); share of "
                    f"the centre patch minus the largest other's {plus_minus(*peak)}"
                )
            found.append(Finding(claim, source, verdict, numbers))
            if np.isfinite(less[0]):
                claim = f"attention alone is less centred on its own place than the sum in {name}"
                numbers = f"share of the centre cell, sum minus attention: {plus_minus(*less)}"
                found.append(Finding(claim, f"{source}, C.4", decided(*less), numbers))
        for a, b in product(np.flatnonzero(attends), np.flatnonzero(~np.array(attends))):
            (vit, vit_se), (cnn, cnn_se) = trend[a][0], trend[b][0]
            found.append(
                Finding(
                    f"low layers of {self.models[a]} look farther than those of {self.models[b]}",
                    source,
                    decided(vit - cnn, float(np.hypot(vit_se, cnn_se))),
                    f"{text}, lowest third: {plus_minus(vit, vit_se)} and "
                    f"{plus_minus(cnn, cnn_se)}",
                )
            )
        return found


GROUP = "tokens"
RESULT = ReceptiveFieldResult


def measure(
    models: Any,
    images: Any = None,
    *,
    layers: str | Sequence[str] = "blocks",
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
            image (pooled vectors, mixtures of all tokens) are left out.
        channels: how many random channels of a layer, or ``all``.
        signed: |mean over channels of ∂|, another quantity: channels cancel.
        pre_residual: instead of the layers, the residual additions of their modules: what the
            branch adds, and the sum.
        num_images: how many images; 32 by default, or as many as there are.
        batch_size: images a batch. The graph of one batch is in memory, and gradients of at most
            so many images are computed side by side.
        options: further fields of ``running.session.Options``.

    Raises:
        VitprobeError: unknown models, images or layers; no layer with places; gradients that are
            not finite.
    """
    if channels != "all" and (not isinstance(channels, int) or channels < 1):
        raise VitprobeError(f"--channels: expected all or a number above 0, not {channels!r}.")
    if num_images is None:
        there = NUM_IMAGES if images is None else len(open_images(images))
        num_images = min(NUM_IMAGES, there)
    settings = Options(num_images=num_images, batch_size=batch_size, **options)
    # Backward passes take as long channels last.
    with session(models, images, settings, lay_out=False) as ready:
        with frozen([model.module for model in ready.models]):
            plans = []
            for m, example in enumerate(ready.example()):
                plans.append(_plan(ready, m, example, layers, channels, signed, pre_residual))
            sums = ready.sums(**{
                f"{table}_{m}": (GROUPS, len(plan.sites), plan.side[0] * plan.side[1] + 1)
                for m, plan in enumerate(plans) for table in ("channels", "images")
            })  # fmt: skip

            def step(batch: Batch) -> None:
                for m, plan in enumerate(plans):
                    _step(ready, batch, m, plan, sums)

            labels = [site.label for plan in plans for site in plan.sites]
            facts = {"layers": labels, "channels": channels, "signed": signed}
            run(ready, step, sums, decides={"analysis": "receptive_field", **facts}, gradients=True)
        meta = ready.meta("receptive_field")
    meta |= {"channels": channels, "signed": signed, "pre_residual": pre_residual}
    meta["replicates"] = min(GROUPS, meta["n"])
    meta |= {"sides": [plan.side for plan in plans], "attends": [plan.attends for plan in plans]}
    rows, columns = np.max([plan.side for plan in plans], axis=0)
    parts: list[list[np.ndarray]] = [[] for _ in range(8)]
    trends = []
    for m, plan in enumerate(plans):
        field, scalars, trend = _summarise(plan, sums[f"channels_{m}"], sums[f"images_{m}"])
        padding = [(0, 0), (0, rows - plan.side[0]), (0, columns - plan.side[1])]
        padded = [np.pad(one, padding, constant_values=np.nan) for one in field]
        for part, one in zip(parts, (*padded, *scalars)):
            part.append(one)
        trends.append(trend)
    boxes = [box or [np.nan] * 4 for plan in plans for box in plan.boxes]
    owner = np.repeat(np.arange(len(plans)), [len(plan.sites) for plan in plans])
    arrays = [np.concatenate(part) for part in parts]
    arrays += [np.array(boxes, dtype=float), *np.stack(trends, axis=1), np.array(labels), owner]
    return ReceptiveFieldResult(meta, *arrays)


@dataclass(frozen=True)
class _Plan:
    """The sites of a model and the directions in their channels that are differentiated."""

    sites: list[Site]
    cotangents: list[Tensor]  # (k, channels) each
    left_out: list[float]  # fraction of the channels that were not drawn
    boxes: list[tuple[int, int, int, int] | None]
    side: tuple[int, int]
    attends: bool


def _plan(
    ready: Session,
    m: int,
    example: Tensor,
    layers: str | Sequence[str],
    channels: int | str,
    signed: bool,
    pre_residual: bool,
) -> _Plan:
    model, side = ready.models[m], (example.shape[-2], example.shape[-1])
    with ready.autocast():
        found = map_layers(model.name, model.module, example)
        chosen = found.choose(layers)
        if pre_residual:
            owners = {layer.module for layer in chosen}
            chosen = [la for la in found.layers if la.addition and la.module in owners]
        sites = []
        for layer, places in zip(chosen, find_places(model.module, chosen, example)):
            if not isinstance(places, Places):
                continue
            if pre_residual:
                label = layer.label.replace(" sum", " branch")
                sites.append(Site(label, layer, places, branch=True))
            sites.append(Site(layer.label, layer, places))
        if not sites:
            raise NotApplicable(
                f"--layers: none of these layers of {model.name} has a centre.", model.name
            )
        # A branch stands before the sum that it goes into, and sees no farther.
        whole = [site for site in sites if not site.branch]
        at = [site.centre for site in whole]
        boxes = theoretical_fields(model.module, [s.layer for s in whole], at, example[:1])
        boxes = [box for box in boxes for _ in range(2 if pre_residual else 1)]
    cotangents, left_out = [], []
    for site in sites:
        count = site.channels
        if signed:
            cotangents.append(torch.full((1, count), 1 / count))
            left_out.append(0.0)
            continue
        # The branch and the sum of an addition are compared on the same channels.
        generator = torch.Generator().manual_seed(ready.options.seed)
        drawn = torch.randperm(count, generator=generator)
        drawn = drawn if channels == "all" else drawn[: int(channels)]
        cotangents.append(torch.eye(count)[drawn])
        left_out.append(1 - len(drawn) / count)
    return _Plan(sites, cotangents, left_out, boxes, side, found.has_attention)


def _step(ready: Session, batch: Batch, m: int, plan: _Plan, sums: Sums) -> None:
    """Add |gradients| of a batch to the tables by channel and by image; the last column counts."""
    model, inputs = ready.models[m], batch.inputs[m].detach().requires_grad_()
    by_channel, by_image = sums[f"channels_{m}"], sums[f"images_{m}"]
    # Side by side is faster where launches cost more than arithmetic; on CPU it is slower.
    together = ready.options.batch_size // len(batch) if ready.device.type == "cuda" else 1

    def forward() -> None:
        with ready.autocast():
            model.module(inputs)

    group = torch.from_numpy(batch.positions % GROUPS).to(by_image.device)
    for i, centre in enumerate(centres(model.module, plan.sites, forward)):
        cotangents = plan.cotangents[i]
        total: Any = 0
        for k, row in enumerate(rows_of_jacobian(centre, inputs, cotangents, max(1, together))):
            # (n, pixels), the mean over RGB.
            size = row.abs().mean(1).flatten(1)
            total = total + size
            by_channel[k % GROUPS, i, :-1] += size.sum(0).to(by_channel.device).double()
            by_channel[k % GROUPS, i, -1] += len(batch)
        sizes = total.to(by_image.device).double()
        if not torch.isfinite(sizes).all():
            raise VitprobeError(
                f"The gradient of layer {plan.sites[i].label} of {model.name} is not finite; it "
                f"is the first such layer."
            )
        by_image[:, i, :-1].index_add_(0, group, sizes)
        counts = torch.full((len(batch),), float(len(cotangents))).to(by_image)
        by_image[:, i, -1].index_add_(0, group, counts)


def _summarise(plan: _Plan, by_channel: Tensor, by_image: Tensor) -> tuple[Any, Any, Any]:
    """(field, error), (area50, error, ...), (trends, error) of a model."""
    count, third = len(plan.sites), max(1, len(plan.sites) // 3)
    middle = max(0, (count + 1) // 2 - 1)
    attention = [
        i for i, site in enumerate(plan.sites)
        if site.branch and site.layer.addition and site.layer.addition.attends
    ]  # fmt: skip

    def statistic(table: Tensor) -> Tensor:
        field = (table[:, :-1] / table[:, -1:]).unflatten(1, plan.side)
        scalars = [area(field, share) for share in SHARES]
        cells = [
            centre_cell(one, (site.places.rows, site.places.columns))
            for one, site in zip(field, plan.sites)
        ]
        scalars.append(torch.stack([share for share, _ in cells]))
        wide, centre = scalars[1:]
        # A branch is followed by the sum that it goes into.
        less = [centre[i + 1] - centre[i] for i in attention] or [centre.new_tensor(torch.nan)]
        trends = [wide[:third].mean(), wide[middle], wide[-third:].mean(), cells[middle][1],
                  torch.stack(less).mean()]  # fmt: skip
        return torch.cat([field.flatten(), *scalars, torch.stack(trends)])

    value, among_images = jackknife(statistic, by_image, (by_image[..., -1] > 0).any(1))
    _, among_channels = jackknife(statistic, by_channel, (by_channel[..., -1] > 0).any(1))
    # Drawn without replacement: nothing is uncertain once all channels are there.
    rest, pixels = np.sqrt(plan.left_out), plan.side[0] * plan.side[1]
    share = np.concatenate([rest.repeat(pixels), rest, rest, rest, np.full(5, rest.max())])
    among_channels = np.where(share > 0, share * among_channels, 0)
    error = np.hypot(among_images, among_channels)
    ends = np.cumsum([count * pixels, count, count, count])
    parts = [np.split(one, ends) for one in (value, error)]
    field = [part[0].reshape(count, *plan.side).astype(np.float32) for part in parts]
    scalars = [part[i] for i in (1, 2, 3) for part in parts]
    return field, scalars, [part[4] for part in parts]


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m vitprobe.receptive_field``."""
    parser = cli.parser("receptive_field", __doc__)
    add = parser.add_argument
    add("--channels", type=lambda text: text if text == "all" else int(text), default=CHANNELS,
        metavar="N", help="random channels a layer, or all (%(default)s)")  # fmt: skip
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
