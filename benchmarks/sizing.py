"""What so many cards serve, computed from the models' shapes and the cards' limits: no measurement.

    python -m benchmarks.sizing

prints the tables of docs/sizing.md, which says what they assume. Nothing is loaded: models are
built without memory for their weights (`glimt.bench.roofline`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from glimt.bench.roofline import ModelCosts, costs_of
from glimt.devices.base import Device
from glimt.loader import ModelFolder, read_synthetic
from glimt.models.base import BuildContext
from glimt.synthetic import parse_name

CARD_COUNTS = (1, 8, 64)
TEXT_TOKENS, ANSWER_TOKENS = 32, 256
MAX_SEQS = 64  # answers of one replica at a time, as glimt serve has it
SHARE = 0.5  # of the limits, in tables for planning
SPARE = 0.9  # of a card's memory; the rest is for activations and what else is there
TP_SIZES = (1, 2, 4, 8)
_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Card:
    """One card as its vendor describes it: bytes/s, dense 16-bit operations/s, bytes."""

    name: str
    read_limit: float
    ops_limit: float
    memory_bytes: float


CARDS = (
    Card("Ascend 910B, 64 GB", 1.6e12, 313e12, 64e9),
    Card("H100 SXM, 80 GB", 3.35e12, 989e12, 80e9),
)


@dataclass(frozen=True, slots=True)
class Sized:
    """A published model in bfloat16. picture_tokens: of one picture in the prompt."""

    name: str
    picture_tokens: int
    costs: ModelCosts
    weight_bytes: int

    @property
    def prompt_tokens(self) -> int:
        """Of the workload: a picture and a short question."""
        return self.picture_tokens + TEXT_TOKENS

    @property
    def mean_context(self) -> float:
        """Tokens in the cache of one answer, on average over its steps."""
        return self.prompt_tokens + ANSWER_TOKENS / 2


def sized(name: str, picture_tokens: int, num_vision_layers: int) -> Sized:
    """Count a published model.

    Its tower is counted with one layer and with two, since to count all takes long: each layer
    costs the same.
    """
    one, two = (_costs(f"{name},vision-layers={count}") for count in (1, 2))
    image_ops = one.image_ops + (num_vision_layers - 1) * (two.image_ops - one.image_ops)
    found = _opened(name)
    model = found.family.build(found.config, BuildContext(Device("meta"), _DTYPE, 1))
    weights = sum(value.numel() for value in model.parameters()) * _DTYPE.itemsize
    return Sized(name, picture_tokens, replace(one, image_ops=image_ops), weights)


def _costs(name: str) -> ModelCosts:
    found = _opened(name)
    assert found.processor is not None
    return costs_of(found.family, found.config, found.processor, _DTYPE)


def _opened(name: str) -> ModelFolder:
    return read_synthetic(parse_name(f"synthetic:{name}"))


def models() -> tuple[Sized, ...]:
    """Both, each with the tokens that its picture takes, and its tower's layers."""
    return sized("glm-4v-9b", 1602, 63), sized("visualglm-6b", 32, 39)


# --- one card --------------------------------------------------------------------------------


def batch_of(model: Sized, card: Card) -> int:
    """Answers that a card's memory holds at once beside the weights, at most MAX_SEQS."""
    kv_bytes = (model.prompt_tokens + ANSWER_TOKENS) * model.costs.kv_bytes
    free = card.memory_bytes * SPARE - model.weight_bytes
    return max(0, min(MAX_SEQS, int(free / kv_bytes)))


def first_token_s(model: Sized, card: Card, num_images: int = 1) -> float:
    """Seconds of compute before the first token; num_images 0: the picture is cached."""
    return model.costs.prefill_limit_s(
        1, model.prompt_tokens, num_images, card.read_limit, card.ops_limit
    )


def step_s(model: Sized, card: Card, batch: int) -> float:
    """Seconds of one step of so many answers."""
    return model.costs.decode_limit_s(batch, model.mean_context, card.read_limit, card.ops_limit)


def requests_per_s(model: Sized, card: Card, is_seen: bool) -> float:
    """Of the workload, without end; is_seen: prompt and picture are in the replica's caches."""
    batch = batch_of(model, card)
    prompt_s = 0.0 if is_seen else first_token_s(model, card)
    return 1 / (prompt_s + ANSWER_TOKENS * step_s(model, card, batch) / batch)


# --- tables ----------------------------------------------------------------------------------


def limits_table(models: Sequence[Sized]) -> list[str]:
    """What one card could do at most."""
    lines = [
        "| model | card | answers at once | first token | step of one | step of all | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for model in models:
        for card in CARDS:
            batch = batch_of(model, card)
            whole_s, one_s = step_s(model, card, batch), step_s(model, card, 1)
            times = f"{first_token_s(model, card) * 1e3:.0f} ms | {one_s * 1e3:.1f} ms"
            rate = f"{whole_s * 1e3:.1f} ms | {batch / whole_s:,.0f}"
            lines.append(f"| {model.name} | {card.name} | {batch} | {times} | {rate} |")
    return lines


def plan_table(models: Sequence[Sized]) -> list[str]:
    """Requests per second of 1, 8 and 64 cards, each a replica, at SHARE of the limits."""
    counts = " | ".join(f"{count} card{'s' * (count > 1)}" for count in CARD_COUNTS)
    lines = [f"| model | card | picture | {counts} |", "|---|---|---|---:|---:|---:|"]
    for model in models:
        for card in CARDS:
            for is_seen, word in ((False, "new"), (True, "seen before")):
                rate = SHARE * requests_per_s(model, card, is_seen)
                rates = " | ".join(f"{rate * count:,.1f}" for count in CARD_COUNTS)
                lines.append(f"| {model.name} | {card.name} | {word} | {rates} |")
    return lines


def divided_table(models: Sequence[Sized]) -> list[str]:
    """A step of one answer with the weights divided among cards, the links left out."""
    sizes = " | ".join(f"tp {size}" for size in TP_SIZES)
    lines = [f"| model | card | {sizes} |", "|---|---|" + "---:|" * len(TP_SIZES)]
    for model in models:
        for card in CARDS:
            times = " | ".join(f"{step_s(model, card, 1) / size * 1e3:.2f} ms" for size in TP_SIZES)
            lines.append(f"| {model.name} | {card.name} | {times} |")
    return lines


def tables() -> list[str]:
    """All three, as the page has them."""
    counted = models()
    made = (limits_table(counted), plan_table(counted), divided_table(counted))
    return ["\n".join(each) for each in made]


if __name__ == "__main__":
    print("\n\n".join(tables()))
