"""What every model family promises, and what families share. Knows no family by name.

A family is one file in this folder ending in a `FAMILY` object; `find_family` scans the folder
and asks each file whether it claims a config.json.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from glimt.errors import ConfigError
from glimt.types import EncodedPrompt, ImageInput, Message, SamplingDefaults

if TYPE_CHECKING:
    from PIL.Image import Image

    from glimt.devices.base import AttentionBatch, Device, KVCache
    from glimt.layers.embedding import Embedding
    from glimt.layers.linear import Linear
    from glimt.layers.rotary import Rotary
    from glimt.layers.tower import Stages

PromptAttention = Literal["causal", "bidirectional"]


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

    def finish_text(self, raw: str) -> str:
        """The reply as the original shows it: stripped, punctuation mended."""

    def stable_length(self, raw: str) -> int:
        """Length of the prefix of `raw` whose finished form no later text can change.

        For any continuation: finish_text(raw + more) starts with finish_text(raw[:length]).
        """


class Model(nn.Module):
    """Weights and arithmetic of one family. Keeps nothing of a request.

    What is quantised, planned in memory and timed goes by the names of its parts: `embedding`,
    `blocks` and `head` are the language model's; `tower`, `adapter`, `qformer` and `project` are
    what only pictures pass through. The methods below run a decoder that is made of these parts as
    most are; a family whose own differs overrides them.
    """

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
        turn = self.rotary.at(positions)
        for block, cache in zip(self.blocks, caches, strict=True):
            hidden = block(hidden, turn, batch, cache)
        return self.final_norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size], in the dtype of the weights."""
        return self.head(hidden)


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What a model needs besides its config.

    rotary_table: "auto", "hub_fp16" or "fp32_product" (VisualGLM)
    max_positions: rows of rotary tables to build
    """

    device: Device
    dtype: torch.dtype
    max_positions: int
    rotary_table: str = "auto"


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


SAT_SAID = (
    "holds VisualGLM's SAT form (model_config.json); make the hub form of it first: glimt convert"
)


def read_model_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises ConfigError; names VisualGLM's other weight form."""
    if not (folder / "config.json").exists() and (folder / "model_config.json").exists():
        raise ConfigError(str(folder), [SAT_SAID])
    return read_json(folder / "config.json")


LFS_HEAD = b"version https://git-lfs"
LFS_SAID = "is a Git LFS pointer, not the file itself; run git lfs pull in the model folder"


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises ConfigError naming the file."""
    try:
        data = path.read_bytes()
        if data.startswith(LFS_HEAD):
            raise ConfigError(str(path), [LFS_SAID])
        raw = json.loads(data.decode("utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(str(path.parent), [f"{path.name} is missing"]) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), [f"is not readable as JSON: {error}"]) from error
    if not isinstance(raw, dict):
        raise ConfigError(str(path), [f"holds a {type(raw).__name__}, not an object"])
    return raw


class ConfigReader:
    """Reads typed values from a parsed config.json and remembers everything that is wrong.

    Read all values, then call `check()`: it raises one ConfigError naming each problem. A value
    that is wrong is returned as a harmless stand-in until then.
    """

    def __init__(self, raw: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.raw = raw
        self.where = where
        self.prefix = prefix
        self.problems: list[str] = []
        self._wrong: set[str] = set()  # full names; what is derived from them is not judged

    def section(self, name: str) -> ConfigReader:
        """A reader of a nested object; its problems join this reader's.

        Where there is no such object, that is the problem, and not each of its values.
        """
        inner = self.raw.get(name)
        if not isinstance(inner, Mapping):
            self._problem(name, "is missing" if inner is None else "is not an object")
            return ConfigReader({}, self.where, f"{self.prefix}{name}.")
        reader = ConfigReader(inner, self.where, f"{self.prefix}{name}.")
        reader.problems, reader._wrong = self.problems, self._wrong
        return reader

    def integer(self, name: str, low: int = 1, default: int | None = None) -> int:
        """A whole number of at least `low`."""
        value = self._given(name, default)
        if value is None:
            return int(self._problem(name, "is missing", low))
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            return int(self._problem(name, f"is {value!r}; a whole number >= {low} is needed", low))
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._given(name, default)
        if value is None:
            return float(self._problem(name, "is missing", 1.0))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not 0 < value < float("inf"):
            return float(self._problem(name, f"is {value!r}; a number above 0 is needed", 1.0))
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or false."""
        value = self._given(name, default)
        if not isinstance(value, bool):
            said = "is missing" if value is None else f"is {value!r}; true or false is needed"
            return bool(self._problem(name, said, False))
        return value

    def must_be(self, name: str, only: Any) -> None:
        """A setting that has only one value that this family computes."""
        if self.raw.get(name) is None:
            self._problem(name, "is missing")
        else:
            self.may_only_be(name, only)

    def may_only_be(self, name: str, only: Any) -> None:
        """The same, for a setting that many files do not have: absent means `only`."""
        value = self.raw.get(name)
        if value is not None and value != only:
            self._problem(name, f"is {value!r}; only {only!r} is supported")

    def one_of(self, name: str, choices: Sequence[int], default: int) -> int:
        """One of a few whole numbers."""
        value = self._given(name, default)
        if isinstance(value, bool) or value not in choices:
            said = either([str(choice) for choice in choices])
            return int(self._problem(name, f"is {value!r}; {said} is needed", default))
        return int(value)

    def must_agree(self, given: tuple[str, int], wanted: int, *sources: str) -> None:
        """A value that other keys, the sources, determine already."""
        name, value = given
        if self._are_sound(name, *sources) and value != wanted:
            said = " and ".join(f"{self.prefix}{source}" for source in sources)
            self._problem(name, f"is {value}, but {said} give {wanted}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self.raw.get(name, default)
        if not isinstance(value, str):
            return str(self._problem(name, "is missing" if value is None else f"is {value!r}", ""))
        return value

    def size(self, name: str) -> tuple[int, int]:
        """[height, width]."""
        match self.raw.get(name):
            case [int(height), int(width)] if height > 0 and width > 0:
                return height, width
            case value:
                said = "is missing" if value is None else f"is {value!r}; [height, width] is needed"
                self._problem(name, said)
                return 1, 1

    def flags(self, name: str, count: int, source: str) -> tuple[bool, ...]:
        """A list of `count` true or false; `source` is the key that gave the count."""
        value = self.raw.get(name)
        is_flags = isinstance(value, list) and all(isinstance(flag, bool) for flag in value)
        is_counted = isinstance(value, list) and len(value) == count
        if isinstance(value, list) and is_flags and (is_counted or not self._are_sound(source)):
            return tuple(value)
        said = "is missing" if value is None else f"is {value!r}; {count} flags are needed"
        self._problem(name, said)
        return (False,) * count

    def ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self.raw.get(name)
        if value is None:
            self._problem(name, "is missing")
            return ()
        ids = value if isinstance(value, list) else [value]
        if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            self._problem(name, f"is {value!r}; a token id or a list of them is needed")
            return ()
        return tuple(ids)

    def dtype(self) -> str:
        """torch_dtype, or dtype, as newer writers call it."""
        name = "dtype" if self.raw.get("torch_dtype") is None else "torch_dtype"
        value = self.raw.get(name)
        if value is None:
            self._problem("torch_dtype", "is missing")
            return "float32"
        if value not in ("float32", "float16", "bfloat16"):
            self._problem(name, f"is {value!r}; float32, float16 or bfloat16 is needed")
            return "float32"
        return str(value)

    def divides(self, whole: str, size: int, part: str, count: int) -> None:
        """Remember a problem when `count` parts do not divide `size`."""
        if self._are_sound(whole, *part.split()) and size % count:
            self._problem(whole, f"is {size}, which {part} ({count}) does not divide")

    def _are_sound(self, *names: str) -> bool:
        """No key of these names was found wrong, nor the object that it is in."""
        paths = [f"{self.prefix}{name}." for name in names]
        return not any(path.startswith(f"{wrong}.") for path in paths for wrong in self._wrong)

    def _given(self, name: str, default: Any) -> Any:
        """A value, or the default where it is absent or null."""
        value = self.raw.get(name)
        return default if value is None else value

    def _problem(self, name: str, said: str, stand_in: Any = None) -> Any:
        self.problems.append(f"{self.prefix}{name} {said}")
        self._wrong.add(f"{self.prefix}{name}")
        return stand_in

    def check(self) -> None:
        """Raise ConfigError if anything was wrong."""
        if self.problems:
            raise ConfigError(self.where, self.problems)


def either(words: Sequence[str]) -> str:
    """A, B or C."""
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


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


# --- pictures --------------------------------------------------------------------------------

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def squash(image: Image, height: int, width: int) -> np.ndarray:
    """Resize to exactly this size, bicubic with antialiasing, aspect ratio not kept.

    Returns [height, width, 3] uint8. Both originals do this with Pillow; a tensor library's
    bicubic without antialiasing gives other pixels.
    """
    from PIL.Image import Resampling

    resized = image.convert("RGB").resize((width, height), Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8)


def normalise(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """[height, width, 3] uint8 -> [3, height, width] float32, (x / 255 - mean) / std."""
    x = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1) / 255
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[…, channels, height, width] -> […, rows * columns, channels * patch_size**2], row-major.

    A patch's values are in (channel, y, x) order, which is a convolution weight's own order, so
    that a convolution with stride = kernel size is one matrix product.
    """
    *batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    x = images.reshape(-1, channels, rows, patch_size, columns, patch_size)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(*batch, rows * columns, channels * patch_size**2)
