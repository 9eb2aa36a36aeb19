"""Names in any script: fonts to fall back on, and one line where none has their letters."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib import font_manager

# What systems bring for letters that matplotlib's own font lacks; those that are there are asked in
# this order.
WIDE = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "Noto Sans JP",
    "Noto Sans KR", "Source Han Sans SC", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "Nirmala UI", "Noto Sans Devanagari", "Noto Sans Thai", "Arial Unicode MS",
)  # fmt: skip
MOST = 8
_told: set[str] = set()


def families() -> list[str]:
    """The fonts in use, and behind them those that have letters of other scripts."""
    installed = set(font_manager.get_font_names())
    return [*matplotlib.rcParams["font.family"], *(name for name in WIDE if name in installed)]


@contextmanager
def missing_letters_told() -> Iterator[None]:
    """Within it a warning for each letter that no font has becomes one line for all of them."""
    with warnings.catch_warnings(record=True) as given:
        warnings.filterwarnings("always", message=r"Glyph \d+ .*missing from")
        yield
    letters = set()
    for one in given:
        glyph = re.match(r"Glyph (\d+) .*missing from", str(one.message))
        if glyph:
            letters.add(chr(int(glyph[1])))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if letters - _told:
        named = " ".join(sorted(letters - _told)[:MOST])
        more = " ..." if len(letters - _told) > MOST else ""
        _told.update(letters)
        print(
            f"vitprobe: no font here has these letters of the names in a figure: {named}{more} "
            f"(installing one such as Noto Sans CJK helps).",
            file=sys.stderr,
        )
