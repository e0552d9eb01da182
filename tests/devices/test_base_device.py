"""The plain device against float64 loops, and every other device against the plain one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import glimt.devices.base
from attention_steps import STEPS, Step, naive_attend, normal
from conftest import CHOICES, use_isa
from glimt.devices.base import (
    Activation,
    Device,
    KVCache,
    RotaryStyle,
    all_devices,
    open_device,
    rounded_heads,
    rounded_to_int8,
)
from glimt.devices.card_check import FUSED_ATTENTION, INTEGER_PRODUCTS
from glimt.devices.cpu import NativeCpuDevice
from glimt.devices.cuda import CudaDevice
from glimt.devices.host import Memory, plan_threads
from glimt.devices.npu_weights import Int4Weight
from glimt.errors import ConfigError
from glimt.kernels.library import ISAS
from glimt.quant.base import all_formats
from npu_stand_in import contract

# Sums of a few hundred float32 products of unit normals; a wrong key or head is off by about 1.
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}
# Devices may sum in another order; 16-bit results may then differ in their last two bits.
SIXTEEN_BIT = {"rtol": 2e-2, "atol": 2e-2}
# Two products: what lies between may be rounded to 16 bits or not, and a value on the edge between
# two steps of 8 bits may fall either way. All in all that is little; a lost bias is about 1.
MLP_ELEMENT = {"rtol": 2e-2, "atol": 0.2}
MLP_NORM = 0.015


# --- naive float64 ---------------------------------------------------------------------------


def naive_rotate(
    x: Tensor, cos: Tensor, sin: Tensor, style: RotaryStyle, num_segments: int
) -> Tensor:
    """Pair by pair, as the docstring of Device.rotate says."""
    out = x.clone()
    num_pairs = cos.shape[-1]
    width = 2 * num_pairs // num_segments
    for pair in range(num_pairs):
        if style == "interleaved":
            i, j = 2 * pair, 2 * pair + 1
        else:
            segment, within = divmod(pair, width // 2)
            i = segment * width + within
            j = i + width // 2
        for token in range(len(x)):
            c, s = cos[token, pair], sin[token, pair]
            for head in range(x.shape[1]):
                a, b = x[token, head, i].item(), x[token, head, j].item()
                out[token, head, i] = a * c - b * s
                out[token, head, j] = b * c + a * s
    return out


HEADS_AND_DIMS = [((16, 1), 16), ((2, 2), 88), ((2, 2), 112), ((32, 2), 128), ((4, 4), 128)]


@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_paged_attention_sees_what_it_may_and_nothing_else(rows):
    """Would catch a wrong block, mask, offset or order in any mixture of rows."""
    step = Step(rows)
    torch.testing.assert_close(step.run(Device()).double(), step.naive(), **FLOAT32)


@pytest.mark.parametrize(("heads", "dim"), HEADS_AND_DIMS)
def test_paged_attention_pairs_heads_and_scales_for_every_real_size(heads, dim):
    """Would catch a query head reading another group's keys, or a head size that is padded.

    16 query heads per KV head are GLM-4's, 1 is VisualGLM's; 88 and 112 are the towers' sizes.
    """
    step = Step([(5, 1, 0), (9, 1, 0), (0, 3, 0), (4, 4, 0), (0, 3, 2)], heads, dim)
    torch.testing.assert_close(step.run(Device()).double(), step.naive(), **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_paged_attention_runs_in_sixteen_bits(dtype):
    """Would catch a mask of another dtype than the queries, or a softmax in 16 bits."""
    step = Step(STEPS["everything at once"], dtype=dtype)
    result = step.run(Device())
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), step.naive(), **SIXTEEN_BIT)


def test_what_other_sequences_left_in_the_cache_does_not_show():
    """Would catch a masked slot that still weighs something: the filler is huge but finite."""
    rows = STEPS["everything at once"]
    clean, littered = Step(rows).run(Device()), Step(rows, filler=3e4).run(Device())
    torch.testing.assert_close(littered, clean, rtol=0, atol=0)


def test_a_sequence_that_is_not_finite_stays_alone():
    """Would catch NaN flowing to a neighbour over masked padding, since 0 * NaN is NaN."""
    step = Step([(2, 1, 0), (9, 1, 0), (5, 1, 0), (0, 3, 0)])
    bad = 1
    first, second = step.rows[0].block_table[0], step.rows[bad].block_table[0]
    # The bad sequence holds block 0, which is what a careless padding reads.
    swapped = {0: second, second: 0}
    for index, row in enumerate(step.rows):
        table = [swapped.get(b, b) for b in row.block_table]
        step.rows[index] = replace(row, block_table=table)
    assert first != 0
    step.value[bad] = step.key[bad] = math.nan
    step.cache.key[0] = step.cache.value[0] = math.nan
    result = step.run(Device())
    assert [bool(row.isnan().any()) for row in result] == [False, True, False, False, False, False]


@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("heads", [(16, 1), (3, 3)], ids=["16:1", "1:1"])
def test_attention_over_int8_is_attention_over_what_int8_leaves(heads, rows):
    """Would catch a scale of another token or head, and a first chunk that reads its own keys
    unrounded: a prompt would differ from the same in chunks.
    """
    step = Step(rows, heads)
    torch.testing.assert_close(
        step.rounded().run(Device()).double(), step.widened().naive(), **FLOAT32
    )


@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
def test_int8_costs_attention_no_more_than_its_steps(rows):
    """Would catch steps that are too coarse: half of one is largest / 254 for every value.

    Scores are off by the query's sum times that, weights by the exponential of twice as much.
    """
    step = Step(rows, dim=64)
    exact, rounded = step.naive(), step.rounded().run(Device()).double()
    everything = torch.cat([step.key, step.cache.key.flatten(0, 1)])
    values = torch.cat([step.value, step.cache.value.flatten(0, 1)]).abs().max()
    scores = step.query.abs().sum(-1).max() * everything.abs().max() / 254 * step.scale
    bound = values / 254 + values * ((2 * scores).exp() - 1)
    assert (rounded - exact).abs().max() <= bound
    assert (rounded - exact).norm() < 0.02 * exact.norm(), "in practice it is far less"


def test_rounding_a_head_to_int8():
    """Would catch steps of a neighbour's size, ties that go up, and what is not finite lost."""
    x = torch.tensor([[254.0, 1, 3, -254], [0, 0, 0, 0], [1e-35, 0, 0, 0], [1e-3, 0, -5e-4, 2e-4]])
    values, scales = rounded_heads(x)
    assert values.tolist() == [[127, 0, 2, -127], [0] * 4, [0] * 4, [127, 0, -64, 25]]
    torch.testing.assert_close(scales, x.abs().amax(-1) / 127)
    for bad in (math.nan, math.inf, -math.inf):
        values, scales = rounded_heads(torch.tensor([1.0, bad]))
        assert not (values * scales).isfinite().any()


def test_write_kv_touches_only_its_slots():
    """Would catch keys and values swapped, or a slot written that belongs to another."""
    cache = KVCache(torch.zeros(3, 4, 2, 5), torch.zeros(3, 4, 2, 5))
    key, value = normal(3, 2, 5, seed=1), normal(3, 2, 5, seed=2)
    Device().write_kv(key, value, cache, torch.tensor([11, 0, 6]))
    for tensor, new in ((cache.key, key), (cache.value, value)):
        assert torch.equal(tensor[2, 3], new[0])
        assert torch.equal(tensor[0, 0], new[1])
        assert torch.equal(tensor[1, 2], new[2])
        assert int(tensor.any(-1).any(-1).sum()) == 3


# --- attention inside packed pictures --------------------------------------------------------


@pytest.mark.parametrize("lengths", [(5,), (3, 6), (7, 1, 4), (2, 5, 3, 6), (1, 4, 2, 8, 3)])
@pytest.mark.parametrize("dim", [88, 112])
def test_each_picture_attends_to_itself_alone(lengths, dim):
    """Would catch pictures that see each other, for any number: mlx-vlm split for three only."""
    starts = [0, *np.cumsum(lengths).tolist()]
    q, k, v = (normal(starts[-1], 2, dim, seed=s) for s in (1, 2, 3))
    result = Device().varlen_attention(q, k, v, starts, starts, dim**-0.5)
    naive = [
        naive_attend(q[i], k[a:b], v[a:b], dim**-0.5)
        for a, b in pairwise(starts)
        for i in range(a, b)
    ]
    torch.testing.assert_close(result.double(), torch.stack(naive), **FLOAT32)


def test_queries_may_be_fewer_or_more_than_keys():
    """Would catch query offsets used for keys: the Q-Former has 32 queries over 257 states."""
    q_starts, k_starts = [0, 2, 4, 9], [0, 7, 10, 12]
    q, k, v = normal(9, 3, 8, seed=1), normal(12, 3, 8, seed=2), normal(12, 3, 8, seed=3)
    result = Device().varlen_attention(q, k, v, q_starts, k_starts, 0.3)
    for s in range(3):
        keys = slice(k_starts[s], k_starts[s + 1])
        for i in range(q_starts[s], q_starts[s + 1]):
            naive = naive_attend(q[i], k[keys], v[keys], 0.3)
            torch.testing.assert_close(result[i].double(), naive, **FLOAT32)


def test_packed_attention_takes_views_of_a_fused_product():
    """Would catch a result in the layout of an unbound view, or an operation that refuses one."""
    fused = normal(7, 3, 2, 16, seed=5)
    views = fused.unbind(1)
    starts = [0, 4, 7]
    args = (starts, starts, 0.25)
    expected = Device().varlen_attention(*(view.contiguous() for view in views), *args)
    result = Device().varlen_attention(*views, *args)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert torch.equal(result.flatten(1), result.reshape(7, 32))


# --- small operations ------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize(
    ("dim", "num_pairs", "num_segments"),
    [(16, 8, 1), (16, 4, 1), (16, 8, 2), (24, 6, 3), (4, 1, 1)],
)
def test_rotate_turns_the_pairs_that_its_docstring_names(style, dim, num_pairs, num_segments):
    """Would catch a wrong pairing, a flipped sign, or dims turned that must pass through.

    (16, 8, 2) in halves is VisualGLM's head, (16, 4, 1) interleaved GLM-4's, both shrunk.
    """
    x = normal(3, 2, dim, seed=1)
    angle = normal(3, num_pairs, seed=2)
    result = Device().rotate(x, angle.cos(), angle.sin(), style, num_segments)
    naive = naive_rotate(x, angle.cos(), angle.sin(), style, num_segments)
    torch.testing.assert_close(result, naive, rtol=1e-6, atol=1e-6)
    assert torch.equal(result[..., 2 * num_pairs :], x[..., 2 * num_pairs :])


@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_rotate_leaves_its_input_alone_and_keeps_its_dtype(style):
    """Would catch a rotation in place (the value would be turned with the key) or in float32."""
    x = normal(3, 2, 8, seed=1, dtype=torch.bfloat16)
    before = x.clone()
    angle = normal(3, 4, seed=2)
    result = Device().rotate(
        x, angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16), style, 1
    )
    assert result.dtype == torch.bfloat16
    assert torch.equal(x, before)


def test_rms_norm_casts_once_after_the_weight():
    """Would catch LLaMA's order: normalise, cast to bfloat16, then multiply by the weight."""
    x, weight = normal(50, 64, seed=1, dtype=torch.bfloat16), normal(64, dtype=torch.bfloat16)
    wide = x.float()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    glm, llama = (normed * weight.float()).bfloat16(), normed.bfloat16() * weight
    result = Device().rms_norm(x, weight, 1e-5)
    assert result.dtype == torch.bfloat16
    # rsqrt against 1 / sqrt differ in the last float32 bit, which rarely moves a bfloat16 one.
    assert (result != glm).float().mean() < 0.002
    assert (llama != glm).float().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_squares_in_float32(dtype):
    """Would catch a mean of squares in float16, which overflows beyond 255."""
    x = normal(3, 64, seed=1, dtype=dtype) * 300
    result = Device().rms_norm(x, torch.ones(64, dtype=dtype), 1e-5)
    exact = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(result.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_keeps_its_statistics_in_float32(dtype):
    """Would catch mean and variance in 16 bits: a row far from zero would lose all its digits."""
    x = normal(4, 256, seed=1, dtype=dtype) * 100 + 500
    weight, bias = normal(256, seed=2, dtype=dtype), normal(256, seed=3, dtype=dtype)
    result = Device().layer_norm(x, weight, bias, 1e-5)
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (
        wide.var(-1, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    exact = normed * weight.double() + bias.double()
    torch.testing.assert_close(result.double(), exact, **SIXTEEN_BIT)


def test_layer_norm_adds_its_epsilon_to_the_variance():
    """Would catch an epsilon outside the root or left out: a constant row would divide by 0."""
    x = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    result = Device().layer_norm(x, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]), 3.0)
    assert result.tolist() == [[-0.5, 2.0], [0.0, 1.0]]


def test_rms_norm_adds_its_epsilon_under_the_root():
    """Would catch an epsilon beside the root: values of ordinary size do not show where it is."""
    result = Device().rms_norm(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.ones(2), 3.0)
    assert result.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_the_two_gelus_are_the_two_gelus():
    """Would catch the tanh form in the tower or the exact one in VisualGLM's language model."""
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    tanh = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    erf = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    torch.testing.assert_close(Device().gelu_tanh(x), torch.stack(tanh))
    torch.testing.assert_close(Device().gelu_erf(x), torch.stack(erf))
    assert (torch.stack(tanh) - torch.stack(erf)).abs().max() > 1e-4


def test_silu_acts_on_the_gate():
    """Would catch gate and up swapped."""
    gate, up = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 5.0])
    expected = [3 / (1 + math.exp(-1)), -10 / (1 + math.exp(2))]
    torch.testing.assert_close(Device().silu_mul(gate, up), torch.tensor(expected))


def test_linear_and_embedding_by_hand():
    """Would catch a transposed weight or a forgotten bias."""
    device = Device()
    x, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0], [7.0, 8.0]])
    assert device.linear(x, weight, None).tolist() == [[11, 17, 23]]
    assert device.linear(x, weight, torch.tensor([1.0, 0, -1])).tolist() == [[12, 17, 22]]
    assert device.embedding(torch.tensor([2, 0]), weight).tolist() == [[7, 8], [3, 4]]


# --- every device gives the base's results ---------------------------------------------------


CARD_WAYS = "card's ways"


class CardOnCpu(CudaDevice):
    """What a card computes by torch's own means, computed on the CPU."""

    preferred_dtype = Device.preferred_dtype
    free_bytes = Device.free_bytes


def device_params() -> list[Any]:
    """One test case per device; those of a card carry its mark. The CPU: plain, and by kernels."""
    marked = {"cuda": pytest.mark.cuda, "npu": pytest.mark.npu}
    kinds = [(name, "") for name in all_devices() if name != "cpu"]
    kinds += [("cpu", isa) for isa in CHOICES]
    marked[CARD_WAYS] = pytest.mark.filterwarnings("ignore:.*:UserWarning")
    kinds.append((CARD_WAYS, ""))
    params = [
        pytest.param((name, isa), marks=[marked[name]] if name in marked else [], id=isa or name)
        for name, isa in kinds
    ]
    return [*params, *(pytest.param(("contract", chip), id=chip) for chip in ("a2", "310p"))]


@pytest.fixture(params=device_params())
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Each device that can be used here; those of NPUs also over a stand-in for torch_npu."""
    name, isa = request.param
    if name == CARD_WAYS:
        yield CardOnCpu("cpu", frozenset({FUSED_ATTENTION, INTEGER_PRODUCTS}))
        return
    if name == "contract":
        with contract(isa) as opened, opened.watching():
            yield opened.device()
        return
    reason = all_devices()[name].unavailable_reason()
    if reason:
        pytest.skip(reason)
    if isa:
        use_isa(isa, monkeypatch)
    opened = open_device(name)
    assert isinstance(opened, NativeCpuDevice) == (isa in ISAS), "a test would prove nothing"
    yield opened


def hold(device: Device, weight: Any, dtype: torch.dtype, is_paired: bool = False) -> Any:
    """The weight as the device holds it; skips what the device says that it does not do."""
    try:
        return device.prepare_weight(weight, dtype, is_paired)
    except ConfigError as error:
        pytest.skip(str(error))


def cases(t: torch.dtype) -> dict[str, tuple[Any, ...]]:
    """Arguments of every small operation; a name may say which variant after a colon."""
    x, table = normal(5, 48, dtype=t), normal(33, 48, seed=3, dtype=t)
    weight, bias = normal(48, seed=1, dtype=t), normal(48, seed=2, dtype=t)
    heads, angle = normal(5, 3, 16, dtype=t), normal(5, 8, seed=1)
    cos, sin = angle.cos().to(t), angle.sin().to(t)
    q, k, v = (normal(9, 2, 88, seed=s, dtype=t) for s in range(3))
    return {
        "embedding": (torch.tensor([3, 0, 3]), table),
        "linear:plain": (x, table, None),
        "linear:bias": (x[:1], table, normal(33, seed=4, dtype=t)),
        "layer_norm": (x, weight, bias, 1e-6),
        "layer_norm:residual": (x, weight, bias, 1e-6, x.flip(0)),
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, x.flip(0), weight, 1e-5),
        "add_rms_norm:columns": (x.T.contiguous().T, x.flip(0), weight, 1e-5),
        "add_rms_norm:no rows": (x[:0], x[:0], weight, 1e-5),
        "gelu_tanh": (x,),
        "gelu_erf": (x,),
        "silu_mul": (x, x.flip(0)),
        "rotate:interleaved": (heads, cos[:, :4], sin[:, :4], "interleaved", 1),
        "rotate:half": (heads, cos, sin, "half", 2),
        "varlen_attention:self": (q, k, v, [0, 4, 9], [0, 4, 9], 0.1),
        "varlen_attention:cross": (q[:4], k, v, [0, 1, 4], [0, 4, 9], 0.1),
    }


def there(device: Device, value: Any) -> Any:
    """A tensor or a matrix in few bits, moved to where the device computes; else as it is."""
    return value.to(device.torch_device) if hasattr(value, "to") else value


def in_turn(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return FLOAT32 if dtype == torch.float32 else SIXTEEN_BIT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases(torch.float32))
def test_every_device_computes_what_the_base_computes(device, case, dtype):
    """Would catch an override that is fast and wrong, or returns another dtype or shape."""
    name, args = case.split(":")[0], cases(dtype)[case]
    expected = getattr(Device(), name)(*args)
    result = getattr(device, name)(*(there(device, arg) for arg in args))
    for ours, plain in zip(in_turn(result), in_turn(expected), strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours.cpu(), plain, **tolerance(dtype))


# --- products ---

ACTIVATIONS: tuple[Activation, ...] = ("none", "gelu_erf", "gelu_tanh", "silu_mul")
LOW_BITS = ("int8", "w8a8", "int4", "int4-g32", "int4-asym", "int4-a16")


def matrix(form: str, n: int, k: int, seed: int, dtype: torch.dtype) -> Any:
    """[n, k] with products of about 1, plain or in few bits."""
    plain = normal(n, k, seed=seed, dtype=dtype) * k**-0.5
    return plain if form == "plain" else all_formats()[form].quantise(plain.float())


def exact_linear(x, weight, bias, activation, residual, residual_scale):
    """Device.linear in float64, from what the base's weight stands for."""
    wide = x.double()
    if isinstance(weight, Tensor):
        y = wide @ weight.double().T
    else:
        rounded = rounded_to_int8(x.float(), weight.group).double() if weight.quantises_x else wide
        y = rounded @ weight.dequantise().double().T
    y = Device().activate(y + bias.double() if bias is not None else y, activation)
    return y if residual is None else y + residual_scale * residual.double()


@pytest.mark.parametrize("form", ["plain", *LOW_BITS])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_device_multiplies_and_ends_as_the_base_says(device, activation, form, dtype):
    """Would catch a wrong end of a product: another GELU, gate and up swapped, a lost bias.

    One row is decoding, 3 a small batch, 70 a prompt; 96 columns are halves of whole blocks, 72
    are not, and 80 values end within a block.
    """
    for n, num_rows, with_bias, scale in (
        (96, 1, True, None),
        (96, 70, False, 1.0),
        (72, 3, True, 0.5),
        (72, 70, True, None),
    ):
        x, weight = normal(num_rows, 80, seed=1, dtype=dtype), matrix(form, n, 80, 2, dtype)
        bias = normal(n, seed=3, dtype=dtype) if with_bias else None
        width = n // 2 if activation == "silu_mul" else n
        residual = None if scale is None else normal(num_rows, width, seed=4, dtype=dtype)
        ends = (activation, residual, scale or 1.0)
        held = hold(device, there(device, weight), dtype, is_paired=activation == "silu_mul")
        result = device.linear(*(there(device, arg) for arg in (x, held, bias, *ends))).cpu()
        assert (result.dtype, result.shape) == (dtype, (num_rows, width))
        if isinstance(held, Int4Weight):  # activations stay in 16 bits where that costs nothing
            weight = replace(weight, quantises_x=False)
        exact = exact_linear(x, weight, bias, *ends)
        torch.testing.assert_close(result.double(), exact, **tolerance(dtype))


def test_activations_are_rounded_group_by_group():
    """Would catch one scale for a whole row: a large value would drown the other groups."""
    x = torch.zeros(1, 64)
    x[0, 0], x[0, 40] = 1e6, 1.0
    weight = all_formats()["int4-g32"].quantise(torch.eye(64))
    assert Device().linear(x, weight, None)[0, 40] == 1.0
    whole = all_formats()["w8a8"].quantise(torch.eye(64))
    assert Device().linear(x, whole, None)[0, 40] == 0.0


@pytest.mark.parametrize("form", ["plain", "int8", "w8a8", "int4"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_device_computes_an_mlp_as_two_products(device, activation, form, dtype):
    """Would catch a fused MLP that loses rows, a bias, or what is added at the end."""
    for num_rows, scale in ((1, None), (5, 1.0), (70, 0.5)):
        x = normal(num_rows, 80, seed=1, dtype=dtype)
        up, down = (
            matrix(form, 128, 80, 2, dtype),
            matrix(form, 48, 64 if activation == "silu_mul" else 128, 3, dtype),
        )
        biases = normal(128, seed=4, dtype=dtype), normal(48, seed=5, dtype=dtype)
        residual = None if scale is None else normal(num_rows, 48, seed=6, dtype=dtype)
        held = (
            hold(device, there(device, up), dtype, activation == "silu_mul"),
            hold(device, there(device, down), dtype),
        )
        ends = (activation, residual, scale or 1.0)
        result = device.mlp(*(there(device, arg) for arg in (x, *held, *biases, *ends))).cpu()
        base = Device().mlp(x, up, down, *biases, *ends)
        assert (result.dtype, result.shape) == (dtype, base.shape)
        torch.testing.assert_close(result, base, **MLP_ELEMENT)
        assert (result.float() - base.float()).norm() <= MLP_NORM * base.float().norm()


def test_a_product_takes_what_layers_give_it(device):
    """Would catch strides that are ignored: rows of a view, leading axes, a matrix of no rows."""
    dtype = torch.bfloat16
    held = hold(device, there(device, matrix("plain", 32, 48, 1, dtype)), dtype)
    wide = there(device, normal(4, 3, 96, seed=2, dtype=dtype))
    rows = device.linear(wide[..., 48:].contiguous(), held, None)
    assert torch.equal(device.linear(wide[..., 48:], held, None), rows)
    residual = there(device, normal(4, 3, 64, seed=3, dtype=dtype))
    added = device.linear(wide[..., 48:], held, None, "none", residual[..., ::2])
    same = device.linear(wide[..., 48:], held, None, "none", residual[..., ::2].contiguous())
    assert torch.equal(added, same)
    assert device.linear(wide[:0, 0, :48], held, None).shape == (0, 32)


def test_a_row_does_not_depend_on_its_neighbours(device):
    """Would catch a row of a batch that is not what it is alone, beyond another order of sums."""
    dtype = torch.bfloat16
    # torch's own product reads on into the next row, times 0, where 32 does not divide a row.
    size = 80 if isinstance(device, NativeCpuDevice) else 96
    held = hold(device, there(device, matrix("plain", 96, size, 1, dtype)), dtype)
    x = there(device, normal(40, size, seed=2, dtype=dtype))
    x[7] = math.nan
    result = device.linear(x, held, None, "gelu_tanh")
    assert result.isnan().any(-1).nonzero().flatten().tolist() == [7]
    alone = device.linear(x[3:4], held, None, "gelu_tanh")
    torch.testing.assert_close(result[3:4], alone, **SIXTEEN_BIT)


# --- attention ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("heads", [(16, 1), (3, 3)], ids=["16:1", "1:1"])
def test_every_device_attends_as_the_base_attends(device, heads, rows, dtype):
    """Would catch a fused attention with another mask, head order or block walk."""
    step = Step(rows, heads=heads, dtype=dtype)
    torch.testing.assert_close(step.run(device), step.run(Device()), **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("heads", [(16, 1), (3, 3)], ids=["16:1", "1:1"])
def test_every_device_attends_over_int8_as_the_base_does(device, heads, rows, dtype):
    """Would catch a device that takes a cache in int8 for one of its own dtype."""
    step = Step(rows, heads=heads, dtype=dtype).rounded()
    torch.testing.assert_close(step.run(device), step.run(Device()), **tolerance(dtype))


def test_every_device_computes_in_a_dtype_that_it_takes(device):
    """Would catch a preferred dtype that no weight can have."""
    for declared in DTYPES:
        assert device.preferred_dtype(declared) in DTYPES
    assert device.preferred_dtype(torch.float32) == torch.float32
    assert device.free_bytes() > 0


def test_the_cpu_prefers_bfloat16_to_float16():
    """Would catch VisualGLM, which is published in float16, overflowing or crawling on a CPU."""
    cpu = open_device("cpu")
    preferred = [cpu.preferred_dtype(dtype) for dtype in DTYPES]
    assert preferred == [torch.float32, torch.bfloat16, torch.bfloat16]


# --- finding devices -------------------------------------------------------------------------


def test_every_device_is_found_under_its_own_name():
    """Would catch two files of one name, or a class that cannot stand in for the base."""
    devices = all_devices()
    assert "cpu" in devices
    for name, kind in devices.items():
        assert kind.name == name
        assert issubclass(kind, Device)


def test_the_base_class_is_no_choice_of_the_user():
    """Would catch `--device base`."""
    assert "base" not in all_devices()


def test_an_unknown_device_is_refused_with_the_known_ones():
    """Would catch a KeyError, or an error that does not say what can be chosen."""
    with pytest.raises(ConfigError) as caught:
        open_device("tpu")
    (problem,) = caught.value.problems
    assert "'tpu' is unknown" in problem
    assert all(name in problem for name in all_devices())


def test_an_unusable_device_is_refused_with_its_reason(monkeypatch):
    """Would catch a device opened although its driver or card is missing."""

    class Absent(Device):
        name = "absent"

        def __init__(self) -> None:
            raise AssertionError("opened although it is not usable")

        @classmethod
        def unavailable_reason(cls) -> str | None:
            return "no card was found; install its driver"

    monkeypatch.setattr(glimt.devices.base, "all_devices", lambda: {"absent": Absent})
    with pytest.raises(ConfigError, match="absent cannot be used here: no card was found"):
        open_device("absent")


def test_free_memory_is_a_guess_where_the_system_does_not_say(monkeypatch):
    """Would catch a crash at start on a system without /proc/meminfo."""
    nothing = Memory(total=0, available=0, disk_cache=0, swap_total=0, swap_used=0)
    monkeypatch.setattr(glimt.devices.base, "read_memory", lambda: nothing)
    assert Device().free_bytes() == 4 * 2**30


def test_the_number_of_threads_reaches_torch_and_the_kernels(monkeypatch):
    """Catches `--threads` that reaches one of the two: the other one's get in its way."""
    told: list[Any] = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: told.append(("torch", count)))
    monkeypatch.setattr(
        "glimt.devices.cpu.open_native",
        lambda isa, count, places: told.append(("kernels", count)),
    )
    open_device("cpu", 3)
    assert told == [("torch", 3), ("kernels", 3)]
    told.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    open_device("cpu")
    assert told == [("kernels", plan_threads().count)]
    told.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    open_device("cpu")
    assert told == [("torch", plan_threads().count), ("kernels", plan_threads().count)]
