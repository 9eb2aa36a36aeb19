"""Several processes under ``torchrun``: who is who, and sums over all of them."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def is_main_process() -> bool:
    """Whether this process is the one that draws and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def join(device: torch.device) -> tuple[int, int]:
    """(rank, world size), the process group begun; (0, 1) without ``torchrun``."""
    import torch.distributed as dist

    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


def sum_over_processes(state: dict[str, Tensor], device: torch.device) -> None:
    """Every process's totals become those of all."""
    import torch.distributed as dist

    for total in state.values():
        there = total.to(device)
        dist.all_reduce(there)
        total.copy_(there)
