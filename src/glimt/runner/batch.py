"""Flattens a step's plan into the tensors the model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from glimt.devices.base import AttentionBatch
from glimt.types import StepPlan, StepRow


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step, flattened.

    token_ids: [num_tokens] int64; positions: [channels, num_tokens] int64
    sampled: [num_sampled] int64, indices of the tokens whose logits are wanted
    drafted: [num_drafted] int64, indices of the drafts
    scored: [num_targets] int64, indices of the tokens that predict plan.targets
    opened_blocks: cache blocks that get their first tokens now and stay partly empty
    """

    token_ids: Tensor
    positions: Tensor
    sampled: Tensor
    drafted: Tensor
    scored: Tensor
    attention: AttentionBatch
    opened_blocks: tuple[int, ...]


def flatten(plan: StepPlan, block_size: int, torch_device: torch.device) -> Batch:
    """Lay the rows end to end; rows that decode come first in the plan already."""
    starts = [0, *accumulate(len(row.token_ids) for row in plan.rows)]
    ids = [token for row in plan.rows for token in row.token_ids]
    positions = np.concatenate([row.positions for row in plan.rows], axis=1)
    # Of each row that samples: the last known token and its drafts.
    wanted = [
        range(stop - 1 - len(row.drafts), stop)
        for row, stop in zip(plan.rows, starts[1:], strict=True)
        if row.samples
    ]
    return Batch(
        token_ids=torch.tensor(ids, device=torch_device),
        positions=torch.from_numpy(positions).to(torch_device),
        sampled=_indices((at for places in wanted for at in places), torch_device),
        drafted=_indices((at for places in wanted for at in places[1:]), torch_device),
        scored=_indices(_before_targets(plan.rows, starts), torch_device),
        attention=_attention(plan.rows, starts, block_size, torch_device),
        opened_blocks=tuple(_opened_blocks(plan.rows, block_size)),
    )


def _before_targets(rows: Sequence[StepRow], starts: Sequence[int]) -> Iterator[int]:
    for row, first in zip(rows, starts, strict=False):  # starts has the end besides
        for target in row.targets:
            yield first + target.place - 1 - row.start


def _indices(indices: Iterable[int], torch_device: torch.device) -> Tensor:
    return torch.tensor(list(indices), dtype=torch.int64, device=torch_device)


def _opened_blocks(rows: Sequence[StepRow], block_size: int) -> Iterator[int]:
    """At most one block per row: the one it ends in, if it also begins there in this step."""
    for row in rows:
        last, offset = divmod(row.start + len(row.token_ids), block_size)
        if offset and last * block_size >= row.start:
            yield row.block_table[last]


def _attention(
    rows: Sequence[StepRow],
    starts: Sequence[int],
    block_size: int,
    torch_device: torch.device,
) -> AttentionBatch:
    num_decodes = sum(row.is_decode for row in rows)
    contexts = tuple(row.start + len(row.token_ids) for row in rows)
    tables = _padded_tables(rows, contexts, block_size)
    slots = _slots(rows, starts, tables, block_size)
    return AttentionBatch(
        num_decodes=num_decodes,
        query_starts=tuple(starts),
        context_lens=contexts,
        num_shared=tuple(row.bidirectional_len for row in rows),
        slots=torch.from_numpy(slots).to(torch_device),
        block_tables=torch.from_numpy(tables).to(torch_device),
        decode_lens=torch.tensor(contexts[:num_decodes], dtype=torch.int64, device=torch_device),
    )


def _padded_tables(rows: Sequence[StepRow], contexts: Sequence[int], block_size: int) -> np.ndarray:
    """[num_rows, max_blocks] int64: only the blocks in use, padded with the row's first.

    Padding is read and then masked, but 0 * NaN is NaN: with another sequence's block as padding,
    one whose values are not finite would end its neighbours too.
    """
    used = [-(-context // block_size) for context in contexts]
    tables = np.empty((len(rows), max(used)), dtype=np.int64)
    for table, row, count in zip(tables, rows, used, strict=True):
        table[:count] = row.block_table[:count]
        table[count:] = row.block_table[0]
    return tables


def _slots(
    rows: Sequence[StepRow], starts: Sequence[int], tables: np.ndarray, block_size: int
) -> np.ndarray:
    """[num_tokens] int64: block * block_size + offset of every token of the step.

    starts: offsets of the rows among the step's tokens; tables: of `_padded_tables`
    """
    counts = np.diff(starts)
    firsts = np.array([row.start for row in rows]) - starts[:-1]
    at = np.arange(starts[-1]) + np.repeat(firsts, counts)  # index in the row's own cache
    number, offset = np.divmod(at, block_size)
    return tables[np.repeat(np.arange(len(rows)), counts), number] * block_size + offset
