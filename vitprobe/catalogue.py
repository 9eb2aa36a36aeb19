"""Which measurements there are, read off the modules without importing them.

A measurement is a module of ``vitprobe`` that says ``RESULT = ...``; it says its group as well
(``GROUP = "tokens"``). Nothing else lists them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import vitprobe

# Group -> its heading where commands are listed, in order.
GROUPS = {
    "compare": "Compare layers",
    "attention": "Attention",
    "tokens": "Tokens",
    "robustness": "Robustness",
    "weights": "Weights",
}
_RESULT = re.compile(r"^RESULT = ", re.MULTILINE)
_GROUP = re.compile(r'^GROUP = "(\w+)"', re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """A measurement.

    Attributes:
        name: of its module.
        group: one of ``GROUPS``.
        line: the first of its docstring.
    """

    name: str
    group: str
    line: str


def measurements() -> dict[str, Entry]:
    """All measurements by name, group after group."""
    found = sorted(_entries(), key=lambda one: (list(GROUPS).index(one.group), one.name))
    return {one.name: one for one in found}


def first_line(source: str) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0]


def _entries() -> Iterator[Entry]:
    for folder in vitprobe.__path__:
        for path in sorted(Path(folder).glob("*.py")):
            entry = _entry(path, path.stat().st_mtime_ns)
            if entry is not None:
                yield entry


@cache
def _entry(path: Path, changed: int) -> Entry | None:
    """What a module says, read once; None where it is no measurement."""
    source = path.read_text(encoding="utf-8")
    if not _RESULT.search(source):
        return None
    group = _GROUP.search(source)
    return Entry(path.stem, group[1] if group else "tokens", first_line(source))
