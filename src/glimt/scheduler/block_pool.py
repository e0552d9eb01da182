"""BlockPool: who owns which cache block. Knows no tensor, no token and no request.

A block is free (nobody holds it; it may still be cached under a hash), or held by one or more
sequences. Cached blocks are reused oldest first, and only when no plain free block is left.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted blocks 0 … num_blocks-1 with a look-up by content hash."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that can be found by hash, held or not."""
        return len(self._block_of)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; what was cached in them is forgotten.

        The caller checks num_free first.
        """
        assert count <= self.num_free, "allocate() without asking num_free"
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self.forget(block)
            self._ref_counts[block] = 1
        return blocks

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of a chain of hashes; holds none of them."""
        blocks: list[int] = []
        for digest in hashes:
            if digest not in self._block_of:
                break
            blocks.append(self._block_of[digest])
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Add a holder to each block."""
        for block in blocks:
            self._ref_counts[block] += 1
            self._free.pop(block, None)

    def release(self, blocks: Sequence[int]) -> None:
        """Remove a holder from each block.

        Given in the order of the sequence: later blocks are reused earlier, because a prefix is
        worth more than what follows it.
        """
        for block in reversed(blocks):
            assert self._ref_counts[block] > 0, f"block {block} released by nobody"
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if block not in self._hash_of:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, digest: bytes) -> None:
        """Make a held, fully written block findable. The first block of a content keeps it."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def forget(self, block: int) -> None:
        """Make a block unfindable."""
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]

    def check(self) -> None:
        """Assert the invariants: free + held = total, and the look-up is one to one."""
        held = sum(count > 0 for count in self._ref_counts)
        assert held + len(self._free) == self.num_blocks
        assert all(self._ref_counts[block] == 0 for block in self._free)
        assert {block: digest for digest, block in self._block_of.items()} == self._hash_of

    def ref_count(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._ref_counts[block]
