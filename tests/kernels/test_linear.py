"""Products with packed weights, of every instruction set here, against float64.

The references know nothing of the kernels: weights are dequantised by their formula and multiplied
in float64; where the kernel rounds x, the reference rounds x the same way first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from glimt.kernels.library import available
from glimt.kernels.native import Native, PackedWeight

ROWS = (0, 1, 2, 3, 8, 9, 16, 17, 32, 33, 64, 100, 257)
SHAPES = ((48, 40), (100, 64), (192, 100), (272, 192), (1000, 520), (16, 8), (33, 1024))

# One rounding to bfloat16, which has 8 bits: half a unit is at most 2^-8 of the value; to float16,
# which has 11, and steps of 2^-24 below 2^-14. A little is left for sums that lie at the edge
# between two numbers.
ROUNDING = {torch.bfloat16: 1.02 * 2.0**-8, torch.float16: 1.02 * 2.0**-11}
SMALLEST = {torch.bfloat16: 1e-30, torch.float16: 1.02 * 2.0**-25}
# Sums in float32: 2^-24 of what is summed for each addition, which seldom point the same way.
SUMMING = 2.0**-18
# Kernels of bfloat16 for many rows may round dequantised int4 weights, and x after its own
# rounding, to bfloat16: independent errors of up to 2^-8 of each product. Six standard deviations.
WEIGHT_ROUNDING = 6 * 2.0**-8 / 3**0.5


@dataclass(frozen=True)
class Variant:
    """A format with all that can be chosen about it."""

    format: str
    group: int = 0
    has_offsets: bool = False
    quantises_x: bool = False
    dtype: torch.dtype = torch.bfloat16  # of activations

    def __str__(self) -> str:
        is_half = self.dtype == torch.float16 and self.format != "fp16"
        parts = (
            self.format,
            self.group or "",
            "asym" * self.has_offsets,
            "q" * self.quantises_x,
            "half" * is_half,
        )
        return "-".join(str(part) for part in parts if part)


VARIANTS = (
    Variant("bf16"),
    Variant("int8"),
    Variant("int8", quantises_x=True),
    Variant("int4", 32),
    Variant("int4", 64, has_offsets=True),
    Variant("int4", 128, has_offsets=True),
    Variant("int4", 32, has_offsets=True, quantises_x=True),
    Variant("int4", 64),
    Variant("int4", 64, quantises_x=True),
    Variant("int4", 64, has_offsets=True, quantises_x=True),
    Variant("int4", 128, has_offsets=True, quantises_x=True),
    Variant("int4", 128, quantises_x=True),
    Variant("fp16", dtype=torch.float16),
    Variant("int8", dtype=torch.float16),
    Variant("int8", quantises_x=True, dtype=torch.float16),
    Variant("int4", 32, has_offsets=True, dtype=torch.float16),
    Variant("int4", 64, dtype=torch.float16),
    Variant("int4", 64, quantises_x=True, dtype=torch.float16),
    Variant("int4", 128, has_offsets=True, quantises_x=True, dtype=torch.float16),
)
BF16, FP16 = Variant("bf16"), Variant("fp16", dtype=torch.float16)


@dataclass(frozen=True)
class Plain:
    """A matrix [n, k] as the kernels are given it, and as numbers."""

    values: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    dequantised: Tensor  # float64 [n, k]


def make_plain(variant: Variant, n: int, k: int, seed: int = 0) -> Plain:
    """Random weights of the variant, of size about 1 / sqrt(k); rows differ in scale."""
    random = torch.Generator().manual_seed(seed)
    spread = torch.rand(n, 1, generator=random) + 0.5
    if variant.format in ("bf16", "fp16"):
        values = (torch.randn(n, k, generator=random) * spread / k**0.5).to(variant.dtype)
        return Plain(values, None, None, values.double())
    if variant.format == "int8":
        values = torch.randint(-127, 128, (n, k), generator=random, dtype=torch.int8)
        scales = (spread / 60 / k**0.5).flatten()
        return Plain(values, scales, None, values.double() * scales.double()[:, None])
    groups = -(-k // variant.group)
    nibbles = torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8)
    # float16 numbers, which the layout keeps exactly.
    scales = (spread / k**0.5 / 4 * (torch.rand(n, groups, generator=random) + 0.5)).half().float()
    shift = torch.rand(n, groups, generator=random) * 4 - 10 if variant.has_offsets else -8.0
    offsets = (shift * scales).half().float() if variant.has_offsets else -8.0 * scales
    wide = [t.double().repeat_interleave(variant.group, 1)[:, :k] for t in (scales, offsets)]
    values = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return Plain(values, scales, offsets, nibbles.double() * wide[0] + wide[1])


def pack(native: Native, variant: Variant, plain: Plain, is_paired: bool = False) -> PackedWeight:
    """The same, packed."""
    return native.pack(
        plain.values,
        variant.format,
        scales=plain.scales,
        offsets=plain.offsets,
        group=variant.group,
        is_paired=is_paired,
        quantises_x=variant.quantises_x,
    )


def make_x(m: int, k: int, seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Random rows of different sizes."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=random) * (torch.rand(m, 1, generator=random) * 3)
    return x.to(dtype)


def rounded(x: Tensor, variant: Variant) -> Tensor:
    """X in float64 as the kernel sees it: as it is, or rounded to int8 by rows or by groups."""
    if not variant.quantises_x:
        return x.double()
    width = variant.group or x.shape[1]
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % width))
    parts = padded.reshape(x.shape[0], -1, width)
    largest = parts.abs().amax(-1, keepdim=True)
    # Divided by a tensor: a number divided by a tensor is taken times its reciprocal.
    factor = torch.full_like(largest, 127.0) / largest
    q = torch.round(parts * torch.where(largest > 0, factor, 0.0))
    return (q.double() * (largest / 127.0).double()).reshape(padded.shape)[:, : x.shape[1]]


def rounding(values: Tensor, variant: Variant) -> Tensor:
    """What one rounding to the variant's dtype may change."""
    return ROUNDING[variant.dtype] * values.abs() + SMALLEST[variant.dtype]


def allowed(x: Tensor, w: Tensor, expected: Tensor, variant: Variant) -> Tensor:
    """How far from the expected values a kernel may be, by the constants above."""
    bound = rounding(expected, variant) + SUMMING * (x.abs() @ w.abs().T)
    if variant.format == "int4" and variant.dtype == torch.bfloat16:
        bound = bound + WEIGHT_ROUNDING * (x.square() @ w.square().T).sqrt()
    return bound


def check(actual: Tensor | None, expected: Tensor, bound: Tensor) -> None:
    """Every value lies within its bound; skips where the instruction set has no kernel."""
    if actual is None:
        pytest.skip("this instruction set has no such kernel yet")
    assert actual.shape == expected.shape
    worst = ((actual.double() - expected).abs() / bound).max() if expected.numel() else 0.0
    assert worst <= 1, f"{float(worst):.3g} times the allowed error"


# --- the layout ---


def unpacked(packed: PackedWeight, group: int) -> NDArray[np.float64]:
    """The matrix [n, k] read back as csrc/layout.h describes it."""
    data = packed.data.numpy()
    blocks, k_padded, scales_at, _, blocks_at, block_bytes, nibbles_at = data[:56].view(np.int64)
    has_offsets = bool(data[56:60].view(np.int32)[0])
    body = data[blocks_at:].reshape(blocks, block_bytes)
    if packed.format == "fp16":
        halves = body.copy().view(np.float16).reshape(blocks, k_padded, 16)
        return in_order(halves.transpose(0, 2, 1).astype(np.float64), packed)
    if packed.format == "bf16":
        words = body.copy().view(np.uint16).reshape(blocks, k_padded // 2, 16, 2)
        rows = (words.astype(np.uint32) << 16).view(np.float32).transpose(0, 2, 1, 3)
        return in_order(rows.reshape(blocks, 16, k_padded).astype(np.float64), packed)
    scales = data[scales_at : scales_at + blocks * 64].view(np.float32).astype(np.float64)
    if packed.format == "int8":
        quads = body.copy().view(np.int8).reshape(blocks, k_padded // 4, 16, 4)
        q = quads.transpose(0, 2, 1, 3).reshape(blocks, 16, k_padded).astype(np.float64)
        return in_order(q * scales.reshape(blocks, 16, 1), packed)
    nibbles = body[:, nibbles_at:].reshape(blocks, k_padded // 8, 16, 4)
    both = np.stack([nibbles & 15, nibbles >> 4], 3).transpose(0, 2, 1, 3, 4)
    q = both.reshape(blocks, 16, k_padded).astype(np.float64)
    groups, parts = k_padded // group, 1 + has_offsets
    halves = body[:, : groups * parts * 32].copy().view(np.float16)
    of_groups = halves.reshape(blocks, groups, parts, 16).astype(np.float64)
    scale = of_groups[:, :, 0].transpose(0, 2, 1).repeat(group, 2)
    offset = of_groups[:, :, 1].transpose(0, 2, 1).repeat(group, 2) if has_offsets else -8 * scale
    return in_order((q * scale + offset) * scales.reshape(blocks, 16, 1), packed)


def in_order(rows: NDArray[np.float64], packed: PackedWeight) -> NDArray[np.float64]:
    """Blocks [num_blocks, 16, k_padded] as rows [n, k]; what pads them is dropped."""
    if packed.is_paired:
        rows = np.concatenate([rows[0::2], rows[1::2]])
    return rows.reshape(-1, rows.shape[-1])[: packed.n, : packed.k]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_layout_is_the_one_described(native: Native, variant: Variant, n: int, k: int) -> None:
    """Catches a packing that disagrees with layout.h, which kernels of all sets are written to."""
    plain = make_plain(variant, n, k)
    packed = pack(native, variant, plain)
    assert packed.data.data_ptr() % 64 == 0
    assert packed.nbytes % 64 == 0
    np.testing.assert_allclose(
        unpacked(packed, variant.group), plain.dequantised.numpy(), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_paired_layout_alternates_halves(native: Native, variant: Variant) -> None:
    """Catches gate and up blocks that are not side by side."""
    plain = make_plain(variant, 192, 72)
    packed = pack(native, variant, plain, is_paired=True)
    np.testing.assert_allclose(
        unpacked(packed, variant.group), plain.dequantised.numpy(), rtol=1e-12, atol=1e-12
    )


def test_group_scales_of_any_size_keep_11_bits(native: Native) -> None:
    """Catches float16 scales that overflow or vanish."""
    scales = torch.tensor([1e-30, 3e-7, 1.7, 6e20])[:, None].expand(4, 2) * torch.tensor([1, 0.3])
    offsets = scales * -3.7
    values = torch.full((4, 32), 0x5A, dtype=torch.uint8)
    packed = native.pack(values, "int4", scales=scales.contiguous(), offsets=offsets, group=32)
    wide = [t.double().repeat_interleave(32, 1) for t in (scales, offsets)]
    expected = torch.tensor([10.0, 5.0], dtype=torch.float64).repeat(32) * wide[0] + wide[1]
    np.testing.assert_allclose(unpacked(packed, 32), expected.numpy(), rtol=2.0**-9)


def test_pairing_needs_whole_blocks(native: Native) -> None:
    """Catches halves that end inside a block of 16."""
    with pytest.raises(ValueError, match="48"):
        native.pack(torch.zeros(48, 8, dtype=torch.bfloat16), is_paired=True)
    packed = native.pack(torch.zeros(64, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="is_paired"):
        native.linear(torch.zeros(1, 8, dtype=torch.bfloat16), packed, activation="silu_mul")


# --- linear ---


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_equal_float64(native: Native, variant: Variant, n: int, k: int) -> None:
    """Catches wrong tails of m, n or k in any of the kernels that a number of rows selects."""
    plain = make_plain(variant, n, k)
    packed = pack(native, variant, plain)
    x = make_x(max(ROWS), k, dtype=variant.dtype)
    seen = rounded(x, variant)
    expected = seen @ plain.dequantised.T
    bound = allowed(seen, plain.dequantised, expected, variant)
    for m in ROWS:
        check(native.linear(x[:m], packed), expected[:m], bound[:m])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("m", [1, 5, 24, 130])
def test_float_results_are_not_rounded(native: Native, variant: Variant, m: int) -> None:
    """Catches logits that pass through bfloat16, and sums that lose bits."""
    plain = make_plain(variant, 272, 200)
    x = make_x(m, 200, dtype=variant.dtype)
    seen = rounded(x, variant)
    expected = seen @ plain.dequantised.T
    bound = allowed(seen, plain.dequantised, expected, variant) - rounding(expected, variant)
    bound = bound + 1e-30
    out = torch.full((m, 300), 7.0)
    result = native.linear(x, pack(native, variant, plain), out=out[:, :272])
    check(result, expected, bound)
    assert bool((out[:, 272:] == 7).all()), "written beyond the row"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("m", [3, 12, 70])
@pytest.mark.parametrize("activation", ["none", "gelu_erf", "gelu_tanh"])
@pytest.mark.parametrize("is_paired", [False, True])
def test_epilogue_is_bias_activation_residual(
    native: Native, variant: Variant, m: int, activation: str, is_paired: bool
) -> None:
    """Catches a wrong order of the steps, reordered columns, and strides that are ignored."""
    n, k = 96, 136
    plain = make_plain(variant, n, k)
    x = make_x(2 * m, 2 * k, dtype=variant.dtype)[::2, :k]
    bias = make_x(1, n, 2, variant.dtype)[0]
    residual = make_x(m, 3 * n, 3, variant.dtype)[:, n : 2 * n]
    seen = rounded(x, variant)
    inner = seen @ plain.dequantised.T + bias.double()
    expected = activated(inner, activation) + 0.75 * residual.double()
    bound = allowed(seen, plain.dequantised, inner, variant)
    bound = bound + rounding(expected, variant)
    out = torch.full((m, n + 8), 7.0).to(variant.dtype)
    result = native.linear(
        x,
        pack(native, variant, plain, is_paired),
        bias,
        activation=activation,
        residual=residual,
        residual_scale=0.75,
        out=out[:, :n],
    )
    check(result, expected, bound)
    assert bool((out[:, n:] == 7).all()), "written beyond the row"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("m", [1, 7, 20, 90])
def test_silu_multiplies_the_halves(native: Native, variant: Variant, m: int) -> None:
    """Catches gate and up exchanged, and halves of a wrong width."""
    n, k = 160, 104
    plain = make_plain(variant, n, k)
    x, bias = make_x(m, k, dtype=variant.dtype), make_x(1, n, 2, variant.dtype)[0]
    seen = rounded(x, variant)
    inner = seen @ plain.dequantised.T + bias.double()
    gate, up = inner.chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    error = allowed(seen, plain.dequantised, 0 * inner, variant).chunk(2, 1)
    bound = rounding(expected, variant) + 1.1 * error[0] * up.abs() + error[1] * gate.abs()
    packed = pack(native, variant, plain, is_paired=True)
    check(native.linear(x, packed, bias, activation="silu_mul"), expected, bound + 1e-6)


def activated(x: Tensor, activation: str) -> Tensor:
    """The activation in float64."""
    if activation == "none":
        return x
    form = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(x, approximate=form)


@pytest.mark.parametrize("activation", ["gelu_erf", "gelu_tanh", "silu_mul"])
@pytest.mark.parametrize("m", [2, 64])
@pytest.mark.parametrize("variant", [BF16, FP16], ids=str)
def test_activations_far_from_zero(
    native: Native, variant: Variant, activation: str, m: int
) -> None:
    """Catches exponentials that overflow, and tails that turn into noise."""
    n, dtype = 64, variant.dtype
    values = torch.linspace(-90, 90, m * n).reshape(m, n).to(dtype)
    eye = torch.eye(n).to(dtype)
    if activation == "silu_mul":
        plain = torch.cat([eye, torch.zeros(n, n, dtype=dtype)])
        bias = torch.cat([torch.zeros(n), torch.ones(n)]).to(dtype)
        expected = torch.nn.functional.silu(values.double())
    else:
        plain, bias, expected = eye, None, activated(values.double(), activation)
    packed = native.pack(plain, variant.format, is_paired=activation == "silu_mul")
    result = native.linear(values, packed, bias, activation=activation)
    check(result, expected, rounding(expected, variant) + 2e-7)


@pytest.mark.parametrize("m", [4, 992])
def test_every_float16_is_read_and_rounded_as_ieee_says(native: Native, m: int) -> None:
    """Catches subnormals that vanish, ties rounded upwards, and overflow that stays a number.

    Half of another float16 is added to each, so that the sums fall between two numbers, often right
    in the middle, and beyond the largest.
    """
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = every[every.isfinite()].view(-1, 64)
    eye = native.pack(torch.eye(64).half(), "fp16")
    for residual in (x, x.roll(1, 1), x.flip(0, 1)):
        parts = zip(x.split(m), residual.split(m), strict=True)
        out = [native.linear(a, eye, residual=b, residual_scale=0.5) for a, b in parts]
        expected = (x.float() + 0.5 * residual.float()).half()
        assert torch.equal(torch.cat(out), expected)
    assert (x.float() + 0.5 * x.float()).half().isinf().any()
    assert native.linear(x[:m] * torch.nan, eye).isnan().all()


@pytest.mark.parametrize("m", [1, 40])
def test_weights_and_activations_of_two_16_bit_dtypes(native: Native, m: int) -> None:
    """Catches x read as what the weight is: a float16 layer may follow a bfloat16 one."""
    for variant, dtype in ((BF16, torch.float16), (FP16, torch.bfloat16)):
        plain = make_plain(variant, 80, 136)
        x = make_x(m, 136, dtype=dtype)
        seen = x.double()
        expected = seen @ plain.dequantised.T
        bound = allowed(seen, plain.dequantised, expected, BF16)
        check(native.linear(x, pack(native, variant, plain)), expected, bound)


def test_zeros_and_wild_rows_stay_apart(native: Native) -> None:
    """Catches a division by the largest of a row of zeros, and rows that touch each other."""
    for variant in VARIANTS:
        plain = make_plain(variant, 64, 128)
        packed = pack(native, variant, plain)
        for m in (4, 40):
            x = make_x(m, 128, dtype=variant.dtype)
            x[1], x[2] = 0, float("nan")
            out = native.linear(x, packed)
            if out is None:
                pytest.skip("this instruction set has no such kernel yet")
            assert bool((out[1] == 0).all())
            assert bool(out[3:].isfinite().all())
            if not variant.quantises_x:
                assert bool(out[2].isnan().all())


def test_long_rows_of_int8_do_not_overflow(native: Native) -> None:
    """Catches sums of int8 products that leave 32 bits or are taken for pairs of 16."""
    k = 16384
    variant = Variant("int8", quantises_x=True)
    values = torch.full((32, k), 127, dtype=torch.int8)
    packed = native.pack(values, "int8", scales=torch.ones(32), quantises_x=True)
    for m in (1, 16, 64):
        x = torch.ones(m, k).bfloat16()
        expected = torch.full((m, 32), 127.0 * k, dtype=torch.float64)
        check(
            native.linear(x, packed),
            expected,
            allowed(x.double(), values.double(), expected, variant),
        )


@pytest.mark.parametrize("variant", [*VARIANTS[:4], VARIANTS[10], FP16], ids=str)
@pytest.mark.parametrize("m", [40, 400])
def test_matrices_larger_than_a_block(native: Native, variant: Variant, m: int) -> None:
    """Catches sums that are lost between runs of k, and seams between blocks."""
    n, k = 720, 4200
    plain = make_plain(variant, n, k)
    x, residual = (make_x(m, size, seed, variant.dtype) for size, seed in ((k, 1), (n, 3)))
    seen = rounded(x, variant)
    expected = seen @ plain.dequantised.T + residual.double()
    bound = allowed(seen, plain.dequantised, expected, variant)
    packed = pack(native, variant, plain)
    check(native.linear(x, packed, residual=residual), expected, bound)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(80, 136), (64, 9000)])
def test_rows_do_not_depend_on_their_chunk(library: str, variant: Variant, n: int, k: int) -> None:
    """Catches sums whose order changes with the number of rows, on processors without tiles."""
    if "avx512" not in available(library):
        pytest.skip("needs AVX-512")
    native = Native(library, "avx512", threads=2)
    packed = pack(native, variant, make_plain(variant, n, k))
    x = make_x(531, k, dtype=variant.dtype)
    whole = native.linear(x, packed)
    assert whole is not None
    # Not one or two rows of int4, whose sums are two chains for speed.
    for begin, end in ((0, 13), (13, 257), (257, 262), (262, 531)):
        part = native.linear(x[begin:end].contiguous(), packed)
        assert part is not None
        assert torch.equal(part, whole[begin:end])


# --- mlp ---


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("m", [0, 1, 6, 21, 150])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "silu_mul"])
def test_mlp_is_two_products(native: Native, variant: Variant, m: int, activation: str) -> None:
    """Catches row blocks that lose rows, and inner values that are not those of `linear`."""
    k, width, n = 72, 160, 48
    is_paired = activation == "silu_mul"
    up = pack(native, variant, make_plain(variant, width * (1 + is_paired), k), is_paired)
    down = pack(native, variant, make_plain(variant, n, width, 5))
    x = make_x(m, 2 * k, dtype=variant.dtype)[:, k:]
    residual = make_x(m, 2 * n, 3, variant.dtype)[:, :n]
    biases = make_x(1, up.n, 2, variant.dtype)[0], make_x(1, n, 4, variant.dtype)[0]
    result = native.mlp(
        x, up, down, *biases, activation=activation, residual=residual, residual_scale=0.5
    )
    inner = native.linear(x, up, biases[0], activation=activation)
    assert (inner is None) == (result is None)
    if inner is None:
        pytest.skip("this instruction set has no such kernel yet")
    expected = native.linear(inner, down, biases[1], residual=residual, residual_scale=0.5)
    assert expected is not None
    # The inner values may differ in their last bit, where another kernel summed them.
    size = float(expected.abs().max()) if m else 0.0
    bound = rounding(expected.double(), variant) + 2 * ROUNDING[variant.dtype] * size
    check(result, expected.double(), bound)


@pytest.mark.parametrize("variant", VARIANTS[:6], ids=str)
@pytest.mark.parametrize("m", [70, 1058])
@pytest.mark.parametrize("width", [128, 2176])
@pytest.mark.parametrize("activation", ["gelu_tanh", "silu_mul"])
def test_inner_values_lie_where_the_second_product_reads_them(
    native: Native, variant: Variant, m: int, width: int, activation: str
) -> None:
    """Catches tiles of inner values that are misplaced where one product writes the other's x."""
    k, n = 40, 40
    is_paired = activation == "silu_mul"
    up = pack(native, variant, make_plain(variant, width * (1 + is_paired), k), is_paired)
    down = pack(native, variant, make_plain(variant, n, width, 5))
    x, residual = make_x(m, k), make_x(m, n, 3)
    result = native.mlp(x, up, down, activation=activation, residual=residual)
    inner = native.linear(x, up, activation=activation)
    assert inner is not None
    expected = native.linear(inner, down, residual=residual)
    assert expected is not None
    size = float(expected.abs().max())
    bound = rounding(expected.double(), variant) + 2 * ROUNDING[variant.dtype] * size
    check(result, expected.double(), bound)


@pytest.mark.parametrize("variant", [BF16, FP16], ids=str)
def test_mlp_of_many_rows(native: Native, variant: Variant) -> None:
    """Catches the seam between row blocks."""
    plain = make_plain(variant, 64, 32), make_plain(variant, 32, 64, 5)
    x = make_x(3000, 32, dtype=variant.dtype)
    up, down = (pack(native, variant, one) for one in plain)
    inner = activated(x.double() @ plain[0].dequantised.T, "gelu_erf")
    expected = inner @ plain[1].dequantised.T
    spread = inner.abs() @ plain[1].dequantised.abs().T
    bound = rounding(expected, variant) + rounding(spread, variant)
    check(native.mlp(x, up, down, activation="gelu_erf"), expected, bound)
