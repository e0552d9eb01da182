"""Heads that teach the tower while training and are thrown away afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data.garments import NAMES
from training.data.layout import COLOUR_NAMES, GROUND_NAMES, NUM_OBJECT_KINDS, SHAPE_NAMES
from training.data.texts import CHARACTERS
from training.initial import places
from training.view import Pictures, Seen

_NUM_THINGS = 1 + len(SHAPE_NAMES) + len(CHARACTERS)  # nothing, a shape, a character
_NOTHING_WEIGHT = 0.2  # most patches show nothing
_PAINTER_SIZE, _PAINTER_HEADS = 128, 4


class Parts(NamedTuple):
    """Kinds of training.data.layout, taken apart, so that all red things teach what red is.

    thing:         0 nothing, then shapes, then characters; -1 where nothing is known
    colour, size:  of shapes, else -1
    ground:        of a scene's background, else -1
    """

    thing: Tensor
    colour: Tensor
    size: Tensor
    ground: Tensor


def parts_of(kinds: Tensor) -> Parts:
    """kinds: of any shape, -1 where nothing is known."""
    look = kinds - 1
    is_object = (look >= 0) & (look < NUM_OBJECT_KINDS)
    ground = look - NUM_OBJECT_KINDS
    is_ground = (ground >= 0) & (ground < len(GROUND_NAMES))
    character = ground - len(GROUND_NAMES)
    thing = (1 + len(SHAPE_NAMES) + character).where(character >= 0, kinds.clamp(max=0))
    thing = torch.where(is_object, 1 + look // (2 * len(COLOUR_NAMES)), thing)
    colour = look // 2 % len(COLOUR_NAMES)
    return Parts(
        thing,
        colour.where(is_object, -1),
        (look % 2).where(is_object, -1),
        ground.where(is_ground, -1),
    )


class KindHeads(nn.Module):
    """What each place shows, from a vector per place."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.thing = nn.Linear(size, _NUM_THINGS)
        self.colour = nn.Linear(size, len(COLOUR_NAMES))
        self.size = nn.Linear(size, 2)
        self.ground = nn.Linear(size, len(GROUND_NAMES))
        self.middle = nn.Linear(size, 2)

    def forward(self, states: Tensor, layouts: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
        """[num_images, num_places, size], [num_images, num_places], the same -> the loss, and the
        share of right things among the places that show one.
        """
        x = F.layer_norm(states.float(), states.shape[-1:]).flatten(0, 1)
        parts = parts_of(layouts.flatten())
        weight = torch.ones(_NUM_THINGS, device=x.device)
        weight[0] = _NOTHING_WEIGHT
        # What lies on several places is one object: to be counted it must have one middle.
        middle = _cross_entropy(self.middle(x), middles.flatten(), weight[:2])
        things = self.thing(x)
        loss = middle + _cross_entropy(things, parts.thing, weight)
        loss = loss + _cross_entropy(self.colour(x), parts.colour)
        loss = loss + _cross_entropy(self.size(x), parts.size)
        loss = loss + _cross_entropy(self.ground(x), parts.ground)
        shown = parts.thing > 0
        is_right = (things.argmax(-1) == parts.thing)[shown].float()
        return loss, is_right.sum() / shown.sum().clamp(1)


class Painter(nn.Module):
    """Says from the features alone what was where, so that they must tell it.

    Without it a Q-Former's queries told what there is and not where: questions for places were
    answered by chance.
    """

    def __init__(self, size: int, num_places: int) -> None:
        super().__init__()
        self.register_buffer("places", places(1 + num_places, _PAINTER_SIZE)[1:], persistent=False)
        self.query = nn.Linear(_PAINTER_SIZE, _PAINTER_SIZE)
        self.key_value = nn.Linear(size, 2 * _PAINTER_SIZE)
        self.up = nn.Linear(_PAINTER_SIZE, 2 * _PAINTER_SIZE)
        self.down = nn.Linear(2 * _PAINTER_SIZE, _PAINTER_SIZE)

    def forward(self, features: Tensor) -> Tensor:
        """[num_images, num_tokens, size] -> [num_images, num_places, _PAINTER_SIZE]."""
        x = F.layer_norm(features.float(), features.shape[-1:])
        heads = (_PAINTER_HEADS, -1)
        query = self.query(self.places).unflatten(-1, heads).transpose(0, 1)
        key, value = self.key_value(x).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        query = query[None].expand(len(x), -1, -1, -1).to(key.dtype)
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return seen + self.down(F.gelu(self.up(seen)))


class Heads(nn.Module):
    """All heads: on the tower's states, on the features, and on the features' mean."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        super().__init__()
        vision = raw.get("vision_config") or raw["eva_config"]
        num_positions = vision.get("num_positions") or vision["max_sequence_length"]
        self.states = KindHeads(vision["hidden_size"])
        self.painter = Painter(raw["hidden_size"], num_positions - 1)
        self.painted = KindHeads(_PAINTER_SIZE)
        self.garment = nn.Linear(raw["hidden_size"], len(NAMES))

    def layout_loss(self, seen: Seen, pictures: Pictures) -> tuple[Tensor, Tensor]:
        """Of the states and of the painted features; the share of things painted right."""
        truth = pictures.layouts, pictures.middles
        of_states, _ = self.states(seen.states, *truth)
        of_painted, share = self.painted(self.painter(seen.features), *truth)
        return of_states + of_painted, share

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
