"""timm's trained weights must reach all of a network, as a file's must."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import VitprobeError
from vitprobe.models.reference import is_plain, norm_alone

SHOWN = 3


@contextmanager
def complete(name: str) -> Iterator[None]:
    """Within it timm loads trained weights in whole.

    timm loads those of some networks, and those whose number of classes its configuration gives
    wrongly, as far as they fit, and leaves the rest as it was made, at random.

    Args:
        name: of the model, for messages.

    Raises:
        VitprobeError: something in the network would stay at random, or is in numbers of another
            kind.
    """
    from timm.models import _builder

    loader: Any = _builder.load_pretrained

    def checked(model: nn.Module, *arguments: Any, **options: Any) -> None:
        norms = {n: t.clone() for n, t in _weights(model).items() if norm_alone([n])}
        with torch.no_grad():
            for tensor in _weights(model).values():
                tensor.fill_(math.nan)
        hook = model.register_load_state_dict_pre_hook(_only_plain(name))
        try:
            loader(model, *arguments, **options)
        finally:
            hook.remove()
        # What is still undefined did not come from the file.
        unset = [n for n, tensor in _weights(model).items() if tensor.isnan().all()]
        if not norm_alone(unset):
            more = f" and {len(unset) - SHOWN} more" if len(unset) > SHOWN else ""
            raise VitprobeError(
                f"The weights of {name} do not fit the architecture. Missing: "
                f"{', '.join(unset[:SHOWN])}{more}."
            )
        with torch.no_grad():
            for n in unset:
                _weights(model)[n].copy_(norms[n])

    _builder.load_pretrained = checked
    try:
        yield
    finally:
        _builder.load_pretrained = loader


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor
        for name, tensor in module.state_dict().items()
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    }


def _only_plain(name: str) -> Any:
    def check(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        needed = _weights(module)
        other = [n for n, t in state.items() if n in needed and not is_plain(t)]
        if other:
            raise VitprobeError(
                f"The weights of {name} are not in plain numbers (quantised weights?): {other[0]} "
                f"is {str(state[other[0]].dtype).removeprefix('torch.')}."
            )

    return check
