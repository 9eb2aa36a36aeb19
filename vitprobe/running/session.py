"""The batch loop: device, precision, progress, resume, several processes.

A measurement opens a ``session``, resolves its layers on an example, and hands ``Session.run`` a
step that turns a batch into additions to named float64 sums. Additive sums are the one shape
behind progress, resume after a kill, and several processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from vitprobe.errors import VitprobeError
from vitprobe.images.sources import BROKEN_FRACTION_ALLOWED, Images, open_images
from vitprobe.models.loading import Model, load_models
from vitprobe.results.provenance import models_meta, versions
from vitprobe.running import memory, processes
from vitprobe.running.checkpoint import Checkpoint, Saves, UntilWritten
from vitprobe.running.devices import exact, prepared, resolve_device
from vitprobe.running.interrupts import HeldBack, Interrupted
from vitprobe.running.layout import channels_last
from vitprobe.running.loading import Failure, TransformedImages, collate
from vitprobe.running.options import Options

Sums = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """One batch: ``inputs[i]`` (n, C, H, W) for model i, on the device and in its precision."""

    index: int
    inputs: list[Tensor]
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)


class Session:
    """Models and images, ready on a device; made by ``session``."""

    def __init__(
        self, models: list[Model], images: Images, options: Options, at_least: int = 1
    ) -> None:
        self.models, self.images, self.options = models, images, options
        self.device = resolve_device(options.device)
        self.batches = _batches(len(images), options.batch_size, at_least)
        self.broken: list[str] = []
        # For each model, whether it gets its inputs so.
        self.channels_last = [False] * len(models)
        self._dataset = TransformedImages(models, images)

    def example(self, count: int = 2) -> list[Tensor]:
        """The first ``count`` readable images, for each model."""
        found = []
        for position in range(len(self.images)):
            item = self._dataset[position]
            if isinstance(item, Failure):
                reason = item.reason
            else:
                found.append(item)
            if len(found) == count:
                break
        if not found:
            raise VitprobeError(f"No image of {self.images.source} can be read: {reason}")
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
        scratch: int = 0,
    ) -> None:
        """Call ``step`` on every batch and leave the totals over all processes in ``sums``.

        Args:
            step: adds a batch to ``sums``, in place.
            sums: made by ``self.sums``.
            decides: with the session's own facts, everything that decides the result; a state on
                disk is gone on with only where all of it agrees.
            gradients: leave autograd on.
            scratch: bytes that ``step`` needs for a whole batch beside the forward passes.

        Raises:
            VitprobeError: more broken images than allowed, images that have gone, out of memory,
                another process that has ended.
            Interrupted: on Ctrl-C, after the state has been saved.
        """
        state = dict(sums)
        state["_broken"] = torch.zeros(len(self.images), dtype=torch.float64)
        facts = {**self.fingerprint(), **decides}
        rank, world = processes.join(self.device)
        place = self.options.checkpoint
        until_written = place if isinstance(place, UntilWritten) else None
        path = until_written.path if until_written else place
        checkpoint = Checkpoint(path, facts, len(self.batches), rank)  # type: ignore[arg-type]
        done = checkpoint.load(state, fresh=self.options.fresh)
        if world > 1:
            with self._together(checkpoint):
                done = processes.from_main_process(done, self.device)
        todo = [b for b in range(len(self.batches)) if not done[b]][rank::world]
        if done.any() and rank == 0 and not self.options.quiet:
            print(f"going on after {int(done.sum())} of {len(done)} batches", file=sys.stderr)
        mode = nullcontext() if gradients else torch.inference_mode()
        with mode:
            if todo and rank == 0:
                self._forecast(sums, scratch)
            self._over(todo, step, state, checkpoint, done if rank == 0 else np.zeros_like(done))
        if world > 1:
            with self._together(checkpoint):
                processes.sum_over_processes(state, self.device)
            self._check_broken(state)
        self.broken = [self.images.name(int(p)) for p in state["_broken"].nonzero()[:, 0]]
        if until_written is not None:
            until_written.runs.append(checkpoint)
        elif rank == 0:
            checkpoint.remove()

    def _over(
        self,
        todo: list[int],
        step: Callable[[Batch], None],
        state: Sums,
        checkpoint: Checkpoint,
        mine: np.ndarray,
    ) -> None:
        """The loop over this process's batches; ``mine`` tells which are in ``state``."""
        saves = Saves(checkpoint, self.options.save_every)
        with HeldBack() as stops:
            try:
                with self._progress(len(todo), checkpoint.rank) as progress:
                    for batch, failures in self._load(todo):
                        self._check_gone(failures, checkpoint)
                        with stops.batch():
                            for position, failure in failures:
                                state["_broken"][position] += 1
                                self._tell_broken(position, failure.reason)
                            self._check_broken(state)
                            if len(batch):
                                step(batch)
                            mine[batch.index] = True
                        progress.update()
                        with stops.undisturbed():
                            saves.now_and_then(state, mine)
                if checkpoint.keeps:
                    with stops.undisturbed():
                        saves.now(state, mine)
            except KeyboardInterrupt:
                _last_save(saves, stops, state, mine)
                text = _stopped(todo, mine, checkpoint)
                raise Interrupted(f"{text} {_way(checkpoint)}", stops.status) from None
            except Exception as error:
                _last_save(saves, stops, state, mine)
                told = self._told(error, checkpoint)
                if told is None:
                    raise
                raise told from error

    @contextmanager
    def _together(self, checkpoint: Checkpoint) -> Iterator[None]:
        """Around what all processes do together, each having saved what it has done.

        Raises:
            VitprobeError: another one has ended.
            Interrupted: on Ctrl-C.
        """
        # Who waits for a card hears no signal: there the system is to end the process itself.
        with HeldBack(takes=self.device.type != "cuda") as stops:
            try:
                with stops.undisturbed():
                    yield
            except (KeyboardInterrupt, RuntimeError) as error:
                # Who is asked to stop together with the others sees them end, too.
                if stops.asked or isinstance(error, KeyboardInterrupt):
                    raise Interrupted(f"Stopped. {_way(checkpoint)}", stops.status) from None
                if memory.ran_out(error):
                    raise
                raise VitprobeError(
                    f"Another process of this run has ended before it was done. {_way(checkpoint)}"
                ) from error

    def _told(self, error: Exception, checkpoint: Checkpoint) -> VitprobeError | None:
        """What a user can do about an exception from the loop, where there is something."""
        size, text = self.options.batch_size, str(error)
        if memory.ran_out(error):
            return VitprobeError(
                f"Out of memory on {self.device} at --batch-size {size}; "
                + (f"try --batch-size {size // 2}." if size > 1 else "a smaller model may fit.")
            )
        # What a dead process has left behind is a broken connection or a word from torch.
        decoders = self._workers(len(self.batches)) > 0
        broken = decoders and isinstance(error, (ConnectionError, EOFError))
        if broken or (isinstance(error, RuntimeError) and "DataLoader worker" in text):
            return VitprobeError(
                "The system has ended a process that decodes images, as it does when memory is "
                f"short; with --workers 0 there are none. {_way(checkpoint)}"
            )
        return None

    def _forecast(self, sums: Sums, scratch: int) -> None:
        """Warn before the first batch where the run will not fit into memory."""
        free = memory.free_bytes(self.device)
        if free is None:
            return
        size, on_host = self.options.batch_size, self.device.type == "cpu"
        # Batches that wait to be taken are in memory too.
        waiting = 2 * self._workers(len(self.batches)) if on_host else 0
        with self.autocast():
            forecast = memory.forecast(
                [model.module for model in self.models],
                self.example(),
                min(size, len(self.images)),
                waiting,
                scratch + memory.nbytes(sums.values()),
            )
        here = processes.on_this_machine() if on_host else 1
        warning = forecast.warning(free // here, size) if forecast else None
        if warning:
            print(f"vitprobe: {warning}", file=sys.stderr)

    def fingerprint(self) -> dict[str, Any]:
        """What decides a result in every measurement."""
        options = self.options
        return {
            "models": [model.provenance() for model in self.models],
            "images": [self.images.digest, self.images.version],
            "batch_size": options.batch_size,
            "precision": options.precision,
            "device": self.device.type,
            "seed": options.seed,
            "versions": versions(),
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

    def _load(self, todo: list[int]) -> Iterator[tuple[Batch, list[tuple[int, Failure]]]]:
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
        # Not all processors of a shared machine are this process's, nor this process's alone.
        mine = getattr(os, "sched_getaffinity", None)
        usable = len(mine(0)) if mine else os.cpu_count() or 1
        return min(8, max(1, usable // 2 // processes.on_this_machine()))

    def _to_models(self, columns: list[Tensor]) -> list[Tensor]:
        inputs: list[Tensor] = []
        if not columns:
            # Not one image of the batch could be read.
            return inputs
        groups = self._dataset.group_of_model
        for model, group, last in zip(self.models, groups, self.channels_last):
            parameter = next(model.module.parameters(), None)
            dtype = parameter.dtype if parameter is not None else torch.float32
            layout = torch.channels_last if last else torch.preserve_format
            column = columns[group].to(self.device, dtype, non_blocking=True)
            inputs.append(column.to(memory_format=layout))
        return inputs

    def _progress(self, total: int, rank: int) -> Any:
        silent = self.options.quiet or rank > 0 or not sys.stderr.isatty()
        return tqdm(total=total, unit="batch", disable=silent, file=sys.stderr)

    def _tell_broken(self, position: int, reason: str) -> None:
        print(f"skipped {self.images.name(position)}: {reason}", file=sys.stderr)

    def _check_broken(self, state: Sums) -> None:
        count, n = int((state["_broken"] > 0).sum()), len(self.images)
        if count > BROKEN_FRACTION_ALLOWED * n:
            last = self.images.name(int(state["_broken"].nonzero()[-1]))
            raise VitprobeError(
                f"{count} of {n} images of {self.images.source} cannot be read (among them: "
                f"{last}), more than {BROKEN_FRACTION_ALLOWED:.0%}."
            )

    def _check_gone(self, failures: list[tuple[int, Failure]], checkpoint: Checkpoint) -> None:
        """Pictures that vanish in mid-run are not broken: leaving them out would be wrong."""
        for position, failure in failures:
            if failure.gone:
                raise VitprobeError(
                    f"{self.images.name(position)} of {self.images.source} cannot be reached any "
                    f"more: {failure.reason}. {_way(checkpoint)}"
                )


def _last_save(saves: Saves, stops: HeldBack, state: Sums, mine: np.ndarray) -> None:
    """Save, unless the sums hold a part of a batch: then the last save stands."""
    for _ in range(2):
        try:
            with stops.undisturbed():
                if not stops.torn:
                    saves.now(state, mine)
            return
        except RuntimeError as late:
            # torch tells of a dead decoder, once, when its signal comes, be it in mid-save.
            if "DataLoader worker" not in str(late):
                raise


def _stopped(todo: list[int], mine: np.ndarray, checkpoint: Checkpoint) -> str:
    """How far a run, or this process of several, has come, and how much of that is saved."""
    if processes.joined():
        whose, done, count = f" of process {checkpoint.rank}", int(mine[todo].sum()), len(todo)
    else:
        whose, done, count = "", int(mine.sum()), len(mine)
    lost = int(mine.sum()) - checkpoint.saved
    but = f", the last {lost} of them not saved" if checkpoint.saved and lost else ""
    return f"Stopped after {done} of {count} batches{whose}{but}."


def _way(checkpoint: Checkpoint) -> str:
    """How to go on after a run that ended early."""
    # One of several processes may have saved nothing yet where the others have.
    kept = checkpoint.keeps if processes.joined() else checkpoint.saved
    return "The same command goes on from there." if kept else "Nothing is kept."


@contextmanager
def session(
    models: Any,
    images: Any = None,
    options: Options | None = None,
    *,
    at_least: int = 1,
    lay_out: bool = True,
) -> Iterator[Session]:
    """Models and images made ready; modules get back their modes and device at the end.

    Args:
        models: see ``load_models``.
        images: see ``open_images``.
        options: defaults if None.
        at_least: images that the measurement needs in a batch.
        lay_out: run convolutions in the layout in which their forward passes are fast.

    Raises:
        VitprobeError: fewer images than ``at_least``, or a model that has no transform for them.
    """
    options = options or Options()
    loaded = load_models(models, options.image_size, options.seed, options.names)
    opened = open_images(images, options.num_images, options.seed)
    if processes.is_main_process():
        for remark in opened.remarks:
            print(f"vitprobe: {remark}", file=sys.stderr)
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
    ready = Session(loaded, opened, options, at_least)
    modules = [model.module for model in loaded]
    try:
        with (
            prepared(modules, ready.device),
            exact(ready.device),
            channels_last(modules if lay_out else [], ready.device, ready.example) as taken,
        ):
            ready.channels_last = taken or ready.channels_last
            yield ready
    except (RuntimeError, MemoryError) as error:
        if not memory.ran_out(error):
            raise
        raise VitprobeError(
            f"Out of memory on {ready.device} for {options.batch_size} images a batch and "
            f"{' and '.join(model.name for model in loaded)}."
        ) from error


def _batches(n: int, batch_size: int, at_least: int = 1) -> list[np.ndarray]:
    """Positions of each batch, as many in one as in another.

    Estimates of a few images are noisy, and sums over batches count every batch alike: 100 images
    as 32 + 32 + 32 + 4 have a CKA with more than twice the error of 4 × 25. Only where even
    batches would be under ``at_least`` are all but the last full.
    """
    count = -(-n // batch_size)
    if n // count >= at_least:
        return np.array_split(np.arange(n), count)
    return np.split(np.arange(n), range(batch_size, n, batch_size))
