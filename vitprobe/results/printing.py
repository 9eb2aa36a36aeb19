"""What a command prints once its files are written: their paths, then what was found.

On a terminal lines are wrapped at its width and verdicts coloured; elsewhere they are plain text,
one line each, for ``grep`` and friends.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from vitprobe.errors import shown
from vitprobe.results.result import FAILS, HOLDS, OPEN, Finding

_COLOURS = {HOLDS: "32", FAILS: "31", OPEN: "33"}
MIN_WIDTH, MAX_WIDTH = 40, 100


def print_files(paths: Sequence[Path], findings: Sequence[Finding], seconds: float) -> None:
    """The paths, the findings by paper and figure, and how long it took, on stdout."""
    for path in paths:
        print(as_printed(path))
    print_findings(findings)
    print(f"\nTook {duration(seconds)}.")


def print_findings(
    findings: Sequence[Finding], stream: IO[str] | None = None, width: int | None = None
) -> None:
    """Each verdict with its claim, the layers and numbers that decided it indented below.

    Args:
        findings: in any order; those of a figure are printed together.
        stream: stdout by default.
        width: of the lines; by default that of the terminal, and no limit elsewhere.
    """
    stream = stream or sys.stdout
    width, colours = width or _width(stream), _coloured(stream)
    for source in dict.fromkeys(finding.source for finding in findings):
        print(f"\n{source}", file=stream)
        for finding in (one for one in findings if one.source == source):
            lines = _filled(f"{finding.verdict}: {finding.claim}", width, 2, hang=2)
            if colours:
                code = _COLOURS.get(finding.verdict, "0")
                lines = lines.replace(finding.verdict, f"\033[1;{code}m{finding.verdict}\033[0m", 1)
            print(lines, file=stream)
            if finding.over:
                print(_filled(f"over {finding.over}", width, 6, hang=2), file=stream)
            for part in finding.numbers.split("; "):
                print(_filled(part, width, 6, hang=2), file=stream)


def print_json(paths: Sequence[Path], findings: Sequence[Finding], seconds: float) -> None:
    """The same as one JSON object: ``files``, ``findings`` (the fields of each), ``seconds``."""
    told: dict[str, Any] = {
        "files": [as_printed(path) for path in paths],
        "findings": [asdict(finding) for finding in findings],
        "seconds": round(seconds, 3),
    }
    print(json.dumps(told, indent=2, ensure_ascii=False))


def as_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side, two spaces apart and indented by two."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        for row in rows
    )


def as_printed(path: Path, stream: IO[str] | None = None) -> str:
    """A path as it is, but not what a terminal would act on, nor what cannot be written out."""
    stream = stream or sys.stdout
    text = str(path)
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8", "strict")
    except UnicodeEncodeError:
        return shown(text)
    return shown(text) if stream.isatty() else text


def on_terminal(stream: IO[str] | None) -> bool:
    """Whether somebody looks on; a program without a terminal may have no such stream at all."""
    return stream is not None and stream.isatty()


def duration(seconds: float) -> str:
    """``0.8 s``, ``42 s``, ``3 min 5 s``, ``2 h 10 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _filled(text: str, width: int | None, indent: int, hang: int) -> str:
    start = " " * indent
    if width is None:
        return start + text
    # No line ends between a number and its error.
    lines = textwrap.fill(
        text.replace(" ± ", "\u00a0±\u00a0"), width, initial_indent=start,
        subsequent_indent=start + " " * hang, break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return lines.replace("\u00a0±\u00a0", " ± ")


def _width(stream: IO[str]) -> int | None:
    """Columns of the terminal, within what reads well; None where there is no terminal."""
    if not stream.isatty():
        return None
    return min(max(shutil.get_terminal_size().columns, MIN_WIDTH), MAX_WIDTH)


def _coloured(stream: IO[str]) -> bool:
    """Whether a terminal is there that shows colours and nobody asked for none (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
