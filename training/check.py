"""Exact matches on held-out questions while training: quick, because no answer is generated.

An answer is right when each of its tokens is the likeliest one after the right ones before it,
and then greedy generation gives exactly this answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from glimt.models.base import Model, Processor
from training.data.mixture import held_out_questions
from training.data.sample import Sample
from training.encode import EncodedRow, collate, encode
from training.held_out import SEED
from training.view import Batch, answer, see

_BATCH_ROWS = 64

HeldOutRows = Mapping[str, Sequence[Batch]]


def held_out_rows(
    processor: Processor,
    is_causal: bool,
    tasks: Sequence[str],
    count: int,
    photos: Path | None,
) -> HeldOutRows:
    """`count` held-out questions of each task as batches of rows."""
    return {
        task: list(
            _rows(processor, is_causal, held_out_questions(task, count, SEED, photos=photos))
        )
        for task in tasks
    }


def _rows(processor: Processor, is_causal: bool, samples: Iterator[Sample]) -> Iterator[Batch]:
    encoded = [_question(processor, is_causal, sample) for sample in samples]
    for start in range(0, len(encoded), _BATCH_ROWS):
        yield collate(encoded[start : start + _BATCH_ROWS], is_causal)


def _question(processor: Processor, is_causal: bool, sample: Sample) -> EncodedRow:
    first = sample.exchanges[0]
    turns = [first, first.follow_up] if first.follow_up else [first]
    return last_answer_only(encode(processor, sample, turns, is_causal))


def last_answer_only(row: EncodedRow) -> EncodedRow:
    """The row with only its last answer to be predicted."""
    start = len(row.learnt)
    while start and row.learnt[start - 1]:
        start -= 1
    return replace(row, learnt=[False] * start + row.learnt[start:])


def exact_matches(model: Model, batch: Batch) -> Tensor:
    """[num_rows] bool: is every learnt token of the row the likeliest one?"""
    assert batch.rows
    features = see(model, batch.pictures.pixels).features if batch.pictures else None
    logits, labels = answer(model, batch.rows, features)
    owners = (batch.rows.labels >= 0).nonzero()[:, 0]
    misses = torch.zeros(len(batch.rows.labels), device=labels.device)
    return misses.index_add(0, owners, (logits.argmax(-1) != labels).float()) == 0


@torch.no_grad()
def accuracies(model: Model, held_out: HeldOutRows) -> dict[str, float]:
    """Share of exact matches by task."""
    device = next(model.parameters()).device
    return {
        task: float(torch.cat([exact_matches(model, b.to(device)) for b in group]).float().mean())
        for task, group in held_out.items()
    }
