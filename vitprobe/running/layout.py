"""The layout in memory in which convolutions on a CPU are fast.

Where the channels of a place are neighbours ("channels last"), torch's convolutions on a CPU need
not rearrange what they are given. Measured, forward passes of most CNNs at 224 px take 0.55 to 0.85
of their time, those of a few as long as before; what timm's architectures compute stays the same to
rounding. Only how the values lie in memory changes: shapes and indices stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def channels_last(
    modules: list[nn.Module], device: torch.device, example: Callable[[], list[Tensor]]
) -> Iterator[list[bool]]:
    """Lay out the convolutions of models that gain by it; every tensor comes back afterwards.

    Args:
        modules: in evaluation mode, on ``device``.
        device: nothing is done but on a CPU, where the gain was measured.
        example: makes (n, C, H, W) inputs for each module; called where one may gain.

    Yields:
        for each module, whether its inputs are to be given channels last. Not where it has fewer
        than two convolutions, as the ViTs, nor where it cannot run that way.
    """
    before: list[tuple[nn.Parameter, Tensor]] = []
    taken = [False] * len(modules)
    candidates = {m: found for m, module in enumerate(modules) if (found := _kernels(module))}
    try:
        if device.type == "cpu" and candidates:
            inputs = example()
            for m, kernels in candidates.items():
                taken[m] = _fits(modules[m], inputs[m], kernels, before)
        yield taken
    finally:
        _put_back(before)


def _kernels(module: nn.Module) -> list[nn.Parameter]:
    """The weights of a model's convolutions; none where it has fewer than two."""
    found = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]
    return [w for w in found if isinstance(w, nn.Parameter)] if len(found) > 1 else []


def _fits(
    module: nn.Module,
    inputs: Tensor,
    kernels: list[nn.Parameter],
    before: list[tuple[nn.Parameter, Tensor]],
) -> bool:
    """Lay out a model and try it; ``before`` gets what must come back afterwards."""
    mine = len(before)
    try:
        for kernel in dict.fromkeys(kernels):
            before.append((kernel, kernel.data))
            kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            module(inputs.contiguous(memory_format=torch.channels_last))
    except Exception:
        # Code that asks for a layout of its own (view), or whatever else is wrong with the model:
        # that, the measurement will meet and tell.
        _put_back(before[mine:])
        del before[mine:]
        return False
    return True


def _put_back(before: list[tuple[nn.Parameter, Tensor]]) -> None:
    # Last in, first out: a kernel that two models share comes back to where it was first.
    for kernel, data in reversed(before):
        kernel.data = data
