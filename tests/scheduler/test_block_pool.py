"""The block pool by hand-computed ids, then by random operations against a plain model of it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from glimt.scheduler.block_pool import BlockPool


def cached_chain(pool: BlockPool, *hashes: bytes) -> list[int]:
    """Blocks that one sequence allocated, filled and released, one per hash."""
    blocks = pool.allocate(len(hashes))
    for block, digest in zip(blocks, hashes, strict=True):
        pool.register(block, digest)
    pool.release(blocks)
    return blocks


# --- by hand ---------------------------------------------------------------------------------


def test_a_fresh_pool_hands_out_blocks_in_order():
    """Would catch a pool that skips or repeats a block."""
    pool = BlockPool(5)
    assert (pool.num_free, pool.num_cached) == (5, 0)
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(0) == []
    assert pool.allocate(3) == [2, 3, 4]
    assert pool.num_free == 0
    assert [pool.ref_count(block) for block in range(5)] == [1] * 5


def test_allocating_more_than_is_free_is_our_own_mistake():
    """Would catch a pool that hands out a block somebody holds instead of failing."""
    pool = BlockPool(2)
    pool.allocate(1)
    with pytest.raises(AssertionError, match="num_free"):
        pool.allocate(2)


def test_releasing_twice_is_our_own_mistake():
    """Would catch a double release, after which one block would have two writers."""
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="block 0"):
        pool.release(blocks)


def test_plain_blocks_come_back_in_the_order_of_the_sequence():
    """Would catch plain blocks queued behind cached ones or handed out backwards."""
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    pool.release(blocks)
    assert pool.allocate(4) == [0, 1, 2, 3]


def test_the_head_of_a_cached_prefix_outlives_its_tail():
    """Would catch eviction from the front: without its first block a prefix cannot be found."""
    pool = BlockPool(4)
    assert cached_chain(pool, b"a", b"ab", b"abc", b"abcd") == [0, 1, 2, 3]
    for evicted, left in [(3, [0, 1, 2]), (2, [0, 1]), (1, [0]), (0, [])]:
        assert pool.allocate(1) == [evicted]
        assert pool.find([b"a", b"ab", b"abc", b"abcd"]) == left


def test_plain_blocks_are_reused_before_cached_ones():
    """Would catch a cached prefix thrown away while a worthless block was free."""
    pool = BlockPool(5)
    assert cached_chain(pool, b"a", b"ab") == [0, 1]  # plain: 2, 3, 4
    held = pool.allocate(2)
    assert held == [2, 3]
    pool.release(held)  # freed last, and still used first
    assert pool.allocate(3) == [2, 3, 4]
    assert pool.find([b"a", b"ab"]) == [0, 1]
    assert pool.allocate(2) == [1, 0]


def test_of_two_cached_prefixes_the_one_released_first_goes_first():
    """Would catch eviction by block number or by the order of registering."""
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    for block, digest in zip([*second, *first], (b"s", b"st", b"f", b"fg"), strict=True):
        pool.register(block, digest)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(4) == [3, 2, 1, 0]


def test_a_hit_moves_a_prefix_behind_the_others():
    """Would catch a prefix in steady use being evicted because it was cached long ago."""
    pool = BlockPool(4)
    cached_chain(pool, b"old", b"old2")  # 0, 1
    cached_chain(pool, b"new", b"new2")  # 2, 3
    used = pool.find([b"old", b"old2"])
    pool.hold(used)
    assert pool.num_free == 2
    pool.release(used)
    assert pool.allocate(2) == [3, 2]


def test_a_mixed_sequence_gives_its_plain_tail_first():
    """Would catch an unfilled last block being treated like a cached one."""
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    pool.register(blocks[0], b"a")
    pool.register(blocks[1], b"ab")
    pool.release(blocks)
    assert pool.allocate(3) == [2, 1, 0]


def test_find_stops_at_the_first_gap():
    """Would catch a later block being used although the one before it is gone."""
    pool = BlockPool(4)
    cached_chain(pool, b"a", b"ab", b"abc")
    pool.forget(1)
    assert pool.find([b"a", b"ab", b"abc"]) == [0]
    assert pool.find([b"x", b"a"]) == []
    assert pool.find([]) == []
    pool.check()


def test_find_holds_nothing():
    """Would catch look-ups that leak references."""
    pool = BlockPool(2)
    cached_chain(pool, b"a")
    pool.find([b"a"])
    assert (pool.num_free, pool.ref_count(0)) == (2, 0)


def test_the_first_block_of_a_content_stays_the_one_that_is_found():
    """Would catch a second copy stealing the hash: the look-up would not be one to one."""
    pool = BlockPool(3)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], b"same")
    pool.register(second[0], b"same")
    assert pool.find([b"same"]) == first
    assert pool.num_cached == 1
    pool.release(first)
    pool.release(second)  # the copy is plain, so it goes before block 2 and before the cached one
    assert pool.allocate(3) == [1, 2, 0]
    pool.check()


def test_a_shared_block_is_free_only_when_its_last_holder_is_gone():
    """Would catch a block freed under a sequence that still reads it."""
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.register(blocks[0], b"a")
    pool.hold(pool.find([b"a"]))
    assert pool.ref_count(0) == 2
    pool.release(blocks)
    assert (pool.ref_count(0), pool.num_free) == (1, 1)
    assert pool.allocate(1) == [1]
    pool.release(blocks)
    assert pool.num_free == 1


def test_a_reused_block_is_no_longer_found():
    """Would catch a hash that still points at a block with new content."""
    pool = BlockPool(1)
    cached_chain(pool, b"a")
    assert pool.allocate(1) == [0]
    assert pool.find([b"a"]) == []
    pool.register(0, b"b")
    assert pool.find([b"b"]) == [0]
    pool.check()


def test_a_forgotten_block_is_a_plain_one_once_released():
    """Would catch a poisoned block kept in the queue of the cached ones."""
    pool = BlockPool(3)
    cached_chain(pool, b"a")  # 0
    blocks = pool.allocate(1)  # 1
    pool.register(blocks[0], b"bad")
    pool.forget(blocks[0])
    pool.forget(blocks[0])  # harmless
    pool.release(blocks)
    assert pool.find([b"bad"]) == []
    assert pool.allocate(3) == [1, 2, 0]


def test_a_partly_written_block_goes_to_whoever_goes_on_from_it():
    """Would catch a second turn that computes the end of the first again."""
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"full")
    pool.register_partial(blocks[1], b"full", ("a", "b", "c"))
    assert pool.find_partial(b"full", ("a", "b")) == (-1, 0)  # its writer still holds it
    pool.release(blocks)
    assert pool.find_partial(b"full", ("a", "b", "x", "y")) == (blocks[1], 2)
    assert pool.find_partial(b"full", ("x",)) == (-1, 0)
    assert pool.find_partial(b"other", ("a",)) == (-1, 0)
    pool.take_over(blocks[1])
    assert pool.ref_count(blocks[1]) == 1
    assert pool.find_partial(b"full", ("a",)) == (-1, 0)
    pool.check()


def test_a_block_that_was_taken_over_is_not_found_by_what_it_held_before():
    """Would catch a turn that reads what the one before it has written over."""
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.register_partial(blocks[0], b"", ("a", "b"))
    pool.release(blocks)
    pool.take_over(blocks[0])
    pool.release(blocks)
    assert pool.find_partial(b"", ("a", "b")) == (-1, 0)
    pool.check()


def test_only_the_newest_partly_written_block_after_a_parent_is_kept():
    """Would catch a block that is neither found nor reused before the cached ones."""
    pool = BlockPool(3)
    for content in (("a",), ("b",)):
        blocks = pool.allocate(1)
        pool.register_partial(blocks[0], b"", content)
        pool.release(blocks)
    assert pool.find_partial(b"", ("a",)) == (-1, 0)
    newest, length = pool.find_partial(b"", ("b",))
    assert length == 1
    assert newest not in pool.allocate(2)
    pool.check()


# --- by random operations --------------------------------------------------------------------

NUM_BLOCKS = 7
HASHES = [bytes([i]) for i in range(5)]


class PoolAgainstModel(RuleBasedStateMachine):
    """Sequences come, share, fill and go; a dictionary of holders says what the pool must say."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tables: list[list[int]] = []  # per sequence, in order
        self.hash_of: dict[int, bytes] = {}
        self.partials: dict[bytes, tuple[int, str]] = {}  # by parent: block and content
        self.freed_at = dict.fromkeys(range(NUM_BLOCKS), 0)  # per free block, when
        self.now = 0

    @property
    def cached(self) -> set[int]:
        return set(self.hash_of) | {block for block, _ in self.partials.values()}

    def forget_partial(self, block: int) -> None:
        self.partials = {p: held for p, held in self.partials.items() if held[0] != block}

    def holders(self) -> Counter[int]:
        return Counter(block for table in self.tables for block in table)

    @initialize()
    def start(self):
        self.pool.check()

    @precondition(lambda self: self.pool.num_free)
    @rule(data=st.data())
    def allocate(self, data):
        count = data.draw(st.integers(1, self.pool.num_free))
        held = self.holders()
        plain = [block for block in self.freed_at if block not in self.cached]
        oldest = sorted(set(self.freed_at) & self.cached, key=self.freed_at.__getitem__)
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not held.keys() & set(blocks), "a block with two writers"
        assert set(blocks[: len(plain)]) <= set(plain), "a cached block before a plain one"
        assert blocks[len(plain) :] == oldest[: max(0, count - len(plain))], "not the oldest"
        for block in blocks:
            self.hash_of.pop(block, None)
            self.forget_partial(block)
            del self.freed_at[block]
        self.tables.append(blocks)

    @rule(chain=st.lists(st.sampled_from(HASHES), max_size=3, unique=True))
    def share(self, chain):
        block_of = {digest: block for block, digest in self.hash_of.items()}
        expected = []
        for digest in chain:
            if digest not in block_of:
                break
            expected.append(block_of[digest])
        found = self.pool.find(chain)
        assert found == expected
        self.pool.hold(found)
        for block in found:
            self.freed_at.pop(block, None)
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data):
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        for block in reversed(table):
            if not self.holders()[block]:
                self.now += 1
                self.freed_at[block] = self.now

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), digest=st.sampled_from(HASHES))
    def register(self, data, digest):
        block = data.draw(st.sampled_from(sorted(self.holders())))
        if block in self.cached - set(self.hash_of):
            return  # a partly written block that can be found has no writer
        self.pool.register(block, digest)
        if block not in self.hash_of and digest not in self.hash_of.values():
            self.hash_of[block] = digest

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def forget(self, data):
        block = data.draw(st.sampled_from(sorted(self.holders())))
        self.pool.forget(block)
        self.hash_of.pop(block, None)
        self.forget_partial(block)

    @precondition(lambda self: any(self.tables))
    @rule(
        data=st.data(),
        parent=st.sampled_from(HASHES),
        content=st.text("ab", min_size=1, max_size=3),
    )
    def finish_partly_written(self, data, parent, content):
        """The last block of a sequence that only it holds, as the scheduler does."""
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        block = table[-1]
        if self.holders()[block] > 1 or block in self.cached:
            return
        self.pool.register_partial(block, parent, tuple(content))
        self.partials[parent] = block, content
        self.tables.remove(table)
        self.pool.release(table)
        for each in reversed(table):
            if not self.holders()[each]:
                self.now += 1
                self.freed_at[each] = self.now

    @rule(parent=st.sampled_from(HASHES), content=st.text("ab", max_size=3))
    def go_on_from_partly_written(self, parent, content):
        block, length = self.pool.find_partial(parent, tuple(content))
        kept, written = self.partials.get(parent, (-1, ""))
        common = sum(content.startswith(written[:n]) for n in range(1, len(written) + 1))
        assert (block, length) == ((kept, common) if common else (-1, 0))
        if length:
            self.pool.take_over(block)
            self.forget_partial(block)
            del self.freed_at[block]
            self.tables.append([block])

    @invariant()
    def keeps_its_books(self):
        """Would catch lost blocks, wrong counts and look-ups that are not one to one."""
        self.pool.check()
        held = self.holders()
        assert [self.pool.ref_count(block) for block in range(NUM_BLOCKS)] == [
            held[block] for block in range(NUM_BLOCKS)
        ]
        assert self.pool.num_free + len(held) == NUM_BLOCKS
        assert self.pool.num_cached == len(self.hash_of)
        for block, digest in self.hash_of.items():
            assert self.pool.find([digest]) == [block]


PoolAgainstModel.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestPoolAgainstModel = PoolAgainstModel.TestCase
