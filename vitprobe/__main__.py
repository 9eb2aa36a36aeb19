"""``python -m vitprobe`` lists the commands; ``python -m vitprobe NAME ...`` runs one."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files

from vitprobe._version import __version__
from vitprobe.catalogue import GROUPS, first_line, measurements
from vitprobe.errors import nearest

OTHERS = ("report", "extract", "redraw")
# Commands that are no module of their own: where they are, and what they do.
ELSEWHERE = {
    "models": ("vitprobe.listing", "list_models", "What --models takes: names, aliases, timm's."),
    "layers": ("vitprobe.layer_table", "list_layers", "A model's layers, and what it can have."),
}


def commands() -> dict[str, str]:
    """Name -> first line of its docstring, read without importing anything heavy."""
    found = {name: entry.line for name, entry in measurements().items()}
    for name in OTHERS:
        source = files("vitprobe") / f"{name}.py"
        if not source.is_file():
            source = files("vitprobe") / name / "command.py"
        found[name] = first_line(source.read_text(encoding="utf-8"))
    return {**found, **{name: line for name, (_, _, line) in ELSEWHERE.items()}}


def overview(known: dict[str, str]) -> str:
    """What ``vitprobe`` alone prints: the commands in groups, and how to begin."""
    groups: dict[str, list[str]] = {heading: [] for heading in GROUPS.values()}
    for entry in measurements().values():
        groups[GROUPS[entry.group]].append(entry.name)
    groups |= {"All of them": list(OTHERS), "Look up": list(ELSEWHERE)}
    width = max(map(len, known))
    columns = min(shutil.get_terminal_size().columns, 100)
    lines = ["usage: vitprobe COMMAND [options], or python -m vitprobe.COMMAND [options]", ""]
    for heading, names in groups.items():
        lines.append(heading)
        lines += [
            textwrap.fill(known[name], columns, initial_indent=f"  {name:<{width}}  ",
                          subsequent_indent=" " * (width + 4))
            for name in names if name in known
        ]  # fmt: skip
        lines.append("")
    return "\n".join([
        *lines,
        "Without options a command runs on bundled models and images, offline:",
        "  vitprobe cka",
        "  vitprobe cka --models vit_b16 resnet50 --images FOLDER",
        "`vitprobe COMMAND --help` lists the options of one.",
    ])  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The installed script ``vitprobe``."""
    try:
        return _main(argv)
    except KeyboardInterrupt:
        # While libraries are loaded, which takes seconds; later on the commands see to it.
        print("vitprobe: Stopped.", file=sys.stderr)
        return 130


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if "_ARGCOMPLETE" in os.environ:
        return _complete(known)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        try:
            print(overview(known), flush=True)
        except BrokenPipeError:
            # The reader (head, less) has seen enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print(f"vitprobe: stdout cannot be written: {error.strerror}.", file=sys.stderr)
            return 2
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0].replace("-", "_")
    if name not in known:
        way = nearest(name, known, 1) or " `vitprobe` lists the commands."
        print(f"vitprobe: unknown command {arguments[0]!r}.{way}", file=sys.stderr)
        return 2
    return _run(name, arguments[1:])


def _run(name: str, arguments: Sequence[str]) -> int:
    module, function, _ = ELSEWHERE.get(name, (f"vitprobe.{name}", "main", ""))
    return getattr(import_module(module), function)(arguments)


def _complete(known: dict[str, str]) -> int:
    """Tell the shell the commands, or what may follow one: its parser does (``cli.complete``)."""
    words = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])].split(" ")
    name = words[1].replace("-", "_") if len(words) > 2 else ""
    if name in known:
        # As if the command were a program of its own, one word further on.
        os.environ["_ARGCOMPLETE"] = "2"
        return _run(name, ())
    from argparse import ArgumentParser

    from vitprobe.cli import complete

    parser = ArgumentParser(prog="vitprobe")
    parser.add_argument("command", choices=list(known))
    complete(parser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
