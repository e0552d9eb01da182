"""Norm, rotation and gate in Triton: what torch does in five to eight passes, in one.

All compute in float32 and round once at the end. Imported only where triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr, tensor

_GATE_TILE = 1024  # columns
_HEADS_TILE = 16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[num_rows, size] -> the same, contiguous; weight: [size]. Rows may be apart."""
    assert x.stride(1) == 1, "values lie side by side"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = triton.next_power_of_2(x.shape[1])
    warps = min(16, max(1, tile // 512))
    _rms_norm[(len(x),)](x, weight, out, eps, x.shape[1], x.stride(0), tile=tile, num_warps=warps)
    return out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """[num_rows, size], [num_rows, size] -> silu(gate) * up, contiguous. Rows may be apart."""
    assert gate.stride(1) == up.stride(1) == 1, "values lie side by side"
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    rows, size = gate.shape
    grid = (rows, triton.cdiv(size, _GATE_TILE))
    _silu_mul[grid](gate, up, out, size, gate.stride(0), up.stride(0), tile=_GATE_TILE)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool, num_segments: int) -> Tensor:
    """As Device.rotate, contiguous. cos, sin: [num_tokens, num_pairs], of equal row strides.

    x: [num_tokens, num_heads, head_dim]; tokens and heads may be apart
    """
    assert x.stride(2) == cos.stride(1) == sin.stride(1) == 1, "values lie side by side"
    assert cos.stride(0) == sin.stride(0), "both are read at the same offsets"
    tokens, heads, dim = x.shape
    pairs = cos.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rest = dim - 2 * pairs
    _rotate[(tokens, triton.cdiv(heads, _HEADS_TILE))](
        x, cos, sin, out, heads, dim, pairs, pairs // num_segments, x.stride(0), x.stride(1),
        cos.stride(0), is_interleaved=is_interleaved, has_rest=rest > 0, heads_tile=_HEADS_TILE,
        tile=triton.next_power_of_2(pairs), rest_tile=triton.next_power_of_2(max(rest, 1)),
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rms_norm(
    x: tensor,
    weight: tensor,
    out: tensor,
    eps: tensor,
    size: tensor,
    x_row: tensor,
    tile: constexpr,
) -> None:
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, tile)
    is_value = columns < size
    wide = tl.load(x + row * x_row + columns, mask=is_value, other=0.0).to(tl.float32)
    gain = tl.load(weight + columns, mask=is_value, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + eps)
    result = (wide * scale * gain).to(out.dtype.element_ty)
    tl.store(out + row * size + columns, result, mask=is_value)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _silu_mul(
    gate: tensor,
    up: tensor,
    out: tensor,
    size: tensor,
    gate_row: tensor,
    up_row: tensor,
    tile: constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * tile + tl.arange(0, tile)
    is_value = columns < size
    g = tl.load(gate + row * gate_row + columns, mask=is_value, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + columns, mask=is_value, other=0.0).to(tl.float32)
    result = (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty)
    tl.store(out + row * size + columns, result, mask=is_value)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _rotate(
    x: tensor, cos: tensor, sin: tensor, out: tensor,
    num_heads: tensor, dim: tensor, num_pairs: tensor, half: tensor,
    x_token: tensor, x_head: tensor, table_row: tensor,
    is_interleaved: constexpr, has_rest: constexpr,
    heads_tile: constexpr, tile: constexpr, rest_tile: constexpr,
) -> None:  # fmt: skip
    """One token's tile of heads. half: pairs of a segment."""
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * heads_tile + tl.arange(0, heads_tile)
    pairs = tl.arange(0, tile)
    left, apart = 2 * pairs, 1
    if not is_interleaved:
        left, apart = (pairs // half) * 2 * half + pairs % half, half
    is_pair = (heads < num_heads)[:, None] & (pairs < num_pairs)[None, :]
    source = x + token * x_token + heads[:, None] * x_head
    target = out + (token * num_heads + heads[:, None]) * dim
    a = tl.load(source + left[None, :], mask=is_pair, other=0.0).to(tl.float32)
    b = tl.load(source + left[None, :] + apart, mask=is_pair, other=0.0).to(tl.float32)
    at, is_angle = token * table_row + pairs, pairs < num_pairs
    c = tl.load(cos + at, mask=is_angle, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + at, mask=is_angle, other=0.0).to(tl.float32)[None, :]
    kind = out.dtype.element_ty
    tl.store(target + left[None, :], (a * c - b * s).to(kind), mask=is_pair)
    tl.store(target + left[None, :] + apart, (b * c + a * s).to(kind), mask=is_pair)
    if has_rest:
        rest = 2 * num_pairs + tl.arange(0, rest_tile)
        is_rest = (heads < num_heads)[:, None] & (rest < dim)[None, :]
        passed = tl.load(source + rest[None, :], mask=is_rest, other=0.0)
        tl.store(target + rest[None, :], passed, mask=is_rest)
