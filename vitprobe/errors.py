"""The one exception for what a user can put right."""

from collections.abc import Iterable
from difflib import get_close_matches


class VitprobeError(Exception):
    """Something that the caller can put right; its message is one line that says how.

    Commands print the line and exit with status 2; in Python it is raised as it is.
    """


class NotApplicable(VitprobeError):
    """A measurement that a model, or these images, cannot have; other models still can.

    Attributes:
        model: its name; empty where the images are what is lacking.
    """

    def __init__(self, message: str, model: str = "") -> None:
        super().__init__(message)
        self.model = model


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """A sentence with the known names nearest to ``name``, or an empty string."""
    found = get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(found)}?" if found else ""
