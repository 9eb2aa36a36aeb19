"""What the branch of a residual addition does: attend, convolve, or work on each place alone."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from vitprobe.tracing.additions import Addition

ATTENTION, MLP, CONVOLUTION = "attention", "MLP", "convolution"


def branch_kind(addition: Addition, modules: Mapping[str, nn.Module]) -> str:
    """``attention``, ``MLP`` or ``convolution``.

    Args:
        addition: of a trace.
        modules: all of the model's, by qualified name.
    """
    if addition.attends:
        return ATTENTION
    # Convolutions of one pixel are linear layers: some MLPs are made of them.
    branch = (modules[name] for name in addition.branch_modules)
    spatial = any(isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1 for part in branch)
    return CONVOLUTION if spatial else MLP
