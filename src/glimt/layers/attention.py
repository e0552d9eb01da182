"""Attention blocks that more than one family uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from glimt.devices.base import Activation, AttentionBatch, Device, KVCache
from glimt.layers.linear import Linear, mlp
from glimt.layers.tower import Stages, by_rows, run_through
from glimt.parallel import ALONE, Group, Part, divided, in_blocks, share


def cached_attention(
    device: Device,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: KVCache,
    batch: AttentionBatch,
) -> Tensor:
    """Store this step's keys and values, then attend over every row's cached context.

    query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim],
    rotated already. Scale 1/sqrt(head_dim). Returns [num_tokens, num_heads * head_dim].
    """
    device.write_kv(key, value, cache, batch.slots)
    scale = query.shape[-1] ** -0.5
    return device.paged_attention(query, key, value, cache, batch, scale).flatten(1)


@dataclass(frozen=True, slots=True)
class BlockShape:
    """Sizes of one tower block, and who divides it."""

    hidden_size: int
    num_heads: int
    intermediate_size: int
    group: Group = ALONE


class TowerAttention(nn.Module):
    """Full attention inside each picture; fused rows are [Q | K | V], each split into heads.

    Heads are divided among the ranks, if they can be.
    """

    def __init__(self, shape: BlockShape, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        size = shape.hidden_size
        group = shape.group.for_units(shape.num_heads)
        heads = Part(shape.num_heads, size // shape.num_heads)
        rows, columns = divided(group, 0, heads, heads, heads), divided(group, 1, heads)
        self.device = device
        self.num_heads = share(group, shape.num_heads)
        self.head_dim = size // shape.num_heads
        self.qkv = Linear(size, 3 * size, True, device, dtype, shard=rows)
        self.dense = Linear(size, size, True, device, dtype, shard=columns)

    def forward(
        self, x: Tensor, cu_seqlens: Sequence[int], residual: Tensor | None = None
    ) -> Tensor:
        """[num_tokens, hidden_size], plus the residual; picture s owns rows cu_seqlens[s] …
        cu_seqlens[s+1]-1.
        """
        return run_through(self.stages(x, cu_seqlens, len(x), residual))

    def stages(
        self, x: Tensor, cu_seqlens: Sequence[int], part_rows: int, residual: Tensor | None = None
    ) -> Stages[Tensor]:
        """[num_tokens, hidden_size] -> the same, in parts of so many rows, each of one picture."""
        fused = yield from by_rows(lambda rows: self.qkv(x[rows]), len(x), part_rows, _QKV_SHARE)
        q, k, v = fused.reshape(-1, 3, self.num_heads, self.head_dim).unbind(1)
        if part_rows >= len(x):
            out = self._attended(q, k, v, cu_seqlens, cu_seqlens, residual)
            yield _ATTENTION_SHARE
            return out
        parts = []
        for start, stop in pairwise(cu_seqlens):
            keys, values, rest = k[start:stop], v[start:stop], _rows(residual, start, stop)
            part = _Picture(self, q[start:stop], keys, values, rest)
            share = _ATTENTION_SHARE * (stop - start) / len(x)
            parts.append((yield from by_rows(part.attended, stop - start, part_rows, share)))
        return torch.cat(parts)

    def _attended(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_starts: Sequence[int],
        k_starts: Sequence[int],
        residual: Tensor | None,
    ) -> Tensor:
        out = self.device.varlen_attention(q, k, v, q_starts, k_starts, self.head_dim**-0.5)
        return self.dense(out.flatten(1), residual=residual)


# Of a tower block's operations, roughly, and exact in binary: the rest is its MLP.
_QKV_SHARE, _ATTENTION_SHARE = 0.125, 0.25
MLP_SHARE = 1 - _QKV_SHARE - _ATTENTION_SHARE


def _rows(residual: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if residual is None else residual[start:stop]


@dataclass(frozen=True, slots=True, eq=False)
class _Picture:
    """One picture's queries, keys and values, [num_tokens, num_heads, head_dim] each."""

    attention: TowerAttention
    q: Tensor
    k: Tensor
    v: Tensor
    residual: Tensor | None

    def attended(self, rows: slice) -> Tensor:
        """Some queries over all keys of the picture."""
        q, residual = self.q[rows], _rows(self.residual, rows.start, rows.stop)
        return self.attention._attended(q, self.k, self.v, [0, len(q)], [0, len(self.k)], residual)


class GeluMlp(nn.Module):
    """Two linears with a GELU between, exact or in its tanh form."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        device: Device,
        dtype: torch.dtype,
        tanh: bool = False,
        group: Group = ALONE,
    ) -> None:
        super().__init__()
        inner = in_blocks(intermediate_size, group)
        rows, columns = divided(group, 0, inner), divided(group, 1, inner)
        self.up = Linear(hidden_size, intermediate_size, True, device, dtype, shard=rows)
        self.down = Linear(intermediate_size, hidden_size, True, device, dtype, shard=columns)
        self.activation: Activation = "gelu_tanh" if tanh else "gelu_erf"

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_scale: float = 1.0
    ) -> Tensor:
        """[n, hidden_size] -> [n, hidden_size], plus residual_scale * residual."""
        return mlp(self.up, self.down, x, self.activation, residual, residual_scale)
