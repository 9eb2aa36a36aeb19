"""What the trials of claims on noise share."""

from __future__ import annotations

from contextlib import ExitStack
from functools import wraps
from importlib import import_module
from unittest.mock import patch

from vitprobe.results.result import HOLDS

DRAWS, LAYERS = 20, 6
# Functions of vitprobe.papers, "MODULE.NAME", that a trial says it tries.
TRIED: set[str] = set()


def tries(*functions):
    """Mark a trial of claims; it fails where it does not ask these functions for them."""

    def marked(trial):
        @wraps(trial)
        def watched(*args, **options):
            with ExitStack() as stack:
                asked = []
                for function in functions:
                    place, _, name = function.rpartition(".")
                    module = import_module(f"vitprobe.papers.{place}")
                    spy = patch.object(module, name, wraps=getattr(module, name))
                    asked.append(stack.enter_context(spy))
                trial(*args, **options)
                assert all(one.called for one in asked)

        TRIED.update(functions)
        return watched

    return marked


def verdicts(findings):
    return [one.verdict for one in findings]


def holding(verdicts):
    """How many of all draws' verdicts are that a claim holds."""
    return sum(one == HOLDS for one in verdicts)


def facts(*names, weights="trained"):
    return [{"name": name, "weights": weights} for name in names]
