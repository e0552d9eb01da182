"""Models of published widths with random weights, made in memory: to time, and to try with.

`synthetic:NAME,layers=4,vision-layers=4,seed=1` stands where a model folder is named. NAME is a
published model, or a folder whose config.json is taken; what it says is noise.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glimt.checkpoint import Checkpoint, Shape, TensorInfo
from glimt.errors import ConfigError
from glimt.models.base import Model, TokenDecoder
from glimt.models.config_reader import read_model_config
from glimt.weights import checkpoint_shapes

PREFIX = "synthetic:"


# --- what is asked for -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SyntheticName:
    """A synthetic model's name, taken apart.

    layers, vision_layers: of the language model and of the tower; None: as published
    """

    base: str
    layers: int | None = None
    vision_layers: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        given = {"layers": self.layers, "vision-layers": self.vision_layers}
        given |= {"seed": self.seed or None}
        parts = [f"{name}={value}" for name, value in given.items() if value is not None]
        return PREFIX + ",".join([self.base, *parts])

    @property
    def folder(self) -> Path:
        """Where files beside config.json would be; of a published model nowhere."""
        return Path(str(self) if self.base in PUBLISHED else self.base).expanduser()


def is_synthetic(name: str) -> bool:
    """Whether a model's name asks for random weights."""
    return name.startswith(PREFIX)


_COUNTS = {"layers": 1, "vision-layers": 1, "seed": 0}  # and the least that each may be


def parse_name(name: str) -> SyntheticName:
    """Take a name apart. Raises ConfigError listing what is wrong with it."""
    base, *parts = name.removeprefix(PREFIX).split(",")
    given: dict[str, int] = {}
    problems = []
    for part in parts:
        key, _, value = part.partition("=")
        if key not in _COUNTS:
            problems.append(f"{part!r} is unknown; there are {', '.join(_COUNTS)}")
        elif not value.isdecimal() or int(value) < _COUNTS[key]:
            problems.append(f"{key} is {value!r}; a whole number >= {_COUNTS[key]} is needed")
        else:
            given[key.replace("-", "_")] = int(value)
    if base not in PUBLISHED and not Path(base).expanduser().is_dir():
        known = ", ".join(PUBLISHED)
        problems.append(f"{base!r} is neither a folder nor one of {known}")
    if problems:
        raise ConfigError(name, problems)
    return SyntheticName(base, **given)


def published_config(name: SyntheticName) -> dict[str, Any]:
    """The config.json with its layers cut. Raises ConfigError if it has fewer than asked for."""
    raw = dict(PUBLISHED.get(name.base) or read_model_config(name.folder))
    problems = []
    if name.layers is not None:
        problems += _cut(raw, "num_layers", name.layers, "layers")
    if name.vision_layers is not None:
        key, count = next((it for it in _TOWERS if it[0] in raw), _TOWERS[0])
        raw[key] = dict(raw.get(key) or {})
        problems += _cut(raw[key], count, name.vision_layers, "vision-layers")
    if problems:
        raise ConfigError(str(name), problems)
    return raw


# The object of config.json that describes the tower, and its number of layers in there.
_TOWERS = (("vision_config", "num_hidden_layers"), ("eva_config", "num_layers"))


def _cut(section: dict[str, Any], key: str, wanted: int, said: str) -> list[str]:
    if key not in section:
        return [f"{said} is {wanted}, but config.json does not say how many there are ({key})"]
    if wanted > section[key]:
        return [f"{said} is {wanted}, but the published model has {section[key]}"]
    section[key] = wanted
    return []


# --- weights ---------------------------------------------------------------------------------

_BLOCK = 1_048_573  # values; a prime, so that no row of a matrix repeats another


def synthetic_checkpoint(name: SyntheticName, model: Model, dtype: torch.dtype) -> Checkpoint:
    """A checkpoint without files: every tensor is made when it is read, in its final dtype.

    Read like any other, so whatever is done to weights on their way is done to these too.
    """
    file = Path(str(name))
    shapes = checkpoint_shapes(model)
    tensors = {key: TensorInfo(key, file, shape, dtype) for key, shape in shapes.items()}
    reader = _reader(name.seed, shapes, dtype)
    return Checkpoint(file, (file,), tensors, open_reader=reader)


def _reader(seed: int, shapes: Mapping[str, Shape], dtype: torch.dtype) -> Any:
    @contextmanager
    def open_noise(file: Path) -> Iterator[Callable[[str], Tensor]]:
        noise = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))
        yield lambda name: draw(name, shapes[name], noise, dtype)

    return open_noise


def draw(name: str, shape: Shape, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """One tensor: `noise` over and over, from a place that its name tells.

    Matrices are scaled by 1/sqrt(fan-in), gains stand around 1 and biases around 0, so that
    activations keep their size through any number of layers. noise: [n] float32, of variance 1
    """
    is_gain = len(shape) == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight")
    scale = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
    scale = 1.0 if "embedding" in name else scale
    block = (noise * scale + float(is_gain)).to(dtype)
    start = zlib.crc32(name.encode()) % len(block)
    block = torch.cat((block[start:], block[:start]))
    tensor = torch.empty(math.prod(shape), dtype=dtype)
    for part in tensor.split(len(block)):
        part.copy_(block[: len(part)])
    return tensor.view(shape)


# --- tokenizer -------------------------------------------------------------------------------


class SyntheticTokenizer:
    """One token a character; text comes back as printable letters. Has the family's special ids.

    num_plain: ids below are text's: those before the first special one but 0
    """

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self.special_ids = special_ids
        self.num_plain = min(filter(None, special_ids.values()))
        self.num_ids = 1 + max(special_ids.values())
        self._hidden = frozenset(special_ids.values())

    def encode(self, text: str) -> list[int]:
        """Never an id of a special token."""
        ids = [1 + ord(letter) % (self.num_plain - 1) for letter in text]
        return [1 if i in self._hidden else i for i in ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        """A letter for each id that is not special: noise looks like noise."""
        return "".join(chr(ord("a") + i % 26) for i in token_ids if i not in self._hidden)

    def decoder(self) -> TokenDecoder:
        """Itself: it keeps nothing."""
        return self

    def token_bytes(self, token_id: int) -> bytes:
        """The letter of one token."""
        return self.decode([token_id]).encode()

    def feed(self, token_id: int) -> str:
        """The letter of one token."""
        return self.decode([token_id])

    def finish(self) -> str:
        """Nothing is ever held back."""
        return ""


# --- published configurations ----------------------------------------------------------------

# What the published config.json files say of what is computed. `scaling_factor`, `layer_norm_eps`
# and `rope_ratio` of GLM-4v could not be read anywhere; they cost no time whatever they are.
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "glm-4v-9b": {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "num_layers": 40,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "kv_channels": 128,
        "ffn_hidden_size": 13696,
        "padded_vocab_size": 151552,
        "layernorm_epsilon": 1.5625e-07,
        "rmsnorm": True,
        "post_layer_norm": True,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "apply_residual_connection_post_layernorm": False,
        "fp32_residual_connection": False,
        "original_rope": True,
        "seq_length": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": [151329, 151336, 151338],
        "pad_token_id": 151329,
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
            "layer_norm_eps": 1e-06,
            "scaling_factor": 8,
        },
    },
    "visualglm-6b": {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGenerationWithImage"},
        "vocab_size": 130528,
        "hidden_size": 4096,
        "num_layers": 28,
        "num_attention_heads": 32,
        "inner_hidden_size": 16384,
        "layernorm_epsilon": 1e-05,
        "max_sequence_length": 2048,
        "position_encoding_2d": True,
        "bos_token_id": 130004,
        "eos_token_id": 130005,
        "mask_token_id": 130000,
        "gmask_token_id": 130001,
        "pad_token_id": 3,
        "image_length": 32,
        "torch_dtype": "float16",
        "eva_config": {
            "num_layers": 39,
            "hidden_size": 1408,
            "num_attention_heads": 16,
            "vocab_size": 1,
            "layernorm_order": "pre",
            "max_sequence_length": 257,
            "inner_hidden_size": 6144,
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
            "num_layers": 12,
            "hidden_size": 768,
            "num_attention_heads": 12,
            "vocab_size": 32,
            "layernorm_order": "post",
            "max_sequence_length": 0,
            "is_decoder": [True, False] * 6,
            "cross_attn_hidden_size": 1408,
            "layernorm_epsilon": 1e-12,
        },
    },
}
