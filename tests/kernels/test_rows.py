"""Norms, rotation, cache writes: every instruction set against float64 and the plain device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glimt.devices.base import Device, KVCache, RotaryStyle
from glimt.kernels.native import Native

# One rounding to bfloat16 is half a step of 2^-7; float32 sums may tip a value across a half-way
# point, never further than the neighbour: a whole step. The absolute part is for sums near zero.
STEP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
ONE_STEP = {dtype: {"rtol": step, "atol": 1e-5} for dtype, step in STEP.items()}
# The plain device rounds products and sums of a rotation one by one: one more step of the larger.
TWO_STEPS = {dtype: {"rtol": 2 * step, "atol": 4 * step} for dtype, step in STEP.items()}
# Below, at and above the vectors of every instruction set, and the models' own widths.
SIZES = (1, 3, 7, 8, 15, 16, 17, 63, 100, 129, 1792, 4096)
# Enough rows of any size that all threads share them, and few enough that one does them.
MANY_ROWS, FEW_ROWS = 131, 3


@pytest.fixture(params=STEP, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def normal(
    *shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def strided(x: Tensor, gap: int = 5) -> Tensor:
    """The same values in a wider buffer of NaN: rows no longer follow each other."""
    room = torch.full((*x.shape[:-1], x.shape[-1] + gap), torch.nan, dtype=x.dtype)
    room[..., : x.shape[-1]] = x
    return room[..., : x.shape[-1]]


def exact_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> Tensor:
    """In float64, rounded once."""
    wide = x.double()
    if bias is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    out = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    out = out if bias is None else out + bias.double()
    return (out if residual is None else out + residual.double()).to(x.dtype)


# --- norms ---


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, FEW_ROWS, MANY_ROWS])
def test_norm_equals_float64(
    native: Native, dtype: torch.dtype, rows: int, has_bias: bool, has_residual: bool
) -> None:
    """Catches lost tails, a row of another thread, and a residual or bias put before the scale."""
    for size in SIZES:
        x = strided(normal(rows, size, seed=size, scale=3.0, dtype=dtype) + 1)
        weight = normal(size, seed=1, dtype=dtype)
        bias = normal(size, seed=2, dtype=dtype) if has_bias else None
        residual = strided(normal(rows, size, seed=3, dtype=dtype), 2) if has_residual else None
        out = native.norm(x, weight, bias, 1e-5, residual)
        exact = exact_norm(x, weight, bias, 1e-5, residual)
        torch.testing.assert_close(out, exact, **ONE_STEP[dtype])


def test_norm_equals_the_plain_device(native: Native, dtype: torch.dtype) -> None:
    """Catches another formula (eps outside the root, a cast before the weight)."""
    x = normal(17, 1792, scale=0.01, dtype=dtype)
    weight, bias = normal(1792, seed=1, dtype=dtype), normal(1792, seed=2, dtype=dtype)
    rms, layer = Device().rms_norm(x, weight, 1e-5), Device().layer_norm(x, weight, bias, 1e-5)
    torch.testing.assert_close(native.norm(x, weight, None, 1e-5), rms, **ONE_STEP[dtype])
    torch.testing.assert_close(native.norm(x, weight, bias, 1e-5), layer, **ONE_STEP[dtype])


def test_norm_of_large_float16_does_not_overflow(native: Native) -> None:
    """Catches squares or sums in float16, which end at 65504."""
    x = normal(5, 291, scale=2000.0, dtype=torch.float16)
    weight, bias = normal(291, seed=1, dtype=x.dtype), normal(291, seed=2, dtype=x.dtype)
    for used in (None, bias):
        exact = exact_norm(x, weight, used, 1e-5, None)
        out = native.norm(x, weight, used, 1e-5)
        torch.testing.assert_close(out, exact, **ONE_STEP[x.dtype])


def test_norm_rounds_the_residual_sum_once(native: Native) -> None:
    """Catches a norm rounded before the residual is added: a fifth of the values then differ."""
    x, weight = normal(16, 1792), normal(1792, seed=1)
    residual = normal(16, 1792, seed=2)
    out = native.norm(x, weight, None, 1e-5, residual)
    assert out is not None
    same = out == exact_norm(x, weight, None, 1e-5, residual)
    assert same.double().mean() > 0.999


def test_layer_norm_of_a_constant_row_is_the_bias(native: Native) -> None:
    """Catches a division by the zero spread, and a bias scaled with the row."""
    weight, bias = normal(291), normal(291, seed=1)
    out = native.norm(torch.full((4, 291), 3.0).bfloat16(), weight, bias, 1e-5)
    assert torch.equal(out, bias.expand(4, -1))


@pytest.mark.parametrize("size", [1, 17, 64])
def test_ties_go_to_the_even_neighbour(native: Native, dtype: torch.dtype, size: int) -> None:
    """Catches ties that are rounded up: a half of all of them are then a step too large."""
    step = STEP[dtype]
    for bias, expected in ((1.0, 1.0), (1 + step, 1 + 2 * step), (-1.0, -1.0)):
        half = torch.full((2, size), step / 2 if bias > 0 else -step / 2, dtype=dtype)
        x, weight = torch.ones(2, size, dtype=dtype), torch.ones(size, dtype=dtype)
        out = native.norm(x, weight, torch.full((size,), bias, dtype=dtype), 1e-5, half)
        assert out is not None
        assert out.unique().tolist() == [expected]


def test_layer_norm_of_a_far_mean_does_not_cancel(native: Native) -> None:
    """Catches a variance taken as E[x²] - E[x]²: at a mean of 1000 float32 loses it."""
    x = (1000 + 4 * torch.randint(0, 2, (MANY_ROWS, 4096))).bfloat16()
    weight, bias = normal(4096, seed=1), normal(4096, seed=2)
    out = native.norm(x, weight, bias, 1e-5)
    # The mean has a float32 step of 6e-5; the spread is 2.
    close = {"rtol": 2**-7, "atol": 1e-3}
    torch.testing.assert_close(out, exact_norm(x, weight, bias, 1e-5, None), **close)


@pytest.mark.parametrize("rows", [FEW_ROWS, MANY_ROWS])
def test_norm_writes_where_it_is_told(native: Native, rows: int) -> None:
    """Catches a wrong output stride, and values written beside the rows."""
    x, weight = normal(rows, 291), normal(291, seed=1)
    room = torch.full((rows, 300), 7.0, dtype=torch.bfloat16)
    assert native.norm(x, weight, None, 1e-5, out=room[:, 4:295]) is not None
    assert torch.equal(room[:, 4:295], native.norm(x, weight, None, 1e-5))
    assert (room[:, :4] == 7).all()
    assert (room[:, 295:] == 7).all()


@pytest.mark.parametrize("target", ["x", "residual"])
def test_norm_in_place(native: Native, target: str) -> None:
    """Catches values read after the output has overwritten them."""
    x, residual = normal(MANY_ROWS, 291), normal(MANY_ROWS, 291, seed=2)
    weight, bias = normal(291, seed=1), normal(291, seed=3)
    expected = native.norm(x, weight, bias, 1e-5, residual)
    out = x if target == "x" else residual
    assert native.norm(x, weight, bias, 1e-5, residual, out=out) is not None
    assert torch.equal(out, expected)


def test_norm_keeps_nan_to_its_row(native: Native) -> None:
    """Catches a NaN rounded into a number, and one row's sum in another's."""
    x, weight = normal(5, 40), normal(40, seed=1)
    x[2, 33] = torch.nan
    out = native.norm(x, weight, None, 1e-5)
    assert out is not None
    assert out[2].isnan().all()
    assert not out[[0, 1, 3, 4]].isnan().any()


# --- rotation ---


def exact_rotate(
    x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle, num_segments: int
) -> Tensor:
    """Pair by pair in float64, rounded once."""
    out = x.clone()
    num_pairs = cos.shape[-1]
    half = num_pairs // num_segments
    for pair in range(num_pairs):
        segment, within = divmod(pair, half)
        i, j = 2 * segment * half + within, (2 * segment + 1) * half + within
        if style == "interleaved":
            i, j = 2 * pair, 2 * pair + 1
        a, b = x[..., i].double(), x[..., j].double()
        c, s = cos[:, None, pair].double(), sin[:, None, pair].double()
        out[..., i], out[..., j] = (a * c - b * s).to(x.dtype), (b * c + a * s).to(x.dtype)
    return out


ROTATIONS = [
    # tokens, heads, head_dim, num_pairs, num_segments
    (0, 2, 8, 4, 1),
    (1, 1, 2, 1, 1),
    (3, 2, 10, 3, 1),
    (2, 3, 24, 6, 2),
    (5, 4, 66, 31, 1),
    (4, 32, 128, 32, 1),  # GLM-4: half of every head
    (70, 32, 128, 32, 1),  # as many as all threads share
    (67, 16, 128, 64, 2),  # VisualGLM: a position and a block position
]


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize(("tokens", "heads", "dim", "pairs", "segments"), ROTATIONS)
def test_rotate_equals_float64_and_the_plain_device(
    native: Native,
    dtype: torch.dtype,
    style: RotaryStyle,
    tokens: int,
    heads: int,
    dim: int,
    pairs: int,
    segments: int,
) -> None:
    """Catches dims paired wrongly, another token's angles, a wrong sign, untouched dims lost."""
    fused = normal(
        tokens, heads + 2, dim + 6, dtype=dtype
    )  # heads of a fused projection: both strides are odd
    x = fused[:, 1:-1, 3:-3]
    angles = torch.rand(tokens, pairs, generator=torch.Generator().manual_seed(1)) * 7
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    out = native.rotate(x, cos, sin, style == "interleaved", segments)
    exact = exact_rotate(x, cos, sin, style, segments)
    torch.testing.assert_close(out, exact, **ONE_STEP[dtype])
    if tokens:
        plain = Device().rotate(x, cos, sin, style, segments)
        torch.testing.assert_close(out, plain, **TWO_STEPS[dtype])


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize("tokens", [FEW_ROWS, MANY_ROWS])
def test_rotate_in_place(
    native: Native, dtype: torch.dtype, style: RotaryStyle, tokens: int
) -> None:
    """Catches the first half of a pair overwritten before the second is computed from it."""
    fused = normal(tokens, 9, 40, dtype=dtype)
    before = fused.clone()
    x = fused[:, 2:8, :]
    angles = torch.rand(tokens, 17)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    expected = native.rotate(x, cos, sin, style == "interleaved", 1)
    assert native.rotate(x, cos, sin, style == "interleaved", 1, out=x) is not None
    assert torch.equal(x, expected)
    assert torch.equal(fused[:, :2], before[:, :2])
    assert torch.equal(fused[:, 8:], before[:, 8:])
    assert torch.equal(x[..., 34:], before[:, 2:8, 34:])


# --- the cache ---


@pytest.mark.parametrize("tokens", [0, 1, FEW_ROWS, MANY_ROWS])
def test_write_kv_equals_the_plain_device(native: Native, dtype: torch.dtype, tokens: int) -> None:
    """Catches keys in another slot, a head's stride taken for a token's, values beside the slot."""
    heads, dim, block_size, num_blocks = 3, 96, 16, 12
    fused = normal(tokens, 2 * heads, dim, dtype=dtype)
    key, value = fused[:, :heads], fused[:, heads:]
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(3))
    slots = slots[:tokens]
    plain, ours = (
        KVCache(*(torch.zeros(num_blocks, block_size, heads, dim).to(dtype) for _ in range(2)))
        for _ in range(2)
    )
    Device().write_kv(key, value, plain, slots)
    assert native.write_kv(key, value, ours.key, ours.value, slots)
    assert torch.equal(ours.key, plain.key)
    assert torch.equal(ours.value, plain.value)


def test_write_kv_follows_the_strides_of_the_caches(native: Native) -> None:
    """Catches caches taken for contiguous: here keys and values share one tensor, heads first."""
    tokens, heads, dim = 20, 2, 16
    room = torch.zeros(5, heads, 8, 2 * dim).bfloat16()
    caches = room.transpose(1, 2)
    key, value = normal(tokens, heads, dim), normal(tokens, heads, dim, seed=1)
    slots = torch.arange(tokens) + 13
    assert native.write_kv(key, value, caches[..., :dim], caches[..., dim:], slots)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(caches[slot // 8, slot % 8, :, :dim], key[token])
        assert torch.equal(caches[slot // 8, slot % 8, :, dim:], value[token])
    assert room.count_nonzero() == 2 * tokens * heads * dim


def int8_cache(num_blocks: int, block_size: int, heads: int, dim: int) -> KVCache:
    """Nothing in it is what a write leaves there."""
    values = (torch.full((num_blocks, block_size, heads, dim), -128).char() for _ in range(2))
    scales = (torch.full((num_blocks, block_size, heads), -1.0) for _ in range(2))
    return KVCache(*values, *scales)


@pytest.mark.parametrize("dim", [16, 20, 88, 112, 128])
@pytest.mark.parametrize("tokens", [0, 1, FEW_ROWS, MANY_ROWS])
def test_write_kv_rounds_to_int8_as_the_plain_device_does(
    native: Native, tokens: int, dim: int
) -> None:
    """Catches another rounding, a head in steps of its neighbour's, a scale in another slot.

    Heads of zeros, of values too small for any step, and such as are not finite are among them.
    """
    heads, block_size, num_blocks = 3, 16, 12
    fused = normal(tokens, 2 * heads, dim) * torch.logspace(-3, 3, 2 * heads)[:, None]
    fused = fused.bfloat16()
    if tokens > 1:
        fused[0, 0], fused[0, 1], fused[1, 2] = 0, 1e-35, -0.0
        fused[0, 3, 1], fused[1, 0, dim - 1], fused[1, 4, 2] = torch.nan, torch.inf, -torch.inf
    key, value = fused[:, :heads], fused[:, heads:]
    slots = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(3))
    plain, ours = (int8_cache(num_blocks, block_size, heads, dim) for _ in range(2))
    Device().write_kv(key, value, plain, slots[:tokens])
    assert native.write_kv(key, value, ours.key, ours.value, slots[:tokens], ours.scales)
    for mine, wanted in zip(ours.tensors(), plain.tensors(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=0, equal_nan=True)
