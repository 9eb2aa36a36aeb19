"""``vitprobe.layers`` and ``vitprobe layers``: what a model has, before any measurement.

    table = vitprobe.layers("vit_b16")
    table  # in a notebook: every layer with its shape, kind and grid, and what can be measured
    [row["name"] for row in table if row["kind"] == "attention"]

A name of the table, given to ``--layers`` or ``layers=``, selects that layer and no other.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitprobe import cli
from vitprobe.catalogue import measurements
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import Model, load_models
from vitprobe.results.printing import as_table
from vitprobe.running.applicability import applicable, at_stand_ins, example_of
from vitprobe.running.options import Options
from vitprobe.running.session import Session
from vitprobe.together import measurement_class
from vitprobe.tracing.layers import CHOICES, WORDS, Choice, Layer, LayerMap
from vitprobe.tracing.places import Places
from vitprobe.tracing.positions import find_positions
from vitprobe.tracing.stem import stem_filters

Row = dict[str, Any]
COLUMNS = ("layer", "shape", "kind", "grid", "other tokens", "in --layers", "also called")


@dataclass(frozen=True)
class LayerTable:
    """The layers of a model, what was found in it, and what can be measured.

    Attributes:
        model: its name.
        image: (C, H, W) that it was looked at with.
        rows: for each layer, in forward order: ``name``; ``shape`` of one image's part; ``kind``
            (``block``, ``addition``, ``skip``, ``branch``, ``attention``, ``MLP hidden``, ``norm``,
            ``convolution``, or the class of the module); ``grid`` (rows and columns of what stands
            in the image, or None) and ``prefix`` (how many tokens stand nowhere); ``choices`` of
            ``--layers`` that it is in; ``also`` (other names of the very same tensor).
        found: ``attention`` (layer -> heads, queries, keys), ``additions`` (kind -> how many),
            ``position_tables`` and ``position_biases``, ``patch_filters``; each with its shape.
        measurements: name -> nothing, or what keeps this model from having it.
    """

    model: str
    image: tuple[int, ...]
    rows: list[Row]
    found: dict[str, Any]
    measurements: dict[str, str]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def names(self) -> list[str]:
        """What ``layers=`` takes, one for each layer."""
        return [row["name"] for row in self.rows]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "model": self.model,
            "image": list(self.image),
            "layers": self.rows,
            "found": self.found,
            "measurements": self.measurements,
        }

    def __repr__(self) -> str:
        parts = [f"{self._title}\n", as_table(self._cells), "\nFound"]
        parts += [f"  {line}" for line in self._told_found]
        return "\n".join([*parts, *_told_measurements(self.measurements)])

    def _repr_html_(self) -> str:
        head, *rows = self._cells
        lines = [
            f"<p><b>{html.escape(self._title)}</b></p>",
            "<div style='max-height: 30em; overflow: auto'><table>",
            _html_row(head, "th"),
            *(_html_row(row, "td") for row in rows),
            "</table></div>",
            "<p>" + "<br>".join(map(html.escape, self._told_found)) + "</p>",
            "<table>",
            *(_html_row((name, why or "yes"), "td") for name, why in self.measurements.items()),
            "</table>",
        ]
        return "\n".join(lines)

    @property
    def _title(self) -> str:
        size = " × ".join(map(str, self.image))
        many = f"{len(self.rows)} layer{'s' * (len(self.rows) != 1)}"
        return f"{self.model}: {many} for images of {size}"

    @property
    def _cells(self) -> list[tuple[str, ...]]:
        cells = [COLUMNS]
        for row in self.rows:
            grid = " × ".join(map(str, row["grid"])) if row["grid"] else ""
            cells.append((
                row["name"], " × ".join(map(str, row["shape"])), row["kind"], grid,
                str(row["prefix"]) if row["prefix"] else "", " ".join(row["choices"]),
                ", ".join(row["also"]),
            ))  # fmt: skip
        # A column in which nothing stands says nothing.
        kept = [i for i in range(len(COLUMNS)) if any(row[i] for row in cells[1:])]
        return [tuple(row[i] for i in kept) for row in cells]

    @property
    def _told_found(self) -> list[str]:
        found, lines = self.found, []
        layers = found["attention"]
        if layers:
            heads = Counter(one["heads"] for one in layers.values())
            many = ", ".join(f"{count} of {number} heads" for number, count in heads.items())
            names = list(layers)
            ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            lines.append(f"attention layers: {many} ({ends})")
        else:
            lines.append("attention layers: none between places of the image")
        kinds = ", ".join(f"{count} {kind}" for kind, count in found["additions"].items())
        lines.append(f"residual additions: {kinds or 'none'}")
        for what, title in (("position_tables", "position table"),
                            ("position_biases", "relative position bias"),
                            ("patch_filters", "patch filters")):  # fmt: skip
            shapes = [
                f"{name} ({' × '.join(map(str, shape))})" for name, shape in found[what].items()
            ]
            more = f" and {len(shapes) - 2} more" if len(shapes) > 2 else ""
            lines.append(f"{title}: {', '.join(shapes[:2]) or 'none'}{more}")
        return lines


def layers(
    model: Any,
    layers: Choice | None = None,
    *,
    example: Tensor | None = None,
    image_size: int | None = None,
    device: str = "auto",
) -> LayerTable:
    """What a model has: its layers, its attention, and the measurements that it can have.

    Args:
        model: a spec, a module or a ``Model``.
        layers: which of them; by default every distinct tensor that a module puts out, the
            representations of ``paper``, and what residual additions add.
        example: (n, C, H, W) images of the size to come, where that is not the model's own.
        image_size: see ``load_model``.
        device: where it is looked at.

    Raises:
        VitprobeError: unknown model or layers.
    """
    with _looking_at(model, example, image_size, device) as (ready, images):
        return replace(_table(ready, layers), measurements=_applicable(ready, images))


@contextmanager
def _looking_at(
    model: Any, example: Tensor | None, image_size: int | None, device: str
) -> Iterator[tuple[Session, Tensor]]:
    """A session of a model on stand-ins for images, and two of those."""
    (loaded,) = load_models(model, image_size)
    options = Options(device=device, batch_size=8)
    if example is None:
        example = example_of(loaded, options)
    example = example.detach()[:2]
    if len(example) < 2:
        example = torch.cat([example, example.flip(-1)])
    with at_stand_ins(loaded, example, options) as ready:
        yield ready, example


def _table(ready: Session, layers: Choice | None) -> LayerTable:
    (model,), (example,) = ready.models, ready.example()
    found = ready.layers(0)
    chosen = _everything(found) if layers is None else found.choose(layers)
    rows = _rows(found, chosen, ready.places(0, chosen))
    return LayerTable(
        model.name, tuple(example.shape[1:]), rows, _found(ready, model, example, found), {}
    )


def _applicable(ready: Session, example: Tensor) -> dict[str, str]:
    kinds = {name: measurement_class(name) for name in measurements()}
    return applicable(kinds, ready, example)


def _everything(found: LayerMap) -> list[Layer]:
    both = {la.label: la for one in ("all", "paper", "blocks") for la in _chosen(found, one)}
    both |= {layer.label: layer for layer in found.operands}
    if not both:
        found.choose("all")  # says that there is nothing
    return sorted(both.values(), key=lambda layer: layer.time)


def _rows(found: LayerMap, chosen: Sequence[Layer], places: Sequence[Places | str]) -> list[Row]:
    members = {name: {layer.label for layer in _chosen(found, name)} for name in CHOICES}
    alike: dict[Any, list[str]] = {}
    for layer in found.layers:
        alike.setdefault(layer.identity, []).append(layer.label)
    further: dict[str, list[str]] = {}
    for name, mine in found.names.items():
        # A name that stands for several calls, or is a word of --layers, is not this layer's.
        if len(mine) == 1 and name not in WORDS:
            further.setdefault(mine[0].label, []).append(name)
    return [
        {
            "name": layer.label,
            "shape": list(layer.shape),
            "kind": found.kind(layer),
            "grid": [grid.rows, grid.columns] if isinstance(grid, Places) else None,
            "prefix": len(grid.without_place) if isinstance(grid, Places) else 0,
            "choices": [name for name, labels in members.items() if layer.label in labels],
            "also": [
                name
                for name in (*alike.get(layer.identity, ()), *further.get(layer.label, ()))
                if name != layer.label
            ],
        }
        for layer, grid in zip(chosen, places)
    ]


def _chosen(found: LayerMap, choice: str) -> list[Layer]:
    try:
        return found.choose(choice)
    except VitprobeError:
        return []  # a model can lack blocks, say


def _found(ready: Session, model: Model, example: Tensor, found: LayerMap) -> dict[str, Any]:
    try:
        attention = ready.attention(0).layers
    except VitprobeError:
        attention = []  # what keeps it from being read stands beside the measurements of it
    positions = find_positions(model.module, example[:1])
    stem = stem_filters(model.module, example[:1])
    return {
        "attention": {
            layer.label: {
                "heads": layer.heads,
                "queries": layer.queries.shape[1],
                "keys": layer.keys.shape[1],
            }
            for layer in attention
        },
        "additions": dict(Counter(addition.kind for addition in found.trace.additions)),
        "position_tables": {name: list(table.shape) for name, table in positions.tables},
        "position_biases": {name: list(bias.shape) for name, bias in positions.biases},
        "patch_filters": {stem[0]: list(stem[1].shape)} if stem else {},
    }


def _told_measurements(known: dict[str, str]) -> list[str]:
    can = [name for name, why in known.items() if not why]
    lines = ["", "Measurements", f"  can have: {', '.join(can) or 'none'}"]
    return [*lines, *(f"  {name}: {why}" for name, why in known.items() if why)] if known else []


def _html_row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def list_layers(argv: Sequence[str] | None = None) -> int:
    """``vitprobe layers MODEL``: name, shape, kind and grid of every layer, and what can be had."""
    parser = cli.plain_parser(
        "layers",
        "List the layers of a model in forward order: the name for --layers, the shape of one "
        "image's part, the kind, the grid of what stands in the image, how many tokens stand "
        "beside it, and the choices of --layers that it belongs to. Below them what was found in "
        "the model, and which measurements it can have.",
        "vit_small_box",
        "resnet50@random --layers paper",
    )
    parser.add_argument("model", metavar="MODEL", help="NAME, NAME@random or NAME@FILE")
    parser.add_argument(
        "--layers", nargs="+", metavar="L",
        help="blocks, paper, all, names with wildcards, or numbers (default: every layer)",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, metavar="PX",
                        help="for models that accept sizes other than their own")  # fmt: skip
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    def body() -> None:
        with _looking_at(args.model, None, args.image_size, args.device) as (ready, example):
            table = _table(ready, args.layers)
            if not args.json:
                # Trying all measurements takes a while, and a name may be all that is wanted.
                print(table, flush=True)
            can = _applicable(ready, example)
        if args.json:
            print(json.dumps(replace(table, measurements=can).to_json(), indent=2))
        else:
            print("\n".join(_told_measurements(can)))

    return cli.guarded(body, args.debug)
