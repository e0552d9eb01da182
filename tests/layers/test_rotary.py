"""Rotary tables and channels against scalar arithmetic, for every family's way of turning heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from glimt.devices.base import open_device
from glimt.layers.rotary import Rotary, RotarySpec, TableMode, inverse_frequencies, repeated

CPU = open_device("cpu")
# float32 angles: a position of 2048 times a rounded frequency is off by up to 2^-13.
ANGLE_ERROR = 2e-4


def visualglm_spec(mode: TableMode, head_dim: int = 128) -> RotarySpec:
    """Two halves of a head, each turned as a half of its own; specs/visualglm-6b.md 1.4."""
    width = head_dim // 2
    return RotarySpec(
        style="half",
        inv_freq=inverse_frequencies(width, 10000.0).half().float().repeat(2),
        channels=repeated((0, 1), width // 2),
        num_segments=2,
        mode=mode,
    )


def glm4_spec(head_dim: int = 128, rope_ratio: float = 1.0) -> RotarySpec:
    """The first half of a head, in neighbouring pairs; specs/glm-4v-9b.md 1.3."""
    width = head_dim // 2
    return RotarySpec(
        style="interleaved",
        inv_freq=inverse_frequencies(width, 10000.0 * rope_ratio),
        channels=repeated((0,), width // 2),
    )


def table(spec: RotarySpec, max_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 … max_positions-1 in every channel, float32."""
    rotary = Rotary(spec, max_positions, CPU, torch.float32)
    return rotary.at(torch.arange(max_positions).expand(max(spec.channels) + 1, -1))


def vector(head_dim: int, seed: int = 0) -> Tensor:
    return torch.randn(1, 1, head_dim, generator=torch.Generator().manual_seed(seed))


def turn(rotary: Rotary, x: Tensor, *position: int) -> list[float]:
    """One head at one position, one number per channel."""
    return rotary.rotate(x, rotary.at(torch.tensor(position)[:, None]))[0, 0].tolist()


# --- tables ----------------------------------------------------------------------------------


def test_frequencies_fall_from_one_to_the_base():
    """Would catch an exponent over the whole head, or one off by a step."""
    exact = [10000.0 ** (-2 * i / 64) for i in range(32)]
    assert inverse_frequencies(64, 10000.0).tolist() == pytest.approx(exact, rel=1e-6)
    assert inverse_frequencies(4, 100.0).tolist() == pytest.approx([1.0, 0.1])


def test_float32_tables_are_the_cosines_they_claim():
    """Would catch an angle that loses precision before its cosine is taken."""
    cos, sin = table(glm4_spec(), 2048)
    for position in (0, 1, 7, 100, 1023, 2047):
        for i in range(32):
            angle = position * 10000.0 ** (-2 * i / 64)
            assert cos[position, i].item() == pytest.approx(math.cos(angle), abs=ANGLE_ERROR)
            assert sin[position, i].item() == pytest.approx(math.sin(angle), abs=ANGLE_ERROR)


def test_the_hub_table_rounds_to_float16_at_every_step():
    """Would catch an angle kept in float32, or a cosine of the unrounded angle: bit for bit
    cos_tab[p, i] = fp16(cos(fp16(fp16(p) * fp16(inv_freq[i])))), by scalar NumPy float16.

    torch takes the cosine of a half in float32. Where that stands within a bit of the middle of
    two halves, as sin(300) does, libraries differ, torch's own kernels among them; both pass.
    """
    cos, sin = table(visualglm_spec("hub_fp16"), 2048)
    frequencies = [np.float16(np.float32(10000.0) ** np.float32(-2 * i / 64)) for i in range(32)]
    ours = visualglm_spec("hub_fp16").inv_freq[:32].half().numpy()
    assert np.array_equal(ours, np.array(frequencies, dtype=np.float16))
    assert torch.equal(cos[:, :32], cos[:, 32:])
    assert torch.equal(sin[:, :32], sin[:, 32:])
    tables = (cos.tolist(), math.cos), (sin.tolist(), math.sin)
    for i, frequency in enumerate(frequencies):
        for position in range(2048):
            angle = np.float16(position) * frequency
            assert type(angle) is np.float16
            for values, function in tables:
                exact = function(float(angle))
                expected = float(np.float16(exact)), float(np.float16(np.float32(exact)))
                assert values[position][i] in expected, (position, i)


@pytest.mark.parametrize(
    ("positions", "to_product", "to_exact", "digits"),
    [(64, 0.006, 0.009, 3), (256, 0.06, 0.10, 2), (1024, 0.25, 0.39, 2), (2048, 0.49, 0.78, 2)],
)
def test_the_two_tables_differ_as_much_as_the_spec_found(positions, to_product, to_exact, digits):
    """Would catch a hub table rounded in another place; the numbers are specs/visualglm-6b.md 1.4.

    The exact table takes neither the frequencies nor the angles as rounded.
    """
    hub, product = (torch.stack(table(visualglm_spec(mode), positions)).double()[..., :32]
                    for mode in ("hub_fp16", "fp32_product"))  # fmt: skip
    exact_freq = 10000.0 ** (-torch.arange(0, 64, 2, dtype=torch.float64) / 64)
    angles = torch.outer(torch.arange(positions, dtype=torch.float64), exact_freq)
    exact = torch.stack((angles.cos(), angles.sin()))
    assert round((hub - product).abs().max().item(), digits) == to_product
    assert (hub - exact).abs().max().item() == pytest.approx(to_exact, abs=10**-digits)


def test_the_product_table_keeps_the_rounded_frequencies():
    """Would catch frequencies in full precision: the original rounds them in every dtype."""
    cos, _ = table(visualglm_spec("fp32_product"), 2048)
    i = 5
    rounded = float(np.float16(10000.0 ** (-2 * i / 64)))
    assert cos[2047, i].item() == pytest.approx(math.cos(2047 * rounded), abs=ANGLE_ERROR)
    assert abs(math.cos(2047 * rounded) - math.cos(2047 * 10000.0 ** (-2 * i / 64))) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["fp32_product", "hub_fp16"])
def test_tables_have_the_models_dtype(mode, dtype):
    """Would catch float32 tables that promote 16-bit queries, or tables built in 16 bits.

    GLM-4's are built in float32 and cast once (specs/glm-4v-9b.md 1.3).
    """
    spec = visualglm_spec(mode)
    rotary = Rotary(spec, 300, CPU, dtype)
    positions = torch.tensor([[299, 3], [1, 250]])
    cos, sin = rotary.at(positions)
    wide_cos, wide_sin = Rotary(spec, 300, CPU, torch.float32).at(positions)
    assert cos.dtype == sin.dtype == dtype
    assert torch.equal(cos, wide_cos.to(dtype))
    assert torch.equal(sin, wide_sin.to(dtype))


def test_a_position_beyond_the_table_is_refused():
    """Would catch a position that silently wraps round or is clamped."""
    rotary = Rotary(glm4_spec(), 8, CPU, torch.float32)
    with pytest.raises(IndexError):
        rotary.at(torch.tensor([[8]]))


# --- channels --------------------------------------------------------------------------------


def test_visualglm_turns_each_half_of_a_head_by_its_own_position():
    """Would catch channels swapped, or dims paired across the two halves of the head."""
    x = vector(128)
    rotary = Rotary(visualglm_spec("fp32_product"), 64, CPU, torch.float32)
    result = turn(rotary, x, 7, 40)
    v = x[0, 0].tolist()
    for half, position in ((0, 7), (64, 40)):
        for i in range(32):
            angle = position * float(np.float16(10000.0 ** (-2 * i / 64)))
            c, s = math.cos(angle), math.sin(angle)
            a, b = v[half + i], v[half + i + 32]
            assert result[half + i] == pytest.approx(a * c - b * s, abs=1e-4)
            assert result[half + i + 32] == pytest.approx(b * c + a * s, abs=1e-4)


@pytest.mark.parametrize("rope_ratio", [1.0, 500.0])
def test_glm4_turns_the_first_half_of_a_head_in_neighbouring_pairs(rope_ratio):
    """Would catch the whole head turned, the other pairing, or a ratio that divides."""
    x = vector(128)
    result = turn(Rotary(glm4_spec(rope_ratio=rope_ratio), 64, CPU, torch.float32), x, 41)
    v = x[0, 0].tolist()
    for i in range(32):
        angle = 41 * (10000.0 * rope_ratio) ** (-2 * i / 64)
        c, s = math.cos(angle), math.sin(angle)
        a, b = v[2 * i], v[2 * i + 1]
        assert result[2 * i] == pytest.approx(a * c - b * s, abs=1e-4)
        assert result[2 * i + 1] == pytest.approx(b * c + a * s, abs=1e-4)
    assert result[64:] == v[64:]


def test_three_channels_can_share_one_head_in_sections():
    """Would catch two channels being all there is: GLM-4.1V turns sections of 8, 12 and 12 pairs
    by time, row and column, with one run of frequencies over all of them.
    """
    x = vector(128)
    channels = (*repeated((0,), 8), *repeated((1, 2), 12))
    spec = RotarySpec("interleaved", inverse_frequencies(64, 10000.0), channels)
    result = turn(Rotary(spec, 64, CPU, torch.float32), x, 5, 20, 33)
    v = x[0, 0].tolist()
    for i in range(32):
        position = 5 if i < 8 else 20 if i < 20 else 33
        angle = position * 10000.0 ** (-2 * i / 64)
        c, s = math.cos(angle), math.sin(angle)
        assert result[2 * i] == pytest.approx(v[2 * i] * c - v[2 * i + 1] * s, abs=1e-4)
        assert result[2 * i + 1] == pytest.approx(v[2 * i + 1] * c + v[2 * i] * s, abs=1e-4)
    assert result[64:] == v[64:]


def test_every_token_is_turned_by_its_own_positions():
    """Would catch tokens and channels exchanged: two channels and two tokens have one shape."""
    rotary = Rotary(visualglm_spec("hub_fp16", head_dim=8), 64, CPU, torch.float32)
    x = torch.cat([vector(8, seed) for seed in range(2)])
    both = rotary.rotate(x, rotary.at(torch.tensor([[3, 9], [0, 5]])))
    assert both[0, 0].tolist() == turn(rotary, x[:1], 3, 0)
    assert both[1, 0].tolist() == turn(rotary, x[1:], 9, 5)


def test_scores_depend_on_the_distance_alone():
    """Would catch any rotation that is not one: moving query and key together changes nothing."""
    rotary = Rotary(glm4_spec(), 128, CPU, torch.float32)
    q, k = vector(128, 1), vector(128, 2)

    def score(query_at: int, key_at: int) -> float:
        a, b = turn(rotary, q, query_at), turn(rotary, k, key_at)
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-3)
    assert abs(score(9, 4) - score(9, 5)) > 0.01
    assert turn(rotary, q, 0) == q[0, 0].tolist()


def test_two_towers_may_have_unlike_tables():
    """Would catch one cached table for all (nano-vllm's rotary_embedding.py does that)."""
    first = Rotary(glm4_spec(), 8, CPU, torch.float32)
    second = Rotary(glm4_spec(rope_ratio=500.0), 8, CPU, torch.float32)
    at = torch.tensor([[7]])
    assert not torch.equal(first.at(at)[0], second.at(at)[0])
    assert torch.equal(first.at(at)[0], Rotary(glm4_spec(), 8, CPU, torch.float32).at(at)[0])


def test_repeated_names_each_channel_in_turn():
    """Would catch channels dealt out alternately."""
    assert repeated((0, 1), 3) == (0, 0, 0, 1, 1, 1)
    assert repeated((0,), 2) == (0, 0)
    assert repeated((), 4) == ()
