"""Atlas A2 and A3: one fused attention for everything, over a paged cache in the plain layout.

npu_fused_infer_attention_score takes packed tokens ("TND"), the queries of several sequences end to
end. Its only masks are fixed, so tokens that see a shared part whole and tokens that see up to
themselves are two calls. Source: Ascend/op-plugin, docs/zh/custom_APIs; docs/ascend.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from glimt.devices.base import Activation, AttentionBatch, KVCache, ModelStep, RotaryStyle
from glimt.devices.npu_base import HEAD, Kept, NpuDevice, Stretch, stretches, widened_heads
from glimt.devices.npu_graphs import GraphRecorder
from glimt.devices.npu_runtime import takes
from glimt.devices.replay import ReplayedStep
from glimt.errors import ConfigError

_MASK_SIDE = 2048  # of the causal mask, whatever the lengths: the operator repeats it
_CAUSAL = 3  # sparse_mode: aligned to the bottom right, so right behind a cached context too
_OPEN = 0  # sparse_mode without a mask
_MOST_SEQUENCES = 4096  # of one call
_BLOCK_STEP, _MOST_BLOCK = 128, 512  # of the cache, in tokens
_WIDEST_ROTATION = 896  # dims, exclusive
_MOST_HEADS = 1000  # of neighbours' rotation, exclusive


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of the fused attention over the cache.

    tokens: [n] int64, which of the step's tokens it has; None: all, in order
    tables: [num_sequences, max_blocks] int32
    ends:   one past each sequence's last token, among the call's; lengths: what each sees
    """

    tokens: Tensor | None
    tables: Tensor
    ends: list[int]
    lengths: list[int]
    is_open: bool


class AtlasA2(NpuDevice):
    """Ascend 910B and 910_93.

    records: whether decoding steps are recorded as NPU graphs
    """

    product = "Atlas A2"
    adds_with_norm = True

    def __init__(
        self,
        torch_npu: Any,
        torch_device: str,
        casts_weights: bool = False,
        records: bool = False,
    ) -> None:
        super().__init__(torch_npu, torch_device, casts_weights)
        self.records = records
        self.num_scratch_blocks = 1 if records else 0
        self._can_scatter = takes("npu.npu_scatter_pa_kv_cache", "cache_mode")
        mask = torch.ones(_MASK_SIDE, _MASK_SIDE, dtype=torch.int8).triu_(1)  # 1 hides
        self._mask = mask.to(self.torch_device)
        self._calls: Kept[list[_Call]] = Kept()
        self._slots: Kept[Tensor] = Kept()

    def block_size(self, wanted: int) -> int:
        """128, or what is wanted. Raises ConfigError for blocks the fused attention cannot read."""
        if wanted % _BLOCK_STEP == 0 and wanted <= _MOST_BLOCK:
            return wanted or _BLOCK_STEP
        said = f"is {wanted}, but {self.product} reads blocks of 128, 256, 384 or 512 tokens"
        raise ConfigError("block_size", [f"{said}; leave it out for 128"])

    # --- recorded steps ---

    def recorded(self, step: ModelStep, cache: KVCache) -> ModelStep:
        """The step as NPU graphs, one for each size of batch that comes."""
        if not self.records:
            return step
        recorder = GraphRecorder(self.torch_npu, self.torch_device, self.forget)
        return ReplayedStep(step, recorder, cache)

    def forget(self) -> None:
        """Drop what was made for the other layers of a step."""
        super().forget()
        self._calls, self._slots = Kept(), Kept()

    # --- rows ---

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As the base, in one operator, whose second result nobody needs."""
        if not self.can_norm(x, residual, weight):
            return super().add_rms_norm(x, residual, weight, eps)
        given = x.contiguous(), residual.contiguous()
        normed, _, total = self.torch_npu.npu_add_rms_norm(*given, weight, eps)
        return normed, total

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """As the base, with gate and up in one operator."""
        if activation != "silu_mul" or not (self.is_fused(x) and x.numel()):
            return super().activate(x, activation)
        out: Tensor = self.torch_npu.npu_swiglu(x.contiguous())
        return out

    def can_rotate(self, x: Tensor, width: int) -> bool:
        """Even widths below 896, fewer than 1,000 heads. x: [num_tokens, num_heads, head_dim]."""
        return width % 2 == 0 and width < _WIDEST_ROTATION and x.shape[1] < _MOST_HEADS

    def rotate_segment(self, x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle) -> Tensor:
        """[1, num_tokens, num_heads, width] -> the same."""
        mode = "interleave" if style == "interleaved" else "half"
        out: Tensor = self.torch_npu.npu_rotary_mul(x, cos, sin, mode)
        return out

    # --- attention ---

    def varlen_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        query_starts: Sequence[int],
        key_starts: Sequence[int],
        scale: float,
    ) -> Tensor:
        """As the base, heads padded to 128 dims."""
        is_small = query.shape[-1] <= HEAD and len(query_starts) <= _MOST_SEQUENCES
        if not (self.is_fused(query, key, value) and is_small):
            return super().varlen_attention(query, key, value, query_starts, key_starts, scale)
        out: Tensor = self.torch_npu.npu_fused_infer_attention_score(
            widened_heads(query),
            widened_heads(key),
            widened_heads(value),
            actual_seq_lengths=list(query_starts[1:]),
            actual_seq_lengths_kv=list(key_starts[1:]),
            num_heads=query.shape[1],
            num_key_value_heads=key.shape[1],
            scale=scale,
            input_layout="TND",
            sparse_mode=_OPEN,
        )[0]
        return out[..., : query.shape[-1]]

    def write_kv(self, key: Tensor, value: Tensor, cache: KVCache, slots: Tensor) -> None:
        """As the base."""
        if not self._can_attend(key, cache):
            super().write_kv(key, value, cache, slots)
            return
        narrow = self._slots.of(slots, slots.int)
        new = key.contiguous(), value.contiguous(), cache.key, cache.value, narrow
        if self._can_scatter:
            self.torch_npu.npu_scatter_pa_kv_cache(*new, cache_mode="Norm")
        else:  # before 26.0.0 it writes tiles, whatever the cache is
            self.torch_npu._npu_reshape_and_cache(*new)

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scale: float,
    ) -> Tensor:
        """As the base, from the cache alone."""
        if not self._can_attend(query, cache) or len(batch.context_lens) > _MOST_SEQUENCES:
            return super().paged_attention(query, key, value, cache, batch, scale)
        calls = self._calls.of(batch, lambda: _calls_for(batch))
        if calls[0].tokens is None:
            return self._attend(query.contiguous(), cache, calls[0], scale)
        out = torch.empty_like(query)
        for call in calls:
            assert call.tokens is not None, "one call of several has a part of the tokens"
            part = self._attend(query.index_select(0, call.tokens), cache, call, scale)
            out.index_copy_(0, call.tokens, part)
        return out

    def _can_attend(self, x: Tensor, cache: KVCache) -> bool:
        """Heads of 128 dims over blocks of 128 tokens, neither of them rounded."""
        is_read = cache.scales is None and cache.block_size % _BLOCK_STEP == 0
        return is_read and x.shape[-1] == HEAD and self.is_fused(x, cache.key)

    def _attend(self, query: Tensor, cache: KVCache, call: _Call, scale: float) -> Tensor:
        """[n, num_heads, 128], contiguous -> the same."""
        out: Tensor = self.torch_npu.npu_fused_infer_attention_score(
            query,
            cache.key.flatten(2),
            cache.value.flatten(2),
            atten_mask=None if call.is_open else self._mask,
            actual_seq_lengths=call.ends,
            actual_seq_lengths_kv=call.lengths,
            block_table=call.tables,
            block_size=cache.block_size,
            num_heads=query.shape[1],
            num_key_value_heads=cache.num_kv_heads,
            scale=scale,
            input_layout="TND",
            sparse_mode=_OPEN if call.is_open else _CAUSAL,
        )[0]
        return out


def _calls_for(batch: AttentionBatch) -> list[_Call]:
    """The tokens that see a shared part whole, and those that see up to themselves."""
    found = stretches(batch)
    kinds = [[s for s in found if s.is_open == is_open] for is_open in (True, False)]
    tables = batch.block_tables.int()
    return [_call_for(kind, len(kind) == len(found), tables) for kind in kinds if kind]


def _call_for(chosen: Sequence[Stretch], has_all: bool, tables: Tensor) -> _Call:
    """tables: [num_rows, max_blocks] int32, of the step."""
    ends, end = [], 0
    for stretch in chosen:
        end += stretch.count
        ends.append(end)
    tokens = None
    if not has_all:  # a decode has all: nothing is brought from the host while it is recorded
        rows = torch.tensor([stretch.row for stretch in chosen], device=tables.device)
        tables = tables.index_select(0, rows)
        places = [token for stretch in chosen for token in range(stretch.start, stretch.stop)]
        tokens = torch.tensor(places, device=tables.device)
    return _Call(
        tokens=tokens,
        tables=tables,
        ends=ends,
        lengths=[stretch.length for stretch in chosen],
        is_open=chosen[0].is_open,
    )
