"""GLM-4v-9B: EVA2-CLIP-E tower, convolution and GLU adapter, GLM-4 language model.

Also GLM-4-9B text checkpoints, which are the same without `vision_config`. Sources: the hub's
modeling_chatglm.py and visual.py of glm-4v-9b (June 2024); shapes proved by its parameter count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from glimt.devices.base import AttentionBatch, Device, KVCache
from glimt.errors import ConfigError, RequestError
from glimt.layers.attention import (
    MLP_SHARE,
    BlockShape,
    GeluMlp,
    TowerAttention,
    cached_attention,
)
from glimt.layers.embedding import Embedding, PatchEmbedding
from glimt.layers.linear import Head, Linear, PatchLinear, empty_parameter, mlp
from glimt.layers.norm import LayerNorm, RMSNorm
from glimt.layers.rotary import Rotary, RotarySpec, inverse_frequencies, repeated
from glimt.layers.tower import (
    PART_ROWS,
    PatchTower,
    Stages,
    TowerBlock,
    by_rows,
    part_rows_for,
    run_through,
    without_last_pause,
)
from glimt.models.base import (
    BuildContext,
    Model,
    ModelFamily,
    Tokenizer,
    TokenizerSpec,
    WeightTable,
    renamed,
    special_id,
)
from glimt.models.config_reader import ConfigReader, read_json
from glimt.models.pixels import CLIP_MEAN, CLIP_STD, normalise, normalised, patchify, squash
from glimt.parallel import ALONE, Group, Part, divided, divided_vocabulary, in_blocks, share
from glimt.types import (
    EncodedPrompt,
    Function,
    ImageInput,
    ImageSpan,
    Message,
    SamplingDefaults,
    ToolCall,
)

if TYPE_CHECKING:
    from PIL.Image import Image


# --- config ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """`vision_config` of config.json."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    patch_size: int
    image_size: int
    num_positions: int
    layer_norm_eps: float
    scaling_factor: float

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_image_tokens(self) -> int:
        """Rows that enter the language model: 2x2 patches merged, plus begin and end."""
        return (self.grid // 2) ** 2 + 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm4vConfig:
    """config.json of GLM-4v-9B, or of a GLM-4-9B text model (vision is None)."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    layernorm_epsilon: float
    qkv_bias: bool
    linear_bias: bool
    interleaved_rotary: bool
    rope_ratio: float
    seq_length: int
    torch_dtype: str
    eos_token_ids: tuple[int, ...]
    boi_token_id: int
    eoi_token_id: int
    vision: VisionConfig | None

    @property
    def context_tokens(self) -> int:
        """The longest sequence the checkpoint was trained for."""
        return self.seq_length

    @property
    def max_positions(self) -> int:
        """A picture's patches share one position, so this is not the cache's limit."""
        return self.seq_length

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> Glm4vConfig:
        """Read a parsed config.json; ConfigError lists everything missing or unsupported."""
        r = ConfigReader(raw, where)
        for name, only in _ONLY.items():
            r.must_be(name, only)
        r.may_only_be("pre_seq_len", None)
        has_vision = raw.get("vision_config") is not None
        vision = _read_vision(r.section("vision_config")) if has_vision else None
        heads = r.integer("num_attention_heads")
        grouped = r.flag("multi_query_attention")
        config = cls(
            num_layers=r.integer("num_layers"),
            hidden_size=r.integer("hidden_size"),
            num_heads=heads,
            num_kv_heads=r.integer("multi_query_group_num") if grouped else heads,
            head_dim=r.integer("kv_channels"),
            ffn_hidden_size=r.integer("ffn_hidden_size"),
            vocab_size=r.integer("padded_vocab_size"),
            layernorm_epsilon=r.number("layernorm_epsilon"),
            qkv_bias=r.flag("add_qkv_bias"),
            linear_bias=r.flag("add_bias_linear"),
            interleaved_rotary=r.flag("original_rope"),
            rope_ratio=r.number("rope_ratio", default=1.0),
            seq_length=r.integer("seq_length"),
            torch_dtype=r.dtype(),
            eos_token_ids=r.ids("eos_token_id"),
            boi_token_id=r.integer("boi_token_id", low=0) if vision else -1,
            eoi_token_id=r.integer("eoi_token_id", low=0) if vision else -1,
            vision=vision,
        )
        r.divides("num_attention_heads", heads, "multi_query_group_num", config.num_kv_heads)
        r.divides("kv_channels", config.head_dim, "rotary pairs of two halves", 4)
        r.check()
        return config


# What the published checkpoints say and the only thing that is computed here.
_ONLY: dict[str, Any] = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "tie_word_embeddings": False,
}


def _read_vision(r: ConfigReader) -> VisionConfig:
    r.must_be("hidden_act", "gelu")
    r.must_be("in_channels", 3)
    config = VisionConfig(
        num_layers=r.integer("num_hidden_layers"),
        hidden_size=r.integer("hidden_size"),
        num_heads=r.integer("num_heads"),
        intermediate_size=r.integer("intermediate_size"),
        patch_size=r.integer("patch_size"),
        image_size=r.integer("image_size"),
        num_positions=r.integer("num_positions"),
        layer_norm_eps=r.number("layer_norm_eps"),
        scaling_factor=r.number("scaling_factor"),
    )
    r.divides("hidden_size", config.hidden_size, "num_heads", config.num_heads)
    r.divides("image_size", config.image_size, "2 * patch_size", 2 * config.patch_size)
    num_positions = "num_positions", config.num_positions
    r.must_agree(num_positions, config.grid**2 + 1, "image_size", "patch_size")
    return config


# --- prompt and picture ----------------------------------------------------------------------

_SPECIALS = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
    "<|begin_of_video|>", "<|end_of_video|>",
)  # fmt: skip

TOKENIZER = TokenizerSpec(
    kind="tiktoken",
    file="tokenizer.model",
    pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    special_names=_SPECIALS,
)


class Glm4vProcessor:
    """Messages to ids: `[gMASK]<sop>`, then per message `<|role|>\\n`, its pictures, its text."""

    def __init__(self, folder: Path, config: Glm4vConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        ids = tokenizer.special_ids
        self._prefix = [special_id(ids, "[gMASK]"), special_id(ids, "<sop>")]
        self._roles = {
            role: special_id(ids, f"<|{role}|>")
            for role in ("system", "user", "assistant", "observation")
        }
        self._newline = tokenizer.encode("\n")
        self._filler = special_id(ids, "<|endoftext|>")
        generation = ConfigReader(_generation_config(folder), "generation_config.json")
        self.stop_token_ids = frozenset(config.eos_token_ids)
        self.knows_tools = config.vision is None
        self._tools_form = _ToolsForm.of_folder(folder)
        self.sampling_defaults = _sampling_defaults(generation)
        problems = [f"{generation.where}: {problem}" for problem in generation.problems]
        problems += self._image_id_problems()
        if problems:
            raise ConfigError(str(folder), problems)
        self.image_settings = (
            f"glm4v_9b bicubic squash {config.vision and config.vision.image_size}"
        )

    def _image_id_problems(self) -> list[str]:
        if self.config.vision is None:
            return []
        ids = self.tokenizer.special_ids
        named = special_id(ids, "<|begin_of_image|>"), special_id(ids, "<|end_of_image|>")
        said = self.config.boi_token_id, self.config.eoi_token_id
        if named == said:
            return []
        return [f"boi_token_id, eoi_token_id are {said} but the tokenizer's ids are {named}"]

    def _vision(self) -> VisionConfig:
        if self.config.vision is None:
            raise RequestError("image", "this is a text model; send the request without pictures")
        return self.config.vision

    def image_cost(self, width: int, height: int) -> int:
        """The same for every picture: all are squashed to one size."""
        return self._vision().num_image_tokens

    def prepare_image(self, image: Image, digest: bytes) -> ImageInput:
        """Squash to the tower's square."""
        vision = self._vision()
        pixels = squash(image, vision.image_size, vision.image_size)
        grid = (vision.grid, vision.grid)
        return ImageInput(digest, vision.num_image_tokens, grid, pixels)

    def encode_chat(
        self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]], language: str
    ) -> EncodedPrompt:
        """Encode a conversation; a message with neither text nor picture emits nothing."""
        prompt = self._conversation(messages, image_sizes)
        prompt.add_text([self._roles["assistant"]])
        return prompt.build()

    def encode_open(
        self,
        messages: Sequence[Message],
        image_sizes: Sequence[tuple[int, int]],
        language: str,
        prompt_end: str,
    ) -> EncodedPrompt:
        """Both ends are the end of the last message: no end of turn is ever written."""
        return self._conversation(messages, image_sizes).build()

    def _conversation(
        self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]]
    ) -> _PromptBuilder:
        prompt = _PromptBuilder(self._prefix)
        costs = iter([self.image_cost(*size) for size in image_sizes])
        for message in messages:
            if message.text or message.num_images:
                self._add_message(prompt, message, costs)
            for call in message.calls:
                self._add_call(prompt, call)
        return prompt

    def _add_message(self, prompt: _PromptBuilder, message: Message, costs: Iterator[int]) -> None:
        prompt.add_text([self._roles[message.role], *self._newline])
        for _ in range(message.num_images):
            ids = (self.config.boi_token_id, self._filler, self.config.eoi_token_id)
            prompt.add_image(ids, next(costs))
        prompt.add_text(self.tokenizer.encode(message.text))

    def _add_call(self, prompt: _PromptBuilder, call: ToolCall) -> None:
        """A turn of its own; the line of the role, empty in any other turn, has the name."""
        prompt.add_text([self._roles["assistant"], *self.tokenizer.encode(f"{call.name}\n")])
        prompt.add_text(self.tokenizer.encode(call.arguments))

    def tools_text(self, functions: Sequence[Function]) -> str:
        """The opening, then each function in JSON, as the checkpoint's own template has them."""
        return self._tools_form.text(functions)

    def encode_text(self, text: str) -> EncodedPrompt:
        """`[gMASK]<sop>` and the text."""
        prompt = _PromptBuilder(self._prefix)
        prompt.add_text(self.tokenizer.encode(text))
        return prompt.build()

    def encode_tokens(self, token_ids: Sequence[int]) -> EncodedPrompt:
        """The ids as they are, each one position further."""
        prompt = _PromptBuilder([])
        prompt.add_text(token_ids)
        return prompt.build()

    def finish_text(self, raw: str) -> str:
        """Replies usually begin with a line feed, which the original strips."""
        return raw.strip()

    def stable_length(self, raw: str) -> int:
        """Everything but trailing blanks, which are stripped if nothing follows."""
        return len(raw.rstrip())


# As the first release writes it (tokenization_chatglm.py, June 2024), which has no template.
_TOOLS_OPENING = (
    "你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。"
)
_CALL_ADVICE = "在调用上述函数时，请使用 Json 格式表示调用的参数。"
# Later releases have templates that differ in the opening. transformers renders them without the
# line feed behind a block (trim_blocks), so that one before the heading is not in the prompt.
_TOOLS_IN_TEMPLATE = re.compile(
    r"<\|system\|>\n([^{}]+)\{% set tools = item\['tools'\] %\}\{% for tool in tools %\}"
    r"\{% if tool\['type'\] == 'function' %\}\n(\n*)## "
)


@dataclass(frozen=True, slots=True)
class _ToolsForm:
    """How a checkpoint writes the functions that it may call: what comes first, and before each."""

    opening: str = _TOOLS_OPENING
    gap: str = "\n\n"

    @classmethod
    def of_folder(cls, folder: Path) -> _ToolsForm:
        """From the checkpoint's own template, where it has one of GLM-4's form."""
        path = folder / "tokenizer_config.json"
        template = read_json(path).get("chat_template") if path.exists() else None
        found = _TOOLS_IN_TEMPLATE.search(template) if isinstance(template, str) else None
        return cls(*found.groups()) if found else cls()

    def text(self, functions: Sequence[Function]) -> str:
        return self.opening + "".join(map(self._offered, functions))

    def _offered(self, function: Function) -> str:
        described = json.dumps(function.described, ensure_ascii=False, indent=4)
        return f"{self.gap}## {function.name}\n\n{described}\n{_CALL_ADVICE}"


class _PromptBuilder:
    """Collects ids, spans and positions.

    begin p | patches, all p+1 | end p+2 | text p+3 …: a picture moves the position on by 3,
    whatever its length, and the cache by its full length.
    """

    def __init__(self, prefix: Sequence[int]) -> None:
        self._original: list[int] = []
        self._expanded: list[int] = []
        self._positions: list[int] = []
        self._spans: list[ImageSpan] = []
        self.add_text(prefix)

    def add_text(self, ids: Sequence[int]) -> None:
        start = len(self._original)
        self._original += ids
        self._expanded += ids
        self._positions += range(start, start + len(ids))

    def add_image(self, ids: tuple[int, int, int], cost: int) -> None:
        begin, filler, end = ids
        at, patches = len(self._original), cost - 2
        self._spans.append(ImageSpan(len(self._expanded), cost, len(self._spans)))
        self._original += ids
        self._expanded += [begin, *[filler] * patches, end]
        self._positions += [at, *[at + 1] * patches, at + 2]

    def build(self) -> EncodedPrompt:
        return EncodedPrompt(
            token_ids=tuple(self._expanded),
            original_token_ids=tuple(self._original),
            spans=tuple(self._spans),
            positions=np.array([self._positions], dtype=np.int64),
            decode_start=(len(self._original),),
            decode_step=(1,),
        )


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _sampling_defaults(r: ConfigReader) -> SamplingDefaults:
    """Temperature 0.8 and top-p 0.8 are the original chat()'s own, used when the file is absent."""
    return SamplingDefaults(
        temperature=r.number("temperature", default=0.8) if r.flag("do_sample", True) else 0.0,
        top_p=r.number("top_p", default=0.8),
        top_k=r.integer("top_k", low=0, default=0),
        repetition_penalty=r.number("repetition_penalty", default=1.0),
    )


# --- tower and adapter -----------------------------------------------------------------------


class VisionBlock(TowerBlock):
    """The norms act on the branch outputs, whatever the checkpoint calls them."""

    def __init__(self, shape: BlockShape, eps: float, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        size = shape.hidden_size
        self.attention = TowerAttention(shape, device, dtype)
        self.attention_norm = LayerNorm(size, eps, device, dtype)
        self.mlp = GeluMlp(size, shape.intermediate_size, device, dtype, group=shape.group)
        self.mlp_norm = LayerNorm(size, eps, device, dtype)

    def stages(self, x: Tensor, cu_seqlens: Sequence[int]) -> Stages[Tensor]:
        """[num_tokens, hidden_size] -> the same, part by part."""
        part_rows = part_rows_for(cu_seqlens, self.part_rows)
        attended = yield from self.attention.stages(x, cu_seqlens, part_rows)
        h = self.attention_norm(attended, residual=x)

        def apply(rows: slice) -> Tensor:
            return self.mlp_norm(self.mlp(h[rows]), residual=h[rows])

        return (yield from by_rows(apply, len(h), part_rows, MLP_SHARE))


class VisionTower(PatchTower):
    """EVA2-CLIP-E: a class token and all patches, full attention, no final norm."""

    def __init__(self, config: VisionConfig, context: BuildContext) -> None:
        device, dtype, size = context.device, context.dtype, config.hidden_size
        shape = BlockShape(size, config.num_heads, config.intermediate_size, context.group)
        super().__init__(
            PatchEmbedding(config.patch_size, config.num_positions, size, device, dtype),
            (
                VisionBlock(shape, config.layer_norm_eps, device, dtype)
                for _ in range(config.num_layers)
            ),
        )


class Adapter(nn.Module):
    """2x2 convolution, projection, GLU; then begin and end vectors, all divided by a constant."""

    # A token costs about four times as much as a patch does in a block of the tower.
    part_rows = PART_ROWS // 4

    def __init__(self, config: Glm4vConfig, vision: VisionConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        size, inner = config.hidden_size, config.ffn_hidden_size
        group, columns = context.group, in_blocks(inner, context.group)
        rows = divided(group, 0, columns)
        self.device = device
        self.scaling_factor = vision.scaling_factor
        self.merge = PatchLinear(vision.hidden_size, size, 2, device, dtype)
        self.project = Linear(size, size, False, device, dtype)
        self.norm = LayerNorm(size, 1e-5, device, dtype)  # torch's default, not layer_norm_eps
        self.gate = Linear(size, inner, False, device, dtype, shard=rows)
        self.up = Linear(size, inner, False, device, dtype, shard=rows)
        self.down = Linear(inner, size, False, device, dtype, shard=divided(group, 1, columns))
        self.begin = empty_parameter(1, 1, size, dtype=dtype)
        self.end = empty_parameter(1, 1, size, dtype=dtype)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[num_images, rows * columns, vision hidden] -> [num_images, image tokens, hidden]."""
        return run_through(self.stages(x, grid))

    def stages(self, x: Tensor, grid: tuple[int, int]) -> Stages[Tensor]:
        """[num_images, rows * columns, vision hidden] -> as `forward`, part by part if large."""
        images = x.reshape(-1, *grid, x.shape[-1]).permute(0, 3, 1, 2)
        patches = patchify(images, 2)
        num_tokens = patches.shape[1]
        rows = part_rows_for([0, num_tokens], self.part_rows)
        apply = partial(self._merged, patches)
        x = yield from by_rows(apply, num_tokens, rows, 1.0, dim=1)
        begin, end = (edge.expand(x.shape[0], 1, -1) for edge in (self.begin, self.end))
        return torch.cat((begin, x, end), dim=1) / self.scaling_factor

    def _merged(self, patches: Tensor, rows: slice) -> Tensor:
        x = self.project(self.merge(patches[:, rows]))
        x = self.device.gelu_erf(self.norm(x))
        return self.down(self.device.silu_mul(self.gate(x), self.up(x)))


# --- language model --------------------------------------------------------------------------


def attention_group(config: Glm4vConfig, group: Group) -> Group:
    """Who divides the heads: each rank must find the KV heads of its query heads with itself."""
    kv_heads = config.num_kv_heads
    fits = kv_heads % group.size == 0 or group.size % kv_heads == 0
    return group.for_units(config.num_heads) if fits else ALONE


class Attention(nn.Module):
    """Grouped-query attention; only the first half of each head is rotated.

    Query heads are divided among the ranks; so are KV heads, or each is held by several of them.
    """

    def __init__(self, config: Glm4vConfig, rotary: Rotary, context: BuildContext) -> None:
        super().__init__()
        device, dtype, group = context.device, context.dtype, attention_group(config, context.group)
        q, kv = (Part(heads, config.head_dim) for heads in (config.num_heads, config.num_kv_heads))
        self.device = device
        self.rotary = rotary
        self.split = tuple(share(group, heads.count) for heads in (q, kv, kv))
        bias, size = config.qkv_bias or config.linear_bias, config.hidden_size
        rows, columns = divided(group, 0, q, kv, kv), divided(group, 1, q)
        self.qkv = Linear(size, q.length + 2 * kv.length, bias, device, dtype, shard=rows)
        self.dense = Linear(q.length, size, config.linear_bias, device, dtype, shard=columns)

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        cache: KVCache,
        residual: Tensor | None,
    ) -> Tensor:
        """[num_tokens, hidden_size] -> the same, plus the residual; stores keys and values."""
        q, k, v = self.qkv(x).unflatten(-1, (sum(self.split), -1)).split(self.split, dim=1)
        q, k = self.rotary.rotate(q, cos_sin), self.rotary.rotate(k, cos_sin)
        out = cached_attention(self.device, q, k, v, cache, batch)
        return self.dense(out, residual=residual)


class Mlp(nn.Module):
    """SwiGLU with gate and up fused, gate first."""

    def __init__(self, config: Glm4vConfig, context: BuildContext) -> None:
        super().__init__()
        size, inner, bias = config.hidden_size, config.ffn_hidden_size, config.linear_bias
        device, dtype = context.device, context.dtype
        group, columns = context.group, in_blocks(inner, context.group)
        rows = divided(group, 0, columns, columns)
        self.gate_up = Linear(size, 2 * inner, bias, device, dtype, is_paired=True, shard=rows)
        self.down = Linear(inner, size, bias, device, dtype, shard=divided(group, 1, columns))

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """[num_tokens, hidden_size] -> the same, plus the residual."""
        return mlp(self.gate_up, self.down, x, "silu_mul", residual)


class Block(nn.Module):
    """Pre-norm decoder block."""

    def __init__(self, config: Glm4vConfig, rotary: Rotary, context: BuildContext) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.attention_norm = RMSNorm(size, eps, context.device, context.dtype)
        self.attention = Attention(config, rotary, context)
        self.mlp_norm = RMSNorm(size, eps, context.device, context.dtype)
        self.mlp = Mlp(config, context)

    def forward(
        self, h: Tensor, cos_sin: tuple[Tensor, Tensor], batch: AttentionBatch, cache: KVCache
    ) -> Tensor:
        """[num_tokens, hidden_size] -> the same."""
        attended = partial(self.attention, self.attention_norm(h), cos_sin, batch, cache)
        normed, h = self.mlp_norm.of_sum(attended, residual=h)
        return self.mlp(normed, residual=h)


class Glm4vModel(Model):
    """Tower, adapter and language model; the first two are absent in a text model."""

    def __init__(self, config: Glm4vConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        if context.rotary_table != "auto":
            said = f"is {context.rotary_table!r}, a table of VisualGLM; this model has only one"
            raise ConfigError("rotary_table", [f"{said}: leave it at auto"])
        self.num_layers = config.num_layers
        self.num_kv_heads = share(attention_group(config, context.group), config.num_kv_heads)
        self.head_dim = config.head_dim
        self.device, self.dtype, self.vision = device, dtype, config.vision
        self.weight_table = WEIGHTS
        self.rotary = Rotary(_rotary_spec(config), context.max_positions, device, dtype)
        if config.vision:
            self.tower = VisionTower(config.vision, context)
            self.adapter = Adapter(config, config.vision, context)
        size, rows = config.hidden_size, divided_vocabulary(context.group, config.vocab_size)
        self.embedding = Embedding(config.vocab_size, size, device, dtype, rows)
        self.blocks = nn.ModuleList(
            Block(config, self.rotary, context) for _ in range(config.num_layers)
        )
        self.final_norm = RMSNorm(size, config.layernorm_epsilon, device, dtype)
        self.head = Head(size, config.vocab_size, device, dtype, rows)

    def image_features(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """One [num_image_tokens, hidden_size] per picture."""
        return list(self.encode_pixels(self._pixels(images)))

    def image_stages(self, images: Sequence[ImageInput]) -> Stages[list[Tensor]]:
        """Part by part of the tower's blocks, then of the adapter."""
        states = yield from self.tower.stages(self._patches(self._pixels(images)))
        adapted = self.adapter.stages(self._without_class(states), self._grid)
        return list((yield from without_last_pause(adapted)))

    def _pixels(self, images: Sequence[ImageInput]) -> Tensor:
        """[num_images, 3, height, width], normalised."""
        assert self.vision, "the processor refuses pictures for a text model"
        pixels = torch.stack([normalise(i.pixels, CLIP_MEAN, CLIP_STD) for i in images])
        return pixels.to(device=self.device.torch_device, dtype=self.dtype)

    def encode_raw(self, raw: Tensor) -> Tensor:
        """[num_images, height, width, 3], 0 to 255 -> [num_images, num_image_tokens, hidden]."""
        pixels = normalised(raw, CLIP_MEAN, CLIP_STD)
        return self.encode_pixels(pixels.to(device=self.device.torch_device, dtype=self.dtype))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[num_images, 3, height, width], normalised -> [num_images, num_image_tokens, hidden]."""
        return self._adapted(self.tower(self._patches(pixels)))

    def _patches(self, pixels: Tensor) -> Tensor:
        assert self.vision
        return patchify(pixels, self.vision.patch_size)

    def _adapted(self, states: Tensor) -> Tensor:
        """Packed tower states -> features."""
        return self.adapter(self._without_class(states), self._grid)

    def _without_class(self, states: Tensor) -> Tensor:
        """Packed tower states -> [num_images, num_patches, vision hidden]."""
        assert self.vision
        return states.reshape(-1, self.vision.num_positions, self.vision.hidden_size)[:, 1:]

    @property
    def _grid(self) -> tuple[int, int]:
        assert self.vision
        return self.vision.grid, self.vision.grid


def _rotary_spec(config: Glm4vConfig) -> RotarySpec:
    """Half of the head is rotated; rope_ratio multiplies the base."""
    width = config.head_dim // 2
    return RotarySpec(
        style="interleaved" if config.interleaved_rotary else "half",
        inv_freq=inverse_frequencies(width, 10000.0 * config.rope_ratio),
        channels=repeated((0,), width // 2),
    )


# --- weight names ----------------------------------------------------------------------------

_VISION = "transformer.vision."
_VISION_LAYER = "transformer.vision.transformer.layers.{i}."
_LAYER = "transformer.encoder.layers.{i}."

WEIGHTS = WeightTable(
    weights=renamed(
        {
            "transformer.embedding.word_embeddings.weight": "embedding.weight",
            _LAYER + "input_layernorm.weight": "blocks.{i}.attention_norm.weight",
            _LAYER + "self_attention.query_key_value.weight": "blocks.{i}.attention.qkv.weight",
            _LAYER + "self_attention.query_key_value.bias": "blocks.{i}.attention.qkv.bias",
            _LAYER + "self_attention.dense.weight": "blocks.{i}.attention.dense.weight",
            _LAYER + "self_attention.dense.bias": "blocks.{i}.attention.dense.bias",
            _LAYER + "post_attention_layernorm.weight": "blocks.{i}.mlp_norm.weight",
            _LAYER + "mlp.dense_h_to_4h.weight": "blocks.{i}.mlp.gate_up.weight",
            _LAYER + "mlp.dense_h_to_4h.bias": "blocks.{i}.mlp.gate_up.bias",
            _LAYER + "mlp.dense_4h_to_h.weight": "blocks.{i}.mlp.down.weight",
            _LAYER + "mlp.dense_4h_to_h.bias": "blocks.{i}.mlp.down.bias",
            "transformer.encoder.final_layernorm.weight": "final_norm.weight",
            "transformer.output_layer.weight": "head.weight",
            _VISION + "patch_embedding.proj.weight": "tower.embed.patch.weight",
            _VISION + "patch_embedding.proj.bias": "tower.embed.patch.bias",
            _VISION + "patch_embedding.cls_embedding": "tower.embed.cls",
            _VISION + "patch_embedding.position_embedding.weight": "tower.embed.position",
            _VISION_LAYER + "input_layernorm.weight": "tower.blocks.{i}.attention_norm.weight",
            _VISION_LAYER + "input_layernorm.bias": "tower.blocks.{i}.attention_norm.bias",
            _VISION_LAYER + "attention.query_key_value.weight": (
                "tower.blocks.{i}.attention.qkv.weight"
            ),
            _VISION_LAYER + "attention.query_key_value.bias": (
                "tower.blocks.{i}.attention.qkv.bias"
            ),
            _VISION_LAYER + "attention.dense.weight": "tower.blocks.{i}.attention.dense.weight",
            _VISION_LAYER + "attention.dense.bias": "tower.blocks.{i}.attention.dense.bias",
            _VISION_LAYER + "mlp.fc1.weight": "tower.blocks.{i}.mlp.up.weight",
            _VISION_LAYER + "mlp.fc1.bias": "tower.blocks.{i}.mlp.up.bias",
            _VISION_LAYER + "mlp.fc2.weight": "tower.blocks.{i}.mlp.down.weight",
            _VISION_LAYER + "mlp.fc2.bias": "tower.blocks.{i}.mlp.down.bias",
            _VISION_LAYER + "post_attention_layernorm.weight": "tower.blocks.{i}.mlp_norm.weight",
            _VISION_LAYER + "post_attention_layernorm.bias": "tower.blocks.{i}.mlp_norm.bias",
            _VISION + "conv.weight": "adapter.merge.weight",
            _VISION + "conv.bias": "adapter.merge.bias",
            _VISION + "linear_proj.linear_proj.weight": "adapter.project.weight",
            _VISION + "linear_proj.norm1.weight": "adapter.norm.weight",
            _VISION + "linear_proj.norm1.bias": "adapter.norm.bias",
            _VISION + "linear_proj.gate_proj.weight": "adapter.gate.weight",
            _VISION + "linear_proj.dense_h_to_4h.weight": "adapter.up.weight",
            _VISION + "linear_proj.dense_4h_to_h.weight": "adapter.down.weight",
            _VISION + "boi": "adapter.begin",
            _VISION + "eoi": "adapter.end",
        }
    ),
    # Computed without rope_ratio by the original, and never read by it.
    ignored=("transformer.rotary_pos_emb.inv_freq",),
)


def _claims(raw: Mapping[str, Any]) -> bool:
    """The text models share the class names, so their vocabulary size tells them apart.

    A file that lost it is claimed by its other keys, so that the error can name what is missing.
    """
    size = raw.get("padded_vocab_size")
    is_text = size == 151552 or (size is None and "multi_query_group_num" in raw)
    return raw.get("model_type") == "chatglm" and ("vision_config" in raw or is_text)


def _special_ids(config: Glm4vConfig) -> dict[str, int]:
    """They follow one another, and the config tells one of them."""
    known, at = "<|endoftext|>", config.eos_token_ids[0]
    if config.vision is not None:
        known, at = "<|begin_of_image|>", config.boi_token_id
    first = at - _SPECIALS.index(known)
    return {name: first + i for i, name in enumerate(_SPECIALS)}


FAMILY = ModelFamily(
    name="glm4v_9b",
    claims=_claims,
    config=Glm4vConfig,
    tokenizer=TOKENIZER,
    processor=Glm4vProcessor,
    build=Glm4vModel,
    prompt_attention="causal",
    special_ids=_special_ids,
)
