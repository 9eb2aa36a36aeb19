"""Archives of arrays (``.npz``) as others may leave them: cut, damaged, unfolding without end."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Declared:
    """What the header of an array says, with the bytes that its values take."""

    shape: tuple[int, ...]
    dtype: np.dtype
    size: int

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def declared(path: Path) -> dict[str, Declared]:
    """What an archive holds by name, read off the headers: nothing is unfolded.

    Raises:
        Exception: an array is said to be of another size than it is, and whatever else readers of
            damaged files raise.
    """
    found = {}
    with zipfile.ZipFile(path) as archive:
        for entry in entries(path):
            name = entry.filename.removesuffix(".npy")
            with archive.open(entry) as member:
                shape, dtype, start = header(member)
            found[name] = Declared(shape, dtype, int(np.prod(shape, dtype=object)) * dtype.itemsize)
            # Objects are as long as they are; where they are asked for they are refused.
            if found[name].size != entry.file_size - start and not dtype.hasobject:
                raise ValueError(
                    f"{name!r} is said to be {' × '.join(map(str, shape))} of {dtype}, but has "
                    f"{entry.file_size:,} bytes"
                )
    return found


def read_all(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an archive by name.

    Raises:
        VitprobeError: they unfold to more than the memory of this machine.
        Exception: whatever readers of damaged files raise.
    """
    held = declared(path).values()
    for one in held:
        refuse_objects(one.dtype)
    size = sum(one.size for one in held)
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
