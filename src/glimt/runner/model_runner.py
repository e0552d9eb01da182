"""ModelRunner: a step's plan -> logits. Owns the model and the KV tensors; keeps no request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from glimt.devices.base import AttentionBatch, Device
from glimt.devices.memory import saying_what_fits, step_too_large
from glimt.models.base import Model
from glimt.runner.batch import Batch, flatten
from glimt.runner.kv_cache import KVCaches
from glimt.runner.vision import VisionRunner
from glimt.types import ImageSlice, StepPlan


@dataclass(frozen=True, slots=True, eq=False)
class StepLogits:
    """What a step gives.

    logits:  [num_sampled, vocab_size]
    image_s: tower seconds by request id
    scored:  pieces [at most 64, vocab_size] of the logits that plan.targets are scored by, in
        order; each is computed when it is asked for, before the next step
    """

    logits: Tensor
    image_s: dict[str, float] = field(default_factory=dict)
    scored: Iterable[Tensor] = ()


# Rows of logits at one time: of 151,552 tokens 39 MB, less than the layers have just given back.
_SCORED_ROWS = 64


class ModelRunner:
    """Runs one step at a time. What its pictures look like to the model comes from `vision`."""

    def __init__(
        self, model: Model, caches: KVCaches, vision: VisionRunner, device: Device
    ) -> None:
        self.model = model
        self.caches = caches
        self.vision = vision
        self.device = device
        self._decode = device.recorded(self._forward, caches[0])

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepLogits:
        """Compute a step's tokens. Returns the logits of plan.sampled_rows, in order.

        Pictures of its rows that are not ready go through the tower first, all the way. A step may
        be run again: it writes the same values to the same cache slots. Raises EngineError where a
        card has no room for what is computed.
        """
        with saying_what_fits(step_too_large):
            return self._run(plan)

    def _run(self, plan: StepPlan) -> StepLogits:
        batch = flatten(plan, self.caches[0].block_size, self.device.torch_device)
        # Decodes read their last block whole, and NaN that its last owner left is NaN under a mask.
        self.caches.clear_blocks(batch.opened_blocks)
        image_s = self.vision.complete(plan)
        hidden = self.model.embed(batch.token_ids)
        for offset, part in _placed_slices(plan):
            hidden[offset : offset + part.length] = self.vision.rows_of(part)
        is_repeated = batch.attention.is_decode and self.model.is_repeatable
        forward = self._decode if is_repeated else self._forward
        hidden = forward(hidden, batch.positions, batch.attention)
        self._clear_broken_drafts(batch, hidden)
        scored = self._scored(hidden, batch.scored) if len(batch.scored) else ()
        return StepLogits(self.model.logits(hidden[batch.sampled]), image_s, scored)

    def _scored(self, hidden: Tensor, places: Tensor) -> Iterator[Tensor]:
        for piece in places.split(_SCORED_ROWS):
            with torch.inference_mode(), saying_what_fits(step_too_large):
                logits = self.model.logits(hidden[piece])
            yield logits

    def _forward(self, hidden: Tensor, positions: Tensor, batch: AttentionBatch) -> Tensor:
        result: Tensor = self.model(hidden, positions, batch, self.caches)
        return result

    def _clear_broken_drafts(self, batch: Batch, hidden: Tensor) -> None:
        """Take back what is not finite of tokens that may never be said.

        A draft that is refused stays in the cache until its place is written again, and decodes
        read their last block whole: under a mask, but NaN under a mask is NaN.
        hidden: [num_tokens, hidden_size]
        """
        if not len(batch.drafted):
            return
        is_broken = ~hidden[batch.drafted].isfinite().all(-1)
        if is_broken.any():
            self.caches.clear_slots(batch.attention.slots[batch.drafted[is_broken]])


def _placed_slices(plan: StepPlan) -> Iterator[tuple[int, ImageSlice]]:
    """Every picture slice with its offset in the flattened step."""
    start = 0
    for row in plan.rows:
        for part in row.images:
            yield start + part.offset, part
        start += len(row.token_ids)
