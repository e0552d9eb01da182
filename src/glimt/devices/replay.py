"""ReplayedStep: a model's step for decodes, recorded once for each size and then replayed.

A recording computes from the same places in memory, for one number of rows and one width of block
tables. So both are rounded up to a few sizes: the inputs are copied to where the recording reads
them, the rest is padded with rows that see and write a scratch block alone. How a device records is
its own business; here nothing knows of any. Source: CUDA graphs as in vLLM's and nano-vllm's model
runners, by power-of-two batch sizes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from glimt.devices.base import AttentionBatch, KVCache, ModelStep
from glimt.devices.memory import lacks_memory

log = logging.getLogger("glimt")

# Takes how many tokens each row sees, rows that pad too, since operators may read it on the host.
Replay: TypeAlias = Callable[[Sequence[int]], None]
# Takes a function without arguments; returns where its result lies, and what computes it anew. It
# may call the function more than once.
Record: TypeAlias = Callable[[Callable[[], Tensor]], tuple[Tensor, Replay]]

_MOST_ROWS = 256  # beyond, a step is long enough to hide what its launches cost
_LEAST_BLOCKS = 8  # of a table: a recording for each of 1, 2 and 4 would not be worth its memory


@dataclass(frozen=True, slots=True)
class Size:
    """What a recording is made for. blocks: width of the block tables."""

    rows: int
    blocks: int

    def is_at_least(self, other: Size) -> bool:
        """In both: what has more rows and fewer blocks may need less memory."""
        return self.rows >= other.rows and self.blocks >= other.blocks


def size_for(num_rows: int, num_blocks: int) -> Size | None:
    """The least size that holds such a step: powers of two. None: too many rows to record."""
    if num_rows > _MOST_ROWS:
        return None
    return Size(_power_of_two(num_rows), max(_LEAST_BLOCKS, _power_of_two(num_blocks)))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


class ReplayedStep:
    """Does what a step does, by recordings; it is called as the step is.

    What it returns is overwritten by the next call. A device that fails to record once is not asked
    again: what it has recorded is used, and a step of another size is run as it is. If it lacked
    memory, it is still asked for sizes that are smaller in rows or in blocks.
    """

    def __init__(self, step: ModelStep, record: Record, cache: KVCache) -> None:
        """cache: of one layer; its last block is the scratch block."""
        self.step = step
        self._record: Record | None = record
        self._block_size = cache.block_size
        self._scratch = len(cache.key) - 1
        self._recordings: dict[Size, _Recording] = {}
        self._too_large: list[Size] = []

    def __call__(self, hidden: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        """As the step's; every row of the batch has one token."""
        assert batch.is_decode, "chunks of prompts are of too many sizes"
        size = size_for(*batch.block_tables.shape)
        if size is None:
            return self.step(hidden, positions, batch)
        is_settled = size in self._recordings or any(map(size.is_at_least, self._too_large))
        if not is_settled and self._record is not None:
            inputs = Inputs.empty(size, hidden, positions, self._block_size, self._scratch)
            inputs.fill(hidden, positions, batch)
            self._try_to_record(self._record, inputs)
        recording = self._recordings.get(size)
        step = self.step if recording is None else recording.run
        return step(hidden, positions, batch)

    def _try_to_record(self, record: Record, inputs: Inputs) -> None:
        try:
            result, replay = record(lambda: self.step(*inputs.arguments()))
            self._recordings[inputs.size] = _Recording(inputs, result, replay)
        except RuntimeError as error:  # an operation that cannot be recorded, or no memory for it
            said = str(error).partition("\n")[0]
            if lacks_memory(error):
                self._leave_out(inputs.size, said)
                return
            log.warning("decoding steps cannot be recorded and run one by one: %s", said)
            self._record = None

    def _leave_out(self, size: Size, said: str) -> None:
        """Record nothing of this size or beyond; a step by itself needs less and may fit."""
        text = "no memory to record decoding steps of %d rows and %d blocks; such ones, and larger "
        level = logging.DEBUG if self._too_large else logging.WARNING
        log.log(level, text + "ones, run one by one: %s", size.rows, size.blocks, said)
        self._too_large.append(size)


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Where a recording reads what it computes from.

    hidden: [rows, hidden_size]; positions: [channels, rows]; slots, decode_lens: [rows];
    block_tables: [rows, blocks]; scratch: the block of rows that pad, and spare_slots: [rows], its
    slots in turn; context_lens: decode_lens on the host
    """

    size: Size
    block_size: int
    scratch: int
    hidden: Tensor
    positions: Tensor
    slots: Tensor
    spare_slots: Tensor
    block_tables: Tensor
    decode_lens: Tensor
    context_lens: list[int]

    @classmethod
    def empty(
        cls, size: Size, hidden: Tensor, positions: Tensor, block_size: int, scratch: int
    ) -> Inputs:
        """For steps like this one; every row pads.

        hidden: [num_rows, hidden_size]; positions: [channels, num_rows]
        """
        rows = size.rows
        # Slots of their own as long as there are any: a device may refuse to write one twice.
        offsets = torch.arange(rows, device=positions.device) % block_size
        spare_slots = (scratch * block_size + offsets).to(positions.dtype)
        return cls(
            size=size,
            block_size=block_size,
            scratch=scratch,
            hidden=hidden.new_zeros(rows, hidden.shape[1]),
            positions=positions.new_zeros(len(positions), rows),
            slots=spare_slots.clone(),
            spare_slots=spare_slots,
            block_tables=positions.new_full((rows, size.blocks), scratch),
            decode_lens=positions.new_ones(rows),
            context_lens=[1] * rows,
        )

    def fill(self, hidden: Tensor, positions: Tensor, batch: AttentionBatch) -> None:
        """Put a step's own values in, and make rows that pad of those behind it.

        A padding row has a sequence of one token, the first of the scratch block. They are all
        alike, so it does not matter which of them wrote that.
        hidden: [num_rows, hidden_size]; positions: [channels, num_rows]; rows at most size.rows
        """
        blocks, num_spare = batch.block_tables.shape[1], self.size.rows - len(hidden)
        _put(self.hidden, hidden, 0)
        _put(self.positions.T, positions.T, 0)
        _put(self.slots, batch.slots, self.spare_slots[:num_spare])
        _put(self.decode_lens, batch.decode_lens, 1)
        self.context_lens[:] = [*batch.context_lens, *[1] * num_spare]
        _put(self.block_tables[:, :blocks], batch.block_tables, self.scratch)
        # As in runner/batch.py: what is read beyond a row's end is the row's own.
        self.block_tables[:, blocks:] = self.block_tables[:, :1]

    def arguments(self) -> tuple[Tensor, Tensor, AttentionBatch]:
        """What the step is called with: a batch without masks, whose rows may all be longest.

        Hidden states [rows, hidden_size], positions [channels, rows] and the batch.
        """
        rows = self.size.rows
        batch = AttentionBatch(
            num_decodes=rows,
            query_starts=tuple(range(rows + 1)),
            context_lens=(self.size.blocks * self.block_size,) * rows,
            num_shared=(0,) * rows,
            slots=self.slots,
            block_tables=self.block_tables,
            decode_lens=self.decode_lens,
        )
        return self.hidden, self.positions, batch


def _put(place: Tensor, values: Tensor, padding: int | Tensor) -> None:
    place[: len(values)] = values
    place[len(values) :] = padding


@dataclass(frozen=True, slots=True, eq=False)
class _Recording:
    """One size. result: [rows, hidden_size], which `replay` computes from the inputs."""

    inputs: Inputs
    result: Tensor
    replay: Replay

    def run(self, hidden: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        self.inputs.fill(hidden, positions, batch)
        self.replay(self.inputs.context_lens)
        return self.result[: len(hidden)]
