"""The state of an unfinished run on disk: written whole or not at all, never executed.

Every process keeps its own file: its sums and which batches they hold. Files are read together,
so a run resumes with another number of processes too; a file whose batches another one already
holds is left aside, so that no batch counts twice.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from vitprobe.errors import VitprobeError, ran_out
from vitprobe.results.writing import sweep, write_atomically

# Of an array in a file, and of a text beside the sums; far more than they take.
HEADER_BYTES = 4096


class UntilWritten:
    """Where a command keeps the states of its runs; they stay until its result is written.

    A full disk, or a signal while the figure is drawn, then costs nothing but that.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs: list[Checkpoint] = []
        # Of runs that failed, to go on from; unless what they measured is measured otherwise.
        self.failed: list[Checkpoint] = []

    def written(self) -> None:
        """The result is on disk: the states have served."""
        for run in self.runs:
            run.remove()

    def instead(self, failed: list[Checkpoint]) -> None:
        """What these failed runs were to measure has been measured by others."""
        for run in failed:
            self.failed.remove(run)
            if run.rank == 0:
                self.runs.append(run)
            else:
                # Its disk may be one that the main process does not see.
                run.remove_own()

    def saved(self) -> bool:
        """Whether a run that begins anew need not start over."""
        return any(run.there() for run in self.runs)


class Checkpoint:
    """The partial files of one run.

    Args:
        path: path without suffix, or None: nothing is kept.
        facts: everything that decides the result; other facts, other run.
        batches: number of batches in the whole run.
        rank: of this process.

    Attributes:
        saved: how many batches the state of this process on disk holds.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any], batches: int, rank: int) -> None:
        text = json.dumps(facts, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.path, self.batches, self.rank = path, batches, rank
        self.saved = 0

    @property
    def keeps(self) -> bool:
        """Whether there is a place for a state at all."""
        return self.path is not None

    @property
    def folder(self) -> Path:
        """Where the state lies, if it is kept."""
        assert self.path is not None
        return self.path.parent

    def there(self) -> bool:
        """Whether what was saved is on disk still; its folder may have gone meanwhile."""
        return bool(self.saved) and self._file(self.rank).is_file()

    def load(
        self, state: dict[str, Tensor], fresh: bool = False, known: np.ndarray | None = None
    ) -> np.ndarray:
        """Add what is on disk to ``state``; (batches,) bool of what is added.

        Processes do it in turn: where they share a folder, the first one takes all.

        Args:
            state: the sums.
            fresh: remove what is on disk instead.
            known: (batches,) bool of what processes before this one have added to theirs.
        """
        mine = np.zeros(self.batches, dtype=bool)
        if self.path is None:
            return mine
        if fresh:
            self.remove()
        done = mine if known is None else known.copy()
        files, used = self._files(), []
        parts = [(file, part) for file in files if (part := self._read(file, state)) is not None]
        for file, part in sorted(parts, key=lambda one: -int(one[1]["_done"].sum())):
            if (part["_done"] & done).any():
                continue
            done |= part["_done"]
            mine |= part["_done"]
            used.append(file)
            for name, total in state.items():
                total += torch.from_numpy(part[name]).to(total)
        self.saved = int(mine.sum())
        if used and files != [self._file(self.rank)]:
            # One file from here on: processes that save anew would write over what was theirs.
            try:
                self.save(state, mine)
            except VitprobeError:
                return mine
            for file in files:
                if file != self._file(self.rank):
                    _remove(file)
        return mine

    def save(self, state: dict[str, Tensor], done: np.ndarray) -> None:
        """Write this process's sums and the batches that they hold.

        Raises:
            VitprobeError: it cannot be written; the file of the last save is as it was.
        """
        if self.path is None:
            return
        arrays: Any = {name: total.cpu().numpy() for name, total in state.items()}

        def write(file: IO[bytes]) -> None:
            np.savez(file, _key=np.array(self.key), _done=done, **arrays)

        write_atomically({self._file(self.rank): write})
        self.saved = int(done.sum())

    def remove(self) -> None:
        """Remove the partial files of this run, and what killed processes left of a save."""
        # The names carry the key: runs with other facts in the same place are left alone.
        for file in self._files():
            _remove(file)
        if self.path is not None and self.path.parent.is_dir():
            sweep(self.path.parent, f".{self.path.name}.{self.key[:12]}.")

    def remove_own(self) -> None:
        """Remove the file of this process."""
        if self.path is not None:
            _remove(self._file(self.rank))

    def save_whole(self, state: dict[str, Tensor]) -> bool:
        """Write the totals of all processes, rank 0 for all of them; whether that went well."""
        try:
            self.save(state, np.ones(self.batches, dtype=bool))
        except VitprobeError:
            return False
        return True

    def leave_to_main(self, shared: bool) -> None:
        """Remove what this and other processes have left here, but the main process's file.

        Args:
            shared: whether the folder is the main process's too: else all of it goes, and no other
                process can do it.
        """
        for file in self._files():
            if not shared or file != self._file(0):
                _remove(file)

    def _file(self, rank: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.{self.key[:12]}.{rank}.partial")

    def _files(self) -> list[Path]:
        if self.path is None or not self.path.parent.is_dir():
            return []
        start = f"{self.path.name}.{self.key[:12]}."
        return sorted(
            file
            for file in self.path.parent.iterdir()
            if file.name.startswith(start) and file.name.endswith(".partial")
        )

    def _read(self, file: Path, state: dict[str, Tensor]) -> dict[str, np.ndarray] | None:
        """What a file holds, or None where it cannot be trusted: its batches are done again."""
        expected = {"_key": (), "_done": (self.batches,)}
        expected |= {name: tuple(total.shape) for name, total in state.items()}
        types = {name: total.cpu().numpy().dtype for name, total in state.items()}
        most = sum(total.numel() * total.element_size() for total in state.values())
        most += self.batches + HEADER_BYTES * len(expected)
        try:
            # A pipe in its place would be waited for; an archive may unfold to any size.
            if not file.is_file():
                return None
            with zipfile.ZipFile(file) as archive:
                if sum(one.file_size for one in archive.infolist()) > most:
                    return None
            with np.load(file, allow_pickle=False) as loaded:
                part = {name: loaded[name] for name in loaded.files}
        except Exception as error:
            if ran_out(error):
                raise  # the file may well be right
            # Readers of torn files raise anything.
            return None
        if {name: array.shape for name, array in part.items()} != expected:
            return None
        # The very types: other byte orders are equal in kind.
        if any(part[name].dtype != dtype for name, dtype in types.items()):
            return None
        if part["_key"].dtype.kind != "U" or part["_done"].dtype != np.bool_:
            return None
        return part if str(part["_key"]) == self.key else None


def _remove(file: Path) -> None:
    """A file that is not ours to remove (another user's, a folder) stays: the result is there."""
    with suppress(OSError):
        file.unlink(missing_ok=True)


class Saves:
    """Saves of a state while its run goes on.

    One that fails (a full disk) is told once and tried again the next time: the run may well end
    before the disk does.
    """

    def __init__(self, checkpoint: Checkpoint, every: float) -> None:
        self.checkpoint, self.every = checkpoint, every
        self._last, self._took = time.monotonic(), 0.0
        self._told = False

    def now_and_then(self, state: dict[str, Tensor], done: np.ndarray) -> None:
        """Save if it is time to; at most a twentieth of a run goes into it."""
        if time.monotonic() - self._last > max(self.every, 20 * self._took):
            self.now(state, done)

    def now(self, state: dict[str, Tensor], done: np.ndarray) -> None:
        """Save."""
        start = time.monotonic()
        try:
            self.checkpoint.save(state, done)
        except VitprobeError as error:
            if not self._told:
                print(
                    f"vitprobe: the progress of this run cannot be saved: {error}", file=sys.stderr
                )
            self._told = True
        self._last = time.monotonic()
        self._took = self._last - start
