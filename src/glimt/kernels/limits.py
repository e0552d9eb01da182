"""What this machine can do at most: bytes read and operations done in a second.

The measure that times are held against. A shared machine changes from second to second, so a
limit is taken before and after each time, with the loops of csrc/limits.cpp, or with torch where
they were not built.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glimt.kernels.library import library_path, open_library
from glimt.kernels.pages import large_pages

BUFFER_BYTES = 768 * 2**20  # more than the largest last-level cache
MathKind = Literal["bf16", "int8"]
_KINDS: dict[str, int] = {"bf16": 0, "int8": 1}
_WARM_UP = 20  # the first bursts of the matrix unit are slower
_ALIGNMENT = 512  # bytes: csrc/limits.h


@dataclass(frozen=True, slots=True)
class Limits:
    """Per second. None where the machine has no such unit that could be measured.

    read_bytes: all threads, from memory, 4 prefetched streams each
    bf16_ops, int8_ops: all threads, products and sums counted apart, operands in the first cache
    """

    read_bytes: float
    bf16_ops: float
    int8_ops: float | None


class LimitMeter:
    """Measures the limits; owns the buffer that is read.

    threads:   of the native loops; torch's own number is not touched
    isa:       one of library.ISAS; None: the best that this processor has
    num_bytes: of the buffer
    Raises OSError if that instruction set is not there.
    """

    def __init__(self, threads: int, isa: str | None = None, num_bytes: int = BUFFER_BYTES) -> None:
        self._isa = (isa or "").encode()
        path = library_path()
        self._library = open_library(path) if path else None
        if self._library is not None:
            self._library.glimt_set_threads(threads)
            if not self._library.glimt_math_limit(self._isa, _KINDS["bf16"]):
                raise OSError(f"{isa} is not compiled in, or this processor does not have it")
        self.buffer = _touched(num_bytes)
        self._factors = torch.full((2, 512, 512), 0.01, dtype=torch.bfloat16)

    @property
    def is_native(self) -> bool:
        """Whether the compiled loops are there."""
        return self._library is not None

    def warm_up(self) -> None:
        """Run the loops a few times before any figure counts."""
        self.read()
        for _ in range(_WARM_UP if self.is_native else 1):
            self.math("bf16")

    def measure(self) -> Limits:
        """All limits, now."""
        return Limits(self.read(), self.math("bf16"), self.math("int8") or None)

    def read(self) -> float:
        """Bytes per second, over the buffer once."""
        if self._library is None:
            words = self.buffer.view(torch.int64)
            return self.buffer.numel() / _seconds(lambda: words.sum())
        return float(
            self._library.glimt_read_limit(
                self._isa, self.buffer.data_ptr(), self.buffer.numel() // _ALIGNMENT * _ALIGNMENT
            )
        )

    def math(self, kind: MathKind) -> float:
        """Operations per second over some 20 ms; 0 where torch is asked for int8."""
        if self._library is not None:
            return float(self._library.glimt_math_limit(self._isa, _KINDS[kind]))
        return _torch_products(self._factors) if kind == "bf16" else 0.0


def _touched(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 that begins at a page and is all there, in large pages where they exist.

    In small pages the limit would be that of address translation, and not of memory.
    """
    return torch.frombuffer(large_pages(num_bytes), dtype=torch.uint8).fill_(1)


def _torch_products(factors: Tensor) -> float:
    """Operations per second of a bfloat16 product that fits the caches."""
    size = factors.shape[-1]
    a, b = factors
    count = 1
    while (seconds := _seconds(lambda: torch.mm(a, b), count)) < 0.02:
        count *= 2
    return 2 * size**3 * count / seconds


def _seconds(work: Callable[[], object], count: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(count):
        work()
    return time.perf_counter() - start
