"""What layers are called: every label belongs to one layer, and is no word that means a set."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Integral

CHOICES = ("blocks", "paper", "all")
# What --layers of some measurements takes besides.
WORDS = (*CHOICES, "last", "sublayers")
OPERANDS = ("skip", "branch")
Choice = str | int | Sequence[str | int]


def words(choice: Choice) -> list[str | int]:
    """A choice of layers as a list."""
    return [choice] if isinstance(choice, str | Integral) else list(choice)  # type: ignore[arg-type]


def as_number(word: str | int) -> int | None:
    """The number that a word is, or None."""
    if isinstance(word, Integral):
        return int(word)
    digits = str(word).removeprefix("-")
    return int(str(word)) if digits.isascii() and digits.isdigit() else None


def root_label(modules: Collection[str]) -> str:
    """What the model itself is called, where it puts something out or adds."""
    return "model output" if "output" in modules else "output"


def told_apart(labels: Sequence[str]) -> list[str]:
    """The labels, none of which is another or a word of ``--layers``."""
    found: list[str] = []
    taken = set(WORDS)
    for label in labels:
        mine = f"{label}:1" if label in WORDS else label
        while mine in taken:
            mine += "'"
        taken.add(mine)
        found.append(mine)
    return found


def mentions_operands(pattern: str) -> bool:
    """Whether a pattern asks for skips or branches, which other wildcards pass over."""
    return any(f" {operand}" in pattern for operand in OPERANDS)
