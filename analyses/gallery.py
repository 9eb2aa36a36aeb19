"""What the gallery's scripts share: a figure is a command with its arguments, drawn into figures/.

A script makes one ``Figure``. Its options are those of its command (``--models``, ``--images``,
``--num-images``, ``--out`` ...), with other defaults.
"""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from vitprobe._version import __version__
from vitprobe.errors import VitprobeError
from vitprobe.models.loading import bundled_models
from vitprobe.results.result import Result, load_result

FIGURES = Path(__file__).parents[1] / "figures"
# Bytes; a repository of many images asks for small ones.
MAX_PNG = 290_000
# Options with the number of their values that say how and where to, not what.
MANNERS = {"--out": 1, "--device": 1, "--workers": 1, "--save-every": 1}
MANNERS |= {"--fresh": 0, "--quiet": 0, "--debug": 0}
# Arguments that hold for a figure's own models only.
OF_THE_MODELS = ("models", "names", "pairwise", "trained_without")


class Figure:
    """One figure of a paper: what a command draws from its arguments.

    Args:
        doc: the script's docstring; its first line is the title.
        script: its path, whose stem is that of the files drawn.
        command: a measurement, such as ``vitprobe.cka``.
        note: what differs from the paper's figure, as part of the title.
        arguments: options of the command, ``num_images=512`` for ``--num-images 512``.
    """

    def __init__(
        self,
        doc: str | None,
        script: str,
        command: ModuleType,
        *,
        note: str = "",
        **arguments: Any,
    ) -> None:
        self.stem, self.command, self.arguments = Path(script).stem, command, arguments
        self.title, self.note = (doc or "").split("\n")[0].rstrip("."), note

    def command_line(self, given: Sequence[str] = ()) -> list[str]:
        """All arguments of the command; of an option given twice it takes the last."""
        others = _models_in(given)
        title = f"{self.title} ({self.note})" if self.note and not others else self.title
        line = ["--out", os.path.relpath(FIGURES), "--stem", self.stem, "--title", title]
        for name, value in self.arguments.items():
            if others and name in OF_THE_MODELS:
                continue
            line.append(f"--{name.replace('_', '-')}")
            if value is not True:
                line += map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
        return [*line, *given]

    def is_there(self, out: Path, given: Sequence[str] = ()) -> bool:
        """Whether this command, version and weights have drawn the figure in ``out`` already."""
        file = out / f"{self.stem}.npz"
        try:
            result = load_result(file)
        except VitprobeError:
            return False
        meta = result.meta
        line = shlex.split(str(meta["command"]))[3:]  # after python -m vitprobe.NAME
        return (
            file.with_suffix(".png").is_file()
            and deciding(line) == deciding(self.command_line(given))
            and meta["versions"]["vitprobe"] == __version__
            and all(map(_has_these_weights, meta["models"]))
        )

    def main(self, given: Sequence[str] | None = None) -> int:
        """Measure, save, print the paths and the findings; the exit status of the command."""
        given = sys.argv[1:] if given is None else given
        # From here on the process is that command: the file says how to make it without the script.
        before = sys.argv
        sys.argv = [str(self.command.__file__), *self.command_line(given)]
        try:
            return self.command.main()
        finally:
            sys.argv = before


def scripts(patterns: Sequence[str] = ()) -> list[str]:
    """Names of the scripts that draw a figure of a paper, or of those that match a pattern."""
    here = Path(__file__).parent
    found = sorted(path.stem for path in here.glob("*_fig*.py"))
    return [n for n in found if not patterns or any(fnmatch(n, p) for p in patterns)]


def keep_small(png: Path) -> None:
    """Bring a large image down to fewer colours: 256, or as few as it takes."""
    content = png.read_bytes()
    for colours in (256, 64, 16):
        if png.stat().st_size <= MAX_PNG:
            return
        with Image.open(io.BytesIO(content)) as drawn:
            few = drawn.convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        few.save(png, optimize=True)


def deciding(line: Sequence[str]) -> list[str]:
    """A command line without what decides nothing."""
    kept, skip = [], 0
    for word in line:
        if word in MANNERS:
            skip = MANNERS[word]
        elif skip:
            skip -= 1
        else:
            kept.append(word)
    return kept


def command_of(result: Result) -> str:
    """The command that makes a result, without its place, name, title and starting over."""
    words = [w for w in shlex.split(str(result.meta.get("command", ""))) if w != "--fresh"]
    for option in ("--out", "--stem", "--title"):
        while option in words:
            at = words.index(option)
            del words[at : at + 2]
    return shlex.join(words)


def _models_in(given: Sequence[str]) -> bool:
    return any(word.partition("=")[0] in ("--models", "--pairwise") for word in given)


def _has_these_weights(model: dict[str, Any]) -> bool:
    """Bundled weights may be trained anew under their old name."""
    sha256 = model.get("card", {}).get("sha256")
    return sha256 is None or sha256 == bundled_models().get(model["name"], {}).get("sha256")
