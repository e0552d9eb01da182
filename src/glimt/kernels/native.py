"""The native kernels as Python functions over tensors: one thin binding of csrc/exports.cpp.

Knows shapes and pointers, no model. Every function returns None (or False, where there is nothing
to return) if the instruction set in use has no such kernel; the caller then takes the plain path.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_int
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from glimt.kernels.library import library_path, open_library
from glimt.kernels.structs import (
    ACTIVATIONS,
    ELEMENTS,
    FORMATS,
    AttentionStruct,
    DecodeStruct,
    FitStruct,
    LinearStruct,
    MlpStruct,
    NormStruct,
    PlainWeightStruct,
    RotateStruct,
    WeightStruct,
    WriteKvStruct,
)

# Of keys and of values in int8: float32 [num_blocks, block_size, num_kv_heads], heads contiguous.
Scales: TypeAlias = tuple[Tensor, Tensor] | None


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A matrix [n, k] laid out for the kernels.

    data: [num_bytes] uint8; struct: what a call is told, pointing into data
    """

    format: str
    n: int
    k: int
    is_paired: bool
    data: Tensor
    struct: WeightStruct

    @property
    def nbytes(self) -> int:
        """Memory that the matrix takes, in bytes."""
        return self.data.numel()


class Native:
    """The kernels of one instruction set. Raises OSError if it is not there.

    isa: one of ISAS; threads: of the kernels' own, the caller's among them
    places: the processor of each thread; empty: where the system puts them. The caller's own thread
        stays free: what it starts would inherit its place, and the others leave it only one.
    The library holds one of each for the whole process: what was made last decides for all. Packed
    weights are the same for every set, so earlier ones go on with the later kernels.
    """

    def __init__(self, path: str, isa: str, threads: int, places: Sequence[int] = ()) -> None:
        self.library = open_library(path)
        if self.library.glimt_use(isa.encode()):
            raise OSError(f"{isa} is not compiled in, or this processor does not have it")
        self.isa = isa
        self.library.glimt_set_threads(threads)
        self.library.glimt_place_threads((c_int * len(places))(*places), len(places))

    # --- weights ---

    def pack(
        self,
        values: Tensor,
        format: str = "bf16",
        *,
        scales: Tensor | None = None,
        offsets: Tensor | None = None,
        group: int = 0,
        k: int | None = None,
        is_paired: bool = False,
        quantises_x: bool = False,
    ) -> PackedWeight:
        """Lay a matrix [n, k] out; PlainWeight in csrc/kernels.h has the shapes by format.

        k: columns of the matrix, where the last group of int4 `values` goes on beyond them
        Raises ValueError when is_paired and n is not a multiple of 32.
        """
        if is_paired and values.shape[0] % 32:
            raise ValueError(f"a paired matrix has a multiple of 32 rows, not {values.shape[0]}")
        per_byte = 2 if format == "int4" else 1
        n, k = values.shape[0], k or values.shape[1] * per_byte
        values = values[:, : -(-k // per_byte)].contiguous()
        plain = PlainWeightStruct(
            FORMATS[format], group, n, k, values.data_ptr(), _pointer(scales), _pointer(offsets)
        )
        num_bytes = self.library.glimt_packed_bytes(byref(plain))
        data = _aligned(num_bytes)
        self.library.glimt_pack(byref(plain), int(is_paired), data.data_ptr())
        struct = WeightStruct(
            FORMATS[format], group, int(is_paired), int(quantises_x), n, k, data.data_ptr()
        )
        return PackedWeight(format, n, k, is_paired, data, struct)

    # --- products ---

    def linear(
        self,
        x: Tensor,
        weight: PackedWeight,
        bias: Tensor | None = None,
        *,
        activation: str = "none",
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """[m, k] -> [m, n], as LinearCall in csrc/kernels.h says; None without a kernel.

        x: bfloat16 or float16, which bias and residual then are too
        out: as x or float32, rows contiguous; made if not given
        Raises ValueError for silu_mul over a matrix that is not paired.
        """
        _check_paired(weight, activation)
        width = weight.n // 2 if activation == "silu_mul" else weight.n
        if out is None:
            out = torch.empty((x.shape[0], width), dtype=x.dtype)
        call = LinearStruct(
            ctypes.pointer(weight.struct),
            x.data_ptr(),
            _pointer(bias),
            _pointer(residual),
            out.data_ptr(),
            x.shape[0],
            x.stride(0),
            _row_stride(residual),
            out.stride(0),
            residual_scale,
            ACTIVATIONS[activation],
            int(out.dtype == torch.float32),
            ELEMENTS[x.dtype],
        )
        return None if self.library.glimt_linear(byref(call)) else out

    def mlp(
        self,
        x: Tensor,
        up: PackedWeight,
        down: PackedWeight,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        *,
        activation: str,
        residual: Tensor | None = None,
        residual_scale: float = 1.0,
    ) -> Tensor | None:
        """[m, k] bfloat16 or float16 -> [m, down.n], as MlpCall in csrc/kernels.h says.

        Raises ValueError for silu_mul over a matrix that is not paired.
        """
        _check_paired(up, activation)
        out = torch.empty((x.shape[0], down.n), dtype=x.dtype)
        call = MlpStruct(
            ctypes.pointer(up.struct),
            ctypes.pointer(down.struct),
            x.data_ptr(),
            _pointer(up_bias),
            _pointer(down_bias),
            _pointer(residual),
            out.data_ptr(),
            x.shape[0],
            x.stride(0),
            _row_stride(residual),
            out.stride(0),
            residual_scale,
            ACTIVATIONS[activation],
            ELEMENTS[x.dtype],
        )
        return None if self.library.glimt_mlp(byref(call)) else out

    # --- attention ---

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        num_keys: int,
        first_position: int,
        num_shared: int,
        block_table: Tensor | None = None,
        scales: Scales = None,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Queries [num_queries, num_heads, head_dim] of one sequence over its keys, as
        AttentionCall in csrc/kernels.h says; bfloat16.

        key, value: [num_keys, num_kv_heads, head_dim]; with a block_table [num_blocks] int64, the
        whole cache [num_blocks, block_size, num_kv_heads, head_dim]. Last axes contiguous.
        scales: of a cache in int8; out: as query, made if not given
        """
        if out is None:
            out = torch.empty(query.shape, dtype=torch.bfloat16)
        paged = block_table is not None
        call = AttentionStruct(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            _pointer(block_table),
            query.shape[0],
            num_keys,
            first_position,
            num_shared,
            key.shape[1] if paged else 0,
            *query.stride()[:2],
            *key.stride()[-3:-1],
            *value.stride()[-3:-1],
            key.stride(0) if paged else 0,
            *out.stride()[:2],
            query.shape[1],
            key.shape[-2],
            query.shape[2],
            scale,
            *_scale_fields(scales),
        )
        return None if self.library.glimt_attention(byref(call)) else out

    def decode(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        scale: float,
        scales: Scales = None,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """One query per row, [num_rows, num_heads, head_dim] bfloat16, over its paged context.

        key, value: [num_blocks, block_size, num_kv_heads, head_dim], of equal strides;
        block_tables: [num_rows, width] int64; context_lens: [num_rows] int64; scales: of a cache
        in int8
        With AMX the last bits of a row hang on how many tokens the others have: docs/adr/0005.
        """
        if out is None:
            out = torch.empty(query.shape, dtype=torch.bfloat16)
        call = DecodeStruct(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            out.data_ptr(),
            block_tables.data_ptr(),
            context_lens.data_ptr(),
            query.shape[0],
            block_tables.stride(0),
            key.shape[1],
            query.stride(0),
            out.stride(0),
            key.stride(1),
            key.stride(2),
            key.stride(0),
            query.shape[1],
            key.shape[2],
            query.shape[2],
            scale,
            *_scale_fields(scales),
        )
        return None if self.library.glimt_decode(byref(call)) else out

    # --- rows ---

    def norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Rows [num_rows, size]: root mean square without a bias, else layer normalisation.

        x: bfloat16 or float16, and so is all else
        out: rows contiguous, may be x or the residual; made if not given
        """
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype)
        call = NormStruct(
            x.data_ptr(),
            weight.data_ptr(),
            _pointer(bias),
            _pointer(residual),
            out.data_ptr(),
            *x.shape,
            x.stride(0),
            _row_stride(residual),
            out.stride(0),
            eps,
            ELEMENTS[x.dtype],
        )
        return None if self.library.glimt_norm(byref(call)) else out

    def rotate(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        is_interleaved: bool,
        num_segments: int,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Heads [num_tokens, num_heads, head_dim], turned by cos, sin [num_tokens, num_pairs].

        x, cos, sin: bfloat16 or float16; cos, sin contiguous
        out: dims contiguous, may be x; made if not given
        """
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype)
        call = RotateStruct(
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
            x.shape[0],
            *x.stride()[:2],
            *out.stride()[:2],
            *x.shape[1:],
            cos.shape[1],
            num_segments,
            int(is_interleaved),
            ELEMENTS[x.dtype],
        )
        return None if self.library.glimt_rotate(byref(call)) else out

    def write_kv(
        self,
        key: Tensor,
        value: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        slots: Tensor,
        scales: Scales = None,
    ) -> bool:
        """Copy a step's keys and values into their slots, in place; False without a kernel.

        key, value: [num_tokens, num_kv_heads, head_dim], dims contiguous; slots: [num_tokens]
        int64; caches: [num_blocks, block_size, num_kv_heads, head_dim], of equal strides, all of
        one dtype of 16 bits; scales: of caches in int8, of bfloat16 keys and values
        """
        call = WriteKvStruct(
            key.data_ptr(),
            value.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            slots.data_ptr(),
            key.shape[0],
            key_cache.shape[1],
            *key.stride()[:2],
            *value.stride()[:2],
            key_cache.stride(1),
            key_cache.stride(2),
            key_cache.stride(0),
            *key.shape[1:],
            *_scale_fields(scales),
        )
        return not self.library.glimt_write_kv(byref(call))


def _check_paired(weight: PackedWeight, activation: str) -> None:
    if activation == "silu_mul" and not weight.is_paired:
        raise ValueError("silu_mul needs a matrix packed with is_paired")


def _scale_fields(scales: Scales) -> tuple[Any, ...]:
    """The last four fields of the calls that a cache in int8 has part in."""
    if scales is None:
        return None, None, 0, 0
    key_scales, value_scales = scales
    strides = key_scales.stride(1), key_scales.stride(0)
    return key_scales.data_ptr(), value_scales.data_ptr(), *strides


def _pointer(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.data_ptr()


def _row_stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _aligned(num_bytes: int, to: int = 64) -> Tensor:
    """[num_bytes] uint8 that begins at a multiple of `to`."""
    room = torch.empty(num_bytes + to, dtype=torch.uint8)
    start = -room.data_ptr() % to
    return room[start : start + num_bytes]


def fit_groups(groups: Tensor, has_offsets: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Nibbles [m, group / 2], scales and offsets [m] of rows [m, group] float32; see FitCall.

    With the kernels that this process has in use, which all give the same; None without any.
    """
    path = library_path()
    if path is None:
        return None
    groups = groups.contiguous()
    m, group = groups.shape
    values = torch.empty(m, group // 2, dtype=torch.uint8)
    scales, offsets = torch.empty(m), torch.empty(m)
    parts = (groups, values, scales, offsets)
    call = FitStruct(*(part.data_ptr() for part in parts), m, group, int(has_offsets))
    return None if open_library(path).glimt_fit(byref(call)) else (values, scales, offsets)
