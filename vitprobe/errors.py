"""The one exception for what a user can put right."""

import errno
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from traceback import walk_tb
from types import TracebackType
from typing import Any


class VitprobeError(Exception):
    """Something that the caller can put right; its message is one line that says how.

    Commands print the line and exit with status 2; in Python it is raised as it is.
    """

    def __init__(self, message: str = "") -> None:
        # Messages hold names of files and words of others' errors.
        super().__init__(shown(message))


class NotApplicable(VitprobeError):
    """A measurement that a model, or these images, cannot have; other models still can.

    Attributes:
        model: its name; empty where the images are what is lacking.
    """

    def __init__(self, message: str, model: str = "") -> None:
        super().__init__(message)
        self.model = model


class BatchFailure(VitprobeError):
    """What is wrong with one batch, be others right: values not finite, a check that failed."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence with the known names nearest to ``name``, or an empty string."""
    found = get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def some(names: Iterable[str], most: int = 3) -> str:
    """``a, b, c and 9 more``."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def shown(text: str) -> str:
    """Text from outside (names of files, layers, models) as one line that can be shown and saved.

    Control characters and line breaks, which can act on a terminal or forge a line on it, are
    written out (``\\x1b``), and so are marks that reverse the direction of writing. Bytes of a file
    name that are no text become U+FFFD. All other text stays as it is.
    """
    return re.sub(r"[^\x20-\x7e]", _visible, text)


def _visible(match: re.Match[str]) -> str:
    character = match.group()
    kind = unicodedata.category(character)
    if kind == "Cs":
        return "\ufffd"
    directs = (
        unicodedata.bidirectional(character) in _DIRECTIONS or character in "\u200e\u200f\u061c"
    )
    if kind in ("Cc", "Zl", "Zp") or directs or character in "\ufffe\uffff":
        return character.encode("unicode_escape").decode("ascii")
    return character


_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MARKS = "\u200e\u200f\u061c"


def is_error(raised: BaseException) -> bool:
    """Whether what code of a user's raised is an error of that code.

    ``sys.exit()`` there is one: a transform or a forward pass has no say over how a run ends.
    Ctrl-C is none, and neither is the ``sys.exit()`` of a signal handler that interrupts such code.
    Where memory ran out the code may well be right.
    """
    if isinstance(raised, Exception):
        return not ran_out(raised)
    if isinstance(raised, KeyboardInterrupt | GeneratorExit):
        return False
    handlers = {_code(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    return all(frame.f_code not in handlers for frame, _ in walk_tb(raised.__traceback__))


def _code(handler: Any) -> Any:
    return getattr(getattr(handler, "__func__", handler), "__code__", None)


_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "unable to allocate",
    "bad_alloc",
    "alloc_failed",  # what cuBLAS, cuDNN, cuSOLVER and cuFFT call it
    "could not create a primitive",  # oneDNN's word for it
    "could not create a memory object",
)


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's, the system's, or a library's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = _words(error).lower()
    if isinstance(error, OSError):
        # What comes from another process has its number in its words alone.
        return error.errno == errno.ENOMEM or f"[errno {errno.ENOMEM}]" in text
    if isinstance(error, ImportError):
        # Of a library that is there; where it may not be executed, more is said.
        return text.endswith("failed to map segment from shared object")
    words = isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError"
    return words and any(word in text for word in _OUT_OF_MEMORY)


def _words(error: BaseException) -> str:
    """The message of an exception, whose class may be anybody's."""
    try:
        return str(error)
    except Exception as other:
        return f"(its message raises {type(other).__name__})"


MAX_LETTERS = 300


def describe(error: BaseException) -> str:
    """Type and message of an exception in one line."""
    text = " ".join(_words(error).split())
    if len(text) > MAX_LETTERS:
        text = f"{text[:MAX_LETTERS]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def tell_stops_in_a_line() -> None:
    """Show no traceback where Ctrl-C, or memory that is short while libraries are loaded, ends
    this process and nothing else has seen to it.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], raised: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            # One line for all processes of a run.
            if os.environ.get("RANK", "0") == "0":
                print("vitprobe: Stopped.", file=sys.stderr)
        elif ran_out(raised):
            print(f"vitprobe: Out of memory ({describe(raised)}).", file=sys.stderr, flush=True)
            os._exit(2)
        else:
            before(kind, raised, trace)

    sys.excepthook = hook
