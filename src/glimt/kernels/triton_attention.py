"""Attention of decodes over a paged cache, in Triton: one query per row, its keys in parts.

A row's keys are divided among programs, which each keep a softmax of their own; a second kernel
joins them. Source: PagedAttention, arXiv 2309.06180, section 4.3; Flash-Decoding, Dao et al. 2023;
the online softmax of FlashAttention, arXiv 2205.14135. Imported only where triton is installed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

_LEAST_TILE = 16  # rows and columns that the tensor cores multiply at once
_LEAST_SPLIT = 256  # tokens: a shorter part costs more to join than it saves
_MOST_SPLITS = 64
_PROGRAMS = 512  # about four for each multiprocessor of a large card
_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Splits:
    """How a row's context is divided: `count` parts of at most `tokens` tokens."""

    count: int
    tokens: int


def plan_splits(num_rows: int, num_kv_heads: int, context: int, tile: int) -> Splits:
    """So many that the card is busy, as long as each part is worth its program.

    context: tokens of the longest row; tile: tokens that a program reads at once
    """
    wanted = -(-_PROGRAMS // (num_rows * num_kv_heads))
    worth = -(-context // _LEAST_SPLIT)
    count = max(1, min(wanted, worth, _MOST_SPLITS))
    tokens = -(-context // (count * tile)) * tile
    return Splits(-(-context // tokens), tokens)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: Tensor,
    lens: Tensor,
    max_context: int,
    scale: float,
) -> Tensor:
    """[num_rows, num_heads, head_dim] over each row's first `lens` cached tokens -> the same.

    key, value: [num_blocks, block_size, num_kv_heads, head_dim], of the query's dtype and of equal
        strides; tables: [num_rows, max_blocks] int64; lens: [num_rows] int64, each at least 1
    max_context: no entry of lens is larger
    """
    rows, heads, dim = query.shape
    kv_heads, tile = key.shape[2], 64 if query.element_size() == 2 else 32
    assert key.stride() == value.stride(), "both are read at the same offsets"
    assert query.stride(2) == key.stride(3) == tables.stride(1) == 1, "values lie side by side"
    splits = plan_splits(rows, kv_heads, max_context, tile)
    shape = (rows, heads, splits.count)
    partial = torch.empty((*shape, dim), dtype=torch.float32, device=query.device)
    peaks, sums = (
        torch.empty(shape, dtype=torch.float32, device=query.device) for _ in ("peaks", "sums")
    )
    out = torch.empty((rows, heads, dim), dtype=query.dtype, device=query.device)
    width, group = triton.next_power_of_2(max(dim, _LEAST_TILE)), heads // kv_heads
    _attend_part[(rows, kv_heads, splits.count)](
        query, key, value, tables, lens, partial, peaks, sums,
        scale * _LOG2_E, key.shape[1], group, dim, splits.tokens, splits.count,
        *query.stride()[:2], *key.stride()[:3], tables.stride(0),
        heads_tile=triton.next_power_of_2(max(group, _LEAST_TILE)), tile=tile, width=width,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    _join_parts[(rows, heads)](
        partial, peaks, sums, out, splits.count, dim,
        parts=triton.next_power_of_2(splits.count), width=width, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _attend_part(
    query: tensor, key: tensor, value: tensor, tables: tensor, lens: tensor,
    partial: tensor, peaks: tensor, sums: tensor,
    scale: tensor, block_size: tensor, group: tensor, dim: tensor,
    split_tokens: tensor, num_splits: tensor, query_row: tensor, query_head: tensor,
    kv_block: tensor, kv_token: tensor, kv_head: tensor, table_row: tensor,
    heads_tile: constexpr, tile: constexpr, width: constexpr,
) -> None:  # fmt: skip
    """One row's queries of one KV head over one part of its context.

    partial: the sums of weighted values, not divided; peaks: the largest score, in powers of 2;
    sums: of the weights. A part beyond the row's end has the peak -inf.
    """
    row, head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    local, dims = tl.arange(0, heads_tile), tl.arange(0, width)
    heads = head * group + local
    is_value = (local < group)[:, None] & (dims < dim)[None, :]
    at = query + row * query_row + heads[:, None] * query_head + dims[None, :]
    q = tl.load(at, mask=is_value, other=0.0)
    first = split * split_tokens
    stop = tl.minimum(first + split_tokens, tl.load(lens + row).to(tl.int32))
    peak = tl.full([heads_tile], float("-inf"), tl.float32)
    total = tl.zeros([heads_tile], tl.float32)
    mixed = tl.zeros([heads_tile, width], tl.float32)
    for start in range(first, stop, tile):
        tokens = start + tl.arange(0, tile)
        is_seen = tokens < stop
        blocks = tl.load(tables + row * table_row + tokens // block_size, mask=is_seen, other=0)
        places = blocks * kv_block + (tokens % block_size) * kv_token + head * kv_head
        is_read = is_seen[:, None] & (dims < dim)[None, :]
        keys = tl.load(key + places[:, None] + dims[None, :], mask=is_read, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        values = tl.load(value + places[:, None] + dims[None, :], mask=is_read, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        peak = higher
    entry = (row * tl.num_programs(1) * group + heads) * num_splits + split
    tl.store(partial + entry[:, None] * dim + dims[None, :], mixed, mask=is_value)
    tl.store(peaks + entry, peak, mask=local < group)
    tl.store(sums + entry, total, mask=local < group)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _join_parts(
    partial: tensor, peaks: tensor, sums: tensor, out: tensor,
    num_splits: tensor, dim: tensor, parts: constexpr, width: constexpr,
) -> None:  # fmt: skip
    """One head of one row: its parts, each at its own peak, as one softmax."""
    entry = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split, dims = tl.arange(0, parts), tl.arange(0, width)
    is_part = split < num_splits
    at = entry * num_splits + split
    peak = tl.load(peaks + at, mask=is_part, other=float("-inf"))
    weights = tl.exp2(peak - tl.max(peak, 0))
    total = tl.sum(weights * tl.load(sums + at, mask=is_part, other=0.0), 0)
    is_value = is_part[:, None] & (dims < dim)[None, :]
    mixed = tl.load(partial + at[:, None] * dim + dims[None, :], mask=is_value, other=0.0)
    # An empty part holds zeros, which its weight of 0 leaves zeros.
    joined = tl.sum(mixed * weights[:, None], 0) / total
    tl.store(out + entry * dim + dims, joined.to(out.dtype.element_ty), mask=dims < dim)
