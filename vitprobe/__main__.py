"""``python -m vitprobe`` lists the commands; ``python -m vitprobe NAME ...`` runs one."""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.resources import files

from vitprobe._version import __version__
from vitprobe.errors import nearest

OTHERS = ("report", "redraw")


def commands() -> dict[str, str]:
    """Name -> first line of its docstring, read without importing anything."""
    from vitprobe.results.result import ANALYSES

    found = {}
    for name in (*ANALYSES, *OTHERS):
        source = files("vitprobe") / f"{name}.py"
        if source.is_file():
            doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
            found[name] = doc.split("\n")[0]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The installed script ``vitprobe``."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    known = commands()
    if not arguments or arguments[0] in ("-h", "--help"):
        print("vitprobe COMMAND ..., or python -m vitprobe.COMMAND ...; --help after a command")
        width = max(map(len, known))
        for name, line in known.items():
            print(f"  {name:<{width}}  {line}")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name = arguments[0].replace("-", "_")
    if name not in known:
        way = nearest(name, known, 1) or " `vitprobe` lists the commands."
        print(f"vitprobe: unknown command {arguments[0]!r}.{way}", file=sys.stderr)
        return 2
    return import_module(f"vitprobe.{name}").main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
