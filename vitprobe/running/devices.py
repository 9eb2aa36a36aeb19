"""Devices by name, and modules made ready on one and given back as they were."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vitprobe.errors import VitprobeError


def resolve_device(name: str) -> torch.device:
    """``auto`` or a device by name."""
    if name == "auto":
        usual = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else usual
    if name == "cuda":
        # One of several processes takes the device of its number.
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise VitprobeError(
            f"--device: {name!r} is not available on this machine, which has {_available()}."
        ) from error
    if device.type == "meta":
        raise VitprobeError("--device: 'meta' holds no numbers; use auto or cpu.")
    return device


def _available() -> str:
    """Devices to choose from: ``cpu, cuda:0 and cuda:1``."""
    found = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    found += ["mps"] if torch.backends.mps.is_available() else []
    return " and ".join(filter(None, [", ".join(found[:-1]), found[-1]]))


@contextmanager
def prepared(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Evaluation mode on a device; every module's own mode and device come back afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    homes = [next((t.device for t in _tensors(module)), None) for module in modules]
    try:
        for module in modules:
            # Some people's own train() and to() return nothing.
            module.eval()
            module.to(device)
        with _eagerly():
            yield
    finally:
        for part, training in modes:
            part.training = training
        for module, home in zip(modules, homes):
            if home is not None and home != device:
                module.to(home)


@contextmanager
def _eagerly() -> Iterator[None]:
    """Compiled parts of models run as they are written: what is compiled cannot be watched."""
    # Nothing has been compiled where the compiler has not been imported; torch 2.5 has no stance.
    if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def exact(device: torch.device) -> AbstractContextManager[Any]:
    """fp32 means fp32: cuDNN's convolutions would use TF32 by default."""
    return torch.backends.cudnn.flags(allow_tf32=False) if device.type == "cuda" else nullcontext()
