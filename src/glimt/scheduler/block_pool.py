"""BlockPool: who owns which cache block. Knows no tensor, no token and no request.

A block is free (nobody holds it; it may still be cached), or held by one or more sequences. Cached
blocks are reused oldest first, and only when no plain free block is left.

A full block is cached under its hash and shared. A partly written one is cached under the hash of
the block before it; whoever goes on from its content takes it over, so it never has two writers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple


class _Partial(NamedTuple):
    """A partly written block: what its first slots hold, one item each."""

    block: int
    content: tuple[Hashable, ...]


class BlockPool:
    """Reference-counted blocks 0 … num_blocks-1 with a look-up by content hash."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._partial_after: dict[bytes, _Partial] = {}
        self._parent_of: dict[int, bytes] = {}  # of the partly written blocks that can be found

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Full blocks that can be found by hash, held or not."""
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
                if block not in self._hash_of and block not in self._parent_of:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, digest: bytes) -> None:
        """Make a held, fully written block findable. The first block of a content keeps it."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def register_partial(self, block: int, parent: bytes, content: tuple[Hashable, ...]) -> None:
        """Make a held, partly written block findable; the newest after a parent is kept.

        parent:  hash of the full block before it
        content: one item per written slot
        """
        older = self._partial_after.get(parent)
        if older is not None:
            self.forget(older.block)
        self._partial_after[parent] = _Partial(block, content)
        self._parent_of[block] = parent

    def find_partial(self, parent: bytes, content: Sequence[Hashable]) -> tuple[int, int]:
        """The free block that begins like `content`, and how many slots agree; (-1, 0) for none."""
        found = self._partial_after.get(parent)
        if found is None or self._ref_counts[found.block]:
            return -1, 0
        pairs = zip(found.content, content, strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return (found.block, length) if length else (-1, 0)

    def take_over(self, block: int) -> None:
        """Hold a free, partly written block as its only writer from now on."""
        assert self._ref_counts[block] == 0, f"block {block} has a holder"
        self.forget(block)
        self.hold([block])

    def forget(self, block: int) -> None:
        """Make a block unfindable."""
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        parent = self._parent_of.pop(block, None)
        if parent is not None:
            del self._partial_after[parent]
        if block in self._free:
            self._free.move_to_end(block, last=False)

    def check(self) -> None:
        """Assert the invariants: free + held = total, and the look-up is one to one."""
        held = sum(count > 0 for count in self._ref_counts)
        assert held + len(self._free) == self.num_blocks
        assert all(self._ref_counts[block] == 0 for block in self._free)
        assert {block: digest for digest, block in self._block_of.items()} == self._hash_of
        parents = {partial.block: parent for parent, partial in self._partial_after.items()}
        assert parents == self._parent_of
        assert not self._parent_of.keys() & self._hash_of.keys()

    def ref_count(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._ref_counts[block]
