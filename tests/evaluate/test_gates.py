"""Which lines a pair of settings has."""

from __future__ import annotations

from dataclasses import replace

import pytest

from glimt.evaluate.gates import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    INT4,
    INT4_SMALL_GROUPS,
    INT8,
    KV_INT8,
    SAME_16_BIT,
    W8A8,
    Setting,
    gate_for,
    widest,
)

PLAIN = Setting(
    family="glm4v_9b",
    model="sha256:0",
    device="cpu",
    dtype="float32",
    kv_dtype="auto",
    quant="none",
    quant_head="none",
    quant_tower="none",
)
B16 = replace(PLAIN, dtype="bfloat16")


@pytest.mark.parametrize(
    ("reference", "tested", "gate"),
    [
        (PLAIN, PLAIN, FLOAT32),
        (PLAIN, replace(PLAIN, isa="none", device="npu"), FLOAT32),
        (PLAIN, B16, BFLOAT16),
        (B16, PLAIN, BFLOAT16),
        (PLAIN, replace(PLAIN, dtype="float16"), FLOAT16),
        (B16, replace(PLAIN, dtype="float16"), BFLOAT16),
        (B16, replace(B16, device="cuda"), SAME_16_BIT),
        (B16, replace(B16, quant="int8"), widest([SAME_16_BIT, INT8])),
        (B16, replace(B16, quant="int8", quant_tower="w8a8"), widest([SAME_16_BIT, INT8, W8A8])),
        (PLAIN, replace(B16, quant="int4-g128"), widest([BFLOAT16, INT4])),
        (PLAIN, replace(B16, quant="int4"), widest([BFLOAT16, INT4_SMALL_GROUPS])),
        (PLAIN, replace(B16, kv_dtype="int8"), widest([BFLOAT16, KV_INT8])),
        (replace(B16, quant="int4"), replace(B16, quant="int4", isa="none"), SAME_16_BIT),
        (replace(B16, kv_dtype="int8"), B16, SAME_16_BIT),
    ],
)
def test_lines_are_those_of_what_differs(reference, tested, gate):
    """Catches a quantised setting held to a float's lines, and one that both have widening them."""
    assert gate_for(reference, tested) == gate


def test_of_several_lines_the_widest_counts():
    """Catches the line of one difference that is drawn for all."""
    gate = widest([BFLOAT16, INT4])
    assert (gate.mean_kl, gate.top1, gate.cosine_mean) == (0.05, 0.91, 0.997)
    assert gate.p99_kl is None  # 4-bit weights have none
    assert gate.ppl_ratio is None  # and bfloat16 has none of this
    assert (gate.stage_cosine, gate.tower_cosine) == (0.97, 0.97)
    assert gate.name == "bfloat16 against float32 and 4-bit weights"
    assert widest([BFLOAT16, KV_INT8]).tower_cosine == BFLOAT16.tower_cosine


def test_a_setting_is_said_without_what_is_usual():
    """Catches a report whose title does not tell two settings apart."""
    assert PLAIN.said() == "cpu, float32"
    other = replace(
        B16, quant="int4", quant_head="int8", quant_tower="w8a8", kv_dtype="int8", isa="none"
    )
    assert other.said() == (
        "cpu, bfloat16, KV cache int8, int4, head int8, tower w8a8, kernels none"
    )
