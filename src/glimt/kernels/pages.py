"""Memory from the system: large pages where it has them, and freed memory that is kept."""

from __future__ import annotations

import ctypes
import mmap
from contextlib import suppress


def large_pages(num_bytes: int) -> mmap.mmap:
    """So many bytes of zeros that begin at a page and take memory where they are written.

    Private, because shared pages are never large ones.
    """
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for this process; nothing where it is not glibc.

    Source: mallopt(3): M_MMAP_MAX, M_TRIM_THRESHOLD.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)
        mallopt(-1, 2**31 - 1)
