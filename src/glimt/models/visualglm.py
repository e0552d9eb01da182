"""VisualGLM-6B: EVA ViT-G, Q-Former, ChatGLM-6B language model.

Sources: the hub's modeling_chatglm.py (revision f4f759a) and THUDM/VisualGLM-6B model/*.py over
SwissArmyTransformer; shapes proved by the parameter count that the real model prints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from glimt.layers.linear import Head, Linear, empty_parameter
from glimt.layers.norm import LayerNorm
from glimt.layers.rotary import Rotary, RotarySpec, inverse_frequencies, repeated
from glimt.layers.tower import PatchTower, Stages, TowerBlock, by_rows, part_rows_for
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
from glimt.models.config_reader import ConfigReader
from glimt.models.pixels import CLIP_MEAN, CLIP_STD, normalise, normalised, patchify, squash
from glimt.parallel import Part, divided, divided_vocabulary, share
from glimt.types import EncodedPrompt, ImageInput, ImageSpan, Message, SamplingDefaults

if TYPE_CHECKING:
    from PIL.Image import Image


# --- config ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaConfig:
    """`eva_config`: the vision tower."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    layernorm_epsilon: float
    image_size: tuple[int, int]
    patch_size: int
    num_positions: int

    @property
    def grid(self) -> tuple[int, int]:
        """Patches as (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class QformerConfig:
    """`qformer_config`: learned queries that read the tower's output.

    crosses: per layer, whether it has cross attention
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    layernorm_epsilon: float
    num_queries: int
    vision_size: int
    crosses: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualGlmConfig:
    """config.json of VisualGLM-6B."""

    num_layers: int
    hidden_size: int
    num_heads: int
    inner_hidden_size: int
    vocab_size: int
    layernorm_epsilon: float
    max_sequence_length: int
    torch_dtype: str
    bos_token_id: int
    eos_token_id: int
    gmask_token_id: int
    image_length: int
    quantization_bit: int
    eva: EvaConfig
    qformer: QformerConfig

    @property
    def context_tokens(self) -> int:
        """The longest sequence the checkpoint was trained for."""
        return self.max_sequence_length

    @property
    def max_positions(self) -> int:
        """Rows of the rotary table; the original does not refuse more, but never saw them."""
        return self.max_sequence_length

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> VisualGlmConfig:
        """Read a parsed config.json; ConfigError lists everything missing or unsupported."""
        r = ConfigReader(raw, where)
        r.must_be("position_encoding_2d", True)
        r.may_only_be("pre_seq_len", None)
        config = cls(
            num_layers=r.integer("num_layers"),
            hidden_size=r.integer("hidden_size"),
            num_heads=r.integer("num_attention_heads"),
            inner_hidden_size=r.integer("inner_hidden_size"),
            vocab_size=r.integer("vocab_size"),
            layernorm_epsilon=r.number("layernorm_epsilon"),
            max_sequence_length=r.integer("max_sequence_length"),
            torch_dtype=r.dtype(),
            bos_token_id=r.integer("bos_token_id", low=0),
            eos_token_id=r.integer("eos_token_id", low=0),
            gmask_token_id=r.integer("gmask_token_id", low=0),
            image_length=r.integer("image_length"),
            quantization_bit=r.one_of("quantization_bit", tuple(_STORED_QUANT), default=0),
            eva=_read_eva(r.section("eva_config")),
            qformer=_read_qformer(r.section("qformer_config")),
        )
        r.divides(
            "hidden_size", config.hidden_size, "4 * num_attention_heads", 4 * config.num_heads
        )
        length = "image_length", config.image_length
        r.must_agree(length, config.qformer.num_queries, "qformer_config.vocab_size")
        width = "qformer_config.cross_attn_hidden_size", config.qformer.vision_size
        r.must_agree(width, config.eva.hidden_size, "eva_config.hidden_size")
        r.check()
        return config


# quantization_bit: the four linears of every language block, and nothing else, are so in the file.
_STORED_QUANT = {0: "none", 4: "visualglm-int4", 8: "visualglm-int8"}

EVA_ONLY: dict[str, Any] = {
    "layernorm_order": "pre",
    "use_final_layernorm": False,
    "vocab_size": 1,
    "pre_len": 1,
    "post_len": 0,
    "in_channels": 3,
}


def _read_eva(r: ConfigReader) -> EvaConfig:
    for name, only in EVA_ONLY.items():
        r.must_be(name, only)
    config = EvaConfig(
        num_layers=r.integer("num_layers"),
        hidden_size=r.integer("hidden_size"),
        num_heads=r.integer("num_attention_heads"),
        intermediate_size=r.integer("inner_hidden_size"),
        layernorm_epsilon=r.number("layernorm_epsilon"),
        image_size=r.size("image_size"),
        patch_size=r.integer("patch_size"),
        num_positions=r.integer("max_sequence_length"),
    )
    r.divides("hidden_size", config.hidden_size, "num_attention_heads", config.num_heads)
    for side in config.image_size:
        r.divides("image_size", side, "patch_size", config.patch_size)
    num_positions = "max_sequence_length", config.num_positions
    r.must_agree(num_positions, math.prod(config.grid) + 1, "image_size", "patch_size")
    return config


def _read_qformer(r: ConfigReader) -> QformerConfig:
    r.must_be("layernorm_order", "post")
    layers, size = r.integer("num_layers"), r.integer("hidden_size")
    config = QformerConfig(
        num_layers=layers,
        hidden_size=size,
        num_heads=r.integer("num_attention_heads"),
        # SAT leaves it out of the file where it is four times the width.
        intermediate_size=r.integer("inner_hidden_size", default=4 * size),
        layernorm_epsilon=r.number("layernorm_epsilon"),
        num_queries=r.integer("vocab_size"),
        vision_size=r.integer("cross_attn_hidden_size"),
        crosses=r.flags("is_decoder", layers, "num_layers"),
    )
    r.divides("hidden_size", size, "num_attention_heads", config.num_heads)
    return config


# --- prompt and picture ----------------------------------------------------------------------

TOKENIZER = TokenizerSpec(kind="sentencepiece", file="ice_text.model")

_TEMPLATES = {"zh": ("问：", "答："), "en": ("Q:", "A:")}
_CHINESE_QUERY = re.compile("[\u4e00-\u9fa5]")  # the original's own range for choosing a template


class VisualGlmProcessor:
    """Messages to ids: all pictures first, then rounds of question and answer, `[gMASK]<sop>`."""

    sampling_defaults = SamplingDefaults(
        temperature=0.8, top_k=100, top_p=0.4, repetition_penalty=1.2, min_length=100
    )

    def __init__(self, folder: Path, config: VisualGlmConfig, tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self._placeholder = special_id(tokenizer.special_ids, "<unk>")
        self._check_ids(folder)
        self.stop_token_ids = frozenset((config.eos_token_id,))
        self.image_settings = f"visualglm bicubic squash {config.eva.image_size}"

    def _check_ids(self, folder: Path) -> None:
        named = {
            "gmask_token_id": special_id(self.tokenizer.special_ids, "[gMASK]"),
            "bos_token_id": special_id(self.tokenizer.special_ids, "<sop>"),
            "eos_token_id": special_id(self.tokenizer.special_ids, "<eop>"),
        }
        problems = [
            f"{name} is {getattr(self.config, name)} but the tokenizer's id is {token_id}"
            for name, token_id in named.items()
            if getattr(self.config, name) != token_id
        ]
        if problems:
            raise ConfigError(str(folder), problems)

    def image_cost(self, width: int, height: int) -> int:
        """The same for every picture: one place per query."""
        return self.config.image_length

    def prepare_image(self, image: Image, digest: bytes) -> ImageInput:
        """Squash to the tower's size."""
        eva = self.config.eva
        return ImageInput(
            digest, self.config.image_length, eva.grid, squash(image, *eva.image_size)
        )

    def encode_chat(
        self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]], language: str
    ) -> EncodedPrompt:
        """Encode a conversation; pictures stand at the very front, whatever turn showed them."""
        rounds = _rounds(messages)
        if language == "auto":
            language = "zh" if _CHINESE_QUERY.search(_query(messages)) else "en"
        if language not in _TEMPLATES:
            raise RequestError("language", f"is {language!r}; choose auto, zh or en")
        costs = [self.image_cost(*size) for size in image_sizes]
        return self._encode(_render(rounds, *_TEMPLATES[language]), costs)

    def encode_open(
        self,
        messages: Sequence[Message],
        image_sizes: Sequence[tuple[int, int]],
        language: str,
        prompt_end: str,
    ) -> EncodedPrompt:
        """The answer's beginning stands where it would have been generated, behind `<sop>`."""
        if prompt_end != "continue":
            said = "the template always ends where the answer begins; only it can be gone on with"
            raise RequestError("add_generation_prompt", said)
        asked, begun = messages[:-1], messages[-1]
        if not asked:
            raise RequestError("messages", "a question must stand before an answer that goes on")
        prompt = self.encode_chat(asked, image_sizes, language)
        return _answered(prompt, self.tokenizer.encode(begun.text))

    def encode_text(self, text: str) -> EncodedPrompt:
        """The text and `[gMASK]<sop>`."""
        return self._encode(text, ())

    def encode_tokens(self, token_ids: Sequence[int]) -> EncodedPrompt:
        """The ids, and `[gMASK]<sop>` unless they end in it: answers begin there."""
        end = (self.config.gmask_token_id, self.config.bos_token_id)
        context = token_ids[:-2] if tuple(token_ids[-2:]) == end else token_ids
        return _with_positions([*context, *end], ())

    def _encode(self, text: str, image_costs: Sequence[int]) -> EncodedPrompt:
        """The last end tag and the text are encoded together, as the original does."""
        ids: list[int] = []
        spans: list[ImageSpan] = []
        for image, cost in enumerate(image_costs):
            ids += self.tokenizer.encode("</img>") if image else []
            ids += self.tokenizer.encode("<img>")
            spans.append(ImageSpan(len(ids), cost, image))
            ids += [self._placeholder] * cost
        ids += self.tokenizer.encode("</img>" + text if spans else text)
        ids += [self.config.gmask_token_id, self.config.bos_token_id]
        return _with_positions(ids, spans)

    def finish_text(self, raw: str) -> str:
        """Blanks before punctuation removed, then punctuation beside Chinese made Chinese."""
        return _mend_punctuation(_clean_up(raw).strip().replace(*_TRAINING_TIME))

    def stable_length(self, raw: str) -> int:
        """Without a tail that a later character could still change."""
        length = len(raw)
        while length:
            kept = _UNSTABLE_TAIL.sub("", raw[:length][-_LONGEST_TAIL:])
            cut = min(length, _LONGEST_TAIL) - len(kept)
            if not cut:
                break
            length -= cut
        return length


def _query(messages: Sequence[Message]) -> str:
    """What the user asked last; a system text does not choose the template."""
    asked = (message.text for message in reversed(messages) if message.role != "system")
    return next(asked, "")


def _rounds(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Questions with their answers; the last question has none yet.

    The template has no system role: its text goes before the first question. Neighbouring
    messages of one role are joined by a line feed.
    """
    if messages[-1].role == "assistant":
        raise RequestError(
            "messages", "the last message is the assistant's; end with the user's question"
        )
    rounds: list[tuple[list[str], list[str]]] = [([], [])]
    for message in messages:
        if message.role == "assistant":
            rounds[-1][1].append(message.text)
            continue
        if rounds[-1][1]:
            rounds.append(([], []))
        if message.text:
            rounds[-1][0].append(message.text)
    return [("\n".join(questions), "\n".join(answers)) for questions, answers in rounds]


def _render(rounds: Sequence[tuple[str, str]], ask: str, answer: str) -> str:
    past = "".join(f"{ask}{q}\n{answer}{a}\n" for q, a in rounds[:-1])
    return f"{past}{ask}{rounds[-1][0]}\n{answer}"


def _with_positions(ids: Sequence[int], spans: Sequence[ImageSpan]) -> EncodedPrompt:
    """Two channels: the position, which stays at [gMASK]'s from `<sop>` on, and the block
    position, 0 in the context and 1, 2, … from `<sop>` on.
    """
    n = len(ids)
    position = [*range(n - 1), n - 2]
    block = [0] * (n - 1) + [1]
    return EncodedPrompt(
        token_ids=tuple(ids),
        original_token_ids=tuple(ids),
        spans=tuple(spans),
        positions=np.array([position, block], dtype=np.int64),
        decode_start=(n - 2, 2),
        decode_step=(0, 1),
        bidirectional_len=n - 1,
    )


def _answered(prompt: EncodedPrompt, ids: Sequence[int]) -> EncodedPrompt:
    """The same prompt after these output tokens, each at the place where it is generated."""
    rules = zip(prompt.decode_start, prompt.decode_step, strict=True)
    num_tokens = len(prompt.token_ids) + len(ids)
    return replace(
        prompt,
        token_ids=(*prompt.token_ids, *ids),
        original_token_ids=(*prompt.original_token_ids, *ids),
        positions=prompt.positions_between(0, num_tokens),
        decode_start=tuple(start + len(ids) * step for start, step in rules),
    )


# Source: the clean-up that transformers 4.30 applies after decoding, in its order.
_CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
_TRAINING_TIME = ("[[训练时间]]", "2023年")
_PUNCTUATION = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_LONGEST_TAIL = 16


def _prefixes(text: str) -> list[str]:
    return [text[:n] for n in range(1, len(text))]


# What may still change at the end of a text: blanks (stripped), a mark whose right neighbour is
# unknown, and the beginning of anything that is replaced.
_UNSTABLE_TAIL = re.compile(
    "(?:\\s|[,!:;?]|"
    + "|".join(
        re.escape(prefix)
        for pattern in (*(old for old, _ in _CLEAN_UP), _TRAINING_TIME[0])
        for prefix in sorted(_prefixes(pattern), key=len, reverse=True)
    )
    + ")$"
)


def _clean_up(text: str) -> str:
    for old, new in _CLEAN_UP:
        text = text.replace(old, new)
    return text


def _mend_punctuation(text: str) -> str:
    """Source: process_response of the hub's modeling_chatglm.py: before, then after, per mark."""
    for mark, chinese in _PUNCTUATION.items():
        if mark not in text:  # mostly; streaming mends the whole answer again with every token
            continue
        text = re.sub(rf"([\u4e00-\u9fff]){re.escape(mark)}", rf"\1{chinese}", text)
        text = re.sub(rf"{re.escape(mark)}([\u4e00-\u9fff])", rf"{chinese}\1", text)
    return text


# --- tower and Q-Former ----------------------------------------------------------------------


class EvaBlock(TowerBlock):
    """Pre-norm transformer block."""

    def __init__(self, shape: BlockShape, eps: float, device: Device, dtype: torch.dtype) -> None:
        super().__init__()
        size = shape.hidden_size
        self.attention_norm = LayerNorm(size, eps, device, dtype)
        self.attention = TowerAttention(shape, device, dtype)
        self.mlp_norm = LayerNorm(size, eps, device, dtype)
        self.mlp = GeluMlp(size, shape.intermediate_size, device, dtype, group=shape.group)

    def stages(self, x: Tensor, cu_seqlens: Sequence[int]) -> Stages[Tensor]:
        """[num_tokens, hidden_size] -> the same, part by part."""
        part_rows = part_rows_for(cu_seqlens, self.part_rows)
        normed = self.attention_norm(x)
        h = yield from self.attention.stages(normed, cu_seqlens, part_rows, residual=x)

        def apply(rows: slice) -> Tensor:
            return self.mlp(self.mlp_norm(h[rows]), residual=h[rows])

        return (yield from by_rows(apply, len(h), part_rows, MLP_SHARE))


class EvaTower(PatchTower):
    """EVA ViT-G: a class token and all patches, full attention, one last norm over all."""

    def __init__(self, config: EvaConfig, context: BuildContext) -> None:
        device, dtype, size = context.device, context.dtype, config.hidden_size
        shape = BlockShape(size, config.num_heads, config.intermediate_size, context.group)
        super().__init__(
            PatchEmbedding(config.patch_size, config.num_positions, size, device, dtype),
            (
                EvaBlock(shape, config.layernorm_epsilon, device, dtype)
                for _ in range(config.num_layers)
            ),
        )
        self.norm = LayerNorm(size, 1e-5, device, dtype)  # torch's default, unlike the blocks'

    def stages(self, patches: Tensor, pauses_inside: bool = True) -> Stages[Tensor]:
        """[num_images, num_patches, values] -> what `forward` gives, part by part."""
        return self.norm((yield from super().stages(patches, pauses_inside)))


class CrossAttention(nn.Module):
    """Queries read a picture's states; fused rows are [K | V]."""

    def __init__(self, config: QformerConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype, size = context.device, context.dtype, config.hidden_size
        group = context.group.for_units(config.num_heads)
        heads = Part(config.num_heads, size // config.num_heads)
        rows, both = divided(group, 0, heads), divided(group, 0, heads, heads)
        self.device = device
        self.num_heads = share(group, config.num_heads)
        self.head_dim = size // config.num_heads
        self.query = Linear(size, size, True, device, dtype, shard=rows)
        self.kv = Linear(config.vision_size, 2 * size, True, device, dtype, shard=both)
        self.dense = Linear(size, size, True, device, dtype, shard=divided(group, 1, heads))

    def forward(
        self, x: Tensor, states: Tensor, x_starts: Sequence[int], starts: Sequence[int]
    ) -> Tensor:
        """x + [num_queries, hidden_size] over [num_states, vision_size] -> as x."""
        q = self.query(x).reshape(-1, self.num_heads, self.head_dim)
        k, v = self.kv(states).reshape(-1, 2, self.num_heads, self.head_dim).unbind(1)
        out = self.device.varlen_attention(q, k, v, x_starts, starts, self.head_dim**-0.5)
        return self.dense(out.flatten(1), residual=x)


class QformerBlock(nn.Module):
    """Post-norm block in SAT's order: its first norm is BERT's last norm of the block before."""

    def __init__(self, config: QformerConfig, crosses: bool, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        size, eps = config.hidden_size, config.layernorm_epsilon
        shape = BlockShape(size, config.num_heads, config.intermediate_size, context.group)
        self.input_norm = LayerNorm(size, eps, device, dtype)
        self.attention = TowerAttention(shape, device, dtype)
        self.attention_norm = LayerNorm(size, eps, device, dtype)
        self.cross = CrossAttention(config, context) if crosses else None
        self.cross_norm = LayerNorm(size, eps, device, dtype) if crosses else None
        self.mlp = GeluMlp(size, shape.intermediate_size, device, dtype, group=shape.group)

    def forward(
        self, h: Tensor, states: Tensor, h_starts: Sequence[int], starts: Sequence[int]
    ) -> Tensor:
        """[num_queries, hidden_size] -> the same, not yet normalised."""
        a = self.input_norm(h)
        b = self.attention_norm(self.attention(a, h_starts, residual=a))
        if self.cross is not None and self.cross_norm is not None:
            b = self.cross_norm(self.cross(b, states, h_starts, starts))
        return self.mlp(b, residual=b)


class Qformer(nn.Module):
    """Learned queries, no positions, no mask."""

    def __init__(self, config: QformerConfig, context: BuildContext) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.queries = empty_parameter(config.num_queries, size, dtype=context.dtype)
        self.blocks = nn.ModuleList(
            QformerBlock(config, crosses, context) for crosses in config.crosses
        )
        self.norm = LayerNorm(size, eps, context.device, context.dtype)

    def forward(self, states: Tensor, num_images: int) -> Tensor:
        """Packed states [num_states, vision_size] of equal-sized pictures -> packed
        [num_images * num_queries, hidden_size].
        """
        step = len(states) // num_images
        starts = [i * step for i in range(num_images + 1)]
        h_starts = [i * len(self.queries) for i in range(num_images + 1)]
        h = self.queries.repeat(num_images, 1)
        for block in self.blocks:
            h = block(h, states, h_starts, starts)
        return self.norm(h)


# --- language model --------------------------------------------------------------------------


class Attention(nn.Module):
    """One KV head per query head; the fused rows of a head stand together as [Q | K | V]."""

    def __init__(self, config: VisualGlmConfig, rotary: Rotary, context: BuildContext) -> None:
        super().__init__()
        device, dtype, size = context.device, context.dtype, config.hidden_size
        group = context.group.for_units(config.num_heads)
        dim = size // config.num_heads
        rows = divided(group, 0, Part(config.num_heads, 3 * dim))
        columns = divided(group, 1, Part(config.num_heads, dim))
        self.device = device
        self.rotary = rotary
        self.num_heads = share(group, config.num_heads)
        self.qkv = Linear(size, 3 * size, True, device, dtype, shard=rows)
        self.dense = Linear(size, size, True, device, dtype, shard=columns)

    def forward(
        self,
        x: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        batch: AttentionBatch,
        cache: KVCache,
        residual_scale: float,
    ) -> Tensor:
        """[num_tokens, hidden_size] -> the same, plus residual_scale * x; stores keys, values."""
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).unbind(2)
        q, k = self.rotary.rotate(q, cos_sin), self.rotary.rotate(k, cos_sin)
        out = cached_attention(self.device, q, k, v, cache, batch)
        return self.dense(out, residual=x, residual_scale=residual_scale)


class Block(nn.Module):
    """The residual is the normalised input times alpha. Source: DeepNet, arXiv 2203.00555."""

    def __init__(self, config: VisualGlmConfig, rotary: Rotary, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.alpha = math.sqrt(2 * config.num_layers)
        self.attention_norm = LayerNorm(size, eps, device, dtype)
        self.attention = Attention(config, rotary, context)
        self.mlp_norm = LayerNorm(size, eps, device, dtype)
        inner, group = config.inner_hidden_size, context.group
        self.mlp = GeluMlp(size, inner, device, dtype, tanh=True, group=group)

    def forward(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor], batch: AttentionBatch, cache: KVCache
    ) -> Tensor:
        """[num_tokens, hidden_size] -> the same."""
        a = self.attention_norm(x)
        h = self.attention(a, cos_sin, batch, cache, self.alpha)
        b = self.mlp_norm(h)
        return self.mlp(b, b, self.alpha)


class VisualGlmModel(Model):
    """Tower, Q-Former, projection and language model."""

    def __init__(self, config: VisualGlmConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype, size = context.device, context.dtype, config.hidden_size
        self.num_layers = config.num_layers
        group = context.group.for_units(config.num_heads)
        self.num_kv_heads = share(group, config.num_heads)
        self.head_dim = size // config.num_heads
        self.device, self.dtype, self.eva = device, dtype, config.eva
        self.weight_table = WEIGHTS
        self.rotary = Rotary(_rotary_spec(config, context), context.max_positions, device, dtype)
        self.tower = EvaTower(config.eva, context)
        self.qformer = Qformer(config.qformer, context)
        self.project = Linear(config.qformer.hidden_size, size, True, device, dtype)
        rows = divided_vocabulary(context.group, config.vocab_size)
        self.embedding = Embedding(config.vocab_size, size, device, dtype, rows)
        self.blocks = nn.ModuleList(
            Block(config, self.rotary, context) for _ in range(config.num_layers)
        )
        self.final_norm = LayerNorm(size, config.layernorm_epsilon, device, dtype)
        self.head = Head(size, config.vocab_size, device, dtype, rows)

    def image_features(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """One [image_length, hidden_size] per picture."""
        return list(self.encode_pixels(self._pixels(images)))

    def image_stages(self, images: Sequence[ImageInput]) -> Stages[list[Tensor]]:
        """One part per block of the tower; Q-Former and projection, small, are the last."""
        pixels = self._pixels(images)
        states = yield from self.tower.stages(patchify(pixels, self.eva.patch_size))
        return list(self._queried(states, len(images)))

    def _pixels(self, images: Sequence[ImageInput]) -> Tensor:
        """[num_images, 3, height, width], normalised."""
        pixels = torch.stack([normalise(i.pixels, CLIP_MEAN, CLIP_STD) for i in images])
        return pixels.to(device=self.device.torch_device, dtype=self.dtype)

    def encode_raw(self, raw: Tensor) -> Tensor:
        """[num_images, height, width, 3], 0 to 255 -> [num_images, image_length, hidden]."""
        pixels = normalised(raw, CLIP_MEAN, CLIP_STD)
        return self.encode_pixels(pixels.to(device=self.device.torch_device, dtype=self.dtype))

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """[num_images, 3, height, width], normalised -> [num_images, image_length, hidden]."""
        return self._queried(self.tower(patchify(pixels, self.eva.patch_size)), pixels.shape[0])

    def _queried(self, states: Tensor, num_images: int) -> Tensor:
        """Packed tower states -> [num_images, image_length, hidden]."""
        features = self.project(self.qformer(states, num_images))
        return features.reshape(num_images, -1, features.shape[-1])


def _rotary_spec(config: VisualGlmConfig, context: BuildContext) -> RotarySpec:
    """The first half of a head follows the position, the second the block position.

    The original rounds the inverse frequencies to float16 whatever the model's dtype is.
    """
    width = config.hidden_size // (2 * config.num_heads)
    half_model = context.dtype == torch.float16
    hub = context.rotary_table == "hub_fp16" or (context.rotary_table == "auto" and half_model)
    return RotarySpec(
        style="half",
        inv_freq=inverse_frequencies(width, 10000.0).half().float().repeat(2),
        channels=repeated((0, 1), width // 2),
        num_segments=2,
        mode="hub_fp16" if hub else "fp32_product",
    )


# --- weight names ----------------------------------------------------------------------------

_LAYER = "transformer.layers.{i}."
_VIT = "image_encoder.vit."
_VIT_LAYER = "image_encoder.vit.transformer.layers.{i}."
_QF = "image_encoder.qformer.transformer."
_QF_LAYER = "image_encoder.qformer.transformer.layers.{i}."


def _with_bias(pairs: Mapping[str, str]) -> dict[str, str]:
    """Both `.weight` and `.bias` of each pair."""
    return {
        f"{source}.{kind}": f"{target}.{kind}"
        for source, target in pairs.items()
        for kind in ("weight", "bias")
    }


WEIGHTS = WeightTable(
    weights=renamed(
        {
            "transformer.word_embeddings.weight": "embedding.weight",
            "lm_head.weight": "head.weight",
            _VIT + "transformer.word_embeddings.weight": "tower.embed.cls",
            _VIT + "transformer.position_embeddings.weight": "tower.embed.position",
            _QF + "word_embeddings.weight": "qformer.queries",
        }
        | _with_bias(
            {
                _LAYER + "input_layernorm": "blocks.{i}.attention_norm",
                _LAYER + "attention.query_key_value": "blocks.{i}.attention.qkv",
                _LAYER + "attention.dense": "blocks.{i}.attention.dense",
                _LAYER + "post_attention_layernorm": "blocks.{i}.mlp_norm",
                _LAYER + "mlp.dense_h_to_4h": "blocks.{i}.mlp.up",
                _LAYER + "mlp.dense_4h_to_h": "blocks.{i}.mlp.down",
                "transformer.final_layernorm": "final_norm",
                _VIT + "mixins.patch_embedding.proj": "tower.embed.patch",
                _VIT + "mixins.cls.ln_vision": "tower.norm",
                _VIT_LAYER + "input_layernorm": "tower.blocks.{i}.attention_norm",
                _VIT_LAYER + "attention.query_key_value": "tower.blocks.{i}.attention.qkv",
                _VIT_LAYER + "attention.dense": "tower.blocks.{i}.attention.dense",
                _VIT_LAYER + "post_attention_layernorm": "tower.blocks.{i}.mlp_norm",
                _VIT_LAYER + "mlp.dense_h_to_4h": "tower.blocks.{i}.mlp.up",
                _VIT_LAYER + "mlp.dense_4h_to_h": "tower.blocks.{i}.mlp.down",
                _QF_LAYER + "input_layernorm": "qformer.blocks.{i}.input_norm",
                _QF_LAYER + "attention.query_key_value": "qformer.blocks.{i}.attention.qkv",
                _QF_LAYER + "attention.dense": "qformer.blocks.{i}.attention.dense",
                _QF_LAYER + "post_attention_layernorm": "qformer.blocks.{i}.attention_norm",
                _QF_LAYER + "cross_attention.query": "qformer.blocks.{i}.cross.query",
                _QF_LAYER + "cross_attention.key_value": "qformer.blocks.{i}.cross.kv",
                _QF_LAYER + "cross_attention.dense": "qformer.blocks.{i}.cross.dense",
                _QF_LAYER + "post_cross_attention_layernorm": "qformer.blocks.{i}.cross_norm",
                _QF_LAYER + "mlp.dense_h_to_4h": "qformer.blocks.{i}.mlp.up",
                _QF_LAYER + "mlp.dense_4h_to_h": "qformer.blocks.{i}.mlp.down",
                _QF + "final_layernorm": "qformer.norm",
                "image_encoder.glm_proj": "project",
            }
        )
    ),
    # The original's loader skips the stored frequencies; position_embeddings is dead weight.
    ignored=("*.inv_freq", "transformer.position_embeddings.weight"),
)


def _claims(raw: Mapping[str, Any]) -> bool:
    """`chatglm` is also ChatGLM-6B, 2, 3 and GLM-4: the picture parts tell this one."""
    auto_map = raw.get("auto_map")
    loader = auto_map.get("AutoModel", "") if isinstance(auto_map, Mapping) else ""
    with_image = str(loader).endswith(".ChatGLMForConditionalGenerationWithImage")
    has_parts = "eva_config" in raw and "qformer_config" in raw
    return raw.get("model_type") == "chatglm" and (with_image or has_parts)


def _special_ids(config: VisualGlmConfig) -> dict[str, int]:
    """`<unk>`, which stands where a picture goes, is SentencePiece's first piece."""
    return {
        "<unk>": 0,
        "[gMASK]": config.gmask_token_id,
        "<sop>": config.bos_token_id,
        "<eop>": config.eos_token_id,
    }


FAMILY = ModelFamily(
    name="visualglm",
    claims=_claims,
    config=VisualGlmConfig,
    tokenizer=TOKENIZER,
    processor=VisualGlmProcessor,
    build=VisualGlmModel,
    prompt_attention="bidirectional",
    stored_quant=lambda config: _STORED_QUANT[config.quantization_bit],
    special_ids=_special_ids,
)
