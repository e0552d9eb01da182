"""Shapes of the two demo models, as their config.json will say them.

Keys are the published ones; ids of special tokens are read from the tokenizer files beside them.
Sizes are chosen so that the bfloat16 weights stay below 12 MB.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glimt.inputs.tokenizer import load_tokenizer
from glimt.models import glm4v_9b, visualglm

FAMILIES = ("glm4v_9b", "visualglm")
NAMES = {"glm4v_9b": "glimt-demo-glm4v", "visualglm": "glimt-demo-visualglm"}
IMAGE_SIZE = 96
PATCH_SIZE = 8  # finer than the originals' 14: read characters of 19 pixels twice as fast
TOWER = {"layers": 6, "hidden_size": 128, "heads": 4, "intermediate_size": 512}


def demo_config(family: str, tokenizer_folder: Path) -> dict[str, Any]:
    """config.json of a demo model whose tokenizer files lie in `tokenizer_folder`."""
    return {"glm4v_9b": _glm4v, "visualglm": _visualglm}[family](tokenizer_folder)


def _glm4v(folder: Path) -> dict[str, Any]:
    special = load_tokenizer(folder, glm4v_9b.TOKENIZER).special_ids
    stops = ("<|endoftext|>", "<|user|>", "<|observation|>")
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": 6,
        "hidden_size": 192,
        "num_attention_heads": 6,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 32,
        "ffn_hidden_size": 512,
        "padded_vocab_size": _padded(max(special.values()) + 1),
        "layernorm_epsilon": 1.5625e-07,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "fp32_residual_connection": False,
        "original_rope": True,
        "rope_ratio": 1,
        "seq_length": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": [special[name] for name in stops],
        "pad_token_id": special["<|endoftext|>"],
        "boi_token_id": special["<|begin_of_image|>"],
        "eoi_token_id": special["<|end_of_image|>"],
        "vision_config": {
            "num_hidden_layers": TOWER["layers"],
            "hidden_size": TOWER["hidden_size"],
            "num_heads": TOWER["heads"],
            "intermediate_size": TOWER["intermediate_size"],
            "patch_size": PATCH_SIZE,
            "image_size": IMAGE_SIZE,
            "in_channels": 3,
            "num_positions": (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-06,
            "dropout_prob": 0.0,
            "scaling_factor": 8,
        },
    }


def _visualglm(folder: Path) -> dict[str, Any]:
    special = load_tokenizer(folder, visualglm.TOKENIZER).special_ids
    positions = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGenerationWithImage"},
        "vocab_size": 2048,
        "hidden_size": 192,
        "num_layers": 6,
        "num_attention_heads": 6,
        "inner_hidden_size": 768,
        "layernorm_epsilon": 1e-05,
        "max_sequence_length": 4096,
        "position_encoding_2d": True,
        "use_cache": True,
        "bos_token_id": special["<sop>"],
        "eos_token_id": special["<eop>"],
        "mask_token_id": special["[MASK]"],
        "gmask_token_id": special["[gMASK]"],
        "pad_token_id": special["<pad>"],
        "image_length": 32,
        "quantization_bit": 0,
        "torch_dtype": "bfloat16",
        "eva_config": {
            "num_layers": TOWER["layers"],
            "hidden_size": TOWER["hidden_size"],
            "num_attention_heads": TOWER["heads"],
            "vocab_size": 1,
            "layernorm_order": "pre",
            "model_parallel_size": 1,
            "max_sequence_length": positions,
            "inner_hidden_size": TOWER["intermediate_size"],
            "use_final_layernorm": False,
            "layernorm_epsilon": 1e-06,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "pre_len": 1,
            "post_len": 0,
            "in_channels": 3,
            "num_classes": 0,
            "patch_size": PATCH_SIZE,
        },
        "qformer_config": {
            "num_layers": 4,
            "hidden_size": 96,
            "num_attention_heads": 3,
            "vocab_size": 32,
            "layernorm_order": "post",
            "model_parallel_size": 1,
            "max_sequence_length": 0,
            "is_decoder": [True, False, True, False],
            "cross_attn_hidden_size": TOWER["hidden_size"],
            "layernorm_epsilon": 1e-12,
        },
    }


def _padded(vocab_size: int) -> int:
    """The next multiple of 64, as the published tables are padded."""
    return -(-vocab_size // 64) * 64
