"""Heads that teach the tower while training and are thrown away afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.garments import NAMES
from training.data.layout import NUM_OBJECT_KINDS
from training.data.texts import CHARACTERS
from training.view import Pictures, Seen

NUM_KINDS = 1 + NUM_OBJECT_KINDS + len(CHARACTERS)
_NOTHING_WEIGHT = 0.2  # most patches show nothing


class Heads(nn.Module):
    """What each patch shows, from the tower's states; which garment, from the features' mean."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        vision = raw.get("vision_config") or raw["eva_config"]
        self.layout = nn.Linear(vision["hidden_size"], NUM_KINDS)
        self.garment = nn.Linear(raw["hidden_size"], len(NAMES))

    def layout_loss(self, seen: Seen, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """The loss, and the share of right patches among those that show something."""
        logits = self.layout(F.layer_norm(seen.states.float(), seen.states.shape[-1:]))
        known = pictures.layouts >= 0
        logits, kinds = logits[known].float(), pictures.layouts[known]
        weight = torch.ones(NUM_KINDS, device=kinds.device)
        weight[0] = _NOTHING_WEIGHT
        is_right = (logits.argmax(-1) == kinds)[kinds > 0].float()
        if not len(kinds):
            return logits.sum(), is_right.sum()
        return F.cross_entropy(logits, kinds, weight), is_right.mean()

    def garment_loss(self, seen: Seen, pictures: Pictures) -> Tensor:
        """Pictures that show no garment count nothing."""
        pooled = seen.features.float().mean(dim=1)
        logits = self.garment(F.layer_norm(pooled, pooled.shape[-1:])).float()
        loss = F.cross_entropy(logits, pictures.garments, ignore_index=-1, reduction="sum")
        return loss / (pictures.garments >= 0).sum().clamp(min=1)
