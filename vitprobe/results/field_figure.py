"""The figure of receptive fields: panels of fields, and their areas against depth."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

from vitprobe.results import drawing

SHARES = (0.5, 0.9)
MAX_PANELS = 8


def whole(result: Any) -> Any:
    """Fields of up to eight layers a model, linear and logarithmic, and areas against depth."""
    count = len(result.models)
    panels = min(MAX_PANELS, int(np.bincount(result.model_of_layer).max()))
    figure = drawing.new_figure(max(7.0, 1.25 * panels), 2.9 * count + 3.4)
    grid = figure.add_gridspec(count + 1, 1)
    for model in range(count):
        rows = grid[model].subgridspec(2, panels).subplots(squeeze=False)
        for axes, log in zip(rows, (False, True)):
            fields(result, figure, axes, model, log)
    areas(result, figure.add_subplot(grid[count]))
    drawing.caption(figure, caption(result))
    return figure


def fields(result: Any, figure: Any, axes: Any, model: int, log: bool) -> None:
    """Fields of a model's layers, each over its maximum, with the theoretical field as a box."""
    mine = result.rows_of(model)
    count = min(len(axes), len(mine))
    # Branches are shown beside the sums that follow them.
    together = 2 if result.meta["pre_residual"] else 1
    groups = mine.reshape(-1, together)
    at = np.linspace(0, len(groups) - 1, count // together).round().astype(int)
    chosen = groups[at].ravel()
    for one, layer in zip(axes, chosen):
        field = result.field(layer)
        shown = field / field.max() if field.max() > 0 else field
        if log:
            with np.errstate(divide="ignore"):
                shown = np.log10(shown).clip(-4, 0)
        image = drawing.heat_map(
            one, shown, vmin=-4 if log else 0, vmax=0 if log else 1, cmap="viridis"
        )
        # Images begin at their upper left.
        one.set(xticks=[], yticks=[], aspect="equal", ylim=(len(field) - 0.5, -0.5))
        if not log:
            one.set_title(drawing.short(str(result.layers[layer]), 20), fontsize=7)
        top, left, bottom, right = result.box[layer]
        if np.isfinite(top) and (bottom - top + 1, right - left + 1) != field.shape:
            size = right - left + 1, bottom - top + 1
            one.add_patch(
                Rectangle((left - 0.5, top - 0.5), *size, fill=False, color="white", lw=0.8)
            )
    for one in axes[count:]:
        one.axis("off")
    axes[0].set_ylabel(f"{drawing.short(result.models[model], 22)}\n{'log' if log else 'linear'}")
    axes[0].yaxis.label.set_size(7)
    bar = figure.colorbar(image, ax=axes, aspect=12, pad=0.01)
    if log:
        bar.set_ticks([-4, -2, 0], labels=["1e-4", "0.01", "1"])


def areas(result: Any, ax: Any) -> None:
    """Both areas against depth; untrained models dotted, in the colour of their name.

    Branches have lines of their own, dashed. Marks are hollow where the field reaches the border.
    """
    names = [name.removesuffix(" (random)") for name in result.models]
    reaching = result.reaching()

    def untrained(model: int) -> bool:
        return result.meta["models"][model]["weights"].startswith("random")

    for model, name in enumerate(result.models):
        rows = result.rows_of(model)
        depth = (np.arange(len(rows)) + 1) / len(rows)
        lines = {"": (rows, depth, ":" if untrained(model) else "-")}
        if result.meta["pre_residual"]:
            lines = {
                " branches": (rows[::2], depth[::2], "--"),
                " sums": (rows[1::2], depth[1::2], "-"),
            }
        colour = drawing.COLOURS[names.index(names[model]) % len(drawing.COLOURS)]
        for (what, (rows, depth, dashes)), share in product(lines.items(), SHARES):
            mean, error = (
                getattr(result, f"area{share * 100:.0f}{end}")[rows] for end in ("", "_se")
            )
            marker = "o" if share == SHARES[0] else "^"
            ax.plot(
                depth, mean, color=colour, marker=marker, markersize=3.5, linewidth=1.2,
                linestyle=dashes, label=f"{name}{what}, {share:.0%}",
            )  # fmt: skip
            cut = reaching[rows]
            ax.scatter(
                depth[cut], mean[cut], s=16, marker=marker, facecolor="white", edgecolor=colour,
                linewidth=1, zorder=3,
            )  # fmt: skip
            ax.fill_between(depth, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
    ax.set(xlabel="depth (fraction of the layers)", ylim=(0, None))
    ax.set_ylabel("area with 50 % and 90 %\nof the gradient (fraction of image)")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def caption(result: Any) -> str:
    """What is drawn, and how it was measured."""
    meta = result.meta
    text = drawing.provenance_line(meta)
    if meta["signed"]:
        text += " Signed: |mean over channels of ∂centre/∂input|, channels cancel."
    else:
        count = meta["channels"]
        text += " Mean |∂centre/∂input| over images, RGB and "
        if count == "all":
            text += "all channels."
        else:
            # Files of older versions have the same channels in every image.
            each = " and image" if "bias" in meta else ""
            text += f"channels, {count} per layer{each}, drawn at random."
    text += " Each panel divided by its maximum; box: theoretical field."
    if result.reaching().any():
        text += (
            " Hollow marks: the field reaches the border of the image, so the area is a share "
            "of the image, not how far a unit could see."
        )
    for name, layers in meta.get("without_gradient", {}).items():
        text += f" No gradient in {name}: {len(layers)} layers, the first {layers[0]}."
    return text + " Bands: one standard error, over images and channels."
