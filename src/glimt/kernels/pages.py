"""Memory from the system, in large pages where it has them."""

from __future__ import annotations

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
