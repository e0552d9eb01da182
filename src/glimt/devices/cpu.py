"""The CPU: native kernels for 16-bit numbers where they were built, plain torch for all else."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from glimt.devices.base import (
    ONLY_SEAT,
    Activation,
    AttentionBatch,
    Device,
    KVCache,
    LowBitWeight,
    MatrixWeight,
    RotaryStyle,
    Seat,
    add_residual,
)
from glimt.devices.host import plan_threads
from glimt.kernels.choose import open_native
from glimt.kernels.native import Native, PackedWeight
from glimt.kernels.pages import keep_freed_memory
from glimt.kernels.structs import ELEMENTS

_FORMATS = {torch.bfloat16: "bf16", torch.float16: "fp16"}  # of packed weights
_LARGEST_HEAD = 128  # dims that the attention kernels hold


class CpuDevice(Device):
    """The host's processor, in plain torch."""

    name = "cpu"

    @classmethod
    def open(cls, num_threads: int | None = None, seat: Seat = ONLY_SEAT) -> Device:
        """With native kernels, unless there are none or GLIMT_ISA is "none".

        num_threads: None: one for each core of this process, as far as its container's share of
            time goes; torch may take fewer by itself. Each seat has its part of the cores
        Raises ConfigError if the instruction set that GLIMT_ISA names cannot be used.
        """
        threads = plan_threads(num_threads, part=(seat.index, seat.count))
        too_many = torch.get_num_threads() > threads.count
        plain = super().open(threads.count if too_many else num_threads)
        native = open_native(os.environ.get("GLIMT_ISA"), threads.count, threads.places)
        return plain if native is None else NativeCpuDevice(native)

    def preferred_dtype(self, declared: torch.dtype) -> torch.dtype:
        """bfloat16 in place of float16: processors multiply it faster and it cannot overflow."""
        return torch.bfloat16 if declared == torch.float16 else declared


class NativeCpuDevice(CpuDevice):
    """The host's processor, with native kernels for bfloat16, and but for attention for float16.

    Each method is the base's, with one rounding at the end where the base has several. What no
    kernel takes (another dtype, a larger head) goes the base's way.
    """

    def __init__(self, native: Native) -> None:
        super().__init__()
        self.native = native

    def keep_freed_memory(self) -> None:
        """Large blocks are not given back to the system between steps.

        A picture's tower asks for 160 MB anew in every layer; the pages took up to 5 % of its time.
        """
        keep_freed_memory()

    # --- products ---

    def prepare_weight(
        self, weight: Tensor | LowBitWeight, dtype: torch.dtype, is_paired: bool = False
    ) -> MatrixWeight:
        """Packed for the kernels, if the activations are bfloat16 or float16."""
        if dtype not in _FORMATS:
            return weight
        if isinstance(weight, Tensor):
            return self.native.pack(
                weight.detach().to(dtype),
                _FORMATS[dtype],
                is_paired=_can_pair(weight.shape[0], is_paired),
            )
        return self.native.pack(
            weight.values,
            weight.format,
            scales=weight.scales,
            offsets=weight.offsets,
            group=weight.group,
            k=weight.k,
            is_paired=_can_pair(weight.n, is_paired),
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
        """As the base."""
        if not isinstance(weight, PackedWeight):
            return super().linear(x, weight, bias, activation, residual, residual_scale)
        if not _can_end_with(weight, activation):
            gated = self.activate(self.linear(x, weight, bias), activation)
            return add_residual(gated, residual, residual_scale)
        out = self.native.linear(
            _rows(x),
            weight,
            bias,
            activation=activation,
            residual=_rows_if_any(residual),
            residual_scale=residual_scale,
        )
        assert out is not None, f"{self.native.isa} packed this matrix, so it multiplies with it"
        return _as_before(out, x)

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
        if (
            isinstance(up, PackedWeight)
            and isinstance(down, PackedWeight)
            and _can_end_with(up, activation)
        ):
            out = self.native.mlp(
                _rows(x),
                up,
                down,
                up_bias,
                down_bias,
                activation=activation,
                residual=_rows_if_any(residual),
                residual_scale=residual_scale,
            )
            if out is not None:
                return _as_before(out, x)
        return super().mlp(x, up, down, up_bias, down_bias, activation, residual, residual_scale)

    # --- rows ---

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """As the base."""
        out = self._norm(x, weight, bias, eps, residual)
        return super().layer_norm(x, weight, bias, eps, residual) if out is None else out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As the base."""
        out = self._norm(x, weight, None, eps)
        return super().rms_norm(x, weight, eps) if out is None else out

    def _norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
    ) -> Tensor | None:
        if x.dtype != weight.dtype or x.dtype not in ELEMENTS:
            return None
        out = self.native.norm(_rows(x), weight, bias, eps, _rows_if_any(residual))
        return None if out is None else _as_before(out, x)

    def rotate(
        self, x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle, num_segments: int
    ) -> Tensor:
        """As the base."""
        if x.dtype == cos.dtype and x.dtype in ELEMENTS and x.stride(-1) == 1:
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
        if not _can_attend(query, key, value):
            return super().varlen_attention(query, key, value, query_starts, key_starts, scale)
        out = torch.empty(query.shape, dtype=query.dtype)
        for s in range(len(query_starts) - 1):
            q0, q1 = query_starts[s], query_starts[s + 1]
            k0, k1 = key_starts[s], key_starts[s + 1]
            done = self.native.attention(
                query[q0:q1],
                key[k0:k1],
                value[k0:k1],
                scale,
                num_keys=k1 - k0,
                first_position=0,
                num_shared=k1 - k0,
                out=out[q0:q1],
            )
            if done is None:
                return super().varlen_attention(query, key, value, query_starts, key_starts, scale)
        return out

    def write_kv(self, key: Tensor, value: Tensor, cache: KVCache, slots: Tensor) -> None:
        """As the base."""
        is_done = _can_write(key, value, cache) and self.native.write_kv(
            key, value, cache.key, cache.value, slots, cache.scales
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
        if not (_can_attend(query) and _can_cache(cache)):
            return super().paged_attention(query, key, value, cache, batch, scale)
        count = batch.num_decodes
        if count == len(batch.context_lens):
            return self.decode_attention(query, cache, batch, scale)
        out = torch.empty(query.shape, dtype=query.dtype)
        if count:
            out[:count] = self.decode_attention(query, cache, batch, scale)
        for row in range(count, len(batch.context_lens)):
            start, stop = batch.query_starts[row], batch.query_starts[row + 1]
            done = self.native.attention(
                query[start:stop],
                cache.key,
                cache.value,
                scale,
                num_keys=batch.context_lens[row],
                first_position=batch.context_lens[row] - (stop - start),
                num_shared=batch.num_shared[row],
                block_table=batch.block_tables[row],
                scales=cache.scales,
                out=out[start:stop],
            )
            if done is None:
                return super().paged_attention(query, key, value, cache, batch, scale)
        return out

    def decode_attention(
        self, query: Tensor, cache: KVCache, batch: AttentionBatch, scale: float
    ) -> Tensor:
        """As the base."""
        rows = query[: batch.num_decodes]
        if _can_attend(rows) and _can_cache(cache):
            if rows.stride(1) != rows.shape[2]:  # the kernel wants heads side by side
                rows = rows.contiguous()
            tables = batch.block_tables[: batch.num_decodes]
            out = self.native.decode(
                rows, cache.key, cache.value, tables, batch.decode_lens, scale, cache.scales
            )
            if out is not None:
                return out
        return super().decode_attention(query, cache, batch, scale)


def _can_pair(num_rows: int, is_paired: bool) -> bool:
    """Blocks of 16 rows of both halves can alternate only if the halves are whole blocks."""
    return is_paired and num_rows % 32 == 0


def _can_end_with(weight: PackedWeight, activation: Activation) -> bool:
    """Gate and up must lie side by side, or a kernel cannot multiply them with each other."""
    return activation != "silu_mul" or weight.is_paired


def _can_attend(*tensors: Tensor) -> bool:
    """Do the attention kernels take tensors of such heads?"""
    return all(
        x.dtype == torch.bfloat16 and x.shape[-1] <= _LARGEST_HEAD and x.stride(-1) == 1
        for x in tensors
    )


def _can_cache(cache: KVCache) -> bool:
    """Do they read and write such a cache? One in int8 is allocated whole, with its scales."""
    if cache.scales is None:
        return _can_attend(cache.key, cache.value)
    return cache.key.shape[-1] <= _LARGEST_HEAD


def _can_write(key: Tensor, value: Tensor, cache: KVCache) -> bool:
    """Does a kernel put them there? Without rounding to int8 it only copies 16 bits."""
    if cache.scales is not None:
        return _can_attend(key, value) and _can_cache(cache)
    return all(
        x.dtype == key.dtype in ELEMENTS and x.stride(-1) == 1
        for x in (key, value, cache.key, cache.value)
    )


def _rows_if_any(x: Tensor | None) -> Tensor | None:
    return None if x is None else _rows(x)


def _rows(x: Tensor) -> Tensor:
    """[…, size] as rows whose values lie side by side."""
    if x.dim() == 2 and x.stride(1) == 1:  # mostly, and a decoded token makes this call 400 times
        return x
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def _as_before(rows: Tensor, x: Tensor) -> Tensor:
    """[num_rows, size] with the leading axes of x, of which they were made."""
    return rows if x.dim() == 2 else rows.view(*x.shape[:-1], rows.shape[-1])


DEVICE = CpuDevice
