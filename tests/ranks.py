"""Ranks as threads of one process: what a rank computes, without processes and sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from glimt.parallel import Group

T = TypeVar("T")
_WAIT_S = 120.0  # a rank that has failed must not hang the others for ever


class _Board:
    """Where the ranks put what they give to each other."""

    def __init__(self, size: int) -> None:
        self.values: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size)


class ThreadGroup(Group):
    """One rank; the others are threads that share its board."""

    def __init__(self, rank: int, size: int, board: _Board) -> None:
        super().__init__(rank, size)
        self._board = board

    def _exchanged(self, x: Tensor) -> list[Tensor]:
        self._board.values[self.rank] = x.clone()
        self._board.barrier.wait(_WAIT_S)
        given = list(self._board.values)
        self._board.barrier.wait(_WAIT_S)
        return given

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchanged(x)).sum(0)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.cat(self._exchanged(x), dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        return x.copy_(self._exchanged(x)[0])


def on_ranks(size: int, run: Callable[[Group], T]) -> list[T]:
    """What `run` returns on each of so many ranks, in their order."""
    board = _Board(size)

    def guarded(rank: int) -> T:
        try:
            return run(ThreadGroup(rank, size, board))
        except BaseException:
            board.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(guarded, range(size)))
