"""A rank other than the first: it makes on its part of the model whatever rank 0 makes on its own.

Keeps no request: every message says all that is computed. Ends when rank 0 hangs up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from glimt.devices.base import AttentionBatch
from glimt.errors import RankError
from glimt.layers.tower import Stages
from glimt.models.base import Model
from glimt.parallel import Group
from glimt.runner.kv_cache import KVCaches
from glimt.runner.messages import Channel, Message
from glimt.types import ImageInput


class Worker:
    """One rank's part of a model and of its caches.

    allocate: caches of so many blocks
    dtype:    of the activations
    """

    def __init__(
        self,
        model: Model,
        allocate: Callable[[int], KVCaches],
        group: Group,
        torch_device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.model = model
        self.caches = KVCaches()
        self._allocate = allocate
        self.group = group
        self.torch_device = torch_device
        self.dtype = dtype
        self._stages: dict[int, Stages[list[Tensor]]] = {}
        self._answers: dict[str, Callable[[Message], None]] = {
            "cache": self._make_caches,
            "embed": self._embed,
            "forward": self._forward,
            "logits": self._logits,
            "clear_blocks": self._clear_blocks,
            "clear_slots": self._clear_slots,
            "pictures": self._begin_pictures,
            "stage": self._go_on,
            "leave": self._leave,
        }

    @torch.inference_mode()
    def serve(self, channel: Channel) -> None:
        """Compute what is told until "stop". Raises RankError if rank 0 is gone."""
        while (message := channel.receive()).kind != "stop":
            answer = self._answers.get(message.kind)
            if answer is None:
                raise RankError(f"rank 0 asked for {message.kind!r}, which this rank cannot do")
            answer(message)

    def _make_caches(self, message: Message) -> None:
        self.caches = KVCaches()  # the old ones go first
        self.caches = self._allocate(message.values["num_blocks"])

    # --- language model ---

    def _embed(self, message: Message) -> None:
        self.model.embed(self._tensor(message.arrays["token_ids"]))

    def _forward(self, message: Message) -> None:
        batch = AttentionBatch(
            num_decodes=message.values["num_decodes"],
            query_starts=tuple(message.values["query_starts"]),
            context_lens=tuple(message.values["context_lens"]),
            num_shared=tuple(message.values["num_shared"]),
            slots=self._tensor(message.arrays["slots"]),
            block_tables=self._tensor(message.arrays["block_tables"]),
            decode_lens=self._tensor(message.arrays["decode_lens"]),
        )
        positions = self._tensor(message.arrays["positions"])
        self.model(self._given(message), positions, batch, self.caches)

    def _logits(self, message: Message) -> None:
        self.model.logits(self._given(message))

    def _clear_blocks(self, message: Message) -> None:
        self.caches.clear_blocks(message.values["blocks"])

    def _clear_slots(self, message: Message) -> None:
        self.caches.clear_slots(self._tensor(message.arrays["slots"]))

    def _given(self, message: Message) -> Tensor:
        """The hidden states that rank 0 has."""
        shape, where = message.values["shape"], self.torch_device
        return self.group.broadcast(torch.empty(shape, dtype=self.dtype, device=where))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.torch_device)

    # --- pictures ---

    def _begin_pictures(self, message: Message) -> None:
        images = [
            ImageInput(b"", num_tokens, (rows, columns), message.arrays[str(i)])
            for i, (num_tokens, rows, columns) in enumerate(message.values["images"])
        ]
        self._stages[message.values["number"]] = self.model.image_stages(images)

    def _go_on(self, message: Message) -> None:
        number = message.values["number"]
        try:
            next(self._stages[number])
        except StopIteration:
            del self._stages[number]

    def _leave(self, message: Message) -> None:
        self._stages.pop(message.values["number"], None)
