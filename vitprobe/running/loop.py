"""The batch loop: progress, resume, several processes, and what goes wrong in between.

``run`` hands every batch of a session to a step that adds to named float64 sums. Additive sums are
the one shape behind progress, resume after a kill, and several processes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vitprobe.errors import BatchFailure, VitprobeError, ran_out
from vitprobe.images.sources import BROKEN_FRACTION_ALLOWED
from vitprobe.results.printing import on_terminal
from vitprobe.running import memory, processes
from vitprobe.running.checkpoint import Checkpoint, Saves, UntilWritten
from vitprobe.running.interrupts import HeldBack, Interrupted
from vitprobe.running.loading import Failure, decoder_ended, decoder_status, too_many_open
from vitprobe.running.session import Batch, Session, Sums
from vitprobe.statistics.hsic import MIN_BATCH


def run(
    ready: Session,
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
        sums: made by ``Session.sums``.
        decides: with the session's own facts, everything that decides the result; a state on
            disk is resumed only where all of it agrees.
        gradients: leave autograd on.
        scratch: bytes that ``step`` needs for a whole batch beside the forward passes.

    Raises:
        VitprobeError: more broken images than allowed, images that have gone, out of memory,
            another process that has ended.
        Interrupted: on Ctrl-C, after the state has been saved.
    """
    state = dict(sums)
    for name in ("_broken", "_skipped"):
        state[name] = torch.zeros(len(ready.images), dtype=torch.float64)
    facts = {**ready.fingerprint(), **decides}
    rank, world = processes.join(ready.device)
    place = ready.options.checkpoint
    until_written = place if isinstance(place, UntilWritten) else None
    path = until_written.path if until_written else place
    checkpoint = Checkpoint(path, facts, len(ready.batches), rank)  # type: ignore[arg-type]
    if world > 1:
        with _together(ready, checkpoint):
            told = processes.gathered({name: _digest(fact) for name, fact in _seen(facts).items()})
        _check_equal(told)
    mine = done = np.zeros(len(ready.batches), dtype=bool)
    for turn in range(world):
        if turn == rank:
            mine = checkpoint.load(state, ready.options.fresh, done)
        if world > 1:
            with _together(ready, checkpoint):
                done = done | processes.flags_from(turn, mine, ready.device)
        else:
            done = mine.copy()
    todo = [b for b in range(len(ready.batches)) if not done[b]][rank::world]
    if done.any() and rank == 0 and not ready.options.quiet:
        print(f"Resuming after batch {int(done.sum())} of {len(done)}", file=sys.stderr)
    # Not inference mode: what a module keeps of a pass could not be trained with afterwards.
    mode = nullcontext() if gradients else torch.no_grad()
    failure: VitprobeError | None = None
    try:
        with mode:
            if todo and rank == 0:
                _forecast(ready, sums, scratch)
            _over(ready, todo, step, state, checkpoint, mine)
    except VitprobeError as error:
        if until_written is not None:
            until_written.failed.append(checkpoint)
        if world == 1 or not ready.goes_on:
            raise
        failure = error
    if world > 1:
        with _together(ready, checkpoint):
            failures = processes.gathered("" if failure is None else str(failure))
        if failure is not None:
            raise failure
        # Processes that go on with another measurement do so together.
        if text := next(filter(None, failures), ""):
            raise VitprobeError(text)
        with _together(ready, checkpoint):
            processes.sum_over_processes(state, ready.device)
        _check_broken(ready, state)
        if checkpoint.keeps:
            # From here on the main process keeps all: every other one removes its own.
            with _together(ready, checkpoint):
                kept = rank > 0 or checkpoint.save_whole(state)
                if processes.gathered(kept)[0]:
                    shared = processes.see_one_folder(checkpoint.folder, ready.device)
                    if rank > 0:
                        checkpoint.leave_to_main(shared)
    for names, which in ((ready.broken, "_broken"), (ready.skipped, "_skipped")):
        names[:] = [ready.images.name(int(p)) for p in state[which].nonzero()[:, 0]]
    if until_written is not None:
        until_written.runs.append(checkpoint)
    else:
        checkpoint.remove()


def _seen(facts: dict[str, Any]) -> dict[str, Any]:
    """What all processes must agree on: copies of a file may well be of other times."""
    return {**facts, "images": facts["images"][0], "versions": None}


def _digest(fact: Any) -> str:
    text = json.dumps(fact, sort_keys=True, default=str)
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _check_equal(told: list[dict[str, str]]) -> None:
    """Refuse to add up what processes of different models, images or options have found."""
    for rank, one in enumerate(told):
        for name in {**told[0], **one}:
            if one.get(name) != told[0].get(name):
                raise VitprobeError(
                    f"Process {rank} has other {name.replace('_', ' ')} than process 0: all must "
                    f"be given the same command, and the same files under the same names."
                )


def _over(
    ready: Session,
    todo: list[int],
    step: Callable[[Batch], None],
    state: Sums,
    checkpoint: Checkpoint,
    mine: np.ndarray,
) -> None:
    """The loop over this process's batches; ``mine`` tells which are in ``state``."""
    saves = Saves(checkpoint, ready.options.save_every)
    with HeldBack() as stops:
        try:
            with _progress(ready, todo, checkpoint.rank) as progress:
                for batch, failures in ready.load(todo):
                    _check_gone(ready, failures, checkpoint)
                    with stops.batch():
                        for position, failure in failures:
                            state["_broken"][position] += 1
                            _tell_broken(ready, position, failure.reason)
                        _check_broken(ready, state)
                        if len(batch):
                            _attempt(ready, step, batch, state)
                        mine[batch.index] = True
                    count = int(mine[todo].sum())
                    progress.set_postfix_str(f"batch {count} of {len(todo)}", refresh=False)
                    progress.update(len(ready.batches[batch.index]))
                    with stops.undisturbed():
                        saves.now_and_then(state, mine)
            if checkpoint.keeps:
                with stops.undisturbed():
                    saves.now(state, mine)
        except KeyboardInterrupt:
            _last_save(saves, stops, state, mine)
            text = _stopped(todo, mine, checkpoint)
            raise Interrupted(f"{text}; {_way(checkpoint)}", stops.status) from None
        except BaseException as error:
            _last_save(saves, stops, state, mine)
            told = _told(ready, error, checkpoint)
            if told is None:
                raise
            raise told from error


def _attempt(ready: Session, step: Callable[[Batch], None], batch: Batch, state: Sums) -> None:
    """The step on a batch, which is left out if something is wrong with it and that is asked for.

    Raises:
        BatchFailure: otherwise, naming the image.
    """
    skips = ready.options.on_error == "skip"
    before = {name: total.clone() for name, total in state.items()} if skips else {}
    try:
        step(batch)
    except BatchFailure as error:
        text = f"batch {batch.index + 1} of {len(ready.batches)}"
        where = _culprit(ready, step, batch)
        if not skips:
            raise BatchFailure(
                f"{error} It is {where} in {text}; --on-error skip leaves such batches out."
            ) from error
        for name, total in before.items():
            state[name].copy_(total)
        state["_skipped"][torch.from_numpy(batch.positions)] += 1
        print(f"Skipped {text} ({len(batch)} images), for {where}: {error}", file=sys.stderr)


def _culprit(ready: Session, step: Callable[[Batch], None], batch: Batch) -> str:
    """The image that a step fails on by itself; what it adds to the sums meanwhile is void."""
    for i, position in enumerate(batch.positions):
        # As many of it as any estimator needs.
        copies = min(len(batch), MIN_BATCH)
        alone = [one[i : i + 1].repeat(copies, 1, 1, 1) for one in batch.inputs]
        try:
            step(Batch(batch.index, alone, np.repeat(position, copies)))
        except BatchFailure:
            return ready.images.name(int(position))
    first, last = (ready.images.name(int(batch.positions[i])) for i in (0, -1))
    return f"one of {first} to {last}"


@contextmanager
def _together(ready: Session, checkpoint: Checkpoint) -> Iterator[None]:
    """Around what all processes do together, each having saved what it has done.

    Raises:
        VitprobeError: another one has ended.
        Interrupted: on Ctrl-C.
    """
    # Who waits for a card hears no signal: there the system is to end the process itself.
    with HeldBack(takes=ready.device.type != "cuda") as stops:
        try:
            with stops.undisturbed():
                yield
        except (KeyboardInterrupt, RuntimeError) as error:
            # Who is asked to stop together with the others sees them end, too.
            if stops.asked or isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"Stopped; {_way(checkpoint)}", stops.status) from None
            if ran_out(error):
                raise
            raise VitprobeError(
                f"Another process of this run ended early; {_way(checkpoint)}"
            ) from error


def _told(ready: Session, error: BaseException, checkpoint: Checkpoint) -> VitprobeError | None:
    """What a user can do about an exception from the loop, where there is something."""
    if ran_out(error):
        return VitprobeError(f"{memory.out_of_memory(ready.device, ready.options.batch_size)}.")
    decoders = ready.workers(len(ready.batches)) > 0
    if decoders and too_many_open(error):
        return VitprobeError(
            "Too many files are open at once, and processes that decode images hold some each: "
            "raise the limit (ulimit -n) or take fewer of them (--workers 0 starts none); "
            f"{_way(checkpoint)}"
        )
    # What a dead process has left behind is a broken connection or a word from torch.
    broken = decoders and isinstance(error, (ConnectionError, EOFError))
    if broken or decoder_ended(error):
        status = decoder_status(error)
        if status is not None:
            return VitprobeError(
                f"A process that decodes images ended by itself, with status {status} (--workers 0 "
                f"starts none, and what ends it shows); {_way(checkpoint)}"
            )
        return VitprobeError(
            "The system ended a process that decodes images, as it does when memory is short "
            f"(--workers 0 starts none); {_way(checkpoint)}"
        )
    return None


def _forecast(ready: Session, sums: Sums, scratch: int) -> None:
    """Warn before the first batch where the run will not fit into memory."""
    free = memory.free_bytes(ready.device)
    if free is None:
        return
    size, on_host = ready.options.batch_size, ready.device.type == "cpu"
    # Batches that wait to be taken are in memory too.
    waiting = 2 * ready.workers(len(ready.batches)) if on_host else 0
    with ready.autocast():
        forecast = memory.forecast(
            [model.module for model in ready.models],
            ready.example(),
            min(size, len(ready.images)),
            waiting,
            scratch + memory.nbytes(sums.values()),
        )
    here = processes.on_this_machine() if on_host else 1
    warning = forecast.warning(free // here, size) if forecast else None
    if warning:
        print(f"vitprobe: {warning}", file=sys.stderr)


def _progress(ready: Session, todo: list[int], rank: int) -> Any:
    """A bar that counts images, under the models' names."""
    return tqdm(
        total=sum(len(ready.batches[b]) for b in todo),
        desc=", ".join(model.name for model in ready.models),
        unit=" images",
        dynamic_ncols=True,
        disable=ready.options.quiet or rank > 0 or not on_terminal(sys.stderr),
        file=sys.stderr,
    )


def _tell_broken(ready: Session, position: int, reason: str) -> None:
    print(f"Skipped {ready.images.name(position)}: {reason}", file=sys.stderr)


def _check_broken(ready: Session, state: Sums) -> None:
    count, n = int((state["_broken"] > 0).sum()), len(ready.images)
    if count > BROKEN_FRACTION_ALLOWED * n:
        last = ready.images.name(int(state["_broken"].nonzero()[-1]))
        raise VitprobeError(
            f"{count} of {n} images of {ready.images.source} cannot be read (among them: "
            f"{last}), more than {BROKEN_FRACTION_ALLOWED:.0%}."
        )


def _check_gone(
    ready: Session, failures: list[tuple[int, Failure]], checkpoint: Checkpoint
) -> None:
    """Images that vanish in mid-run are not broken: leaving them out would be wrong."""
    for position, failure in failures:
        if failure.gone:
            raise VitprobeError(
                f"{ready.images.name(position)} of {ready.images.source} can no longer be "
                f"reached: {failure.reason}; {_way(checkpoint)}"
            )


def _last_save(saves: Saves, stops: HeldBack, state: Sums, mine: np.ndarray) -> None:
    """Save, unless the sums hold a part of a batch: then the last save stands."""
    for _ in range(2):
        try:
            with stops.undisturbed():
                if mine.any() and not stops.torn:
                    saves.now(state, mine)
            return
        except RuntimeError as late:
            # torch tells of a dead decoder, once, when its signal comes, be it in mid-save.
            if not decoder_ended(late):
                raise


def _stopped(todo: list[int], mine: np.ndarray, checkpoint: Checkpoint) -> str:
    """How far a run, or this process of several, has come, and how much of that is saved."""
    if processes.joined():
        whose, done, count = f" of process {checkpoint.rank}", int(mine[todo].sum()), len(todo)
    else:
        whose, done, count = "", int(mine.sum()), len(mine)
    lost = int(mine.sum()) - checkpoint.saved
    but = f" (the last {lost} not saved)" if checkpoint.saved and lost else ""
    if not done:
        return f"Stopped before the first batch{whose} was done"
    return f"Stopped after batch {done} of {count}{whose}{but}"


def _way(checkpoint: Checkpoint) -> str:
    """How to resume a run that ended early."""
    # One of several processes may have saved nothing yet where the others have.
    kept = checkpoint.keeps if processes.joined() else checkpoint.there()
    return "run the same command to resume." if kept else "nothing was saved."
