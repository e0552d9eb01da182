"""A card without room, said in the words of who can do something about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from glimt.errors import EngineError, GlimtError


@contextmanager
def saying_what_fits(as_error: Callable[[str], GlimtError]) -> Iterator[None]:
    """Translate a card's lack of memory.

    as_error: what torch said, with its numbers and without its advice -> what to raise
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise as_error(_numbers_of(str(error))) from error


def lacks_memory(error: BaseException | None) -> bool:
    """Was it a card's lack of memory, or what came of one? Ending a recording may fail after it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _numbers_of(said: str) -> str:
    """What was asked for and what is free; torch's advice is for who writes programs."""
    return said.partition("\n")[0].partition(" Including")[0].rstrip(". ")


def step_too_large(said: str) -> EngineError:
    """The error of a step for which a card has no room."""
    advice = "lower --max-num-batched-tokens, --tower-patches, --max-num-seqs or --kv-bytes"
    return EngineError(f"a step does not fit: {said}; start again and {advice}")
