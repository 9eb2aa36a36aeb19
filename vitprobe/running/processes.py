"""Several processes under ``torchrun``: who is who, and sums over all of them."""

from __future__ import annotations

import atexit
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import VitprobeError

# A process that has done its share waits for the slowest one; torchrun sees to it that nobody
# waits for a dead one, so the group itself need not give up.
PATIENCE = timedelta(days=30)
LETTING_GO_S = 0.1
# What torchrun tells each process, beside their number, for them to meet.
MEETING = ("RANK", "MASTER_ADDR", "MASTER_PORT")


def is_main_process() -> bool:
    """Whether this process is the one that draws and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def on_this_machine() -> int:
    """How many processes of the run share this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def first_to_tell() -> bool:
    """Whether no other process of the run has told the user yet why it ends.

    True as well where that cannot be found out.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    try:
        # torchrun keeps the store that the processes meet in, whichever of them has ended.
        store = torch.distributed.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=timedelta(seconds=5),
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return bool(store.add(f"vitprobe has told {attempt}", 1) == 1)
    except (AttributeError, KeyError, ValueError, RuntimeError):
        return True


def join(device: torch.device) -> tuple[int, int]:
    """(rank, world size), the process group begun; (0, 1) without ``torchrun``.

    Raises:
        VitprobeError: several processes that have not been told how to find each other.
    """
    import torch.distributed as dist

    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1" or not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        missing = [name for name in MEETING if name not in os.environ]
        if missing:
            raise VitprobeError(
                f"WORLD_SIZE is {world}, but {' and '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not set: start several processes with "
                "torchrun, or unset WORLD_SIZE for one."
            )
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        # A group that is still there when Python ends aborts the process now and then: threads of
        # its own are left running.
        atexit.register(leave)
    return dist.get_rank(), dist.get_world_size()


def joined() -> bool:
    """Whether this process belongs to a group by now."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def leave() -> None:
    """Leave the group, if there is one; all of its processes have what they need."""
    if joined():
        # A thread of gloo may still hold the last tensor, and need Python's lock to let go of it.
        # Before torch 2.8 the group is destroyed under that lock, and would wait for the thread
        # for ever (github.com/pytorch/pytorch/pull/154976).
        time.sleep(LETTING_GO_S)
        torch.distributed.destroy_process_group()


def flags_from(rank: int, flags: np.ndarray, device: torch.device) -> np.ndarray:
    """The flags (bool) of one process, for every process."""
    there = torch.from_numpy(flags.astype(np.uint8)).to(_home(device))
    torch.distributed.broadcast(there, rank)
    return there.cpu().numpy().astype(bool)


def gathered(thing: Any) -> list[Any]:
    """What each process has, by rank; plain things only."""
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, thing)
    return found


def of_main_process(thing: Any, device: torch.device) -> Any:
    """What the main process has; the group is begun where there is to be one.

    Raises:
        VitprobeError: another process has ended.
    """
    if join(device)[1] == 1:
        return thing
    with _heard():
        return gathered(thing)[0]


def see_one_folder(folder: Path, device: torch.device) -> bool:
    """Whether a folder is one and the same for all processes: machines may have disks of their own.

    The main process must be able to write to it.

    Raises:
        VitprobeError: another process has ended.
    """
    rank, world = join(device)
    if world == 1:
        return True
    mark = folder / f".vitprobe-{secrets.token_hex(8)}"
    try:
        if rank == 0:
            mark.touch()
        with _heard():
            there = gathered(str(mark.name))[0]
            return all(gathered((folder / there).exists()))
    finally:
        if rank == 0:
            mark.unlink(missing_ok=True)


@contextmanager
def _heard() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise VitprobeError("Another process of this run ended early.") from error


def sum_over_processes(state: dict[str, Tensor], device: torch.device) -> None:
    """Every process's totals become those of all."""
    for total in state.values():
        there = total.to(_home(device))
        torch.distributed.all_reduce(there)
        total.copy_(there)


def _home(device: torch.device) -> torch.device:
    """Where the group exchanges tensors: nccl on CUDA, gloo on the host."""
    return device if device.type == "cuda" else torch.device("cpu")
