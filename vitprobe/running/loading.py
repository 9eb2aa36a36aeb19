"""Images through every model's transform, in batches, the broken ones told apart."""

from __future__ import annotations

import errno
import multiprocessing.connection
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from vitprobe.errors import VitprobeError, describe, is_error, ran_out, shown
from vitprobe.images.datasets import check_plain
from vitprobe.images.decoding import GoneError
from vitprobe.images.sources import Images
from vitprobe.models.loading import Model
from vitprobe.running.sending import anew, cannot_be_sent

# Where the processors of Hugging Face leave an image.
PIXELS = "pixel_values"
# How long the system may take to end a process whose connections are closed already.
GRACE_S = 1.0


@dataclass(frozen=True)
class Failure:
    """An image without pixels.

    Attributes:
        reason: in one line.
        gone: it was there when the run began; nothing is known about the image itself.
        stops: a line to end the run with: not the image is wrong, what it goes through is.
    """

    reason: str
    gone: bool = False
    stops: str = ""


Loaded = tuple[list[Tensor], np.ndarray, list[tuple[int, Failure]]]


class TransformedImages(Dataset):
    """Position -> the image through every distinct transform, or why it cannot be read."""

    def __init__(self, models: list[Model], images: Images) -> None:
        self.images = images
        # What a given transform does is not known: only the very same one counts as equal.
        keys = [
            "" if images.are_tensors else model.transform_key or str(id(model.transform))
            for model in models
        ]
        groups = list(dict.fromkeys(keys))
        self.group_of_model = [groups.index(key) for key in keys]
        firsts = [models[keys.index(group)] for group in groups]
        self.transforms = [model.transform for model in firsts]
        # Whose the transform of a group is, for messages.
        self.owners = [model.name for model in firsts]

    def __getitem__(self, position: int) -> list[Tensor] | Failure:
        try:
            image = self.images.open(position)
        except GoneError as error:
            return Failure(str(error), gone=True)
        except BaseException as error:
            if ran_out(error):
                # Nothing is known about the image: leaving it out would be wrong.
                return _stop(self._too_large(position, error))
            if not _of_the_code(error):
                raise
            # Decoders of damaged images raise anything; it is told, and too many stop the run.
            return Failure(shown(describe(error)))
        if isinstance(image, Tensor):
            return [image]
        found = []
        for transform, owner in zip(self.transforms, self.owners):
            assert transform is not None  # the session has seen to it
            name = self.images.name(position)
            try:
                given = transform(image)
            except BaseException as error:
                if ran_out(error):
                    return _stop(self._too_large(position, error))
                if not _of_the_code(error):
                    raise
                return _stop(f"The transform of {owner} raised {describe(error)} at {name}.")
            try:
                found.append(as_input(given))
            except ValueError as error:
                return _stop(f"The transform of {owner} gave {error} for {name}: a tensor "
                             f"(C, H, W) is expected.")  # fmt: skip
        return found

    def _too_large(self, position: int, error: BaseException) -> str:
        return (
            f"Out of memory while {self.images.name(position)} was read ({shown(describe(error))});"
            f" fewer --workers or a smaller --batch-size may fit."
        )

    def __getitems__(self, positions: list[int]) -> list[tuple[int, list[Tensor] | Failure]]:
        return [(position, self[position]) for position in positions]

    def stacked(self, good: Sequence[tuple[int, list[Tensor]]]) -> list[Tensor]:
        """One batch for each group of models.

        Raises:
            VitprobeError: images of different sizes.
        """
        for group, column in enumerate(zip(*(item for _, item in good))):
            first = column[0].shape
            other = next((i for i, one in enumerate(column) if one.shape != first), None)
            if other is not None:
                raise self.differ(group, good[0][0], first, good[other][0], column[other].shape)
        return [torch.stack(column) for column in zip(*(item for _, item in good))]

    def differ(
        self, group: int, one: int, size: torch.Size, other: int, other_size: torch.Size
    ) -> VitprobeError:
        """What to say of two images of different sizes, by their positions."""
        who = f"The transform of {self.owners[group]} gives images"
        if self.images.are_tensors:
            who = f"The images of {self.images.source} are"
        return VitprobeError(
            f"{who} of different sizes: {tuple(size)} for {self.images.name(one)}, "
            f"{tuple(other_size)} for {self.images.name(other)}. All must be of one size (resize "
            f"and crop)."
        )


def _of_the_code(error: BaseException) -> bool:
    """Whether an exception is one of a user's code: a data set, a decoder, a transform.

    Ctrl-C never comes to processes that decode (see ``_be_quiet``), and no generator is closed in
    the midst of such code: who raises these there means them.
    """
    if isinstance(error, GeneratorExit):
        return True
    if isinstance(error, KeyboardInterrupt):
        return get_worker_info() is not None
    return is_error(error)


def _stop(line: str) -> Failure:
    return Failure(line, stops=line)


def as_input(given: Any) -> Tensor:
    """The tensor (C, H, W) in what a transform gives: a tensor or array, or a dict with one.

    Raises:
        ValueError: there is none; the message names what there is.
    """
    if isinstance(given, Mapping):
        if PIXELS not in given:
            raise ValueError(f"a dict with {', '.join(map(str, given))}, without {PIXELS!r}")
        given = given[PIXELS]
    # A processor gives a batch of the one image.
    if isinstance(given, list | tuple) and len(given) == 1:
        given = given[0]
    if isinstance(given, np.ndarray) and given.dtype.kind in "fiub":
        # torch has numbers of this machine's byte order only.
        native = np.ascontiguousarray(given, dtype=given.dtype.newbyteorder("="))
        given = torch.from_numpy(native)
    elif isinstance(given, np.ndarray):
        raise ValueError(f"an array of {given.dtype} {given.shape}")
    if not isinstance(given, Tensor):
        kind = "a PIL image" if isinstance(given, Image.Image) else f"a {type(given).__name__}"
        raise ValueError(kind)
    check_plain(given)
    if given.ndim == 4 and len(given) == 1:
        given = given[0]
    if given.ndim != 3:
        raise ValueError(f"a tensor of {tuple(given.shape)}")
    if given.shape[-1] in (1, 3) and given.shape[0] not in (1, 3):
        raise ValueError(f"a tensor of {tuple(given.shape)}, its channels last,")
    return given


def batches(
    dataset: TransformedImages, positions: Sequence[Sequence[int]], workers: int, pin: bool
) -> Iterator[Loaded]:
    """For each batch its images, a tensor for each group of models; where they are; failures.

    Args:
        dataset: the images.
        positions: of each batch.
        workers: processes that decode; none where the images cannot be sent to them.
        pin: into memory that a card reads fast.

    Raises:
        VitprobeError: a transform that fails, or gives images of different sizes.
    """
    if workers and (reason := cannot_be_sent(dataset.images, dataset)):
        print(f"vitprobe: images are decoded in this process: {reason}", file=sys.stderr)
        workers = 0
    loader = DataLoader(
        dataset,
        batch_sampler=[list(one) for one in positions],
        collate_fn=partial(_collate, dataset),
        num_workers=workers,
        pin_memory=pin,
        worker_init_fn=_be_quiet,
    )
    sizes: dict[int, tuple[int, torch.Size]] = {}
    loaded = iter(loader)
    for number in range(len(positions)):
        try:
            columns, places, failures = next(loaded)
        except (RuntimeError, ConnectionError, EOFError) as error:
            if too_many_open(error):
                raise
            if number == 0 and decoder_ended(error) and anew():
                raise VitprobeError(_NEVER_BEGAN) from error
            if workers and (decoder_ended(error) or not isinstance(error, RuntimeError)):
                ended = _ended(getattr(loaded, "_workers", ()), error)
                if ended is not error:
                    raise ended from error
            raise
        for _, failure in failures:
            if failure.stops:
                raise VitprobeError(failure.stops)
        for group, column in enumerate(columns):
            position, size = sizes.setdefault(group, (int(places[0]), column.shape[1:]))
            if column.shape[1:] != size:
                raise dataset.differ(group, position, size, int(places[0]), column.shape[1:])
        yield columns, places, failures


def _collate(dataset: TransformedImages, items: list[tuple[int, list[Tensor] | Failure]]) -> Loaded:
    good = [(position, item) for position, item in items if not isinstance(item, Failure)]
    failures = [(position, item) for position, item in items if isinstance(item, Failure)]
    places = np.array([position for position, _ in good], dtype=np.int64)
    try:
        return dataset.stacked(good), places, failures
    except VitprobeError as error:
        # An exception would come out of a process with its traceback for a message.
        return [], places, [*failures, (good[0][0], _stop(str(error)))]


_NEVER_BEGAN = (
    "A process that decodes images ended before its first batch. Where processes are started anew "
    "(Windows, macOS, Python 3.14), a script needs if __name__ == '__main__': around what it runs; "
    "workers=0 (--workers 0) does without processes."
)


# The status of a process that decodes and could open no more files.
_FULL = 124


def too_many_open(error: BaseException) -> bool:
    """Whether the system opens no more files, here or in a process that decodes."""
    if isinstance(error, OSError):
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return "Too many open files" in str(error) or decoder_status(error) == _FULL


def _be_quiet(worker: int) -> None:
    """Leave it to the main process to tell why a run ends; it ends its workers, too."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def give_up() -> None:
        # A batch is lost, and the main process would wait for it without end. It hears of the
        # first process that ends, and ends the others, which may well meet the same.
        time.sleep(2 * GRACE_S * worker)
        os._exit(_FULL)

    def told(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if too_many_open(error):
            give_up()
        if not issubclass(kind, ConnectionError | EOFError | KeyboardInterrupt):
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = told
    # The thread that sends images on prints what stops it.
    queue: Any = multiprocessing.queues.Queue
    usual = queue._on_queue_feeder_error

    def on_error(error: Exception, thing: Any) -> None:
        if too_many_open(error):
            give_up()
        if not isinstance(error, ConnectionError | EOFError):
            usual(error, thing)

    queue._on_queue_feeder_error = staticmethod(on_error)


def decoder_ended(error: BaseException) -> bool:
    """Whether an exception is torch's word for a decoding process that has ended.

    It is raised out of whatever the main process does at that moment.
    """
    return isinstance(error, RuntimeError) and "DataLoader worker" in str(error)


def decoder_status(error: BaseException) -> int | None:
    """The exit status of a decoding process that has ended by itself; None for one that was ended.

    torch has it in the exception or in one of its causes.
    """
    cause: BaseException | None = error
    seen: set[int] = set()
    # Causes can go in a circle.
    while cause is not None and id(cause) not in seen:
        if decoder_ended(cause) and (status := re.search(r"exit code (\d+)", str(cause))):
            return int(status[1])
        seen.add(id(cause))
        cause = cause.__cause__
    return None


def _ended(decoders: Sequence[Any], error: BaseException) -> BaseException:
    """What has become of the decoding processes, where ``error`` does not tell.

    A connection breaks a moment before the process is gone.
    """
    if decoder_status(error) is not None:
        return error
    try:
        ending = {decoder.sentinel: decoder for decoder in decoders}
        for sentinel in multiprocessing.connection.wait(list(ending), timeout=GRACE_S):
            decoder = ending[sentinel]
            decoder.join(GRACE_S)
            if decoder.exitcode and decoder.exitcode > 0:
                return RuntimeError(f"DataLoader worker: exit code {decoder.exitcode}")
    except RuntimeError as late:
        if not decoder_ended(late):
            raise
        return late
    return error
