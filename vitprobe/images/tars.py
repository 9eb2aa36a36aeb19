"""Images in a tar: read by timm's reader, once the tar is seen to be whole."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vitprobe.errors import VitprobeError, shown, some
from vitprobe.images.folders import MORE_SUFFIXES, SUFFIXES, is_litter

BLOCK = 512


def read_tar(path: Path) -> tuple[Any, np.ndarray, list[str], str]:
    """timm's reader of a tar.

    Returns:
        the reader; which of its images count; their names; a remark on what is left out, or "".

    Raises:
        VitprobeError: it cannot be read, is damaged, or has no images.
    """
    from timm.data.readers.reader_image_in_tar import ReaderImageInTar

    try:
        # The cache of the tar's index is a pickle beside the tar: neither read nor written.
        # An open tar would be shared with the processes that decode, which then move its place
        # under each other's hands: it is opened anew for each image.
        with _more_suffixes():
            reader = ReaderImageInTar(str(path), cache_tarfiles=False, cache_tarinfo=False)
        links = _links(path)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise VitprobeError(f"{path} cannot be read as a tar: {error}") from error
    except ValueError:
        raise VitprobeError(f"There are no images in the tar {path}.") from None
    members = [_member_name(sample[0].path, sample[2]) for sample in reader.samples]
    rows = np.array([i for i, name in enumerate(members)
                     if not any(map(is_litter, name.split("/")))], dtype=np.int64)  # fmt: skip
    if not len(rows):
        raise VitprobeError(f"There are no images in the tar {path}.")
    return reader, rows, [members[i] for i in rows], _remark(path, links)


def _links(path: Path) -> list[str]:
    """Names of images that are links to others in the tar, once all of it is seen to be there.

    Python's reader ends without a word where a header is damaged, and where one tar was written
    behind another.

    Raises:
        tarfile.TarError: there is more than is read.
    """
    links: list[str] = []
    with tarfile.open(path, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # of a million, none is kept
            linked = member.issym() or member.islnk()
            if linked and os.path.splitext(member.name)[1].lower() in SUFFIXES:
                links.append(member.name)
        end = tar.offset
    with path.open("rb") as file:
        file.seek(end)
        first, second = file.read(BLOCK), file.read(BLOCK)
        if any(first) or any(second):
            raise tarfile.ReadError(f"it is damaged at byte {end}")
        while block := file.read(BLOCK):
            if any(block):
                if _begins_member(block):
                    raise tarfile.ReadError(f"another tar was written behind its end at byte {end}")
                break
    return links


def _begins_member(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


def _remark(path: Path, links: list[str]) -> str:
    """A sentence on images that are links, or an empty string."""
    if not links:
        return ""
    many = f"{len(links)} links" if len(links) > 1 else "1 link"
    are = "are" if len(links) > 1 else "is"
    return f"{many} in {shown(path.name)} {are} left out: {some(map(shown, links))}."


def _member_name(path: str, inner: Any) -> str:
    """The name of an image in a tar; one in a tar within it lies in a folder of that tar's name."""
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", ".")]
    return "/".join([PurePosixPath(inner.name).stem, *parts] if inner is not None else parts)


@contextmanager
def _more_suffixes() -> Iterator[None]:
    """Within it timm's readers take the further kinds of images."""
    from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions

    before = get_img_extensions()
    set_img_extensions((*before, *MORE_SUFFIXES))
    try:
        yield
    finally:
        set_img_extensions(before)
