"""``vitprobe models`` and ``vitprobe layers``: what there is to compare, before any measurement."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vitprobe import cli
from vitprobe.errors import VitprobeError, nearest
from vitprobe.models.names import ALIASES, bundled_models
from vitprobe.running.options import Options
from vitprobe.running.session import session
from vitprobe.tracing.layers import CHOICES, Layer, LayerMap, map_layers

Row = dict[str, Any]
HEADINGS = {"bundled": "Bundled with vitprobe", "alias": "Aliases", "timm": "timm"}
# What timm looks for in a repository of the hub, in its order.
HUB_FILES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
             "open_clip_pytorch_model.bin")  # fmt: skip


def list_models(argv: Sequence[str] | None = None) -> int:
    """``vitprobe models [PATTERN]``: bundled models, aliases, and timm's that match a pattern."""
    parser = cli.plain_parser(
        "models",
        "List what --models takes: the bundled models, the aliases with the timm names that they "
        "stand for, and with PATTERN all timm models that match. Weights that are on this machine "
        "already are marked.",
        "",
        "'vit_small*dino*'",
    )
    parser.add_argument("pattern", nargs="?", metavar="PATTERN",
                        help="part of a name, or a name with wildcards")  # fmt: skip
    _add_shared(parser)
    args = parser.parse_args(argv)
    return cli.guarded(lambda: _show_models(args.pattern, args.json), args.debug)


def list_layers(argv: Sequence[str] | None = None) -> int:
    """``vitprobe layers MODEL``: name, shape and kind of every layer."""
    parser = cli.plain_parser(
        "layers",
        "List the layers of a model in forward order: the name for --layers, the shape of one "
        "image's part, the kind, and which choices of --layers it belongs to.",
        "vit_small_box",
        "resnet50@random --layers paper",
    )
    parser.add_argument("model", metavar="MODEL", help="NAME, NAME@random or NAME@FILE")
    parser.add_argument(
        "--layers", nargs="+", default=["all", "paper"], metavar="L",
        help="blocks, paper, all, or names with wildcards (default: all paper)",
    )  # fmt: skip
    parser.add_argument("--image-size", type=int, metavar="PX",
                        help="for models that accept sizes other than their own")  # fmt: skip
    parser.add_argument("--device", default="auto",
                        help="auto, cpu, cuda, cuda:1, mps (default: %(default)s)")  # fmt: skip
    _add_shared(parser)
    args = parser.parse_args(argv)
    return cli.guarded(lambda: _show_layers(args), args.debug)


def _add_shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def known_models(pattern: str | None = None) -> list[Row]:
    """Bundled models and aliases, and with a pattern timm's models too.

    Args:
        pattern: part of a name, or a name with wildcards; or of the timm name that an alias
            stands for.

    Returns:
        ``name``; ``kind`` (``bundled``, ``alias`` or ``timm``); ``stands_for`` (timm's name);
        ``accuracy`` (of bundled models on held-out digit scenes, else None); ``trained`` (whether
        there are trained weights); ``cached`` (whether they are on this machine).
    """
    rows = [
        _row(name, "bundled", card["timm_model"], accuracy=card["test_accuracy"], cached=True)
        for name, card in bundled_models().items()
    ]
    rows += [_row(name, "alias", stands_for) for name, stands_for in ALIASES.items()]
    if pattern is not None:
        import timm

        trained = timm.list_models(pretrained=True)
        bare = set(timm.list_models()) - {name.partition(".")[0] for name in trained}
        rows += [_row(name, "timm", name) for name in trained]
        rows += [_row(name, "timm", name, trained=False) for name in sorted(bare)]
        wanted = pattern if any(letter in pattern for letter in "*?[") else f"*{pattern}*"
        rows = [
            row
            for row in rows
            if fnmatchcase(row["name"], wanted)
            or (row["kind"] == "alias" and fnmatchcase(row["stands_for"], wanted))
        ]
    for row in rows:
        row["cached"] = row["cached"] or (row["trained"] and is_cached(row["stands_for"]))
    return rows


def _row(name: str, kind: str, stands_for: str, **more: Any) -> Row:
    row = {"name": name, "kind": kind, "stands_for": stands_for}
    return {**row, "accuracy": None, "trained": True, "cached": False, **more}


def is_cached(timm_name: str) -> bool:
    """Whether timm finds the weights of a name on this machine, without the network."""
    import torch
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(timm_name)
    if config is None:
        return False
    if config.hf_hub_id:
        names = [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILES
        paths = [try_to_load_from_cache(config.hf_hub_id, name) for name in names]
        return any(isinstance(path, str) for path in paths)
    downloaded = Path(torch.hub.get_dir()) / "checkpoints"
    url = str(config.url or "")
    return bool(url) and (downloaded / Path(url).name).is_file()


def _show_models(pattern: str | None, as_json: bool) -> None:
    rows = known_models(pattern)
    if not rows:
        names = [row["name"] for row in known_models("")]
        raise VitprobeError(f"No model matches {pattern!r}.{nearest(str(pattern), names)}")
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for kind, heading in HEADINGS.items():
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            print(heading)
            _print_table([(row["name"], _described(row), _state(row)) for row in mine])
            print()
    if pattern is None:
        print("Any timm model can be named too: `vitprobe models PATTERN` lists those that match.")
    print("NAME@random is the same model untrained; NAME@FILE takes its weights from a file.")


def _described(row: Row) -> str:
    if row["kind"] == "bundled":
        return f"{row['accuracy']:.1%} of held-out digit scenes right"
    return row["stands_for"] if row["kind"] == "alias" else ""


def _state(row: Row) -> str:
    if not row["trained"]:
        return "no trained weights: @random or @FILE"
    return "on this machine" if row["cached"] and row["kind"] != "bundled" else ""


def _show_layers(args: argparse.Namespace) -> None:
    options = Options(num_images=2, image_size=args.image_size, device=args.device)
    with session([args.model], None, options) as ready:
        (model,), (example,) = ready.models, ready.example()
        found = map_layers(model.name, model.module, example)
        chosen = found.choose(args.layers)
    members = {name: {layer.label for layer in _chosen(found, name)} for name in CHOICES}
    rows: list[Row] = [
        {
            "name": layer.label,
            "shape": list(layer.shape),
            "kind": kind(found, layer),
            "choices": [name for name, labels in members.items() if layer.label in labels],
        }
        for layer in chosen
    ]
    if args.json:
        print(json.dumps(rows, indent=2))
        return
    size = " × ".join(map(str, example.shape[1:]))
    print(f"{model.name}: {len(rows)} layers for images of {size}\n")
    _print_table(
        [("layer", "shape", "kind", "in --layers")]
        + [
            (
                row["name"],
                " × ".join(map(str, row["shape"])),
                row["kind"],
                " ".join(row["choices"]),
            )
            for row in rows
        ]
    )


def _chosen(found: LayerMap, choice: str) -> list[Layer]:
    try:
        return found.choose(choice)
    except VitprobeError:
        return []  # a model can lack blocks, say


def kind(found: LayerMap, layer: Layer) -> str:
    """What a layer is: a residual sum, an MLP's hidden layer, or the class that puts it out."""
    if layer.point == "addition":
        return "residual sum"
    if layer.point == "input":
        return "MLP hidden"
    return type(found.modules[layer.module]).__name__


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns side by side, two spaces apart and indented by two."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip())
