"""EngineConfig: every choice made once at start, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glimt.errors import ConfigError

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "int8")
TP_SIZES = (1, 2, 4, 8)
ROTARY_TABLES = ("auto", "hub_fp16", "fp32_product")


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageLimits:
    """What a picture may be; everything is checked from its header, before decoding."""

    max_bytes: int = 32 * 2**20  # of the encoded file: a 100-megapixel JPEG is about this large
    max_pixels: int = 100_000_000  # 300 MB once decoded
    max_aspect: float = 200.0  # long side over short side; beyond it the squash leaves nothing
    min_side: int = 2  # pixels; a 1-pixel side is ambiguous as a shape and holds no picture
    max_images: int = 64  # per request


_LEAST = {
    "tp_size": 1,
    "num_threads": 1,
    "max_model_len": 1,
    "max_num_batched_tokens": 1,
    "max_num_seqs": 1,
    "block_size": 0,
    "num_blocks": 1,
    "kv_bytes": 1,
    "feature_cache_bytes": 0,
    "tower_patches": 1,
    "tower_slice_patches": 1,
    "num_draft_tokens": 0,
    "memory_limit_bytes": 1,
}
_TEXTS = ("quant", "quant_head", "quant_tower", "vision_runtime")
_CHOICES = {"dtype": DTYPES, "kv_dtype": KV_DTYPES, "rotary_table": ROTARY_TABLES}
_MOST = {
    "num_threads": 1024,  # a process that may not start so many would be ended by its C++ library
    "num_draft_tokens": 16,  # beyond, drafts are wrong more often than a step is saved
}
_OPTIONAL = ("num_threads", "max_model_len", "num_blocks", "kv_bytes", "memory_limit_bytes")


def _is_count(value: object, low: int, high: int | None) -> bool:
    if not isinstance(value, int) or isinstance(value, bool):
        return False
    return low <= value and (high is None or value <= high)


def _is_stretch(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 1 < value < math.inf


def _range_text(low: int, high: int | None) -> str:
    return f"of at least {low}" if high is None else f"from {low} to {high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    Raises ConfigError listing every impossible value.
    """

    model: str  # folder with config.json, weights and tokenizer
    device: str = "cpu"  # a file in devices/
    tp_size: int = 1  # ranks that divide the model: 1, 2, 4 or 8; each a process with a card
    num_threads: int | None = None  # of the processor; None: as many as this process may run on
    dtype: str = (
        "auto"  # of weights and activations; auto: the checkpoint's, if the device likes it
    )
    quant: str = "none"  # a file in quant/: of the language blocks' weights, from the checkpoint's
    quant_head: str = "auto"  # of the output head; auto: what suits `quant`
    quant_tower: str = "none"  # of the vision tower
    vision_runtime: str = "torch"  # what runs the vision tower; else a file in runtimes/
    vision_model: str | None = None  # the file that `glimt export vision` wrote for that runtime
    rotary_table: str = "auto"  # VisualGLM only; auto: hub_fp16 for float16, else fp32_product
    max_model_len: int | None = None  # tokens, pictures expanded; None: what the checkpoint says
    max_num_batched_tokens: int = 2048  # per step: bounds activations and how long a decode waits
    max_num_seqs: int = 64  # sequences running at once
    block_size: int = 0  # tokens per cache block; 0: what suits the device, 32 on the CPU
    num_blocks: int | None = None  # None: from kv_bytes
    kv_bytes: int | None = None  # of the KV cache; None: what max_num_seqs could use, at most
    #                              a quarter of the free memory, or what memory_limit_bytes leaves
    kv_dtype: str = "auto"  # of cached keys and values; auto: the activations'. int8: a byte each
    #                         and a scale per token and head, half of what bfloat16 takes
    memory_limit_bytes: int | None = None  # of weights, caches and work together; None: no limit
    feature_cache_bytes: int = 256 * 2**20  # 20 pictures of GLM-4v-9B in 16 bit; 0: no cache
    tower_patches: int = 8192  # per tower call: one GLM-4v picture has 6,401, VisualGLM 257
    tower_slice_patches: int = 16384  # patches x layers of the tower per step while others run:
    #                                   2 layers of a GLM-4v picture, all 39 of a VisualGLM one
    max_stretch: float | None = None  # how many times as long a step may take for new prompts and
    #                                   pictures beside running answers; None: throughput first.
    #                                   2 keeps streams smooth, and new requests at half the speed
    enable_prefix_cache: bool = True
    num_draft_tokens: int = 0  # drafted per sequence and step, and checked in it; 0: off.
    #                            4 suits answers that repeat the prompt or themselves
    image_limits: ImageLimits = field(default_factory=ImageLimits)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        """The settings whose `dataclasses.asdict`, written as JSON and read again, this is."""
        return cls(**{**values, "image_limits": ImageLimits(**values["image_limits"])})

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}; a whole number {_range_text(low, _MOST.get(name))} is needed"
            for name, low in _LEAST.items()
            if not _is_count(value := getattr(self, name), low, _MOST.get(name))
            and not (value is None and name in _OPTIONAL)
        ]
        problems += [
            f"{name} is {value!r}; a name is needed"
            for name in _TEXTS
            if not isinstance(value := getattr(self, name), str)
        ]
        if _is_count(self.tp_size, 1, None) and self.tp_size not in TP_SIZES:
            problems.append(f"tp_size is {self.tp_size!r}; one of 1, 2, 4 and 8 is needed")
        problems += self._tower_problems()
        if self.max_stretch is not None and not _is_stretch(self.max_stretch):
            problems.append(f"max_stretch is {self.max_stretch!r}; a number above 1 is needed")
        for name, kind in (("enable_prefix_cache", bool), ("image_limits", ImageLimits)):
            if not isinstance(value := getattr(self, name), kind):
                problems.append(f"{name} is {value!r}; {kind.__name__} is needed")
        problems += [
            f"{name} {value!r} is unknown; choose one of {', '.join(known)}"
            for name, known in _CHOICES.items()
            if (value := getattr(self, name)) not in known
        ]
        if problems:
            raise ConfigError("engine options", problems)

    def _tower_problems(self) -> list[str]:
        """A compiled tower comes from a file, and holds its own weights."""
        file: object = self.vision_model
        if file is not None and not isinstance(file, str):
            return [f"vision_model is {file!r}; the path of a file is needed"]
        if self.vision_runtime == "torch":
            said = "vision_model is set, but vision_runtime is torch; name the runtime of the file"
            return [] if self.vision_model is None else [said]
        if self.vision_model is None:
            said = f"vision_runtime is {self.vision_runtime!r}, which runs a file; name it with"
            return [f"{said} vision_model (--vision-model)"]
        if self.tp_size != 1:
            said = f"vision_runtime is {self.vision_runtime!r}, which one process runs, but tp_size"
            return [f"{said} is {self.tp_size}; leave one of the two out"]
        if self.quant_tower != "none":
            said = (
                f"quant_tower is {self.quant_tower!r}, but vision_runtime runs weights of its own"
            )
            return [f"{said}; leave one of the two out"]
        return []
