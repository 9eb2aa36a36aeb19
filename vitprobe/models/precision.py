"""The type in which a model wants its images: that of the first layer that sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitprobe.errors import ran_out


def input_type(module: nn.Module, image: Tensor) -> torch.dtype:
    """The type of the images for a model that may hold weights of several.

    Args:
        module: ready to run.
        image: (1, C, H, W), in any floating type. A model of one type is not run at all.
    """
    types = dict.fromkeys(_floating(module))
    if len(types) < 2:
        return next(iter(types), torch.float32)
    seen = _FirstWeights(module)
    with torch.no_grad():
        if _runs(module, image, seen) and seen.found is not None:
            tried = [seen.found, image.dtype]
        else:
            tried = [t for t in (seen.found, *types, torch.float32) if t is not None]
        for one in dict.fromkeys(tried):
            if _runs(module, image.to(one)):
                return one
    # None will do: the measurement meets what is wrong, and tells it.
    return tried[0]


def _floating(module: nn.Module) -> Iterator[torch.dtype]:
    parameters = [p.dtype for p in module.parameters() if p.is_floating_point()]
    yield from parameters or [b.dtype for b in module.buffers() if b.is_floating_point()]


def _runs(module: nn.Module, image: Tensor, mode: TorchFunctionMode | None = None) -> bool:
    try:
        if mode is None:
            module(image)
        else:
            with mode:
                module(image)
    except Exception as error:
        if ran_out(error):
            raise
        return False
    return True


class _FirstWeights(TorchFunctionMode):
    """The type of the weights in the first operation on what was given and weights.

    Attributes:
        found: the type, or None where there was no such operation.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._weights = {id(parameter) for parameter in module.parameters()}
        self.found: torch.dtype | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        given = [one for one in (*args, *(kwargs or {}).values()) if isinstance(one, Tensor)]
        weights = [one for one in given if id(one) in self._weights and one.is_floating_point()]
        # A weight alone is only made ready; at least two axes of it meet what flows.
        if self.found is None and len(weights) < len(given):
            self.found = next((one.dtype for one in weights if one.ndim > 1), None)
        return function(*args, **(kwargs or {}))
