"""``vitprobe models``: what there is to compare, before any measurement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vitprobe import cli
from vitprobe.errors import VitprobeError, nearest
from vitprobe.models.names import ALIASES, bundled_models
from vitprobe.results.printing import as_table

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
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    return cli.guarded(lambda: _show_models(args.pattern, args.json), args.debug)


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
            print(as_table([(row["name"], _described(row), _state(row)) for row in mine]))
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
