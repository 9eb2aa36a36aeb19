"""How much memory a run needs, said before its first batch, and what to do when it ran out."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Forecast:
    """Bytes that a run needs.

    Attributes:
        parameters: of the models; they are in memory before its first batch.
        activations: of one batch at the fullest moment of a forward pass, its inputs included.
        own: what the measurement adds, the sums and what it makes of a batch.
    """

    parameters: int
    activations: int
    own: int

    def warning(self, free: int, batch_size: int) -> str | None:
        """One line where ``free`` bytes are too few, with the batch size to try; else None."""
        if self.activations + self.own <= free:
            return None
        smaller = int(batch_size * (free - self.own) / max(1, self.activations))
        way = f"try --batch-size {smaller}" if smaller > 0 else "a smaller model may"
        return (
            f"This run needs about {self.activations / GIB:.1f} GiB for the activations of a "
            f"batch and {self.own / GIB:.1f} GiB for what is measured, beside "
            f"{self.parameters / GIB:.1f} GiB of parameters; {free / GIB:.1f} GiB are free. It may "
            f"not fit: {way}."
        )


def forecast(
    modules: list[nn.Module], example: list[Tensor], batch_size: int, waiting: int, own: int
) -> Forecast | None:
    """What a run needs, from one forward pass of each model; None where that fails.

    Args:
        modules: the models, which see the same images one after the other.
        example: for each its inputs (n, C, H, W), of a few images.
        batch_size: images per batch.
        waiting: batches that wait to be taken, in the same memory.
        own: bytes of what is measured.
    """
    known = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    most = 0
    for module, inputs in zip(modules, example):
        # A graph that is built is in memory until it is gone through.
        inputs = inputs.detach().requires_grad_(torch.is_grad_enabled())
        try:
            most = max(most, fullest(partial(module, inputs), [*known, inputs]))
        except Exception:
            # Whatever it is, the first batch will meet it, and tell it in its own words.
            return None
    inputs_bytes = (1 + waiting) * nbytes(example)
    activations = (most + inputs_bytes) * batch_size // len(example[0])
    return Forecast(nbytes(known), activations, own)


class _Fullest(TorchDispatchMode):
    """The most bytes that tensors made within it hold at one time."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.held = self.most = 0
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        # Views share the storage of what they are views of.
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.held += size
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self._freed, key, size).atexit = False

    def _freed(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.held -= size


def fullest(forward: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes of the tensors that ``forward`` holds at its fullest moment, ``known`` ones left out.

    What an operation needs only for itself is not seen: an estimate from below.
    """
    with _Fullest(known) as seen:
        forward()
    return seen.most


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors side by side."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free_bytes(device: torch.device) -> int | None:
    """Memory that a process may still take on a device, limits of its group included, or None."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    if device.type != "cpu":
        return None
    found = [free for free in (_machine(), *map(_group, _LIMITS)) if free is not None]
    return min(found, default=None)


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def _group(files: tuple[str, str]) -> int | None:
    """What a control group (a container, a batch job) leaves; "max" stands for no limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / name).read_text()) for name in files)
        stat = (folder / files[0]).with_name("memory.stat").read_text().split()
    except (OSError, ValueError):
        return None
    # Pages of files are given up when memory is short.
    cached = int(stat[stat.index("inactive_file") + 1]) if "inactive_file" in stat else 0
    return max(0, limit - used + cached)


def out_of_memory(device: Any, batch_size: int) -> str:
    """The line for memory that ran out, with the batch size to try."""
    way = f"try --batch-size {batch_size // 2}" if batch_size > 1 else "a smaller model may fit"
    return f"Out of memory on {device} at --batch-size {batch_size}; {way}"
