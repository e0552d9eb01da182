"""Samples -> padded rows, with the engine's own processors: what is trained is what is served."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glimt.models.base import Processor
from glimt.types import EncodedPrompt, ImagePart, Message, TextPart
from training.data.sample import Exchange, Sample
from training.view import Batch, Pictures, Rows

_LENGTH_STEP = 8


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """A picture of the tower's size, [height, width, 3] uint8, and a sample's truth about it.

    layout:  [num_patches] int64, -1 where it is not known
    middles: [num_patches] int64, 1 where an object's middle is, else 0; -1 where it is not known
    """

    pixels: np.ndarray
    garment: int
    layout: np.ndarray
    middles: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class EncodedRow:
    """One conversation. learnt[i]: token i is an answer's and is to be predicted."""

    token_ids: list[int]
    learnt: list[bool]
    positions: np.ndarray
    context: int
    image_start: int
    image_length: int
    picture: Picture | None


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


def conversations(
    processor: Processor, sample: Sample, num_turns: int, rng: random.Random, is_causal: bool
) -> list[EncodedRow]:
    """Rows about one picture, which is seen once: all turns in one row where every answer is
    learnt, else a row for each turn.
    """
    turns = choose_turns(sample, rng, num_turns)
    if is_causal:
        return [encode(processor, sample, turns, is_causal)]
    picture = encode_picture(processor, sample)
    return [
        encode(processor, sample, talk, is_causal, picture) for talk in _one_question_each(turns)
    ]


def _one_question_each(turns: Sequence[Exchange]) -> list[list[Exchange]]:
    """Each turn alone, but a follow-up after what it follows."""
    talks: list[list[Exchange]] = []
    for turn in turns:
        is_follow_up = bool(talks) and talks[-1][-1].follow_up is turn
        talks.append([*talks[-1], turn] if is_follow_up else [turn])
    return talks


def encode(
    processor: Processor,
    sample: Sample,
    turns: Sequence[Exchange],
    is_causal: bool,
    picture: Picture | None = None,
) -> EncodedRow:
    """A causal family learns every answer of the conversation, a bidirectional one the last.

    picture: the sample's, if it is encoded already
    """
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
    return _row(picture or encode_picture(processor, sample), prompt, ids, learnt)


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
    picture: Picture | None,
    prompt: EncodedPrompt,
    ids: list[int],
    learnt: list[bool],
) -> EncodedRow:
    span = prompt.spans[0] if prompt.spans else None
    return EncodedRow(
        token_ids=ids,
        learnt=learnt,
        positions=prompt.positions_between(0, len(ids)),
        context=prompt.bidirectional_len,
        image_start=span.start if span else 0,
        image_length=span.length if span else 0,
        picture=picture,
    )


def encode_picture(processor: Processor, sample: Sample) -> Picture | None:
    """A sample's picture as the tower will see it; a patch is what its middle is."""
    if sample.image is None:
        return None
    prepared = processor.prepare_image(sample.image, b"")
    rows, columns = prepared.grid
    layout = np.full(rows * columns, -1)
    if sample.layout is not None:
        small = sample.layout.resize((columns, rows), Image.Resampling.NEAREST)
        layout = np.asarray(small, dtype=np.int64).flatten()
    middles = np.full(rows * columns, -1)
    if sample.middles is not None:
        middles[:] = 0
        middles[[int(y * rows) * columns + int(x * columns) for x, y in sample.middles]] = 1
    return Picture(prepared.pixels, sample.label, layout, middles)


def stack(pictures: Sequence[Picture]) -> Pictures | None:
    """None of no pictures."""
    if not pictures:
        return None
    return Pictures(
        torch.from_numpy(np.stack([picture.pixels for picture in pictures])),
        torch.tensor([picture.garment for picture in pictures]),
        torch.from_numpy(np.stack([picture.layout for picture in pictures])),
        torch.from_numpy(np.stack([picture.middles for picture in pictures])),
    )


def collate(rows: Sequence[EncodedRow], is_causal: bool, more: Sequence[Picture] = ()) -> Batch:
    """Pad rows at the end to the longest of them; few lengths make torch keep few plans of work.

    more: pictures that no row shows
    """
    length = -(-max(len(row.token_ids) for row in rows) // _LENGTH_STEP) * _LENGTH_STEP
    count, channels = len(rows), rows[0].positions.shape[0]
    ids = torch.zeros(count, length, dtype=torch.int64)
    labels = torch.full((count, length), -100)
    places = torch.full((count, length), -1)
    positions = torch.zeros(channels, count, length, dtype=torch.int64)
    pictures: dict[int, Picture] = {}  # in order, by identity: rows may share one
    for i, row in enumerate(rows):
        n = len(row.token_ids)
        ids[i, :n] = torch.tensor(row.token_ids)
        positions[:, i, :n] = torch.from_numpy(np.ascontiguousarray(row.positions))
        targets = torch.where(torch.tensor(row.learnt), ids[i, :n], -100)
        labels[i, : n - 1] = targets[1:]
        if row.picture is not None:
            pictures.setdefault(id(row.picture), row.picture)
            start = list(pictures).index(id(row.picture)) * row.image_length
            stop = row.image_start + row.image_length
            places[i, row.image_start : stop] = torch.arange(start, start + row.image_length)
    padded = Rows(ids, positions, labels, _mask(rows, length, is_causal), places)
    return Batch(padded, stack([*pictures.values(), *more]))


def _mask(rows: Sequence[EncodedRow], length: int, is_causal: bool) -> Tensor | None:
    """Query i sees key j if j <= i or j is in the bidirectional context."""
    if is_causal:
        return None
    i = torch.arange(length)
    contexts = torch.tensor([row.context for row in rows])[:, None, None]
    return ((i[None, :] <= i[:, None])[None] | (i[None, None, :] < contexts))[:, None]
