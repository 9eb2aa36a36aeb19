"""Files written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import socket
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from vitprobe.errors import VitprobeError

Content = bytes | Callable[[IO[bytes]], Any]


def write_atomically(contents: Mapping[Path, Content]) -> None:
    """Write files whole or not at all, and let no reader see one half-written.

    All are written beside their places first and renamed together at the end. What a process
    that was killed in the middle has left beside them goes.

    Args:
        contents: for each path its bytes, or a function that writes them to a binary file.

    Raises:
        VitprobeError: a folder cannot be written or the disk is full.
    """
    for path in contents:
        # Found out while files are renamed, those before it would have their places already.
        if path.is_dir():
            raise VitprobeError(f"{path} cannot be written: a folder has its name.")
    temporaries: dict[Path, str] = {}
    path = Path()
    try:
        for path, content in contents.items():
            check_folder(path.parent)
            sweep(path.parent, f".{path.name}{of_this_machine()}")
            handle, temporaries[path] = tempfile.mkstemp(
                prefix=f".{path.name}{of_this_machine()}{os.getpid()}-",
                suffix=".tmp",
                dir=path.parent,
            )
            with os.fdopen(handle, "wb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
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


def check_folder(folder: Path) -> None:
    """Make a folder if it is not there.

    Raises:
        VitprobeError: it cannot be made; where a file has its name, that is said.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        for place in (*reversed(folder.parents), folder):
            if place.is_symlink() and not os.path.exists(place):
                raise VitprobeError(
                    f"{folder} cannot be written: {place} is a link that leads nowhere."
                ) from error
            if place.exists() and not place.is_dir():
                raise VitprobeError(
                    f"{folder} cannot be written: {place} is a file, not a folder."
                ) from error
        raise VitprobeError(f"{folder} cannot be written: {error.strerror}.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise VitprobeError(f"{folder} cannot be written: {reason}.") from error


def of_this_machine() -> str:
    """What the names of temporary files hold that processes of this machine have made."""
    return f".{hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]}-"


def sweep(folder: Path, start: str) -> None:
    """Remove temporary files with such a start whose processes are no more."""
    mark = of_this_machine()
    for file in folder.iterdir():
        if file.name.startswith(start) and file.name.endswith(".tmp") and mark in file.name:
            process = file.name.rpartition(mark)[2].partition("-")[0]
            if process.isdigit() and not _alive(int(process)):
                # In a folder that several people share it may be another one's.
                with suppress(OSError):
                    file.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
