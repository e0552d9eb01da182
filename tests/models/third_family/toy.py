"""A made-up third family that uses every seam at once; one file and nothing else.

A picture keeps its own grid; its rows of patches are divided by line ids, so it has one span per
row. Positions have three channels, of which the third stands still while decoding. The tower takes
packed patches of unequal lengths; blocks have four norms, heads have query and key norms, the
head is the embedding, the checkpoint stores things otherwise than the model, and the tokenizer
file has a form and an ending of its own.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from glimt.devices.base import AttentionBatch, KVCache
from glimt.layers.attention import cached_attention
from glimt.layers.embedding import Embedding
from glimt.layers.linear import Linear, PatchLinear
from glimt.layers.norm import RMSNorm
from glimt.layers.rotary import Rotary, RotarySpec, inverse_frequencies, repeated
from glimt.models.base import (
    BuildContext,
    Model,
    ModelFamily,
    Tokenizer,
    TokenizerSpec,
    Weight,
    WeightTable,
    renamed,
    special_id,
)
from glimt.models.config_reader import ConfigReader, read_json
from glimt.models.pixels import CLIP_MEAN, CLIP_STD, normalise, patchify, squash
from glimt.types import (
    EncodedPrompt,
    ImageInput,
    ImagePart,
    ImageSpan,
    Message,
    SamplingDefaults,
)

PATCH = 4
SPECIALS = "specials.toy"


class ByteTokenizer:
    """Bytes, then the special tokens in the order of the file."""

    def __init__(self, folder: Path) -> None:
        names = (folder / SPECIALS).read_text(encoding="utf-8").split()
        self.special_ids = {name: 256 + number for number, name in enumerate(names)}
        self.num_ids = 256 + len(names)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(i for i in token_ids if i < 256).decode(errors="replace")

    def decoder(self) -> ByteDecoder:
        return ByteDecoder()

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


class ByteDecoder:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._utf8.decode(bytes([token_id]) if token_id < 256 else b"")

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig:
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    max_positions: int
    torch_dtype: str

    @property
    def context_tokens(self) -> int:
        return self.max_positions

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> ToyConfig:
        r = ConfigReader(raw, where)
        r.must_be("tie_word_embeddings", True)
        names = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size")
        sizes = {name: r.integer(name) for name in (*names, "vocab_size", "max_positions")}
        config = cls(torch_dtype=r.dtype(), **sizes)
        r.check()
        return config


class ToyProcessor:
    """`<|role|>` and the message, part by part; a picture row is patches and a line id."""

    sampling_defaults = SamplingDefaults(temperature=0.7)

    def __init__(self, folder: Path, config: ToyConfig, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._ids = tokenizer.special_ids
        self.max_side = ConfigReader(
            read_json(folder / "preprocessor_config.json"), "preprocessor_config.json"
        ).integer("max_side")
        self.stop_token_ids = frozenset((special_id(self._ids, "<|user|>"),))
        self.image_settings = f"toy {PATCH} {self.max_side}"

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        scale = min(1.0, self.max_side / max(width, height))
        return max(1, round(height * scale / PATCH)), max(1, round(width * scale / PATCH))

    def image_cost(self, width: int, height: int) -> int:
        rows, columns = self._grid(width, height)
        return rows * columns

    def prepare_image(self, image: Image, digest: bytes) -> ImageInput:
        rows, columns = self._grid(image.width, image.height)
        pixels = squash(image, rows * PATCH, columns * PATCH)
        return ImageInput(digest, rows * columns, (rows, columns), pixels)

    def encode_chat(
        self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]], language: str
    ) -> EncodedPrompt:
        prompt = _Prompt(special_id(self._ids, "<patch>"), special_id(self._ids, "<line>"))
        grids = iter([self._grid(*size) for size in image_sizes])
        for message in messages:
            prompt.add_text([special_id(self._ids, f"<|{message.role}|>")])
            for part in message.parts:
                if isinstance(part, ImagePart):
                    prompt.add_image(*next(grids))
                else:
                    prompt.add_text(self.tokenizer.encode(part.text))
        prompt.add_text([special_id(self._ids, "<|assistant|>")])
        return prompt.build()

    def encode_text(self, text: str) -> EncodedPrompt:
        prompt = _Prompt(0, 0)
        prompt.add_text(self.tokenizer.encode(text))
        return prompt.build()

    def encode_tokens(self, token_ids: Sequence[int]) -> EncodedPrompt:
        prompt = _Prompt(0, 0)
        prompt.add_text(token_ids)
        return prompt.build()

    def finish_text(self, raw: str) -> str:
        return raw

    def stable_length(self, raw: str) -> int:
        return len(raw)


class _Prompt:
    def __init__(self, patch_id: int, line_id: int) -> None:
        self._patch_id, self._line_id = patch_id, line_id
        self._ids: list[int] = []
        self._positions: list[tuple[int, int, int]] = []
        self._spans: list[ImageSpan] = []
        self._next = self._num_images = 0

    def add_text(self, ids: Sequence[int]) -> None:
        self._ids += ids
        self._positions += [(self._next + i,) * 3 for i in range(len(ids))]
        self._next += len(ids)

    def add_image(self, rows: int, columns: int) -> None:
        at = self._next
        for row in range(rows):
            span = ImageSpan(len(self._ids), columns, self._num_images, row * columns)
            self._spans.append(span)
            self._ids += [*[self._patch_id] * columns, self._line_id]
            self._positions += [(at, at + row, at + column) for column in range(columns + 1)]
        self._num_images += 1
        self._next += max(rows, columns + 1)

    def build(self) -> EncodedPrompt:
        return EncodedPrompt(
            token_ids=tuple(self._ids),
            original_token_ids=tuple(self._ids),
            spans=tuple(self._spans),
            positions=np.array(self._positions, dtype=np.int64).T,
            decode_start=(self._next, self._next, self._next),
            decode_step=(1, 2, 0),
        )


class Tower(nn.Module):
    """One attention over the packed patches; rotary positions are the patch's row and column."""

    def __init__(self, config: ToyConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype, size = context.device, context.dtype, config.hidden_size
        self.device, self.num_heads = device, config.num_heads
        width = size // config.num_heads
        frequencies = inverse_frequencies(width // 2, 100.0).repeat(2)
        spec = RotarySpec("half", frequencies, repeated((0, 1), width // 4), num_segments=2)
        self.rotary = Rotary(spec, 64, device, dtype)
        self.patch = PatchLinear(3, size, PATCH, device, dtype)
        self.qkv = Linear(size, 3 * size, False, device, dtype)
        self.dense = Linear(size, size, False, device, dtype)

    def forward(self, patches: Tensor, positions: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        x = self.patch(patches)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        cos_sin = self.rotary.at(positions)
        q, k = self.rotary.rotate(q, cos_sin), self.rotary.rotate(k, cos_sin)
        scale = q.shape[-1] ** -0.5
        out = self.device.varlen_attention(q, k, v, cu_seqlens, cu_seqlens, scale)
        return x + self.dense(out.flatten(1))


class Block(nn.Module):
    """Norms before and after both branches; queries and keys are normalised per head."""

    def __init__(self, config: ToyConfig, rotary: Rotary, context: BuildContext) -> None:
        super().__init__()
        device, dtype, size, dim = (
            context.device,
            context.dtype,
            config.hidden_size,
            config.head_dim,
        )
        self.device, self.rotary, self.dim = device, rotary, dim
        self.split = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.norms = nn.ModuleList(RMSNorm(size, 1e-6, device, dtype) for _ in range(4))
        self.q_norm = RMSNorm(dim, 1e-6, device, dtype)
        self.k_norm = RMSNorm(dim, 1e-6, device, dtype)
        self.qkv = Linear(size, sum(self.split) * dim, False, device, dtype)
        self.dense = Linear(config.num_heads * dim, size, False, device, dtype)
        self.gate = Linear(size, config.ffn_size, False, device, dtype)
        self.up = Linear(size, config.ffn_size, False, device, dtype)
        self.down = Linear(config.ffn_size, size, False, device, dtype)

    def forward(
        self, h: Tensor, cos_sin: tuple[Tensor, Tensor], batch: AttentionBatch, cache: KVCache
    ) -> Tensor:
        x = self.qkv(self.norms[0](h)).unflatten(-1, (-1, self.dim))
        q, k, v = x.split(self.split, dim=1)
        q = self.rotary.rotate(self.q_norm(q), cos_sin)
        k = self.rotary.rotate(self.k_norm(k), cos_sin)
        h = h + self.norms[1](self.dense(cached_attention(self.device, q, k, v, cache, batch)))
        x = self.norms[2](h)
        return h + self.norms[3](self.down(self.device.silu_mul(self.gate(x), self.up(x))))


class ToyModel(Model):
    def __init__(self, config: ToyConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.num_layers = config.num_layers
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.device, self.dtype = device, dtype
        self.weight_table = WEIGHTS
        # Half of a head turns: of each four pairs two follow time, one the row, one the column.
        pairs = config.head_dim // 4
        channels = (*[0] * (pairs - pairs // 2), *[1] * (pairs // 4), *[2] * (pairs // 4))
        spec = RotarySpec("interleaved", inverse_frequencies(2 * pairs, 10000.0), channels)
        self.rotary = Rotary(spec, context.max_positions, device, dtype)
        self.tower = Tower(config, context)
        self.embedding = Embedding(config.vocab_size, config.hidden_size, device, dtype)
        self.blocks = nn.ModuleList(
            Block(config, self.rotary, context) for _ in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, 1e-6, device, dtype)
        self.head = Linear(config.hidden_size, config.vocab_size, False, device, dtype)
        self.head.weight = self.embedding.weight

    def image_features(self, images: Sequence[ImageInput]) -> list[Tensor]:
        pixels = [normalise(image.pixels, CLIP_MEAN, CLIP_STD) for image in images]
        patches = torch.cat([patchify(picture, PATCH) for picture in pixels])
        positions = np.concatenate([np.indices(image.grid).reshape(2, -1) for image in images], 1)
        lengths = [image.num_tokens for image in images]
        device = self.device.torch_device
        features = self.tower(
            patches.to(device, self.dtype),
            torch.from_numpy(positions).to(device),
            [0, *accumulate(lengths)],
        )
        return list(features.split(lengths))


def _split(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    return parts[0].chunk(2)


def _joined(shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    (rows, columns), _ = shapes
    return [(2 * rows, columns)]


WEIGHTS = WeightTable(
    weights=(
        *renamed(
            {
                "embed.weight": "embedding.weight",
                "final_norm.weight": "final_norm.weight",
                "tower.patch.weight": "tower.patch.weight",
                "tower.patch.bias": "tower.patch.bias",
                "tower.qkv.weight": "tower.qkv.weight",
                "tower.dense.weight": "tower.dense.weight",
            }
        ),
        *renamed(
            {
                f"layers.{{i}}.{name}.weight": f"blocks.{{i}}.{name}.weight"
                for name in ("q_norm", "k_norm", "qkv", "dense", "down")
            }
        ),
        *renamed(
            {f"layers.{{i}}.norm_{n}.weight": f"blocks.{{i}}.norms.{n}.weight" for n in range(4)}
        ),
        Weight(
            sources=("layers.{i}.gate_up.weight",),
            targets=("blocks.{i}.gate.weight", "blocks.{i}.up.weight"),
            convert=_split,
            source_shapes=_joined,
        ),
    ),
    ignored=("extra_layer.*",),
)


def _special_ids(config: ToyConfig) -> dict[str, int]:
    names = ("<|user|>", "<|assistant|>", "<patch>", "<line>")
    return {name: 256 + number for number, name in enumerate(names)}


FAMILY = ModelFamily(
    name="toy",
    claims=lambda raw: raw.get("model_type") == "toy",
    config=ToyConfig,
    tokenizer=TokenizerSpec(kind="own", file=SPECIALS, load=ByteTokenizer),
    processor=ToyProcessor,
    build=ToyModel,
    prompt_attention="causal",
    special_ids=_special_ids,
)
