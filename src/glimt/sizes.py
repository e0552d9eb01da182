"""Sizes in bytes as people type and read them; imports nothing, as the help of cli/ must."""

from __future__ import annotations

import re

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of "16G", "1.5 GiB" or "4096"; units are powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match or not (size := int(float(match[1]) * _UNITS[match[2].upper()])):
        raise ValueError(f"{text!r} is no size; 16G, 512M or a number of bytes is needed")
    return size


def size_text(nbytes: float) -> str:
    """12.3 GiB and the like."""
    for unit in ("bytes", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} bytes" if unit == "bytes" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
