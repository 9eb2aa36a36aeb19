"""The image files of a folder: each real folder once, classes directly under the root.

Names and sizes are read, no image is: starting on a data set does not cost a pass over it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from vitprobe.errors import VitprobeError, shown, some

# What operating systems, file servers and tools leave beside images; hidden names are left out too.
LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found",
          "__pycache__", "thumbs.db"}  # fmt: skip
# Besides timm's .png, .jpg and .jpeg.
MORE_SUFFIXES = (".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jfif", ".jpe")
SUFFIXES = {".png", ".jpg", ".jpeg", *MORE_SUFFIXES}
# Images of other kinds, which are not passed over without a word.
OTHER_IMAGES = {".avif", ".heic", ".heif", ".jxl", ".jp2", ".dng", ".exr", ".dcm"}


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        names: of the image files below the root, with ``/``, in natural order (2 before 10).
        sizes: bytes of each; -1 for a link to nowhere.
        changed: nanoseconds at which each was last changed.
        unreadable: folders that could not be listed, and why.
        others: how many images of each kind that is not read, by suffix.
    """

    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def left_out(self) -> tuple[str, ...]:
        """A sentence on folders that cannot be listed, one on images of other kinds."""
        found = []
        if self.unreadable:
            many = len(self.unreadable) > 1
            named = some(map(shown, self.unreadable))
            folders = f"{len(self.unreadable)} folder{'s' if many else ''} cannot be read and"
            found.append(f"{folders} {'are' if many else 'is'} left out: {named}.")
        if self.others:
            count, kinds = self.others.total(), ", ".join(sorted(self.others))
            files = f"{count:,} files are" if count > 1 else "1 file is"
            found.append(f"{files} of a kind that is not read and left out: {kinds}.")
        return tuple(found)


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is hidden or none of the user's."""
    return name.startswith(".") or name.lower() in LITTER


def natural(name: str) -> tuple[list[str | int], str]:
    """Sorts names as people count: timm's order, with the name itself to settle ties."""
    from timm.utils.misc import natural_key

    return natural_key(name), name


def image_files(root: Path) -> Found:
    """Find the images under a folder.

    A folder that several links lead to, or that holds a link to a folder above it, counts once.
    Anything but files (pipes, sockets, devices) is passed over.

    Raises:
        VitprobeError: the root itself cannot be listed.
    """
    found: list[tuple[str, int, int]] = []
    result = Found()
    seen: set[tuple[int, int]] = set()
    # Real folders come before links, so that a folder goes by its own name where it has one.
    waiting, links = [(str(root), "")], []  # type: ignore[var-annotated]
    while waiting or links:
        if not waiting:
            links.sort(key=lambda one: natural(one[1]), reverse=True)
            waiting.append(links.pop())
        path, inside = waiting.pop()
        try:
            status = os.stat(path)
            # File systems without inodes of their own call all of them 0.
            identity = (status.st_dev, status.st_ino)
            if status.st_ino and identity in seen:
                continue
            seen.add(identity)
            with os.scandir(path) as entries:
                listed = list(entries)
        except OSError as error:
            if not inside:
                raise VitprobeError(f"{root} cannot be read: {error.strerror}.") from error
            result.unreadable.append(f"{inside[:-1]} ({error.strerror})")
            continue
        for entry in listed:
            if is_litter(entry.name):
                continue
            name = inside + entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else waiting).append((entry.path, f"{name}/"))
            elif (suffix := os.path.splitext(entry.name)[1].lower()) in OTHER_IMAGES:
                result.others[suffix] += 1
            elif suffix in SUFFIXES:
                size, changed = _size(entry)
                if size is not None:
                    found.append((name, size, changed))
    found.sort(key=lambda one: natural(one[0]))
    for name, size, changed in found:
        result.names.append(name)
        result.sizes.append(size)
        result.changed.append(changed)
    result.unreadable.sort()
    return result


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # Links that lead to each other.
        return False


def _size(entry: os.DirEntry[str]) -> tuple[int | None, int]:
    """Bytes of a file, -1 for a link to nowhere, None for what is no file; when it was changed."""
    try:
        if entry.is_file():
            status = entry.stat()
            return status.st_size, status.st_mtime_ns
        return (-1, 0) if entry.is_symlink() and not os.path.exists(entry.path) else (None, 0)
    except OSError:
        return -1, 0


def classes_of(names: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The class of each image: the folder directly under the root that holds it, at any depth.

    Args:
        names: of the images, below the root, with ``/``.

    Returns:
        the classes in natural order, and (n,) indices into them, -1 for images directly in the
        root; no classes and None where all are there.
    """
    tops = [parts[0] if len(parts := name.split("/")) > 1 else "" for name in names]
    classes = tuple(sorted({top for top in tops if top}, key=natural))
    if not classes:
        return (), None
    index = {name: i for i, name in enumerate(classes)} | {"": -1}
    return classes, np.array([index[top] for top in tops], dtype=np.int64)


def shown_classes(names: Sequence[str]) -> tuple[str, ...]:
    """Names of classes that can be shown, and by which they stay as many as they are.

    Bytes that are no text are written out: as U+FFFD all of them would be alike. Where something
    is written out, or a name looks as if it were, its own backslashes are doubled: a folder that
    is called ``\\x1b`` is not one that is called by that character.
    """
    return tuple(map(_shown_class, names))


def _shown_class(name: str) -> str:
    written = shown(name.encode("utf-8", "backslashreplace").decode())
    if written == name and not _LOOKS_WRITTEN_OUT.search(name):
        return name
    doubled = name.replace("\\", "\\\\")
    return shown(doubled.encode("utf-8", "backslashreplace").decode())


_LOOKS_WRITTEN_OUT = re.compile(r"\\(x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}|[tnr])")


def below_common_folder(names: Sequence[str]) -> list[str]:
    """The names without the one folder that a whole archive is often packed in (``data/cat/1``).

    A folder that holds images itself stays: it may well be a class.
    """
    parts = [PurePosixPath(name).parts for name in names]
    while parts and len({one[0] for one in parts}) == 1 and min(map(len, parts)) > 2:
        parts = [one[1:] for one in parts]
    return ["/".join(one) for one in parts]
