"""Samples -> padded rows, with the engine's own processors: what is trained is what is served."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glimt.models.base import CLIP_MEAN, CLIP_STD, Processor, normalise
from glimt.types import EncodedPrompt, ImagePart, Message, TextPart
from training.data.sample import Exchange, Sample
from training.view import Rows


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRow:
    """One conversation. learnt[i]: token i is an answer's and is to be predicted."""

    token_ids: list[int]
    learnt: list[bool]
    positions: np.ndarray
    context: int
    image_start: int
    image_length: int
    pixels: Tensor | None


def choose_turns(sample: Sample, rng: random.Random, max_turns: int) -> list[Exchange]:
    """Some of a sample's exchanges in any order, each with its follow-up right after it."""
    pool = list(sample.exchanges)
    rng.shuffle(pool)
    turns: list[Exchange] = []
    for exchange in pool:
        if len(turns) >= max_turns:
            break
        turns.append(exchange)
        if exchange.follow_up and rng.random() < 0.7:
            turns.append(exchange.follow_up)
    return turns


def encode(
    processor: Processor, sample: Sample, turns: Sequence[Exchange], is_causal: bool
) -> EncodedRow:
    """A causal family learns every answer of the conversation, a bidirectional one the last."""
    messages = _messages(sample, turns)
    sizes = [(1, 1)] if sample.image else []  # every picture of these families costs the same
    if is_causal:
        prompt = processor.encode_chat(messages, sizes, "auto")
        ids, learnt = _causal_answers(processor, list(prompt.token_ids))
    else:
        prompt = processor.encode_chat(messages[:-1], sizes, "auto")
        (stop,) = processor.stop_token_ids
        answer = [*processor.tokenizer.encode(turns[-1].answer), stop]
        ids = [*prompt.token_ids, *answer]
        learnt = [False] * len(prompt.token_ids) + [True] * len(answer)
    return _row(processor, sample, prompt, ids, learnt)


def _messages(sample: Sample, turns: Sequence[Exchange]) -> list[Message]:
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        picture = (ImagePart(None),) if sample.image and number == 0 else ()
        messages.append(Message("user", (*picture, TextPart(turn.question))))
        messages.append(Message("assistant", (TextPart(turn.answer),)))
    return messages


def _causal_answers(processor: Processor, ids: list[int]) -> tuple[list[int], list[bool]]:
    """Everything after `<|assistant|>` up to the next role, which is what stops an answer.

    The prompt ends with an open `<|assistant|>`; after the last answer a user would speak.
    """
    special = processor.tokenizer.special_ids
    assistant, user = special["<|assistant|>"], special["<|user|>"]
    ids[-1] = user
    learnt, inside = [], False
    for token_id in ids:
        learnt.append(inside)
        if inside and token_id == user:
            inside = False
        elif token_id == assistant:
            inside = True
    return ids, learnt


def _row(
    processor: Processor,
    sample: Sample,
    prompt: EncodedPrompt,
    ids: list[int],
    learnt: list[bool],
) -> EncodedRow:
    span = prompt.spans[0] if prompt.spans else None
    pixels = None
    if sample.image is not None:
        pixels = normalise(processor.prepare_image(sample.image, b"").pixels, CLIP_MEAN, CLIP_STD)
    return EncodedRow(
        token_ids=ids,
        learnt=learnt,
        positions=prompt.positions_between(0, len(ids)),
        context=prompt.bidirectional_len,
        image_start=span.start if span else 0,
        image_length=span.length if span else 0,
        pixels=pixels,
    )


def collate(rows: Sequence[EncodedRow], is_causal: bool) -> Rows:
    """Pad rows at the end to the longest of them."""
    length = max(len(row.token_ids) for row in rows)
    count, channels = len(rows), rows[0].positions.shape[0]
    ids = torch.zeros(count, length, dtype=torch.int64)
    labels = torch.full((count, length), -100)
    places = torch.full((count, length), -1)
    positions = torch.zeros(channels, count, length, dtype=torch.int64)
    pictures = [row for row in rows if row.pixels is not None]
    first = dict(zip(map(id, pictures), range(len(pictures)), strict=True))
    for i, row in enumerate(rows):
        n = len(row.token_ids)
        ids[i, :n] = torch.tensor(row.token_ids)
        positions[:, i, :n] = torch.from_numpy(np.ascontiguousarray(row.positions))
        targets = torch.where(torch.tensor(row.learnt), ids[i, :n], -100)
        labels[i, : n - 1] = targets[1:]
        if row.pixels is not None:
            start = first[id(row)] * row.image_length
            stop = row.image_start + row.image_length
            places[i, row.image_start : stop] = torch.arange(start, start + row.image_length)
    pixels: Any = torch.stack([row.pixels for row in pictures]) if pictures else None  # type: ignore[misc]
    return Rows(ids, positions, labels, _mask(rows, length, is_causal), pixels, places)


def _mask(rows: Sequence[EncodedRow], length: int, is_causal: bool) -> Tensor | None:
    """Query i sees key j if j <= i or j is in the bidirectional context."""
    if is_causal:
        return None
    i = torch.arange(length)
    contexts = torch.tensor([row.context for row in rows])[:, None, None]
    return ((i[None, :] <= i[:, None])[None] | (i[None, None, :] < contexts))[:, None]
