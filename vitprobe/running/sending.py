"""Whether processes that start anew can be sent what they need: code of the user's often cannot."""

from __future__ import annotations

import ast
import multiprocessing
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitprobe.errors import describe


def anew() -> bool:
    """Whether processes start anew here, and what they need is sent to them."""
    return multiprocessing.get_start_method() != "fork"


def cannot_be_sent(images: Any, everything: Any) -> str:
    """Why processes that start anew cannot have the images and transforms; empty if they can."""
    if not anew():
        return ""
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    by_name = getattr(main, "__spec__", None) is not None
    if file is not None and not by_name and not Path(file).is_file():
        return "processes that start anew cannot read the script again, which has no file."
    pickler = _Trial(_Nowhere(), protocol=5, buffer_callback=lambda buffer: False)
    for thing, called in ((images, "what gives them"), (everything, "a transform")):
        try:
            pickler.dump(thing)
        except Exception as error:
            return f"{called} cannot be sent to others ({describe(error)})."
    if pickler.of_main and file is None and not by_name:
        return f"{pickler.of_main[-1]} is defined in a session that others cannot read."
    kept = _of_main_alone(file) if pickler.of_main and file is not None else set()
    for name in pickler.of_main:
        if name.partition(".")[0] in kept:
            return f"{name} is defined under if __name__ == '__main__', which others do not run."
    return ""


def _of_main_alone(file: str) -> set[str]:
    """The functions and classes that a script defines only where it is the one that is run."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return set()
    guarded = [one for one in tree.body if isinstance(one, ast.If) and _asks_for_main(one.test)]
    others = [one for one in tree.body if one not in guarded]
    return _defined(guarded) - _defined(others)


def _asks_for_main(test: ast.expr) -> bool:
    return any(isinstance(one, ast.Name) and one.id == "__name__" for one in ast.walk(test))


def _defined(statements: Sequence[ast.stmt]) -> set[str]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {one.name for top in statements for one in ast.walk(top) if isinstance(one, kinds)}


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


class _Trial(pickle.Pickler):
    """Tells whether something can be sent, and what of it the main script defines."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.of_main: list[str] = []

    def reducer_override(self, given: Any) -> Any:
        if getattr(given, "__module__", "") == "__main__" and hasattr(given, "__qualname__"):
            self.of_main.append(given.__qualname__)
        return NotImplemented
