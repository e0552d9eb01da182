"""A prompt's chunk in parts that need no mask but a causal one, as fused operators want them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChunkPart:
    """Neighbouring queries of a chunk that need no mask: they see the first num_keys keys.

    is_causal: the last query sees all of them, each one before it one less
    """

    start: int
    stop: int
    num_keys: int
    is_causal: bool


def chunk_parts(chunk: int, context: int, shared: int) -> Iterator[ChunkPart]:
    """A chunk of a context's last tokens, of which all see the context's first `shared`.

          keys    0 … shared-1   shared … context-1
    i < shared    all            none
    i ≥ shared    all            those up to i
    """
    shared = min(shared, context)
    split = min(max(0, shared - (context - chunk)), chunk)
    if split:
        yield ChunkPart(0, split, shared, is_causal=False)
    if split < chunk:
        yield ChunkPart(split, chunk, context, is_causal=True)
