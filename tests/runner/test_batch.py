"""Flattened steps against a naive answer to one question: which cache slots may a token see?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import step_row
from glimt.runner.batch import Batch, flatten
from glimt.types import StepPlan, StepRow

CPU = torch.device("cpu")
INF = float("inf")


def make_row(
    start: int,
    count: int,
    table: tuple[int, ...],
    *,
    bidirectional_len: int = 0,
    samples: bool = True,
    channels: int = 1,
    num_drafts: int = 0,
) -> StepRow:
    """Token ids count on from 100 * the first block; channel c stands at 1000 * c + index."""
    index = np.arange(start, start + count)
    token_ids = [100 * table[0] + int(i) for i in index]
    return step_row(
        sequence_id=table[0],
        request_id=str(table[0]),
        token_ids=token_ids,
        positions=np.stack([1000 * c + index for c in range(channels)]).astype(np.int64),
        start=start,
        block_table=table,
        bidirectional_len=bidirectional_len,
        samples=samples,
        drafts=tuple(token_ids[count - num_drafts :]),
    )


def flat(*rows: StepRow, block_size: int = 4) -> Batch:
    return flatten(StepPlan(rows), block_size, CPU)


def naive_view(row: StepRow, block_size: int) -> list[list[int]]:
    """Per token of the row, the slots it may see, in order."""
    views = []
    for i in range(row.start, row.start + len(row.token_ids)):
        keys = range(max(i + 1, row.bidirectional_len))
        views.append([row.block_table[j // block_size] * block_size + j % block_size for j in keys])
    return views


def batch_view(batch: Batch, block_size: int) -> list[list[int]]:
    """The same, read from the tensors as a device reads them."""
    attention = batch.attention
    views = []
    for row, context in enumerate(attention.context_lens):
        table = attention.block_tables[row].tolist()
        slots = [block * block_size + offset for block in table for offset in range(block_size)]
        start, stop = attention.query_starts[row : row + 2]
        if row < attention.num_decodes:
            shown = attention.decode_mask(block_size, torch.float32)[row, 0, 0] == 0
            slots = slots[: len(shown)]
            views.append([s for s, is_shown in zip(slots, shown, strict=True) if is_shown])
            continue
        mask = attention.prefill_mask(row, torch.float32)
        if mask is None:
            assert context == stop - start
            own = attention.slots[start:stop].tolist()
            views += [own[: i + 1] for i in range(stop - start)]
        else:
            assert mask.shape == (stop - start, context)
            views += [[slots[j] for j in line.nonzero()[:, 0].tolist()] for line in mask == 0]
    return views


# --- by hand ---------------------------------------------------------------------------------


def test_a_mixed_step_by_hand():
    """Would catch a wrong order, offset or padding in any field of a mixed step.

    Decodes at index 2 and 8, a whole prompt of 3, and 2 tokens on a cached context of 5.
    """
    batch = flat(
        make_row(2, 1, (7,)),
        make_row(8, 1, (1, 2, 3)),
        make_row(0, 3, (4, 9)),  # block 9 is reserved and not in use yet
        make_row(5, 2, (5, 6), samples=False),
    )
    assert batch.token_ids.tolist() == [702, 108, 400, 401, 402, 505, 506]
    assert batch.token_ids.dtype == batch.positions.dtype == batch.sampled.dtype == torch.int64
    assert batch.positions.tolist() == [[2, 8, 0, 1, 2, 5, 6]]
    assert batch.sampled.tolist() == [0, 1, 4]
    attention = batch.attention
    assert attention.num_decodes == 2
    assert attention.query_starts == (0, 1, 2, 5, 7)
    assert attention.context_lens == (3, 9, 3, 7)
    assert attention.slots.tolist() == [30, 12, 16, 17, 18, 25, 26]
    assert attention.block_tables.tolist() == [[7, 7, 7], [1, 2, 3], [4, 4, 4], [5, 6, 5]]
    assert attention.decode_lens.tolist() == [3, 9]
    assert attention.num_shared == (0, 0, 0, 0)
    assert attention.decode_mask(4, torch.float32).tolist() == [
        [[[0, 0, 0] + [-INF] * 9]],
        [[[0] * 9 + [-INF] * 3]],
    ]
    assert attention.prefill_mask(2, torch.float32) is None
    rest = attention.prefill_mask(3, torch.float32)
    assert rest.tolist() == [[0, 0, 0, 0, 0, 0, -INF], [0, 0, 0, 0, 0, 0, 0]]


def test_a_bidirectional_prompt_by_hand():
    """Would catch a context token that cannot see a later one, or one that sees `<sop>`.

    Source of the rule: query i sees key j if j < c or j <= i (specs/visualglm-6b.md, 1.5).
    """
    batch = flat(make_row(0, 4, (0,), bidirectional_len=3))
    assert batch.attention.num_shared == (3,)
    mask = batch.attention.prefill_mask(0, torch.float32)
    assert mask.tolist() == [[0, 0, 0, -INF]] * 3 + [[0, 0, 0, 0]]


def test_a_step_without_decodes_has_no_lengths_of_decodes():
    """Would catch a prefill's context among the decodes'."""
    batch = flat(make_row(0, 3, (0,)))
    assert batch.attention.num_decodes == 0
    assert batch.attention.decode_lens.tolist() == []
    assert batch.attention.decode_lens.dtype == torch.int64


def test_a_first_token_alone_is_a_prefill():
    """Would catch a one-token prompt run as a decode."""
    batch = flat(make_row(0, 1, (3,)))
    assert batch.attention.num_decodes == 0
    assert batch.attention.prefill_mask(0, torch.float32) is None


def test_a_step_that_samples_nothing_has_no_sampled_rows():
    """Would catch a chunk in mid-prompt that asks for logits."""
    batch = flat(make_row(0, 3, (0,), samples=False))
    assert batch.sampled.shape == (0,)
    assert batch.sampled.dtype == torch.int64


def test_a_row_with_drafts_by_hand():
    """Would catch a draft that sees the one after it, or logits of the wrong places."""
    batch = flat(
        make_row(2, 1, (7,)),
        make_row(3, 3, (5, 6), num_drafts=2),
        make_row(0, 2, (4,)),
        make_row(2, 2, (8,), samples=False),
    )
    assert batch.token_ids.tolist() == [702, 503, 504, 505, 400, 401, 802, 803]
    assert batch.sampled.tolist() == [0, 1, 2, 3, 5]
    assert batch.drafted.tolist() == [2, 3]
    assert batch.attention.num_decodes == 1
    assert batch.attention.prefill_mask(1, torch.float32).tolist() == [
        [0, 0, 0, 0, -INF, -INF],
        [0, 0, 0, 0, 0, -INF],
        [0, 0, 0, 0, 0, 0],
    ]
    assert batch.opened_blocks == (6, 4)
    assert flat(make_row(2, 1, (7,))).drafted.shape == (0,)


def test_positions_are_not_slots():
    """Would catch rotary positions derived from the cache index, or a channel lost."""
    batch = flat(make_row(4, 2, (8, 2), channels=2), make_row(0, 1, (5,), channels=2))
    assert batch.positions.tolist() == [[4, 5, 0], [1004, 1005, 1000]]
    assert batch.attention.slots.tolist() == [8, 9, 20]


def test_padding_shows_only_the_rows_own_blocks():
    """Would catch padding with a neighbour's block: masked or not, 0 * NaN is NaN, and one
    sequence that overflows would end the others of its batch.
    """
    batch = flat(make_row(3, 1, (5,)), make_row(11, 1, (1, 2, 0)), make_row(0, 9, (7, 6, 8)))
    for table, own in zip(
        batch.attention.block_tables.tolist(), [{5}, {0, 1, 2}, {6, 7, 8}], strict=True
    ):
        assert set(table) == own


def test_the_decode_mask_is_no_wider_than_the_decodes_need():
    """Would catch every decode reading as much cache as the longest prompt beside it."""
    batch = flat(make_row(2, 1, (0,)), make_row(6, 1, (1, 2)), make_row(0, 20, (3, 4, 5, 6, 7)))
    assert batch.attention.decode_mask(4, torch.float32).shape == (2, 1, 1, 8)
    assert batch.attention.block_tables.shape == (3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masks_have_the_models_dtype(dtype):
    """Would catch a float32 mask, which fused attention refuses beside 16-bit queries."""
    batch = flat(make_row(2, 1, (0,)), make_row(2, 3, (1, 2)))
    assert batch.attention.decode_mask(4, dtype).dtype == dtype
    assert batch.attention.prefill_mask(1, dtype).dtype == dtype


def test_masks_are_made_once_for_all_layers():
    """Would catch a mask made anew in every layer."""
    attention = flat(make_row(2, 1, (0,)), make_row(2, 3, (1, 2))).attention
    assert attention.decode_mask(4, torch.float32) is attention.decode_mask(4, torch.float32)
    assert attention.prefill_mask(1, torch.float32) is attention.prefill_mask(1, torch.float32)


def test_a_block_is_opened_once_by_the_row_that_ends_in_it():
    """Would catch a block zeroed under its own earlier tokens, or never: what its last owner left
    behind its end is read by decodes, and NaN under a mask is NaN.
    """
    batch = flat(
        make_row(8, 1, (1, 2, 3)),  # opens block 3
        make_row(9, 1, (4, 5, 6)),  # goes on in block 6
        make_row(11, 1, (7, 8, 9)),  # fills block 9
        make_row(0, 6, (10, 11, 12)),  # fills 10 and opens 11
        make_row(0, 8, (13, 14, 15)),  # fills both
        make_row(5, 2, (16, 17)),  # goes on in block 17
        make_row(3, 3, (18, 19)),  # fills 18 and opens 19
        make_row(0, 1, (20,)),  # opens block 20
    )
    assert batch.opened_blocks == (3, 11, 19, 20)


# --- properties ------------------------------------------------------------------------------


@st.composite
def plans(draw) -> tuple[StepPlan, int]:
    """Decodes first; a sequence's blocks are its own but for a shared beginning."""
    block_size = draw(st.integers(1, 5))
    shared = (50, 51)
    rows = []
    for number in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, 3 * block_size))
        bidirectional_len = draw(st.sampled_from([0, 0, 1, 3, 7]))
        # A bidirectional context goes whole.
        count = max(draw(st.sampled_from([1, 1, 2, 5, 9])), bidirectional_len - start)
        used = -(-(start + count) // block_size)
        own = draw(st.permutations(range(10 * number, 10 * number + 10)))
        own = [*own, *range(100 + 20 * number, 100 + 20 * number + used)]
        num_shared = min(draw(st.integers(0, 2)), start // block_size)
        table = (*shared[:num_shared], *own[: used - num_shared + draw(st.integers(0, 2))])
        rows.append(
            make_row(start, count, table, bidirectional_len=bidirectional_len, samples=start % 2)
        )
    rows.sort(key=lambda row: not row.is_decode)
    return StepPlan(tuple(rows)), block_size


@settings(max_examples=200, deadline=None)
@given(plans())
def test_every_token_sees_exactly_what_it_may(planned):
    """Would catch a token that sees the future, misses its past, or reads another's cache."""
    plan, block_size = planned
    batch = flatten(plan, block_size, CPU)
    expected = [view for row in plan.rows for view in naive_view(row, block_size)]
    assert batch_view(batch, block_size) == expected
    # A token's own slot is the one at its own index of its own view.
    indices = [row.start + k for row in plan.rows for k in range(len(row.token_ids))]
    own = [view[i] for view, i in zip(expected, indices, strict=True)]
    assert batch.attention.slots.tolist() == own
    assert len(set(own)) == len(own)
    ends = np.cumsum([len(row.token_ids) for row in plan.rows])
    samples = [row.samples for row in plan.rows]
    assert batch.sampled.tolist() == [e - 1 for e, s in zip(ends, samples, strict=True) if s]


@settings(max_examples=100, deadline=None)
@given(plans())
def test_every_slot_a_decode_reads_was_written_or_zeroed(planned):
    """Would catch a slot behind a row's end that still holds what an earlier owner left.

    Each sequence is played from its first token: what it has opened or written is clean.
    """
    plan, block_size = planned
    for row in plan.rows:
        clean: set[int] = set()
        for start, count in [(0, row.start), (row.start, len(row.token_ids))]:
            if count:
                batch = flat(make_row(start, count, row.block_table), block_size=block_size)
                clean.update(batch.attention.slots.tolist())
                clean.update(
                    b * block_size + i for b in batch.opened_blocks for i in range(block_size)
                )
                read = set(batch.attention.block_tables.flatten().tolist())
        assert {b * block_size + i for b in read for i in range(block_size)} <= clean
