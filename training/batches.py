"""Batches of conversations: drawn by workers, the same for any number of them.

Steps are drawn in groups, each group from a seed of its own, so that a resumed run sees what an
uninterrupted one would, and rows of like length share a batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from glimt.models.base import Processor
from training.data.mixture import Mixtures
from training.encode import (
    EncodedRow,
    Picture,
    collate,
    conversations,
    encode_picture,
    stack,
)
from training.plan import Plan
from training.view import Batch

GROUP = 4  # steps whose rows are drawn together and sorted by length
_NUM_TURNS = (1, 2, 4, 6)


class BatchGroups(Dataset[list[Batch]]):
    """Group number -> its batches: of pictures alone at first, then of conversations."""

    def __init__(
        self, mixtures: Mixtures, processor: Processor, is_causal: bool, plan: Plan
    ) -> None:
        self._mixtures = mixtures
        self._processor = processor
        self._is_causal = is_causal
        self._plan = plan

    def __getitem__(self, group: int) -> list[Batch]:
        plan = self._plan
        rng = random.Random(plan.seed * 1_000_003 + group * GROUP)
        if group * GROUP < plan.tower_steps:
            return [
                Batch(None, stack(self._pictures(plan.tower_pictures, rng))) for _ in range(GROUP)
            ]
        drawn = self._rows(GROUP * plan.batch_rows, rng)
        parts = [drawn[i * plan.batch_rows :][: plan.batch_rows] for i in range(GROUP)]
        rng.shuffle(parts)
        return [
            collate(part, self._is_causal, self._pictures(plan.more_pictures, rng))
            for part in parts
        ]

    def _rows(self, count: int, rng: random.Random) -> list[EncodedRow]:
        """A causal family's rows by length; a bidirectional one's are all about equally long."""
        rows: list[EncodedRow] = []
        while len(rows) < count:
            sample = self._mixtures.conversations.draw(rng)
            num_turns = rng.choice(_NUM_TURNS)
            rows += conversations(self._processor, sample, num_turns, rng, self._is_causal)
        del rows[count:]
        if self._is_causal:
            rows.sort(key=lambda row: len(row.token_ids))
        return rows

    def _pictures(self, count: int, rng: random.Random) -> list[Picture]:
        samples = (self._mixtures.pictures.draw(rng) for _ in range(count))
        encoded = (encode_picture(self._processor, sample) for sample in samples)
        return [picture for picture in encoded if picture]


def batches(groups: BatchGroups, first_step: int, steps: int, num_workers: int) -> Iterator[Batch]:
    """The batches of steps first_step … steps-1.

    num_workers: processes that draw ahead; 0 draws in this one, which is as fast on two cores
    """
    first = first_step // GROUP
    loader: DataLoader[list[Batch]] = DataLoader(
        groups, batch_size=None, sampler=range(first, -(-steps // GROUP)), num_workers=num_workers
    )
    for group, drawn in enumerate(loader, first):
        for step, batch in enumerate(drawn, group * GROUP):
            if first_step <= step < steps:
                yield batch
