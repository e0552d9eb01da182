"""Bytes and operations of a step and of a picture, and what share of the machine's limits that is.

Counted from a model's shapes alone; nothing here runs. Operations are multiplications and
additions, counted apart. Source of the formulas: the roofline model, Williams et al., CACM 52(4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from glimt.devices.base import Device
from glimt.engine import Engine
from glimt.models.base import (
    VISION_MODULES,
    BuildContext,
    FamilyConfig,
    Model,
    ModelFamily,
    Processor,
)
from glimt.runner.kv_cache import cache_dtype, kv_bytes_per_token
from glimt.types import ImageInput


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """What a model's shapes say of a step.

    layer_products:  values in the matrices of the language model's blocks
    head_products:   values in the matrix of the head
    step_bytes:      of the weights that every step reads: blocks, last norm and head
    kv_bytes:        of one cached token
    num_layers, attention_size: blocks, and query heads times their width
    image_ops:       operations of one picture through tower and adapter
    """

    layer_products: int
    head_products: int
    step_bytes: int
    kv_bytes: int
    num_layers: int
    attention_size: int
    image_ops: int

    def with_weights(self, step_bytes: int) -> ModelCosts:
        """The same for weights in another form, such as quantised ones."""
        return replace(self, step_bytes=step_bytes)

    def with_cache(self, kv_bytes: int) -> ModelCosts:
        """The same for a KV cache in another form."""
        return replace(self, kv_bytes=kv_bytes)

    def prefill_ops(self, num_tokens: int) -> int:
        """Operations of a causal prompt in one step, with one row of logits.

        2 · P · T + 2 · L · size · T² + head: each query sees half of the keys on average.
        """
        attention = 2 * self.num_layers * self.attention_size * num_tokens**2
        return 2 * self.layer_products * num_tokens + attention + 2 * self.head_products

    def decode_ops(self, batch: int, context: float) -> float:
        """Operations of one token for each of `batch` rows whose contexts are so long on average.

        2 · B · (P + head) + 4 · B · L · size · context.
        """
        attention = 4 * self.num_layers * self.attention_size * context
        return batch * (2 * (self.layer_products + self.head_products) + attention)

    def decode_bytes(self, batch: int, context: float) -> float:
        """Bytes that such a step reads: the weights once, and every row's keys and values."""
        return self.step_bytes + batch * context * self.kv_bytes

    def decode_limit_s(
        self, batch: int, context: float, read_limit: float, ops_limit: float
    ) -> float:
        """Seconds below which such a step cannot be, whichever of the two holds it up.

        read_limit, ops_limit: bytes and operations per second
        """
        read_s = self.decode_bytes(batch, context) / read_limit
        return max(read_s, self.decode_ops(batch, context) / ops_limit)

    def prefill_limit_s(
        self, batch: int, num_tokens: int, num_images: int, read_limit: float, ops_limit: float
    ) -> float:
        """The same until the first token of so many prompts of num_tokens, pictures included.

        num_images: pictures of each prompt, which go through tower and adapter
        """
        ops = batch * (self.prefill_ops(num_tokens) + num_images * self.image_ops)
        return max(self.step_bytes / read_limit, ops / ops_limit)

    def mbu(self, step_s: float, read_limit: float) -> float:
        """Share of the bandwidth that the weights alone take: step_bytes / step_s / read_limit.

        read_limit: bytes per second
        """
        return self.step_bytes / step_s / read_limit


def mfu(ops: float, seconds: float, ops_limit: float) -> float:
    """Share of the machine's ops_limit, operations per second, that so many in so long reach."""
    return ops / seconds / ops_limit


# --- counting --------------------------------------------------------------------------------


def engine_costs(engine: Engine) -> ModelCosts:
    """Of an engine's model, in the form in which it holds weights and cache."""
    opened = engine.opened
    costs = costs_of(opened.family, opened.config, opened.processor, opened.dtype)
    costs = costs.with_weights(engine.memory.language + engine.memory.head)
    stored = cache_dtype(engine.config.kv_dtype, opened.dtype)
    return costs.with_cache(kv_bytes_per_token(opened.model, stored))


def costs_of(
    family: ModelFamily[Any], config: FamilyConfig, processor: Processor, dtype: torch.dtype
) -> ModelCosts:
    """Count a model, built anew without memory for its weights."""
    device = Device("meta")
    model = family.build(config, BuildContext(device, dtype, 1))
    language = [
        (name, value)
        for name, value in model.named_parameters()
        if name.partition(".")[0] not in {*VISION_MODULES, "embedding"}
    ]
    matrices = [(name, value.numel()) for name, value in language if value.dim() == 2]
    return ModelCosts(
        layer_products=sum(count for name, count in matrices if not name.startswith("head.")),
        head_products=sum(count for name, count in matrices if name.startswith("head.")),
        step_bytes=sum(value.numel() for _, value in language) * dtype.itemsize,
        kv_bytes=kv_bytes_per_token(model, dtype),
        num_layers=model.num_layers,
        attention_size=config.num_heads * model.head_dim,
        image_ops=_image_ops(model, processor),
    )


def _image_ops(model: Model, processor: Processor) -> int:
    """torch counts the products and attentions of the plain path; 0 for a text model."""
    if not any(name in VISION_MODULES for name, _ in model.named_children()):
        return 0
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.image_features([blank_image(processor)])
    return int(counter.get_total_flops())


def blank_image(processor: Processor) -> ImageInput:
    """A black picture as the tower takes it."""
    from PIL import Image

    return processor.prepare_image(Image.new("RGB", (64, 64)), b"blank")
