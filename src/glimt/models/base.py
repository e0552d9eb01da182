"""What every model family promises, and what families share. Knows no family by name.

A family is one file in this folder ending in a `FAMILY` object; `find_family` scans the folder
and asks each file whether it claims a config.json.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from glimt.errors import ConfigError
from glimt.parallel import ALONE, Group
from glimt.types import EncodedPrompt, Function, ImageInput, Message, SamplingDefaults

if TYPE_CHECKING:
    from PIL.Image import Image

    from glimt.devices.base import AttentionBatch, Device, KVCache
    from glimt.layers.embedding import Embedding
    from glimt.layers.linear import Linear
    from glimt.layers.rotary import Rotary
    from glimt.layers.tower import Stages

PromptAttention = Literal["causal", "bidirectional"]
# First parts of the parameter names of everything that only pictures pass through.
VISION_MODULES = frozenset({"tower", "adapter", "qformer", "project"})


# --- text ------------------------------------------------------------------------------------


class TokenDecoder(Protocol):
    """Turns one answer's token ids into text, token by token, never half a character."""

    def feed(self, token_id: int) -> str:
        """Text that became certain with this token; may be empty."""

    def finish(self) -> str:
        """What was still held back, broken characters as U+FFFD."""


class Tokenizer(Protocol):
    """Text to token ids and back. Special strings inside text stay text."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """Ids of the special tokens by name, such as `<|user|>` or `[gMASK]`."""

    @property
    def num_ids(self) -> int:
        """One more than the highest id, special tokens included."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of ids; special tokens are left out."""

    def decoder(self) -> TokenDecoder:
        """A fresh incremental decoder."""

    def token_bytes(self, token_id: int) -> bytes:
        """What an ordinary token stands for inside a text; b"" for special ids and unknown ones."""


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Which tokenizer file a family has and how it is read (see inputs/tokenizer.py).

    kind: "tiktoken", "sentencepiece", or "own": the family brings its own reader
    file: its name in the model folder
    pattern: the regular expression that splits text before merging (tiktoken only)
    special_names: special tokens in id order, for a tokenizer_config.json that does not list
        them: they follow the ranks (tiktoken only)
    load: model folder -> tokenizer ("own" only)
    """

    kind: Literal["tiktoken", "sentencepiece", "own"]
    file: str
    pattern: str = ""
    special_names: tuple[str, ...] = ()
    load: Callable[[Path], Tokenizer] | None = None


# --- the family ------------------------------------------------------------------------------


class FamilyConfig(Protocol):
    """A checkpoint's geometry, read from config.json alone."""

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], where: str) -> FamilyConfig:
        """Read a parsed config.json; raise ConfigError listing all that is missing or wrong."""

    @property
    def context_tokens(self) -> int:
        """Longest sequence the checkpoint was made for, in tokens."""

    @property
    def max_positions(self) -> int:
        """Rotary positions that exist: every channel's position must be below."""

    @property
    def num_heads(self) -> int:
        """Query heads of the language model."""

    @property
    def torch_dtype(self) -> str:
        """Dtype the checkpoint declares: float32, float16 or bfloat16."""

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the logits, padding rows included."""


class Processor(Protocol):
    """Makes token ids and pixels from messages and pictures, as the original does.

    Built once from the model folder; holds no request's state.
    """

    tokenizer: Tokenizer
    stop_token_ids: frozenset[int]
    sampling_defaults: SamplingDefaults
    image_settings: str
    """Names the preprocessing; enters every picture's digest."""

    def image_cost(self, width: int, height: int) -> int:
        """Places that a picture of this size, in pixels, takes in the prompt.

        Raises RequestError if the model takes no pictures.
        """

    def prepare_image(self, image: Image, digest: bytes) -> ImageInput:
        """Resize a decoded RGB picture as the tower wants it."""

    def encode_chat(
        self, messages: Sequence[Message], image_sizes: Sequence[tuple[int, int]], language: str
    ) -> EncodedPrompt:
        """Encode a conversation that ends where the assistant must speak.

        image_sizes: width and height of each picture, in reading order over all messages; what it
            costs and where its tokens stand follow from them, before anything is decoded
        language:    "auto", "zh" or "en": the template, where a family has one per language
        Raises RequestError for what the template cannot say, and as `image_cost` does.
        """

    def encode_text(self, text: str) -> EncodedPrompt:
        """Encode a bare text to be continued, without a template."""

    def encode_tokens(self, token_ids: Sequence[int]) -> EncodedPrompt:
        """Place a prompt that is given as ids, special ones among them; nothing is put before."""

    def finish_text(self, raw: str) -> str:
        """The reply as the original shows it: stripped, punctuation mended."""

    def stable_length(self, raw: str) -> int:
        """Length of the prefix of `raw` whose finished form no later text can change.

        For any continuation: finish_text(raw + more) starts with finish_text(raw[:length]).
        """


@runtime_checkable
class OpenEnded(Protocol):
    """A processor whose template can end elsewhere than where the assistant begins to speak."""

    def encode_open(
        self,
        messages: Sequence[Message],
        image_sizes: Sequence[tuple[int, int]],
        language: str,
        prompt_end: str,
    ) -> EncodedPrompt:
        """As `Processor.encode_chat`, with another end.

        prompt_end: "continue": inside the last message, which is the assistant's, to be gone on
            with; "none": after the last message, with nobody's turn begun
        Raises RequestError for what the template cannot say.
        """


@runtime_checkable
class ToolPrompts(Protocol):
    """A processor whose template can offer functions, and writes the calls of a message.

    knows_tools: whether the checkpoint was trained to call them
    """

    knows_tools: bool

    def tools_text(self, functions: Sequence[Function]) -> str:
        """What the system says first, before any message, to offer these functions."""


class PictureEncoder(Protocol):
    """What makes features of pictures: a Model's own tower, or one that was compiled from it."""

    def image_features(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """One tensor [image.num_tokens, hidden_size] per picture, on the model's device."""

    def image_stages(self, images: Sequence[ImageInput]) -> Stages[list[Tensor]]:
        """`image_features` in parts: one tensor [image.num_tokens, hidden_size] per picture."""


class Model(nn.Module):
    """Weights and arithmetic of one family. Keeps nothing of a request.

    What is quantised, planned in memory and timed goes by the names of its parts: `embedding`,
    `blocks` and `head` are the language model's; `tower`, `adapter`, `qformer` and `project` are
    what only pictures pass through. The methods below run a decoder that is made of these parts as
    most are; a family whose own differs overrides them.

    is_repeatable: `forward` does nothing but what a device can record: nobody watches or is told
    """

    is_repeatable = True

    num_layers: int
    num_kv_heads: int
    head_dim: int
    weight_table: WeightTable
    embedding: Embedding
    rotary: Rotary
    blocks: nn.ModuleList  # each: (hidden, rotary.at(positions), batch, its cache) -> hidden
    final_norm: nn.Module
    head: Linear

    def image_features(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """Run the tower: one tensor [image.num_tokens, hidden_size] per picture.

        Raises TypeError in a family without a tower.
        """
        raise TypeError(f"{type(self).__name__} takes no pictures")

    def image_stages(self, images: Sequence[ImageInput]) -> Stages[list[Tensor]]:
        """`image_features` in parts, between which the engine may do other work.

        Returns one tensor [image.num_tokens, hidden_size] per picture.
        The same operations in the same order, so the same bits. A part should cost about as much
        as a layer of the tower. A family that does not say how to divide its tower has one part.
        """
        yield from ()
        return self.image_features(images)

    def encode_raw(self, raw: Tensor) -> Tensor:
        """[num_images, height, width, 3] float32, 0 to 255 -> [num_images, image tokens, hidden].

        Tower and normalisation of equal-sized pictures as one function of one tensor, which
        `glimt export` writes down. What it computes must not depend on how many pictures there are,
        but for shapes. Raises TypeError in a family that has no such function.
        """
        raise TypeError(f"{type(self).__name__} has no tower that could be exported")

    def embed(self, token_ids: Tensor) -> Tensor:
        """[num_tokens] int64 -> [num_tokens, hidden_size]: as they stand, no scale, no norm."""
        return self.embedding(token_ids)

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        batch: AttentionBatch,
        caches: Sequence[KVCache],
    ) -> Tensor:
        """[num_tokens, hidden_size], positions [channels, num_tokens] -> normalised hidden states.

        Writes keys and values of these tokens into `caches`, one per layer.
        """
        cos_sin = self.rotary.at(positions)
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden = block(hidden, cos_sin, batch, cache)
        return self.final_norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size], in the dtype of the weights."""
        return self.head(hidden)


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What a model needs besides its config.

    rotary_table: "auto", "hub_fp16" or "fp32_product" (VisualGLM)
    max_positions: rows of rotary tables to build
    group: the ranks that hold the model together; parameters are this one's parts
    """

    device: Device
    dtype: torch.dtype
    max_positions: int
    rotary_table: str = "auto"
    group: Group = ALONE


C = TypeVar("C", bound=FamilyConfig)


@dataclass(frozen=True, slots=True)
class ModelFamily(Generic[C]):
    """One family of checkpoints and how to run it.

    claims:    whether a parsed config.json is of this family
    tokenizer: its tokenizer file
    processor: (model folder, config, tokenizer) -> Processor
    build:     (config, context) -> Model with parameters on the meta device
    prompt_attention: "bidirectional" means that a prompt's tokens see later ones, so it is
        neither chunked nor shared in part
    stored_quant: the format (quant/) in which a checkpoint's language blocks are by the family's
        own keys of config.json; None for a family that has no such keys
    special_ids: the special tokens' ids that config.json alone tells, by name, for a model of
        random weights, which has no tokenizer file; None: there are no such models of the family
    """

    name: str
    claims: Callable[[Mapping[str, Any]], bool]
    config: type[C]
    tokenizer: TokenizerSpec
    processor: Callable[[Path, C, Tokenizer], Processor]
    build: Callable[[C, BuildContext], Model]
    prompt_attention: PromptAttention
    stored_quant: Callable[[C], str] | None = None
    special_ids: Callable[[C], Mapping[str, int]] | None = None


def find_family(raw: Mapping[str, Any], where: str) -> ModelFamily[Any]:
    """The family that claims this config.json. Raises ConfigError if none or several do."""
    claimed = [family for family in all_families() if family.claims(raw)]
    if len(claimed) == 1:
        return claimed[0]
    names = ", ".join(family.name for family in all_families())
    said = f"model_type {raw.get('model_type')!r}, architectures {raw.get('architectures')!r}"
    if claimed:
        both = " and ".join(family.name for family in claimed)
        raise ConfigError(where, [f"both {both} claim this checkpoint ({said})"])
    said = said if raw.get("model_type") is not None else "model_type is missing"
    raise ConfigError(where, [f"no model family claims this checkpoint ({said}); known: {names}"])


def all_families() -> tuple[ModelFamily[Any], ...]:
    """Every family in this folder, by name; a module without FAMILY is no family."""
    package = importlib.import_module("glimt.models")
    modules = [
        importlib.import_module(f"glimt.models.{info.name}")
        for info in pkgutil.iter_modules(package.__path__)
    ]
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


# --- weights ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weight:
    """One line of a family's weight table: checkpoint tensors that become parameters.

    sources: names in the checkpoint; `{i}` stands for a number and is the same on both sides
    targets: parameter names in the model
    convert: all sources -> all targets, for a layout that must be split, fused or reshaped;
             None when the one source is the one target as it stands
    source_shapes: target shapes -> source shapes, with `convert` only
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    convert: Callable[[Sequence[Tensor]], Sequence[Tensor]] | None = None
    source_shapes: Callable[[Sequence[tuple[int, ...]]], Sequence[tuple[int, ...]]] | None = None


@dataclass(frozen=True, slots=True)
class WeightTable:
    """How a family's checkpoint names map to its parameters.

    ignored: names (fnmatch patterns) that may be present and are not read
    """

    weights: tuple[Weight, ...]
    ignored: tuple[str, ...] = ()


def renamed(pairs: Mapping[str, str]) -> tuple[Weight, ...]:
    """Weight lines that only change the name: {checkpoint name: parameter name}."""
    return tuple(Weight((source,), (target,)) for source, target in pairs.items())


def special_id(ids: Mapping[str, int], name: str) -> int:
    """Id of a special token. Raises ConfigError naming it when the tokenizer has none."""
    if name not in ids:
        raise ConfigError("tokenizer", [f"has no special token {name!r}"])
    return ids[name]
