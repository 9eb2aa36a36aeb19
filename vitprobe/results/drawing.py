"""One style for all figures: heat maps, layer axes, captions, saving.

Figures are made without pyplot: no display is needed, nothing global changes, nothing is shown.
"""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitprobe.errors import shown
from vitprobe.results.fonts import families, missing_letters_told

DPI = 150
MAX_NAMED_LAYERS = 26
# Okabe and Ito's palette, which stays apart for the colour-blind; models keep their colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SEQUENTIAL = "magma"
DIVERGING = "RdBu_r"

_STYLE: Any = {
    # Names of folders, files, models and layers are no formulas, whatever they hold.
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLOURS),
    "image.interpolation": "nearest",
    "svg.hashsalt": "vitprobe",
    # Conferences refuse Type 3 fonts; text that stays text can be searched and edited.
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "hatch.linewidth": 0.5,
}


def style() -> AbstractContextManager[Any]:
    """The style, for as long as a figure is being drawn."""
    return matplotlib.rc_context({**_STYLE, "font.family": families()})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, with room made for labels."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_map(
    ax: Any, values: np.ndarray, *, vmin: float, vmax: float, cmap: str = SEQUENTIAL
) -> Any:
    """A matrix with its origin at the lower left; undefined cells (NaN) are hatched."""
    ax.patch.set(facecolor="0.92", edgecolor="0.6", hatch="////")
    image = ax.imshow(
        np.ma.masked_invalid(values),
        origin="lower", aspect="auto", vmin=vmin, vmax=vmax, cmap=cmap, interpolation="nearest",
    )  # fmt: skip
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def layer_axis(axis: Any, names: Sequence[str], label: str) -> None:
    """Ticks for layers: their names while they can be read, their numbers beyond that.

    All names stay with the axis as ``layer_names``, for pages that show more than ticks.
    """
    axis.layer_names = list(names)
    count = len(names)
    if count <= MAX_NAMED_LAYERS:
        axis.set_ticks(range(count), [short(name) for name in names], parse_math=False)
        if axis.axis_name == "x":
            axis.set_tick_params(rotation=90)
    else:
        axis.set_major_locator(MaxNLocator(8, integer=True))
        label = ", ".join(filter(None, [label, f"layer 0–{count - 1}"]))
    axis.set_tick_params(labelsize=7, length=2)
    axis.set_label_text(label)


def short(name: str, width: int = 24) -> str:
    """A layer's name, its middle left out where it is long."""
    name = shown(name)
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[-(width // 2) :]}"


def caption(figure: Figure, text: str) -> None:
    """Small lines under the figure, as wide as it is: n, weights, choices."""
    text = wrapped(figure, shown(text), 18)
    figure.supxlabel(text, fontsize=6.5, color="0.35", parse_math=False)


def wrapped(figure: Figure, text: str, letters_per_inch: float) -> str:
    """The text in lines that fit the figure."""
    return "\n".join(textwrap.wrap(text, int(letters_per_inch * figure.get_figwidth())))


def titled(figure: Figure, title: str) -> Figure:
    """The figure with a title over all of its panels, if that is not empty."""
    if title:
        title = wrapped(figure, shown(title), 11)
        figure.suptitle(title, fontsize=10, fontweight="bold", parse_math=False)
    return figure


def provenance_line(meta: dict[str, Any]) -> str:
    """``n = 512 images of NAME; A: weights; B: weights``."""
    models = "; ".join(f"{m['name']}: {m['weights']}" for m in meta["models"])
    images = meta.get("images")
    if not images:
        return f"{models}."
    skipped = len(images.get("skipped", ()))
    without = f" ({skipped:,} left out for values not finite)" if skipped else ""
    return f"n = {meta['n']:,} images of {images['source']}{without}. {models}."


def render(figure: Figure, file_format: str) -> bytes:
    """The figure as the bytes of a file, the same for the same figure."""
    buffer = io.BytesIO()
    stamp: dict[str, Any] = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    options: Any = {"pil_kwargs": {"optimize": True}} if file_format == "png" else {}
    with style(), missing_letters_told(), warnings.catch_warnings():
        # On a busy machine placing a legend can take a second: that is no fault of the figure.
        warnings.filterwarnings("ignore", message="Creating legend with loc")
        figure.savefig(
            buffer, format=file_format, dpi=DPI, metadata=stamp.get(file_format), **options
        )
    return buffer.getvalue()
