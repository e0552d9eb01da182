"""Attention blocks that more than one family uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from glimt.devices.base import Activation, AttentionBatch, Device, KVCache
from glimt.layers.linear import Linear, mlp


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
    """Sizes of one tower block."""

    hidden_size: int
    num_heads: int
    intermediate_size: int


class TowerAttention(nn.Module):
    """Full attention inside each picture; fused rows are [Q | K | V], each split into heads."""

    def __init__(self, shape: BlockShape, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        self.device = device
        self.num_heads = shape.num_heads
        self.qkv = Linear(shape.hidden_size, 3 * shape.hidden_size, True, device, dtype)
        self.dense = Linear(shape.hidden_size, shape.hidden_size, True, device, dtype)

    def forward(
        self, x: Tensor, cu_seqlens: Sequence[int], residual: Tensor | None = None
    ) -> Tensor:
        """[num_tokens, hidden_size], plus the residual; picture s owns rows cu_seqlens[s] …
        cu_seqlens[s+1]-1.
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        scale = q.shape[-1] ** -0.5
        out = self.device.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, scale)
        return self.dense(out.flatten(1), residual=residual)


class GeluMlp(nn.Module):
    """Two linears with a GELU between, exact or in its tanh form."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        device: Device,
        dtype: torch.dtype,
        tanh: bool = False,
    ) -> None:
        super().__init__()
        self.up = Linear(hidden_size, intermediate_size, True, device, dtype)
        self.down = Linear(intermediate_size, hidden_size, True, device, dtype)
        self.activation: Activation = "gelu_tanh" if tanh else "gelu_erf"

    def forward(
        self, x: Tensor, residual: Tensor | None = None, residual_scale: float = 1.0
    ) -> Tensor:
        """[n, hidden_size] -> [n, hidden_size], plus residual_scale * residual."""
        return mlp(self.up, self.down, x, self.activation, residual, residual_scale)
