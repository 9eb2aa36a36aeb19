"""What a result says about how it was made."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitprobe._version import __version__
from vitprobe.errors import shown


def models_meta(analysis: str, models: Sequence[Any], seed: int) -> dict[str, Any]:
    """The provenance of a result on weights alone; with images, see ``Session.meta``."""
    return {
        "analysis": analysis,
        "models": [model.provenance() for model in models],
        "seed": seed,
        "versions": versions(),
        "command": command_line(),
    }


def versions() -> dict[str, str]:
    """Of everything that the numbers depend on."""
    import timm

    return {
        "vitprobe": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def command_line() -> str:
    """The command line, without the place where the program is installed."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    if program.stem == "ipykernel_launcher":
        return "a notebook"  # its kernel's command line says nothing but a place on this machine
    name = (
        f"python -m vitprobe.{program.stem}" if program.parent.name == "vitprobe" else program.name
    )
    return shown(" ".join([name, *map(shlex.quote, sys.argv[1:])]))
