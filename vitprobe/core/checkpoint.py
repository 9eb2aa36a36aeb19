"""The state of an unfinished run on disk: written whole or not at all, never executed.

Every process keeps its own file: its sums and which batches they hold. Files are read together,
so a run resumes with another number of processes too; a file whose batches another one already
holds is left aside, so that no batch counts twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitprobe.core.errors import VitprobeError


class Checkpoint:
    """The partial files of one run.

    Args:
        path: path without suffix, or None: nothing is kept.
        facts: everything that decides the result; other facts, other run.
        batches: number of batches in the whole run.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self, path: Path | None, facts: dict[str, Any], batches: int, rank: int, world: int
    ) -> None:
        text = json.dumps(facts, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.path, self.batches, self.rank, self.world = path, batches, rank, world

    def load(self, state: dict[str, Tensor], fresh: bool = False) -> np.ndarray:
        """Add what is on disk to ``state`` on rank 0; (batches,) bool of what it holds."""
        done = np.zeros(self.batches, dtype=bool)
        if self.path is None:
            return done
        if fresh and self.rank == 0:
            self.finished()
        if not fresh:
            parts = [part for part in map(self._read, self._files()) if part is not None]
            for part in sorted(parts, key=lambda part: -int(part["_done"].sum())):
                if (part["_done"] & done).any():
                    continue
                done |= part["_done"]
                if self.rank == 0:
                    for name, total in state.items():
                        total += torch.from_numpy(part[name]).to(total)
        if self.world > 1:
            # Nobody writes before everybody has read.
            torch.distributed.barrier()
        return done

    def save(self, state: dict[str, Tensor], done: np.ndarray) -> None:
        """Write this process's sums and the batches that they hold."""
        if self.path is None:
            return
        arrays: Any = {name: total.cpu().numpy() for name, total in state.items()}
        buffer = io.BytesIO()
        np.savez(buffer, _key=np.array(self.key), _done=done, **arrays)
        write_atomically({self._file(self.rank): buffer.getvalue()})

    def finished(self) -> None:
        """Remove the partial files of this run."""
        # The names carry the key: runs with other facts in the same place are left alone.
        for file in self._files():
            file.unlink(missing_ok=True)

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

    def _read(self, file: Path) -> dict[str, np.ndarray] | None:
        try:
            with np.load(file, allow_pickle=False) as loaded:
                part = {name: loaded[name] for name in loaded.files}
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            # A torn file holds nothing that can be trusted: its batches are done again.
            return None
        complete = str(part.get("_key")) == self.key and part["_done"].shape == (self.batches,)
        return part if complete else None


def write_atomically(contents: dict[Path, bytes]) -> None:
    """Write files whole or not at all, and let no reader see one half-written.

    All are written beside their places first and renamed together at the end.

    Raises:
        VitprobeError: a folder cannot be written or the disk is full.
    """
    temporaries: dict[Path, str] = {}
    path = Path()
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporaries[path] = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        # mkstemp's files are private; a result is as readable as any file of the user's.
        mask = os.umask(0)
        os.umask(mask)
        for path, temporary in temporaries.items():
            os.chmod(temporary, 0o666 & ~mask)
            os.replace(temporary, path)
    except OSError as error:
        raise VitprobeError(f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        for temporary in temporaries.values():
            Path(temporary).unlink(missing_ok=True)
