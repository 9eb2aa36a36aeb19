"""Archives of arrays (``.npz``) as others may leave them: cut, damaged, unfolding without end."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vitprobe.errors import VitprobeError

# Of the record that ends an archive: its size without a comment, and where it counts the entries.
_END, _COUNT = 22, slice(10, 12)


def entries(path: Path) -> list[zipfile.ZipInfo]:
    """The entries of an archive, none of which is lost.

    Damaged lengths of names or comments hide entries behind one another: what is optional, as
    labels are, would then be missing without a word.

    Raises:
        zipfile.BadZipFile: it has more entries than can be found, or is no archive.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        found = archive.infolist()
        file.seek(-_END, os.SEEK_END)
        end = file.read()
    counted = int.from_bytes(end[_COUNT], "little")
    # An archive with a comment ends otherwise; one of 65,535 entries or more counts them elsewhere.
    if end.startswith(b"PK\x05\x06") and counted not in (len(found), 0xFFFF):
        raise zipfile.BadZipFile(f"{counted} entries, of which {len(found)} can be found")
    return found


def header(file: Any) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of an array that follows in a file, and where its values begin."""
    version = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read(file)
    return shape, dtype, file.tell()


def refuse_objects(dtype: np.dtype) -> None:
    """Raise where reading an array would execute what is in it.

    Raises:
        ValueError: an array of Python objects.
    """
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not read")


def read_all(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an archive by name.

    Raises:
        VitprobeError: they unfold to more than the memory of this machine.
        Exception: whatever readers of damaged files raise.
    """
    size = 0
    with zipfile.ZipFile(path) as archive:
        for entry in entries(path):
            with archive.open(entry) as member:
                shape, dtype, start = header(member)
            refuse_objects(dtype)
            if int(np.prod(shape, dtype=object)) * dtype.itemsize != entry.file_size - start:
                raise ValueError(f"{entry.filename} is of another size than its header says")
            size += entry.file_size
    if size > (memory() or size):
        raise VitprobeError(
            f"{path} unfolds to {size / 2**30:,.1f} GiB, more than the memory here."
        )
    with np.load(path, allow_pickle=False) as loaded:
        return {name: loaded[name] for name in loaded.files}


def memory() -> int | None:
    """Bytes of memory that this machine has, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
