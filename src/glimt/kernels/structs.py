"""The structs of csrc/kernels.h, field by field, and the numbers of its enums.

Here and there change together, and with them ABI, which glimt_abi of csrc/exports.cpp also says.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

import torch

ABI = 5
FORMATS = {"bf16": 0, "int8": 1, "int4": 2, "fp16": 3}
ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
ACTIVATIONS = {"none": 0, "gelu_erf": 1, "gelu_tanh": 2, "silu_mul": 3}


class PlainWeightStruct(ctypes.Structure):
    """PlainWeight of csrc/kernels.h."""

    _fields_ = (
        ("format", c_int32),
        ("group", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
    )


class WeightStruct(ctypes.Structure):
    """Weight of csrc/kernels.h."""

    _fields_ = (
        ("format", c_int32),
        ("group", c_int32),
        ("is_paired", c_int32),
        ("quantises_x", c_int32),
        ("n", c_int64),
        ("k", c_int64),
        ("data", c_void_p),
    )


class LinearStruct(ctypes.Structure):
    """LinearCall of csrc/kernels.h."""

    _fields_ = (
        ("weight", POINTER(WeightStruct)),
        ("x", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("m", c_int64),
        ("x_stride", c_int64),
        ("residual_stride", c_int64),
        ("out_stride", c_int64),
        ("residual_scale", c_float),
        ("activation", c_int32),
        ("is_out_float", c_int32),
        ("element", c_int32),
    )


class MlpStruct(ctypes.Structure):
    """MlpCall of csrc/kernels.h."""

    _fields_ = (
        ("up", POINTER(WeightStruct)),
        ("down", POINTER(WeightStruct)),
        ("x", c_void_p),
        ("up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("m", c_int64),
        ("x_stride", c_int64),
        ("residual_stride", c_int64),
        ("out_stride", c_int64),
        ("residual_scale", c_float),
        ("activation", c_int32),
        ("element", c_int32),
    )


class AttentionStruct(ctypes.Structure):
    """AttentionCall of csrc/kernels.h."""

    _fields_ = (
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("out", c_void_p),
        ("block_table", c_void_p),
        ("num_queries", c_int64),
        ("num_keys", c_int64),
        ("first_position", c_int64),
        ("num_shared", c_int64),
        ("block_size", c_int64),
        ("query_token_stride", c_int64),
        ("query_head_stride", c_int64),
        ("key_token_stride", c_int64),
        ("key_head_stride", c_int64),
        ("value_token_stride", c_int64),
        ("value_head_stride", c_int64),
        ("block_stride", c_int64),
        ("out_token_stride", c_int64),
        ("out_head_stride", c_int64),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("scale", c_float),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("scale_token_stride", c_int64),
        ("scale_block_stride", c_int64),
    )


class DecodeStruct(ctypes.Structure):
    """DecodeCall of csrc/kernels.h."""

    _fields_ = (
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("out", c_void_p),
        ("block_tables", c_void_p),
        ("context_lens", c_void_p),
        ("num_rows", c_int64),
        ("table_stride", c_int64),
        ("block_size", c_int64),
        ("query_stride", c_int64),
        ("out_stride", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("block_stride", c_int64),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("scale", c_float),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("scale_token_stride", c_int64),
        ("scale_block_stride", c_int64),
    )


class NormStruct(ctypes.Structure):
    """NormCall of csrc/kernels.h."""

    _fields_ = (
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("residual", c_void_p),
        ("out", c_void_p),
        ("num_rows", c_int64),
        ("size", c_int64),
        ("x_stride", c_int64),
        ("residual_stride", c_int64),
        ("out_stride", c_int64),
        ("eps", c_float),
        ("element", c_int32),
    )


class RotateStruct(ctypes.Structure):
    """RotateCall of csrc/kernels.h."""

    _fields_ = (
        ("x", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("out", c_void_p),
        ("num_tokens", c_int64),
        ("x_token_stride", c_int64),
        ("x_head_stride", c_int64),
        ("out_token_stride", c_int64),
        ("out_head_stride", c_int64),
        ("num_heads", c_int32),
        ("head_dim", c_int32),
        ("num_pairs", c_int32),
        ("num_segments", c_int32),
        ("is_interleaved", c_int32),
        ("element", c_int32),
    )


class WriteKvStruct(ctypes.Structure):
    """WriteKvCall of csrc/kernels.h."""

    _fields_ = (
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_cache", c_void_p),
        ("value_cache", c_void_p),
        ("slots", c_void_p),
        ("num_tokens", c_int64),
        ("block_size", c_int64),
        ("key_token_stride", c_int64),
        ("key_head_stride", c_int64),
        ("value_token_stride", c_int64),
        ("value_head_stride", c_int64),
        ("token_stride", c_int64),
        ("head_stride", c_int64),
        ("block_stride", c_int64),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("scale_token_stride", c_int64),
        ("scale_block_stride", c_int64),
    )


class FitStruct(ctypes.Structure):
    """FitCall of csrc/kernels.h."""

    _fields_ = (
        ("weights", c_void_p),
        ("values", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("num_groups", c_int64),
        ("group", c_int32),
        ("has_offsets", c_int32),
    )
