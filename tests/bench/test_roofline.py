"""Bytes and operations of the published models against the arithmetic done by hand."""

import pytest
import torch

from glimt.bench.roofline import ModelCosts, costs_of, mfu
from glimt.config import EngineConfig
from glimt.loader import open_model


def costs(name: str) -> ModelCosts:
    opened = open_model(EngineConfig(model=name, dtype="bfloat16"))
    return costs_of(opened.family, opened.config, opened.processor, torch.bfloat16)


@pytest.fixture(scope="module")
def glm4v() -> ModelCosts:
    return costs("synthetic:glm-4v-9b")


@pytest.fixture(scope="module")
def visualglm() -> ModelCosts:
    return costs("synthetic:visualglm-6b")


H, FFN, VOCAB = 4096, 13696, 151552


def test_glm4v_reads_its_blocks_and_head_in_every_step(glm4v):
    """Catches the embedding or the tower counted as read, or the head forgotten."""
    layer = H * (32 + 2 * 2) * 128 + H * H + H * 2 * FFN + FFN * H
    small = 2 * H + (32 + 2 * 2) * 128  # two norms and the bias of q, k and v
    assert glm4v.layer_products == 40 * layer
    assert glm4v.head_products == VOCAB * H
    assert glm4v.step_bytes == 2 * (40 * (layer + small) + H + VOCAB * H)
    assert glm4v.kv_bytes == 40_960


def test_a_glm4v_picture_is_the_published_arithmetic(glm4v):
    """Catches a tower without attention, or an adapter counted for 6,401 rows."""
    n, h, f, layers = 6401, 1792, 15360, 63
    tower = 2 * n * (4 * h * h + 2 * h * f) * layers + 4 * n * n * h * layers
    patches = 2 * 6400 * 3 * 14 * 14 * h
    adapter = 2 * 1600 * (4 * h * H + H * H + 3 * H * FFN)
    assert glm4v.image_ops == tower + patches + adapter
    assert glm4v.image_ops == pytest.approx(73.96e12, rel=1e-4)


def test_a_visualglm_picture_is_the_published_arithmetic(visualglm):
    """Catches a Q-Former counted for the tower's rows, and cross attention in every layer."""
    n, h, f, q, d = 257, 1408, 6144, 32, 768
    tower = 39 * (2 * n * (4 * h * h + 2 * h * f) + 4 * n * n * h) + 2 * 256 * 588 * h
    own = 12 * (2 * q * (4 * d * d + 2 * d * 4 * d) + 4 * q * q * d)
    cross = 6 * (2 * q * 2 * d * d + 2 * n * h * 2 * d + 4 * q * n * d)
    assert visualglm.image_ops == tower + own + cross + 2 * q * d * 4096


def test_visualglm_reads_and_keeps_what_the_papers_say(visualglm):
    """Catches biases left out, and grouped keys taken for one per head."""
    assert visualglm.step_bytes == pytest.approx(12.35e9, rel=1e-3)
    assert visualglm.kv_bytes == 458_752


def test_a_prompt_costs_two_operations_a_value_and_half_of_the_attention(glm4v):
    """Catches full attention for a causal prompt, and a head for every row."""
    tokens = 1664
    expected = 2 * 40 * 203_948_032 * tokens + 2 * 40 * 4096 * tokens**2 + 2 * VOCAB * H
    assert glm4v.prefill_ops(tokens) == expected
    assert glm4v.prefill_ops(tokens) == pytest.approx(28.1e12, rel=2e-3)


TOY = ModelCosts(
    layer_products=100,
    head_products=20,
    step_bytes=240,
    kv_bytes=8,
    num_layers=2,
    attention_size=4,
    image_ops=0,
)


def test_a_step_reads_weights_once_and_every_rows_context():
    """Catches weights multiplied by the batch."""
    assert TOY.decode_bytes(3, 10) == 240 + 3 * 10 * 8
    assert TOY.decode_ops(3, 10) == 3 * (2 * 120 + 4 * 2 * 4 * 10)


def test_shares_are_work_over_time_over_limit():
    """Catches a share turned upside down."""
    assert TOY.mbu(step_s=2.0, read_limit=240) == 0.5
    assert mfu(ops=100, seconds=4, ops_limit=50) == 0.5
    assert TOY.with_weights(60).mbu(1.0, 60) == 1.0


def test_a_step_is_held_up_by_reading_or_by_multiplying():
    """Catches the sum of both, or the smaller of the two, as the limit."""
    costs = ModelCosts(
        layer_products=90,
        head_products=10,
        step_bytes=200,
        kv_bytes=2,
        num_layers=1,
        attention_size=5,
        image_ops=1000,
    )
    # 2 rows, 10 tokens of context: 200 + 2*10*2 bytes, 2 * (2*100 + 4*5*10) operations.
    assert costs.decode_limit_s(2, 10, read_limit=240, ops_limit=8000) == 1.0
    assert costs.decode_limit_s(2, 10, read_limit=2400, ops_limit=400) == 2.0
    # 4 tokens: 2*90*4 + 2*5*4² + 2*10 = 900 operations a prompt, and 1000 its picture.
    assert costs.prefill_limit_s(2, 4, 1, read_limit=1e9, ops_limit=1900) == 2.0
    assert costs.prefill_limit_s(2, 4, 0, read_limit=1e9, ops_limit=1800) == 1.0
    assert costs.prefill_limit_s(1, 4, 0, read_limit=100, ops_limit=1e9) == 2.0
