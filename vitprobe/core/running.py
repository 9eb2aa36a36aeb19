"""The batch loop: device, precision, progress, resume, several processes.

A measurement opens a ``session``, resolves its layers on an example, and hands ``Session.run`` a
step that turns a batch into additions to named float64 sums. Additive sums are the one shape
behind progress, resume after a kill, and several processes.
"""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vitprobe._version import __version__
from vitprobe.core import processes
from vitprobe.core.checkpoint import Checkpoint
from vitprobe.core.errors import VitprobeError
from vitprobe.core.images import BROKEN_FRACTION_ALLOWED, Images, open_images
from vitprobe.core.loading import TransformedImages, collate
from vitprobe.core.models import Model, load_models

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What every measurement over images can be told; the commands' options of the same names.

    Attributes:
        num_images: how many images, drawn by ``seed``; all by default.
        batch_size: images a batch.
        image_size: side in pixels for models that allow another one than their own.
        device: ``auto`` (cuda, mps, cpu in this order), or one by name.
        precision: ``fp32``, or ``bf16`` (autocast).
        seed: of the choice and order of images, and of untrained weights.
        workers: processes that decode images; chosen by the number of processors if None.
        quiet: no progress bar.
        checkpoint: where the state of an unfinished run is kept (a path without suffix), or None.
        save_every: seconds between two saves of it.
        fresh: start over, whatever the checkpoint holds.
    """

    num_images: int | None = None
    batch_size: int = 32
    image_size: int | None = None
    device: str = "auto"
    precision: str = "fp32"
    seed: int = 0
    workers: int | None = None
    quiet: bool = True
    checkpoint: Path | None = None
    save_every: float = 30.0
    fresh: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise VitprobeError(f"--batch-size must be at least 1, not {self.batch_size}.")
        if self.image_size is not None and self.image_size < 1:
            raise VitprobeError(f"--image-size must be at least 1, not {self.image_size}.")
        if self.precision not in ("fp32", "bf16"):
            raise VitprobeError(f"--precision must be fp32 or bf16, not {self.precision!r}.")


@dataclass(frozen=True)
class Batch:
    """One batch: ``inputs[i]`` (n, C, H, W) for model i, on the device and in its precision."""

    index: int
    inputs: list[Tensor]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


class Interrupted(Exception):
    """Ctrl-C; the message says how to go on."""


class Session:
    """Models and images, ready on a device; made by ``session``."""

    def __init__(self, models: list[Model], images: Images, options: Options) -> None:
        self.models, self.images, self.options = models, images, options
        self.device = resolve_device(options.device)
        self.batches = _batches(len(images), options.batch_size)
        self.broken: list[str] = []
        self._dataset = TransformedImages(models, images)

    def example(self, count: int = 2) -> list[Tensor]:
        """The first ``count`` readable images, for each model."""
        found = []
        for position in range(len(self.images)):
            item = self._dataset[position]
            if not isinstance(item, str):
                found.append(item)
            if len(found) == count:
                break
        if not found:
            raise VitprobeError(f"No image of {self.images.source} can be read: {item}")
        while len(found) < count:
            found.append(found[-1])
        return self._to_models([torch.stack(column) for column in zip(*found)])

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision that was asked for, as a context around forward passes."""
        if self.options.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def sums(self, **shapes: Sequence[int]) -> Sums:
        """Named float64 sums at zero; on the device, unless it has no float64."""
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        return {
            name: torch.zeros(tuple(shape), dtype=torch.float64, device=device)
            for name, shape in shapes.items()
        }

    def run(
        self,
        step: Callable[[Batch], None],
        sums: Sums,
        *,
        decides: dict[str, Any],
        gradients: bool = False,
    ) -> None:
        """Call ``step`` on every batch and leave the totals over all processes in ``sums``.

        Args:
            step: adds a batch to ``sums``, in place.
            sums: made by ``self.sums``.
            decides: with the session's own facts, everything that decides the result; a state on
                disk is gone on with only where all of it agrees.
            gradients: leave autograd on.

        Raises:
            VitprobeError: more broken images than allowed, out of memory.
            Interrupted: on Ctrl-C, after the state has been saved.
        """
        state = dict(sums)
        state["_broken"] = torch.zeros(len(self.images), dtype=torch.float64)
        facts = {**self.fingerprint(), **decides}
        rank, world = processes.join(self.device)
        checkpoint = Checkpoint(self.options.checkpoint, facts, len(self.batches), rank, world)
        done = checkpoint.load(state, fresh=self.options.fresh)
        todo = [b for b in range(len(self.batches)) if not done[b]][rank::world]
        if done.any() and rank == 0 and not self.options.quiet:
            print(f"going on after {int(done.sum())} of {len(done)} batches", file=sys.stderr)
        mine = done.copy() if rank == 0 else np.zeros_like(done)
        mode = nullcontext() if gradients else torch.inference_mode()
        saved_at = time.monotonic()
        try:
            with mode, self._progress(len(todo), rank) as progress:
                for batch, failures in self._load(todo):
                    for position, reason in failures:
                        state["_broken"][position] += 1
                        self._tell_broken(position, reason, int(state["_broken"].sum()))
                    if len(batch):
                        step(batch)
                    mine[batch.index] = True
                    progress.update()
                    if time.monotonic() - saved_at > self.options.save_every:
                        checkpoint.save(state, mine)
                        saved_at = time.monotonic()
        except KeyboardInterrupt:
            checkpoint.save(state, mine)
            raise Interrupted(
                f"stopped after {int(mine.sum())} of {len(done)} batches; "
                + ("the same command goes on from there" if checkpoint.path else "nothing is kept")
            ) from None
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
                raise
            smaller = max(1, self.options.batch_size // 2)
            raise VitprobeError(
                f"Out of memory on {self.device} at --batch-size {self.options.batch_size}; "
                f"try --batch-size {smaller}."
            ) from error
        if world > 1:
            checkpoint.save(state, mine)
            processes.sum_over_processes(state, self.device)
        self.broken = [self.images.name(int(p)) for p in state["_broken"].nonzero()[:, 0]]
        if rank == 0:
            checkpoint.finished()

    def fingerprint(self) -> dict[str, Any]:
        """What decides a result in every measurement."""
        options = self.options
        return {
            "models": [model.provenance() for model in self.models],
            "images": self.images.digest,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "seed": options.seed,
            "vitprobe": __version__,
        }

    def meta(self, analysis: str) -> dict[str, Any]:
        """The provenance that goes into a result file."""
        return {
            **models_meta(analysis, self.models, self.options.seed),
            "images": {
                "source": self.images.source,
                "sha256": self.images.digest,
                "broken": self.broken,
            },
            "n": len(self.images) - len(self.broken),
            "batch_size": self.options.batch_size,
            "precision": self.options.precision,
            "device": self.device.type,
        }

    def _load(self, todo: list[int]) -> Iterator[tuple[Batch, list[tuple[int, str]]]]:
        workers = self._workers(len(todo))
        loader = DataLoader(
            self._dataset,
            batch_sampler=[self.batches[b].tolist() for b in todo],
            collate_fn=collate,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
        )
        for index, (columns, positions, failures) in zip(todo, loader):
            yield Batch(index, self._to_models(columns), positions), failures

    def _workers(self, batches: int) -> int:
        if self.options.workers is not None:
            return self.options.workers
        if self.images.are_tensors or batches < 2:
            return 0
        return min(8, max(1, (os.cpu_count() or 1) // 2))

    def _to_models(self, columns: list[Tensor]) -> list[Tensor]:
        inputs = []
        for model, column in zip(self.models, (columns[g] for g in self._dataset.group_of_model)):
            parameter = next(model.module.parameters(), None)
            dtype = parameter.dtype if parameter is not None else torch.float32
            inputs.append(column.to(self.device, dtype, non_blocking=True) if columns else column)
        return inputs

    def _progress(self, total: int, rank: int) -> Any:
        silent = self.options.quiet or rank > 0 or not sys.stderr.isatty()
        return tqdm(total=total, unit="batch", disable=silent, file=sys.stderr)

    def _tell_broken(self, position: int, reason: str, count: int) -> None:
        print(f"skipped {self.images.name(position)}: {reason}", file=sys.stderr)
        if count > BROKEN_FRACTION_ALLOWED * len(self.images):
            raise VitprobeError(
                f"{count} of {len(self.images)} images of {self.images.source} cannot be read "
                f"(the last: {self.images.name(position)}), more than "
                f"{BROKEN_FRACTION_ALLOWED:.0%}."
            )


def models_meta(analysis: str, models: list[Model], seed: int) -> dict[str, Any]:
    """The provenance of a result on weights alone; with images, see ``Session.meta``."""
    import timm

    return {
        "analysis": analysis,
        "models": [model.provenance() for model in models],
        "seed": seed,
        "versions": {
            "vitprobe": __version__,
            "torch": torch.__version__,
            "timm": timm.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "command": command_line(),
    }


@contextmanager
def session(
    models: Any, images: Any = None, options: Options | None = None, *, at_least: int = 1
) -> Iterator[Session]:
    """Models and images made ready; modules get back their modes and device at the end.

    Raises:
        VitprobeError: fewer images than ``at_least``, or a model that has no transform for them.
    """
    options = options or Options()
    loaded = load_models(models, options.image_size, options.seed)
    opened = open_images(images, options.num_images, options.seed)
    if len(opened) < at_least:
        raise VitprobeError(
            f"{len(opened)} image{'s' * (len(opened) != 1)} of {opened.source} are too few: "
            f"at least {at_least} are needed."
        )
    for model in loaded:
        if model.transform is None and not opened.are_tensors:
            raise VitprobeError(
                f"{model.name} has no transform for pictures: give wrap(module, transform=...) or "
                f"images as a float tensor (n, C, H, W)."
            )
    ready = Session(loaded, opened, options)
    with _prepared([model.module for model in loaded], ready.device), _exact(ready.device):
        yield ready


def command_line() -> str:
    """The command line, without the place where the program is installed."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    if program.stem == "ipykernel_launcher":
        return "a notebook"  # its kernel's command line says nothing but a place on this machine
    name = (
        f"python -m vitprobe.{program.stem}" if program.parent.name == "vitprobe" else program.name
    )
    return " ".join([name, *map(shlex.quote, sys.argv[1:])])


def resolve_device(name: str) -> torch.device:
    """``auto`` or a device by name."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise VitprobeError(f"The device {name!r} is not to be had on this machine.") from error
    return device


@contextmanager
def _prepared(modules: list[nn.Module], device: torch.device) -> Iterator[None]:
    """Evaluation mode on a device; every module's own mode and device come back afterwards."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    homes = [next((t.device for t in _tensors(module)), None) for module in modules]
    try:
        for module in modules:
            module.eval().to(device)
        yield
    finally:
        for part, training in modes:
            part.training = training
        for module, home in zip(modules, homes):
            if home is not None and home != device:
                module.to(home)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    """fp32 means fp32: cuDNN's convolutions would use TF32 by default."""
    return torch.backends.cudnn.flags(allow_tf32=False) if device.type == "cuda" else nullcontext()


def _batches(n: int, batch_size: int) -> list[np.ndarray]:
    return np.split(np.arange(n), range(batch_size, n, batch_size))
