"""What an engine will keep in memory, part by part, and how large the KV cache may be.

Weights are counted exactly; what a step needs besides is estimated, from above.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from glimt.config import EngineConfig
from glimt.devices.base import Device
from glimt.errors import ConfigError
from glimt.models.base import VISION_MODULES, Model
from glimt.runner.kv_cache import cache_dtype, kv_bytes_per_token
from glimt.sizes import size_text

_MAX_DEFAULT_KV_BYTES = 8 * 2**30
_RESERVE = 512 * 2**20  # Python, torch and its libraries, prompts and pictures that wait
# Values that live beside a block's outputs: its inputs, and float32 copies inside norms.
_COPIES = 2
# Of a compiled tower's value: onnxruntime computes in float32, and keeps what a float16 file holds
# beside it. An OM takes less.
_COMPILED_BYTES = 6
_BYTES_PER_LOGIT = 12  # as they come, in float32, and sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of each part; limit: what all of them together may take, None for no limit.

    language, head, embedding, vision: weights; vision: tower, adapter and all that only
        pictures pass through, or a compiled tower, whose size is estimated
    features:  the cache of picture features
    workspace: the most that one step holds besides, estimated
    reserve:   Python, torch and what waits
    """

    language: int
    head: int
    embedding: int
    vision: int
    kv: int
    features: int
    workspace: int
    reserve: int
    limit: int | None = None

    @property
    def weights(self) -> int:
        """All weights."""
        return self.language + self.head + self.embedding + self.vision

    @property
    def total(self) -> int:
        """Everything together."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by name, without the limit."""
        return {name: nbytes for name, nbytes in asdict(self).items() if name != "limit"}

    def as_dict(self) -> dict[str, int | None]:
        """The parts, their sum and the limit, for JSON."""
        return {**self.parts(), "total": self.total, "limit": self.limit}


# --- planning --------------------------------------------------------------------------------


def plan_memory(
    config: EngineConfig, model: Model, device: Device, dtype: torch.dtype, max_model_len: int
) -> tuple[int, MemoryPlan]:
    """The number of cache blocks, and the plan with them.

    Raises ConfigError, naming every part, when not even one block fits into the limit, or when
    more was asked for than fits.
    """
    bare = _bare_plan(config, model, dtype)
    stored = cache_dtype(config.kv_dtype, dtype)
    block_size = device.block_size(config.block_size)
    per_block = kv_bytes_per_token(model, stored) * block_size
    num_blocks = config.num_blocks
    if num_blocks is None:
        room = _kv_room(config, bare, device)
        wanted = -(-max_model_len // block_size) * config.max_num_seqs
        num_blocks = min(room // per_block - device.num_scratch_blocks, wanted)
        if num_blocks < 1:
            raise _too_small(config, bare, room, per_block)
    plan = _with_kv(bare, (num_blocks + device.num_scratch_blocks) * per_block)
    if plan.limit is not None and plan.total > plan.limit:
        raise _beyond_limit(plan)
    return num_blocks, plan


def check_weights_fit(config: EngineConfig, model: Model, dtype: torch.dtype) -> None:
    """Raise ConfigError, naming every part, if weights that are not loaded yet cannot fit.

    Weights that are quantised while they are loaded shrink, and are checked when that is done.
    """
    if config.memory_limit_bytes is None or config.quant != "none":
        return
    plan = _bare_plan(config, model, dtype)
    if plan.total > config.memory_limit_bytes:
        raise _beyond_limit(plan)


def _kv_room(config: EngineConfig, bare: MemoryPlan, device: Device) -> int:
    if config.kv_bytes is not None:
        return config.kv_bytes
    if bare.limit is not None:
        return bare.limit - bare.total
    sharers = config.tp_size if device.peak_bytes() is None else 1  # of the host's memory
    return min(device.free_bytes() // 4, _MAX_DEFAULT_KV_BYTES) // sharers


def _bare_plan(config: EngineConfig, model: Model, dtype: torch.dtype) -> MemoryPlan:
    """All but the KV cache."""
    weights = weight_bytes(model)
    if config.vision_model is not None:  # then the model's own tower is not loaded
        weights["vision"] = _COMPILED_BYTES * _vision_values(model)
    return MemoryPlan(
        **weights,
        kv=0,
        features=config.feature_cache_bytes if _has_vision(model) else 0,
        workspace=_workspace_bytes(config, model, dtype),
        reserve=_RESERVE,
        limit=config.memory_limit_bytes,
    )


def _with_kv(bare: MemoryPlan, kv_bytes: int) -> MemoryPlan:
    fields: dict[str, Any] = asdict(bare) | {"kv": kv_bytes}
    return MemoryPlan(**fields)


# --- counting --------------------------------------------------------------------------------


def weight_bytes(model: Model) -> dict[str, int]:
    """Bytes of the weights by part, in whatever form the modules hold them now.

    A matrix that is packed or quantised is no parameter, but tells its own nbytes.
    """
    parts = dict.fromkeys(("language", "head", "embedding", "vision"), 0)
    seen: set[int] = set()
    for name, module in model.named_modules():
        for value in _held(module):
            if id(value) not in seen:  # a tied weight hangs in several modules
                seen.add(id(value))
                parts[_part_of(name)] += value.nbytes
    return parts


def _held(module: nn.Module) -> Iterator[Any]:
    has_own_form = getattr(module, "held", None) is not None  # then the parameter is a shape only
    for name, value in (*module.named_parameters(recurse=False), *vars(module).items()):
        is_shape = has_own_form and name == "weight"
        if not is_shape and isinstance(getattr(value, "nbytes", None), int):
            yield value


def _part_of(module: str) -> str:
    first = module.partition(".")[0]
    if first in ("embedding", "head"):
        return first
    return "vision" if first in VISION_MODULES else "language"


def _vision_values(model: Model) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if _part_of(name) == "vision")


def _has_vision(model: Model) -> bool:
    return any(name in VISION_MODULES for name, _ in model.named_children())


def _workspace_bytes(config: EngineConfig, model: Model, dtype: torch.dtype) -> int:
    """The widest block's outputs, for as many rows as a step may have, and the logits."""
    widths: dict[str, int] = defaultdict(int)
    for name, value in model.named_parameters():
        block = re.match(r".*?\.\d+\.", name)
        if block and value.dim() == 2:
            widths[block[0]] += value.shape[0]
    tokens = {"language": config.max_num_batched_tokens, "vision": config.tower_patches}
    values = [width * tokens[_part_of(block)] for block, width in widths.items()]
    vocabulary = [value.shape[0] for name, value in model.named_parameters() if "head" in name]
    places = config.max_num_seqs * (1 + config.num_draft_tokens)  # each has logits of its own
    num_sampled = min(places, config.max_num_batched_tokens)
    logits = num_sampled * max(vocabulary, default=0) * _BYTES_PER_LOGIT
    return max(values, default=0) * _COPIES * dtype.itemsize + logits


# --- errors ----------------------------------------------------------------------------------


def _beyond_limit(plan: MemoryPlan) -> ConfigError:
    parts = ", ".join(
        f"{name} {size_text(nbytes)}" for name, nbytes in plan.parts().items() if nbytes
    )
    said = f"is {size_text(plan.limit or 0)}, but {size_text(plan.total)} are needed: {parts}"
    return ConfigError("memory_limit_bytes", [f"{said}; raise it (--memory-limit)"])


def _too_small(config: EngineConfig, bare: MemoryPlan, room: int, per_block: int) -> ConfigError:
    if config.kv_bytes is None and bare.limit is not None:
        return _beyond_limit(_with_kv(bare, per_block))
    said = f"is {size_text(room)}, but one cache block takes {size_text(per_block)}"
    return ConfigError("kv_bytes", [f"{said}; raise it (--kv-bytes)"])
