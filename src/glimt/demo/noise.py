"""A small model with random weights and a toy tokenizer: it runs like a real one and says noise.

For tests, and for trying every command before a real checkpoint is at hand.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from glimt.demo.toy_tokenizer import write_toy_sentencepiece, write_toy_tiktoken
from glimt.devices.base import open_device
from glimt.inputs.tokenizer import load_tokenizer
from glimt.models.base import BuildContext, find_family
from glimt.weights import checkpoint_shapes

FAMILIES = ("glm4v_9b", "visualglm")


def write_noise_model(folder: Path, family: str, seed: int = 0) -> None:
    """Write config.json, tokenizer and random float32 weights (about 1 MB) of a family.

    The same seed gives the same weights. Raises ValueError for an unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    folder.mkdir(parents=True, exist_ok=True)
    config = _glm4v_config(folder) if family == "glm4v_9b" else _visualglm_config(folder)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(random_weights(config, seed), folder / "model.safetensors", {"format": "pt"})


def random_weights(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """float32 tensors [*shape] under the checkpoint's own names, for any family's config.json.

    Matrices are scaled by 1/sqrt(fan-in), gains stand around 1 and biases around 0, so that
    activations keep their size through any number of layers.
    """
    family = find_family(config, "config.json")
    parsed = family.config.from_json(config, "config.json")
    context = BuildContext(open_device("cpu"), torch.float32, parsed.max_positions)
    shapes = checkpoint_shapes(family.build(parsed, context))
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shape, generator) for name, shape in sorted(shapes.items())}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        is_gain = "norm" in name and name.endswith("weight")
        return 0.1 * noise + (1.0 if is_gain else 0.0)
    is_table = "embedding" in name
    return noise if is_table else noise / math.sqrt(math.prod(shape[1:]))


def _glm4v_config(folder: Path) -> dict[str, Any]:
    write_toy_tiktoken(folder)
    family = find_family({"model_type": "chatglm", "padded_vocab_size": 0, "vision_config": {}}, "")
    special = load_tokenizer(folder, family.tokenizer).special_ids
    stops = ("<|endoftext|>", "<|user|>", "<|observation|>")
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 16,
        "ffn_hidden_size": 96,
        "padded_vocab_size": 544,
        "layernorm_epsilon": 1.5625e-07,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
        "fp32_residual_connection": False,
        "original_rope": True,
        "seq_length": 1024,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": [special[name] for name in stops],
        "pad_token_id": special["<|endoftext|>"],
        "boi_token_id": special["<|begin_of_image|>"],
        "eoi_token_id": special["<|end_of_image|>"],
        "vision_config": {
            "num_hidden_layers": 2,
            "hidden_size": 48,
            "num_heads": 4,
            "intermediate_size": 80,
            "patch_size": 14,
            "image_size": 112,
            "in_channels": 3,
            "num_positions": 65,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-06,
            "scaling_factor": 8,
        },
    }


def _visualglm_config(folder: Path) -> dict[str, Any]:
    write_toy_sentencepiece(folder)
    family = find_family({"model_type": "chatglm", "eva_config": {}, "qformer_config": {}}, "")
    special = load_tokenizer(folder, family.tokenizer).special_ids
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGenerationWithImage"},
        "vocab_size": 672,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
        "inner_hidden_size": 160,
        "layernorm_epsilon": 1e-05,
        "max_sequence_length": 512,
        "position_encoding_2d": True,
        "bos_token_id": special["<sop>"],
        "eos_token_id": special["<eop>"],
        "mask_token_id": special["[MASK]"],
        "gmask_token_id": special["[gMASK]"],
        "pad_token_id": special["<pad>"],
        "image_length": 32,
        "torch_dtype": "float32",
        "eva_config": {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": 1,
            "layernorm_order": "pre",
            "max_sequence_length": 257,
            "inner_hidden_size": 48,
            "use_final_layernorm": False,
            "layernorm_epsilon": 1e-06,
            "image_size": [224, 224],
            "pre_len": 1,
            "post_len": 0,
            "in_channels": 3,
            "num_classes": 0,
            "patch_size": 14,
        },
        "qformer_config": {
            "num_layers": 2,
            "hidden_size": 24,
            "num_attention_heads": 3,
            "vocab_size": 32,
            "layernorm_order": "post",
            "max_sequence_length": 0,
            "is_decoder": [True, False],
            "cross_attn_hidden_size": 32,
            "layernorm_epsilon": 1e-12,
        },
    }
