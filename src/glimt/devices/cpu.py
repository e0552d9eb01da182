"""The CPU: native kernels for bfloat16 where they were built, plain torch for everything else."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from glimt.devices.base import (
    Activation,
    AttentionBatch,
    Device,
    KVCache,
    LowBitWeight,
    MatrixWeight,
    RotaryStyle,
)
from glimt.kernels.choose import open_native
from glimt.kernels.native import Native, PackedWeight

_LARGEST_HEAD = 128  # dims that the attention kernels hold


class CpuDevice(Device):
    """The host's processor.

    native: the kernels in use; None for plain torch alone
    """

    name = "cpu"

    def __init__(self, torch_device: str = "cpu") -> None:
        super().__init__(torch_device)
        self.native: Native | None = open_native(os.environ.get("GLIMT_ISA"), usable_threads())

    def preferred_dtype(self, declared: torch.dtype) -> torch.dtype:
        """bfloat16 in place of float16: processors multiply it faster and it cannot overflow."""
        return torch.bfloat16 if declared == torch.float16 else declared

    # --- products ---

    def prepare_weight(
        self, weight: Tensor | LowBitWeight, dtype: torch.dtype, is_paired: bool = False
    ) -> MatrixWeight:
        """Packed for the kernels, if the activations are bfloat16."""
        if self.native is None or dtype != torch.bfloat16:
            return weight
        if isinstance(weight, Tensor):
            return self.native.pack(weight.detach(), is_paired=_can_pair(weight, is_paired))
        return self.native.pack(
            weight.values,
            weight.format,
            scales=weight.scales,
            offsets=weight.offsets,
            group=weight.group,
            k=weight.k,
            is_paired=is_paired and weight.n % 32 == 0,
            quantises_x=weight.quantises_x,
        )

    def linear(
        self,
        x: Tensor,
        weight: MatrixWeight,
        bias: Tensor | None,
        activation: Activation = "none",
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> Tensor:
        """As the base; one rounding at the end where a kernel does it."""
        if not isinstance(weight, PackedWeight):
            return super().linear(x, weight, bias, activation, residual, residual_scale)
        assert self.native is not None, "packed weights come from the kernels"
        if activation == "silu_mul" and not weight.is_paired:
            y = self.activate(self.linear(x, weight, bias), activation)
            return y if residual is None else residual * residual_scale + y
        out = self.native.linear(
            _rows(x),
            weight,
            bias,
            activation=activation,
            residual=None if residual is None else _rows(residual),
            residual_scale=residual_scale,
        )
        assert out is not None, f"{self.native.isa} multiplies"
        return out.view(*x.shape[:-1], out.shape[-1])

    def mlp(
        self,
        x: Tensor,
        up: MatrixWeight,
        down: MatrixWeight,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        activation: Activation,
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> Tensor:
        """As the base, without the inner values in memory where a kernel does it."""
        both = isinstance(up, PackedWeight) and isinstance(down, PackedWeight)
        if self.native and both and (activation != "silu_mul" or up.is_paired):  # type: ignore[union-attr]
            out = self.native.mlp(
                _rows(x),
                up,  # type: ignore[arg-type]
                down,  # type: ignore[arg-type]
                up_bias,
                down_bias,
                activation=activation,
                residual=None if residual is None else _rows(residual),
                residual_scale=residual_scale,
            )
            if out is not None:
                return out.view(*x.shape[:-1], out.shape[-1])
        return super().mlp(x, up, down, up_bias, down_bias, activation, residual, residual_scale)

    # --- rows ---

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """As the base."""
        if self.native and x.dtype == weight.dtype == torch.bfloat16:
            added = None if residual is None else _rows(residual)
            out = self.native.norm(_rows(x), weight, bias, eps, added)
            if out is not None:
                return out.view(x.shape)
        return super().layer_norm(x, weight, bias, eps, residual)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As the base."""
        if self.native and x.dtype == weight.dtype == torch.bfloat16:
            out = self.native.norm(_rows(x), weight, None, eps)
            if out is not None:
                return out.view(x.shape)
        return super().rms_norm(x, weight, eps)

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle, num_segments: int
    ) -> Tensor:
        """As the base."""
        if self.native and x.dtype == cos.dtype == torch.bfloat16 and x.stride(-1) == 1:
            is_interleaved = style == "interleaved"
            out = self.native.rotate(
                x, cos.contiguous(), sin.contiguous(), is_interleaved, num_segments
            )
            if out is not None:
                return out
        return super().rotate(x, cos, sin, style, num_segments)

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
        """As the base."""
        if not self._attends(query, key, value):
            return super().varlen_attention(query, key, value, query_starts, key_starts, scale)
        assert self.native is not None, "_attends says so"
        out = torch.empty(query.shape, dtype=query.dtype)
        for s in range(len(query_starts) - 1):
            q0, q1 = query_starts[s], query_starts[s + 1]
            k0, k1 = key_starts[s], key_starts[s + 1]
            self.native.attention(
                query[q0:q1],
                key[k0:k1],
                value[k0:k1],
                scale,
                num_keys=k1 - k0,
                first_position=0,
                num_shared=k1 - k0,
                out=out[q0:q1],
            )
        return out

    def write_kv(self, key: Tensor, value: Tensor, cache: KVCache, slots: Tensor) -> None:
        """As the base."""
        is_done = self._attends(key, value, cache.key) and self.native.write_kv(  # type: ignore[union-attr]
            key, value, cache.key, cache.value, slots
        )
        if not is_done:
            super().write_kv(key, value, cache, slots)

    def paged_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: KVCache,
        batch: AttentionBatch,
        scale: float,
    ) -> Tensor:
        """As the base, without masks: a row's context and what it shares say all."""
        if not self._attends(query, cache.key, cache.value):
            return super().paged_attention(query, key, value, cache, batch, scale)
        assert self.native is not None, "_attends says so"
        out = torch.empty(query.shape, dtype=query.dtype)
        if count := batch.num_decodes:
            tables, lens = batch.block_tables[:count], batch.decode_lens
            self.native.decode(
                query[:count], cache.key, cache.value, tables, lens, scale, out=out[:count]
            )
        for row in range(count, len(batch.context_lens)):
            start, stop = batch.query_starts[row], batch.query_starts[row + 1]
            self.native.attention(
                query[start:stop],
                cache.key,
                cache.value,
                scale,
                num_keys=batch.context_lens[row],
                first_position=batch.context_lens[row] - (stop - start),
                num_shared=batch.num_shared[row],
                block_table=batch.block_tables[row],
                out=out[start:stop],
            )
        return out

    def _attends(self, *tensors: Tensor) -> bool:
        """Do the kernels attend over such tensors?"""
        return self.native is not None and all(
            x.dtype == torch.bfloat16 and x.shape[-1] <= _LARGEST_HEAD and x.stride(-1) == 1
            for x in tensors
        )


def usable_threads() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0))


def _can_pair(weight: Tensor, is_paired: bool) -> bool:
    """Blocks of 16 rows of both halves can alternate only if the halves are whole blocks."""
    return is_paired and weight.shape[0] % 32 == 0


def _rows(x: Tensor) -> Tensor:
    """[…, size] as rows whose values lie side by side."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


DEVICE = CpuDevice
