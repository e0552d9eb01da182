"""Steps of attention over a filled cache, and what they must give: loops in float64."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from conftest import step_row
from glimt.devices.base import Device, KVCache, rounded_heads
from glimt.runner.batch import flatten
from glimt.types import StepPlan, StepRow


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive_attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One token: [heads, dim] over [n, kv_heads, dim], head by head."""
    group = len(query) // keys.shape[1]
    out = []
    for head, q in enumerate(query.double()):
        k, v = keys[:, head // group].double(), values[:, head // group].double()
        scores = torch.tensor([float(q @ key) * scale for key in k], dtype=torch.float64)
        weights = (scores - scores.max()).exp()
        out.append((weights / weights.sum()) @ v)
    return torch.stack(out)


BLOCK_SIZE = 4
NUM_BLOCKS = 40


def make_row(start: int, count: int, bidirectional_len: int, table: Sequence[int]) -> StepRow:
    return step_row(
        token_ids=[0] * count,
        start=start,
        block_table=table,
        bidirectional_len=bidirectional_len,
    )


class Step:
    """Random queries, keys and values of one step over a cache filled with earlier tokens.

    rows: (start, count, bidirectional_len); decodes first. Blocks are dealt in a shuffled order.
    """

    def __init__(
        self,
        rows: Sequence[tuple[int, int, int]],
        heads: tuple[int, int] = (4, 2),
        dim: int = 16,
        dtype: torch.dtype = torch.float32,
        filler: float = 0.0,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self.block_size = block_size
        num_heads, num_kv_heads = heads
        blocks = iter(torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3)))
        self.rows = [
            make_row(start, count, b, [int(next(blocks)) for _ in range(self.blocks(start, count))])
            for start, count, b in rows
        ]
        num_tokens = sum(count for _, count, _ in rows)
        self.query = normal(num_tokens, num_heads, dim, seed=1, dtype=dtype)
        self.key = normal(num_tokens, num_kv_heads, dim, seed=2, dtype=dtype)
        self.value = normal(num_tokens, num_kv_heads, dim, seed=4, dtype=dtype)
        shape = (NUM_BLOCKS, self.block_size, num_kv_heads, dim)
        self.cache = KVCache(
            torch.full(shape, filler, dtype=dtype), torch.full(shape, filler, dtype=dtype)
        )
        self.scale = dim**-0.5
        for seed, row in enumerate(self.rows):
            for i in range(row.start):
                block, offset = row.block_table[i // self.block_size], i % self.block_size
                for tensor, salt in ((self.cache.key, 100), (self.cache.value, 200)):
                    entry = normal(num_kv_heads, dim, seed=salt + 1000 * seed + i, dtype=dtype)
                    tensor[block, offset] = entry

    def blocks(self, start: int, count: int) -> int:
        return -(-(start + count) // self.block_size)

    def run(self, device: Device) -> Tensor:
        """Write, then attend, on a device. Returns the result on the CPU."""
        at = device.torch_device
        batch = flatten(StepPlan(tuple(self.rows)), self.block_size, at).attention
        cache = device.lay_out_cache(
            KVCache(*(part.to(at, copy=True) for part in self.cache.tensors()))
        )
        query, key, value = self.query.to(at), self.key.to(at), self.value.to(at)
        device.write_kv(key, value, cache, batch.slots)
        return device.paged_attention(query, key, value, cache, batch, self.scale).cpu()

    def naive(self) -> Tensor:
        """Token by token, from each row's own list of earlier tokens and the step's new ones."""
        out, at = [], 0
        for row in self.rows:
            count = len(row.token_ids)
            old = [
                (row.block_table[i // self.block_size], i % self.block_size)
                for i in range(row.start)
            ]
            keys = [self.cache.key[place] for place in old] + list(self.key[at : at + count])
            values = [self.cache.value[place] for place in old] + list(self.value[at : at + count])
            for k in range(count):
                seen = max(row.start + k + 1, row.bidirectional_len)
                args = torch.stack(keys[:seen]), torch.stack(values[:seen]), self.scale
                out.append(naive_attend(self.query[at + k], *args))
            at += count
        return torch.stack(out)

    def rounded(self) -> Step:
        """The same with its cache in int8."""
        step = copy(self)
        key, key_scales = rounded_heads(self.cache.key)
        value, value_scales = rounded_heads(self.cache.value)
        step.cache = KVCache(key, value, key_scales, value_scales)
        return step

    def widened(self) -> Step:
        """The same over keys and values that are what int8 leaves of them."""
        step = copy(self)
        step.key, step.value = widened(self.key), widened(self.value)
        step.cache = KVCache(widened(self.cache.key), widened(self.cache.value))
        return step


def widened(x: Tensor) -> Tensor:
    values, scales = rounded_heads(x)
    return (values * scales[..., None]).to(x.dtype)


STEPS = {
    "one whole prompt": [(0, 6, 0)],
    "one token": [(0, 1, 0)],
    "one decode": [(5, 1, 0)],
    "decodes of unequal lengths": [(1, 1, 0), (11, 1, 0), (7, 1, 0)],
    "block edges": [(3, 1, 0), (4, 1, 0), (8, 1, 0), (0, 4, 0), (0, 8, 0), (4, 4, 0), (8, 5, 0)],
    "short decode beside a long prompt": [(2, 1, 0), (0, 13, 0)],
    "long decode beside a short prompt": [(13, 1, 0), (0, 2, 0)],
    "a chunk on a cached context": [(9, 3, 0)],
    "a bidirectional prompt": [(0, 7, 6)],
    "a bidirectional prompt partly cached": [(4, 5, 8)],
    "a recomputed bidirectional sequence": [(0, 10, 6)],
    "a chunk after a bidirectional context": [(8, 3, 6)],
    "everything at once": [(6, 1, 5), (3, 1, 0), (0, 5, 0), (4, 7, 0), (0, 9, 8), (4, 5, 8)],
}
