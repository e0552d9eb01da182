"""Rank 0's side of a divided model: it says what is computed, and every rank does its part.

To the rest of the engine a LeadingModel is a model like any other. Each of its calls is told to the
other ranks, which then make it on their parts; the sums in the layers join them. Activations are
whole on every rank, so the logits are rank 0's own.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from glimt.devices.base import AttentionBatch, KVCache
from glimt.errors import RankError
from glimt.layers.tower import Stages, run_through
from glimt.models.base import Model
from glimt.parallel import Group
from glimt.runner.kv_cache import KVCaches
from glimt.runner.messages import Message
from glimt.types import ImageInput


class Others(Protocol):
    """The other ranks, as rank 0 knows them.

    group: all of them, with sums
    """

    group: Group

    @property
    def failure(self) -> str:
        """What happened to a rank that is gone; "" while all are well."""

    def agree(self, num_blocks: int) -> int:
        """Give all ranks caches of one size, which is returned: at most num_blocks.

        Raises RankError with what one of them could not do.
        """

    def stop(self) -> None:
        """End them."""

    def tell(self, message: Message) -> None:
        """Send to each of them. Raises RankError."""

    def why(self, error: Exception) -> RankError:
        """What happened when a common computation failed: the rank that is gone, if one is."""


class LeadingModel(Model):
    """This rank's part of a model; whatever it computes, the others compute with it.

    Raises RankError where that fails, on whichever rank: what they hold is then of no more use.
    """

    is_repeatable = False  # a recording would not tell the others

    def __init__(self, own: Model, group: Group, others: Others) -> None:
        super().__init__()
        self.num_layers, self.num_kv_heads = own.num_layers, own.num_kv_heads
        self.head_dim, self.weight_table = own.head_dim, own.weight_table
        self._own = (own,)  # in a tuple, or its parameters would have second names
        self._group = group
        self._others = others
        self._numbers = count()

    @contextmanager
    def _together(self, message: Message) -> Iterator[Model]:
        try:
            self._others.tell(message)
            yield self._own[0]
        except Exception as error:
            raise self._others.why(error) from error

    def image_features(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """As the whole model's."""
        return run_through(self.image_stages(images))

    def image_stages(self, images: Sequence[ImageInput]) -> Stages[list[Tensor]]:
        """As the whole model's; a run that is left before its end is left by all."""
        number = next(self._numbers)
        with self._together(_pictures_message(number, images)) as own:
            stages = own.image_stages(images)
        return self._led(number, stages)

    def _led(
        self, number: int, stages: Stages[list[Tensor]]
    ) -> Generator[float | None, None, list[Tensor]]:
        is_done = False
        try:
            while True:
                with self._together(Message("stage", {"number": number})):
                    is_done, share, features = _advanced(stages)
                if is_done:
                    return features
                yield share
        finally:
            if not is_done:
                self._leave(number)

    def _leave(self, number: int) -> None:
        with suppress(RankError):  # who is gone has left already
            self._others.tell(Message("leave", {"number": number}))

    def embed(self, token_ids: Tensor) -> Tensor:
        """As the whole model's."""
        with self._together(Message("embed", arrays={"token_ids": _array(token_ids)})) as own:
            return own.embed(token_ids)

    def forward(
        self, hidden: Tensor, positions: Tensor, batch: AttentionBatch, caches: Sequence[KVCache]
    ) -> Tensor:
        """As the whole model's; the others have caches of their own."""
        with self._together(_forward_message(hidden, positions, batch)) as own:
            result: Tensor = own(self._group.broadcast(hidden), positions, batch, caches)
            return result

    def logits(self, hidden: Tensor) -> Tensor:
        """As the whole model's."""
        with self._together(Message("logits", {"shape": list(hidden.shape)})) as own:
            return own.logits(self._group.broadcast(hidden.contiguous()))


class LedCaches(KVCaches):
    """Rank 0's caches; what is cleared in them is cleared in the others' too."""

    def __init__(self, own: KVCaches, others: Others) -> None:
        super().__init__(own)
        self._others = others

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """As of its own."""
        if blocks:
            self._others.tell(Message("clear_blocks", {"blocks": list(blocks)}))
            super().clear_blocks(blocks)

    def clear_slots(self, slots: Tensor) -> None:
        """As of its own."""
        self._others.tell(Message("clear_slots", arrays={"slots": _array(slots)}))
        super().clear_slots(slots)


def _advanced(stages: Stages[list[Tensor]]) -> tuple[bool, float | None, list[Tensor]]:
    """Run one part: whether it was the last, its share, and after the last what came out."""
    try:
        return False, next(stages), []
    except StopIteration as end:
        return True, None, list(end.value)


def _pictures_message(number: int, images: Sequence[ImageInput]) -> Message:
    described = [[image.num_tokens, *image.grid] for image in images]
    arrays = {str(i): image.pixels for i, image in enumerate(images)}
    return Message("pictures", {"number": number, "images": described}, arrays)


def _forward_message(hidden: Tensor, positions: Tensor, batch: AttentionBatch) -> Message:
    values = {
        "shape": list(hidden.shape),
        "num_decodes": batch.num_decodes,
        "query_starts": batch.query_starts,
        "context_lens": batch.context_lens,
        "num_shared": batch.num_shared,
    }
    arrays = {
        "positions": positions,
        "slots": batch.slots,
        "block_tables": batch.block_tables,
        "decode_lens": batch.decode_lens,
    }
    return Message("forward", values, {name: _array(value) for name, value in arrays.items()})


def _array(tensor: Tensor) -> np.ndarray:
    found: np.ndarray = tensor.detach().to("cpu", torch.int64).numpy()
    return found
