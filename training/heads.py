"""Heads that teach the tower while training and are thrown away afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.garments import NAMES
from training.data.layout import COLOUR_NAMES, NUM_OBJECT_KINDS, SHAPE_NAMES
from training.data.texts import CHARACTERS
from training.view import Pictures, Seen

_NUM_THINGS = 1 + len(SHAPE_NAMES) + len(CHARACTERS)  # nothing, a shape, a character
_NOTHING_WEIGHT = 0.2  # most patches show nothing


class Parts(NamedTuple):
    """Kinds of training.data.layout, taken apart, so that all red things teach what red is.

    thing:         0 nothing, then shapes, then characters; -1 where nothing is known
    colour, size:  of shapes, else -1
    """

    thing: Tensor
    colour: Tensor
    size: Tensor


def parts_of(kinds: Tensor) -> Parts:
    """kinds: of any shape, -1 where nothing is known."""
    look = kinds - 1
    is_object = (look >= 0) & (look < NUM_OBJECT_KINDS)
    shape = 1 + look // (2 * len(COLOUR_NAMES))
    character = 1 + len(SHAPE_NAMES) + look - NUM_OBJECT_KINDS
    thing = torch.where(is_object, shape, character).where(kinds > 0, kinds)
    colour = (look // 2 % len(COLOUR_NAMES)).where(is_object, -1)
    return Parts(thing, colour, (look % 2).where(is_object, -1))


class Heads(nn.Module):
    """What each patch shows, from the tower's states; which garment, from the features' mean."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        vision = raw.get("vision_config") or raw["eva_config"]
        self.thing = nn.Linear(vision["hidden_size"], _NUM_THINGS)
        self.colour = nn.Linear(vision["hidden_size"], len(COLOUR_NAMES))
        self.size = nn.Linear(vision["hidden_size"], 2)
        self.garment = nn.Linear(raw["hidden_size"], len(NAMES))

    def layout_loss(self, seen: Seen, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """The loss, and the share of right things among the patches that show one."""
        states = F.layer_norm(seen.states.float(), seen.states.shape[-1:]).flatten(0, 1)
        parts = parts_of(pictures.layouts.flatten())
        weight = torch.ones(_NUM_THINGS, device=states.device)
        weight[0] = _NOTHING_WEIGHT
        things = self.thing(states)
        loss = _cross_entropy(things, parts.thing, weight)
        loss = loss + _cross_entropy(self.colour(states), parts.colour)
        loss = loss + _cross_entropy(self.size(states), parts.size)
        shown = parts.thing > 0
        return loss, (things.argmax(-1) == parts.thing)[shown].float().sum() / shown.sum().clamp(1)

    def garment_loss(self, seen: Seen, pictures: Pictures) -> Tensor:
        """Pictures that show no garment count nothing."""
        pooled = seen.features.float().mean(dim=1)
        logits = self.garment(F.layer_norm(pooled, pooled.shape[-1:]))
        return _cross_entropy(logits, pictures.garments)


def _cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over the labels that are not -1; 0 where there are none."""
    weight = torch.ones(logits.shape[-1], device=logits.device) if weight is None else weight
    total = F.cross_entropy(logits.float(), labels, weight, ignore_index=-1, reduction="sum")
    known = labels >= 0
    return total / (weight[labels.clamp(0)] * known).sum().clamp(1e-6)
