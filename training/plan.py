"""How long and how hard to train."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A schedule: the tower alone at first, then everything.

    steps:          in all; tower_steps: of them, those of the tower alone
    batch_rows:     conversations per step; tower_pictures: pictures of a step of the tower alone
    more_pictures:  pictures per step beside those of the conversations
    peak_rate:      of AdamW; that of Muon is matrix_scale times as high
    warmup_steps:   of steps, while the rate rises
    layout_weight, garment_weight: of the losses on the tower's states and on the features
    check_every:    steps between two looks at the held-out questions
    """

    steps: int
    tower_steps: int = 0
    batch_rows: int = 256
    tower_pictures: int = 256
    more_pictures: int = 32
    peak_rate: float = 1.5e-3
    matrix_scale: float = 3.0
    warmup_steps: int = 200
    weight_decay: float = 0.05
    layout_weight: float = 1.0
    garment_weight: float = 0.5
    average_decay: float = 0.998
    save_every: int = 200
    check_every: int = 500
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Learning rate: a linear rise, then half a cosine down to a fiftieth."""
        if step < self.warmup_steps:
            return self.peak_rate * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


QUICK = Plan(steps=160, tower_steps=40, batch_rows=32, tower_pictures=64, more_pictures=8,
             warmup_steps=20, average_decay=0.97, check_every=80)  # fmt: skip
