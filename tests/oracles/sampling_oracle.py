"""A second, plain reading of the sampling rules: float64, one row, whole vocabulary, no shortcuts.

Written from the rules as the Hugging Face processors state them (ascending cumulative sums, masks
over the whole row), so that a shared mistake with `glimt.sampling` is unlikely. Equal scores are
ordered by id, which Hugging Face leaves open.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_MASK = 2**64 - 1


def philox4x64(counter: int, key: int) -> tuple[int, int, int, int]:
    """Philox4x64-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""
    c = [(counter >> (64 * i)) & _MASK for i in range(4)]
    k0, k1 = key & _MASK, key >> 64
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [
            (second >> 64) ^ c[1] ^ k0,
            second & _MASK,
            (first >> 64) ^ c[3] ^ k1,
            first & _MASK,
        ]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
    return c[0], c[1], c[2], c[3]


def uniform(seed: int, position: int) -> float:
    """The draw's number; numpy steps the counter before its first block, hence the + 1."""
    return (philox4x64(position + 1, seed & _MASK)[0] >> 11) / 2**53


def edited(
    logits: Iterable[float],
    *,
    prompt_ids: Sequence[int] = (),
    output_ids: Sequence[int] = (),
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    banned: Iterable[int] = (),
) -> np.ndarray:
    """Scores after penalties, bias and ban: one Python statement per token and rule."""
    scores = np.array(list(logits), dtype=np.float64)
    seen, counts = {*prompt_ids, *output_ids}, Counter(output_ids)
    for token_id in range(len(scores)):
        if token_id in seen:
            if scores[token_id] < 0:
                scores[token_id] *= repetition_penalty
            else:
                scores[token_id] /= repetition_penalty
        if counts[token_id]:
            scores[token_id] -= presence_penalty + frequency_penalty * counts[token_id]
        scores[token_id] += (logit_bias or {}).get(token_id, 0.0)
        if token_id in set(banned):
            scores[token_id] = -np.inf
    return scores


def kept(
    scores: np.ndarray,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> np.ndarray:
    """Probabilities [vocab_size] after temperature, top-k, top-p and min-p; 0 where dropped."""
    scores = scores / temperature
    ascending = np.lexsort((-np.arange(len(scores)), scores))  # of equal scores, high ids first
    if top_k > 0:
        scores = _drop(scores, ascending[:-top_k])
    if top_p < 1.0:
        sums = np.cumsum(_softmax(scores)[ascending])
        drop = sums <= 1 - top_p
        drop[-1] = False
        scores = _drop(scores, ascending[drop])
    if min_p > 0.0:
        probs = _softmax(scores)
        scores = _drop(scores, np.flatnonzero(probs < min_p * probs.max()))
    return _softmax(scores)


def drawn(probs: np.ndarray, number: float) -> int:
    """The token at `number` of the cumulative distribution, most likely first, ties by id."""
    order = np.lexsort((np.arange(len(probs)), -probs))
    below = 0.0
    for token_id in order:
        below += float(probs[token_id])
        if number < below:
            return int(token_id)
    return int([i for i in order if probs[i] > 0][-1])


def acceptable(scores: np.ndarray, number: float, slack: float, **cuts: Any) -> set[int]:
    """Every token a correct sampler may draw when its sums are rounded by up to `slack`.

    A boundary hit exactly (flat logits with top_p 0.5) is decided by the last bit of a sum.
    """
    tokens = set()
    for shift in (-slack, 0.0, slack):
        near = dict(cuts)
        if near.get("top_p", 1.0) < 1.0:
            near["top_p"] = near["top_p"] + shift
        if near.get("min_p", 0.0) > 0.0:
            near["min_p"] = min(near["min_p"] + shift, 1.0)
        probs = kept(scores, **near)
        tokens |= {drawn(probs, number + move) for move in (-slack, 0.0, slack)}
    return tokens


def _drop(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    scores = scores.copy()
    scores[ids] = -np.inf
    return scores


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()
