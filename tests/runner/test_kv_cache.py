"""Sizes of the real models' caches, and the zeroing of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import step_row
from glimt.devices.base import AttentionBatch, Device, KVCache, open_device
from glimt.layers.attention import cached_attention
from glimt.models.base import BuildContext, Model, find_family
from glimt.runner.feature_cache import FeatureCache
from glimt.runner.kv_cache import (
    KVCaches,
    _zeros_on_demand,
    allocate_kv,
    kv_bytes_per_token,
)
from glimt.runner.model_runner import ModelRunner
from glimt.runner.vision import VisionRunner
from glimt.types import StepPlan, StepRow

# The real config.json numbers, as far as they shape the model: specs/visualglm-6b.md 1.1 and 11,
# specs/glm-4v-9b.md 1.1 and 2.1.
VISUALGLM_6B: dict[str, Any] = {
    "model_type": "chatglm",
    "vocab_size": 130528,
    "hidden_size": 4096,
    "num_layers": 28,
    "num_attention_heads": 32,
    "inner_hidden_size": 16384,
    "layernorm_epsilon": 1e-5,
    "max_sequence_length": 2048,
    "bos_token_id": 130004,
    "eos_token_id": 130005,
    "gmask_token_id": 130001,
    "image_length": 32,
    "position_encoding_2d": True,
    "torch_dtype": "float16",
    "eva_config": {
        "vocab_size": 1,
        "layernorm_order": "pre",
        "use_final_layernorm": False,
        "pre_len": 1,
        "post_len": 0,
        "in_channels": 3,
        "num_layers": 39,
        "hidden_size": 1408,
        "num_attention_heads": 16,
        "inner_hidden_size": 6144,
        "layernorm_epsilon": 1e-6,
        "image_size": [224, 224],
        "patch_size": 14,
        "max_sequence_length": 257,
    },
    "qformer_config": {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "vocab_size": 32,
        "layernorm_order": "post",
        "is_decoder": [True, False] * 6,
        "cross_attn_hidden_size": 1408,
        "layernorm_epsilon": 1e-12,
    },
}
GLM_4V_9B: dict[str, Any] = {
    "model_type": "chatglm",
    "num_layers": 40,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": 13696,
    "padded_vocab_size": 151552,
    "layernorm_epsilon": 1.5625e-07,
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "original_rope": True,
    "tie_word_embeddings": False,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "seq_length": 8192,
    "torch_dtype": "bfloat16",
    "eos_token_id": [151329, 151336, 151338],
    "boi_token_id": 151339,
    "eoi_token_id": 151340,
    "vision_config": {
        "num_hidden_layers": 63,
        "hidden_size": 1792,
        "num_heads": 16,
        "intermediate_size": 15360,
        "patch_size": 14,
        "image_size": 1120,
        "in_channels": 3,
        "num_positions": 6401,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "scaling_factor": 8,
    },
}


def build(raw: dict[str, Any], dtype: torch.dtype) -> Model:
    """The real model's modules, with parameters that have a shape and no memory."""
    family = find_family(raw, "config.json")
    config = family.config.from_json(raw, "config.json")
    return family.build(config, BuildContext(open_device("cpu"), dtype, config.max_positions))


@pytest.mark.parametrize(
    ("raw", "dtype", "kv_bytes", "shape"),
    [
        (VISUALGLM_6B, torch.float16, 458_752, (28, 32, 128)),
        (VISUALGLM_6B, torch.float32, 917_504, (28, 32, 128)),
        (GLM_4V_9B, torch.bfloat16, 40_960, (40, 2, 128)),
        (VISUALGLM_6B, torch.int8, 2 * 28 * 32 * (128 + 4), (28, 32, 128)),
        (GLM_4V_9B, torch.int8, 2 * 40 * 2 * (128 + 4), (40, 2, 128)),
    ],
    ids=[
        "visualglm-float16",
        "visualglm-float32",
        "glm4v-bfloat16",
        "visualglm-int8",
        "glm4v-int8",
    ],
)
def test_a_token_of_the_real_models_takes_what_the_papers_say(raw, dtype, kv_bytes, shape):
    """Would catch keys counted without values, query heads in place of KV heads, or a wrong dtype.

    The numbers are those of specs/visualglm-6b.md 1.6 and specs/glm-4v-9b.md 5.
    """
    model = build(raw, torch.bfloat16)
    assert (model.num_layers, model.num_kv_heads, model.head_dim) == shape
    assert kv_bytes_per_token(model, dtype) == kv_bytes


class Geometry:
    """As much of a model as the cache asks for."""

    num_layers, num_kv_heads, head_dim = 3, 2, 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_a_cache_is_as_large_as_was_counted_and_zero(dtype):
    """Would catch a budget that differs from what is allocated, and padding that reads NaN."""
    caches = allocate_kv(Geometry(), 5, 8, dtype, Device())
    assert [cache.block_size for cache in caches] == [8] * 3
    tensors = [tensor for cache in caches for tensor in cache.tensors()]
    total = sum(tensor.nbytes for tensor in tensors)
    assert total == kv_bytes_per_token(Geometry(), dtype) * 5 * 8
    assert not any(tensor.any() for tensor in tensors)
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    assert len(tensors) == (12 if dtype == torch.int8 else 6)


def test_clearing_zeroes_these_blocks_and_no_others():
    """Would catch a NaN left in one layer, in the keys only, or a neighbour's block wiped."""
    bad = [1, 3]
    caches = KVCaches(
        KVCache(torch.full((5, 2, 2, 4), float("nan")), torch.full((5, 2, 2, 4), float("nan")))
        for _ in range(3)
    )
    caches.clear_blocks(bad)
    for tensor in (t for cache in caches for t in (cache.key, cache.value)):
        assert [bool(block.isnan().any()) for block in tensor] == [True, False, True, False, True]
        assert not tensor[bad].any()


def test_clearing_takes_scales_that_are_not_finite_along():
    """Would catch NaN that outlives its sequence in the scales, the only place for it in int8."""
    values = (torch.full((5, 2, 2, 4), 7).char() for _ in range(2))
    cache = KVCache(*values, *(torch.full((5, 2, 2), float("nan")) for _ in range(2)))
    caches = KVCaches([cache])
    caches.clear_blocks([1])
    caches.clear_slots(torch.tensor([6]))
    for tensor in cache.tensors():
        cleared = [not slot.any() for slot in tensor.flatten(0, 1)]
        assert cleared == [slot in (2, 3, 6) for slot in range(10)]


class OneHead(Model):
    """The least that attends: one layer, and a token's id is its query, key and value."""

    num_layers, num_kv_heads, head_dim = 1, 1, 8

    def embed(self, token_ids: Tensor) -> Tensor:
        return token_ids[:, None].expand(-1, 8).float() / 10

    def forward(
        self, hidden: Tensor, positions: Tensor, batch: AttentionBatch, caches: Sequence[KVCache]
    ) -> Tensor:
        x = hidden[:, None]
        return cached_attention(open_device("cpu"), x, x, x, caches[0], batch)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def one_token(token_id: int, start: int, table: tuple[int, ...]) -> StepRow:
    return step_row(sequence_id=table[0], token_ids=[token_id], start=start, block_table=table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_what_the_last_owner_of_a_block_left_does_not_reach_the_next(dtype):
    """Would catch NaN that outlives its sequence: an aborted prefill is not known to be poisoned,
    so its blocks are handed on as they are, and the next owner's decodes read them whole.
    """
    model, cpu = OneHead(), open_device("cpu")

    def run(dirty: float) -> Tensor:
        caches = allocate_kv(model, 4, 4, dtype, Device())
        for tensor in caches[0].tensors():
            tensor.fill_(dirty if tensor.is_floating_point() else 7)
        runner = ModelRunner(model, caches, VisionRunner(model, FeatureCache(0), 1), cpu)
        steps = [
            StepPlan((one_token(i + 1, i, (3, 1)), one_token(9 - i, i, (0, 2)))) for i in range(6)
        ]
        return torch.stack([runner.run(step).logits for step in steps])

    clean = run(0.0)
    assert clean.isfinite().all()
    assert torch.equal(run(float("nan")), clean)


def test_clearing_nothing_changes_nothing():
    """Would catch an empty index being refused, or read as all blocks."""
    cache = KVCache(torch.ones(2, 2, 1, 1), torch.ones(2, 2, 1, 1))
    KVCaches([cache]).clear_blocks([])
    assert cache.key.all()
    assert cache.value.all()


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    with open("/proc/self/status", encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["RssAnon"].split()[0]) * 1024


def test_blocks_take_memory_when_they_are_written():
    """Would catch a cache of gigabytes being touched at start, most of it for nothing."""
    before = _anonymous_bytes()
    cache = KVCache(*(_zeros_on_demand((4096, 32, 2, 128), torch.bfloat16) for _ in range(2)))
    assert _anonymous_bytes() - before < 16 * 2**20, "of 128 MiB"
    cache.key[7] = 1
    assert cache.key[7].min() == 1
    assert not cache.key[8].any()
    assert not cache.value[7].any()
