"""PrefixCache: what a sequence need not compute, because an earlier one left it in the cache.

Knows sequences by the hashes of their content and blocks by the pool; owns neither. Switched off,
it finds nothing and keeps nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from glimt.scheduler.block_pool import BlockPool
from glimt.scheduler.sequence import Sequence


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """The beginning of a sequence that is in the cache already.

        blocks   b₀      b₁      partial
                ├───────┼───────┼───┄┄┄┄┤
                └──── num_tokens ───┘

    blocks:     full ones, to be shared
    partial:    one that goes on where they end, to be taken over; None if there is none
    num_tokens: how many tokens are there in all
    """

    blocks: list[int]
    partial: int | None
    num_tokens: int


class PrefixCache:
    """Finds and registers content in a block pool."""

    def __init__(self, pool: BlockPool, block_size: int, is_enabled: bool) -> None:
        self.pool = pool
        self.block_size = block_size
        self.is_enabled = is_enabled

    def find(self, sequence: Sequence) -> CachedPrefix:
        """What is cached of the tokens known; never all, for the last one's logits are wanted.

        Nothing for a prompt that is to be scored: the logits of all its tokens are wanted.
        """
        if not self.is_enabled or sequence.scores_prompt:
            return CachedPrefix([], None, 0)
        wanted = sequence.num_tokens - 1
        blocks = self.pool.find(sequence.hashes(wanted // self.block_size))
        start = len(blocks) * self.block_size
        content = sequence.content_between(start, min(start + self.block_size, wanted))
        partial, length = self.pool.find_partial(sequence.hash_before(len(blocks)), content)
        return CachedPrefix(blocks, partial if length else None, start + length)

    def keep_full(self, sequence: Sequence, num_before: int) -> None:
        """Make the blocks findable that became full since num_before tokens were computed."""
        first, full = num_before // self.block_size, sequence.num_computed // self.block_size
        if self.is_enabled and full > first:
            hashes = sequence.hashes(full)
            for number in range(first, full):
                self.pool.register(sequence.block_table[number], hashes[number])

    def keep_partial(self, sequence: Sequence) -> None:
        """Make a finished sequence's last block findable, for the turn that follows."""
        number, written = divmod(sequence.num_computed, self.block_size)
        if self.is_enabled and written:
            start = number * self.block_size
            content = sequence.content_between(start, start + written)
            parent = sequence.hash_before(number)
            self.pool.register_partial(sequence.block_table[number], parent, content)
