"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h. Trimming and mapping are set back to the largest that glibc comes to itself.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_WITHIN = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
_AFTER = {_MMAP_MAX: 65536, _TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}


@contextmanager
def kept_for_reuse() -> Iterator[None]:
    """Within it, memory that is freed stays with the process, for the next large tensor.

    glibc hands large pieces back at once, and the system clears every page of them anew: a third of
    the time of many backward passes through one graph. Other C libraries are left as they are.
    """
    library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    for option, value in _WITHIN.items():
        if library is not None:
            library.mallopt(option, value)
    try:
        yield
    finally:
        if library is not None:
            for option, value in _AFTER.items():
                library.mallopt(option, value)
            library.malloc_trim(0)
