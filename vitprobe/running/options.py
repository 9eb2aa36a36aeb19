"""The options that every measurement over images shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitprobe.errors import VitprobeError
from vitprobe.running.checkpoint import UntilWritten


@dataclass(frozen=True)
class Options:
    """What every measurement over images can be told; the commands' options of the same names.

    Attributes:
        names: what figures call the models, one for each; their own names by default.
        num_images: how many images, drawn by ``seed``; all by default.
        batch_size: images per batch, at most; all batches are of one size or differ by one image.
        image_size: side in pixels for models that allow another one than their own.
        device: ``auto`` (cuda, mps, cpu in this order), or one by name.
        precision: ``fp32``, or ``bf16`` (autocast).
        seed: of the choice and order of images, and of untrained weights.
        workers: processes that decode images; chosen by the number of processors if None.
        quiet: no progress bar.
        checkpoint: where the state of an unfinished run is kept (a path without suffix), or None.
            It goes when the run is done, or with ``UntilWritten`` when the result is on disk.
        save_every: seconds between two saves of it; more where saving is slow.
        fresh: start over, whatever the checkpoint holds.
        on_error: what becomes of a batch with values that are not finite or a check that failed:
            ``stop`` (an error; a resume tries it again) or ``skip`` (left out and counted).
    """

    names: str | Sequence[str] | None = None
    num_images: int | None = None
    batch_size: int = 32
    image_size: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    seed: int = 0
    workers: int | None = None
    quiet: bool = True
    checkpoint: Path | UntilWritten | None = None
    save_every: float = 30.0
    fresh: bool = False
    on_error: str = "stop"

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise VitprobeError(f"--batch-size must be at least 1, not {self.batch_size}.")
        if self.image_size is not None and self.image_size < 1:
            raise VitprobeError(f"--image-size must be at least 1, not {self.image_size}.")
        if self.workers is not None and self.workers < 0:
            raise VitprobeError(f"--workers must be at least 0, not {self.workers}.")
        if not 0 <= self.seed < 2**32:
            raise VitprobeError(f"--seed must be from 0 to {2**32 - 1}, not {self.seed}.")
        if not self.save_every >= 0:
            raise VitprobeError(f"--save-every must be at least 0, not {self.save_every}.")
        if self.on_error not in ("stop", "skip"):
            raise VitprobeError(f"--on-error must be stop or skip, not {self.on_error!r}.")
        if self.precision not in ("fp32", "bf16"):
            raise VitprobeError(f"--precision must be fp32 or bf16, not {self.precision!r}.")


def option(default: Any, help: str, **argument: Any) -> Any:
    """A field of a ``Measurement`` that is an option of its command too.

    Args:
        default: of both.
        help: for the command line, in the words of a list.
        argument: what ``argparse`` needs beside that (``type``, ``nargs``, ``choices``, ...).
    """
    return field(default=default, metadata={"argument": {"help": help, **argument}})
