"""What the C library does with memory that a tensor no longer needs."""

from __future__ import annotations

import contextlib
import ctypes
import platform
from collections.abc import Iterator

TOP_PAD, TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -2, -1, -3, -4
"""Of malloc.h."""
GROWS_BY = 64 * 2**20
_keeping = 0


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Lets the process keep memory that it frees, until the end; changes nothing where the C library is not glibc.

    glibc hands blocks of 32 MB and more back at once, and the system clears each page of the next one: writing a new
    tensor of 57 MB then takes 27 ms instead of 5. One within another changes nothing.
    """
    global _keeping
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    c = ctypes.CDLL(None)
    if not _keeping:
        c.mallopt(MMAP_MAX, 0)
        c.mallopt(TRIM_THRESHOLD, 2**31 - 1)
        c.mallopt(TOP_PAD, GROWS_BY)
    _keeping += 1
    try:
        yield
    finally:
        _keeping -= 1
        if not _keeping:
            c.mallopt(MMAP_MAX, 65536)  # the default, as the next; the other two are where glibc's adjustment ends
            c.mallopt(TOP_PAD, 128 * 2**10)
            c.mallopt(MMAP_THRESHOLD, 32 * 2**20)
            c.mallopt(TRIM_THRESHOLD, 64 * 2**20)
            c.malloc_trim(0)
