"""Logits to token ids: what each sequence's SamplingParams do to its logits, and the draw.

Knows the numbers and the rules; nothing of models, caches, text or which sequence comes next.
Every row of a step goes through the same stages, in this order:

    repetition penalty > presence and frequency > logit bias > min_tokens ban     edits of few ids
    grammar                                                                       bars most ids
    temperature > top-k > top-p > min-p > one draw                                on sorted scores

Promises:
- A row's token depends on that row's logits alone: not on its neighbours, its place in the batch,
  or how often the sequence was preempted. The random number is a function of (seed, output length).
  (The logits themselves may differ in their last bits between batches; two tokens that almost tie
  can then change places, and with them what a draw between them gives.)
- Temperature 0 and top_k 1 choose the largest score; of equal scores, the lowest id.
- The kept tokens never depend on `num_candidates`, which only sets how soon the answer is found.

With drafts a row is sampled once more behind each draft, as if the drafts before were output, and
`verify` keeps the tokens up to the first that differs from its draft. Each has the penalties, the
bans and the random number of a step of its own, so what is kept is what such steps would choose.

Where Hugging Face leaves equal scores to chance or keeps them all, ours go by lower id: top-k
keeps exactly k tokens, so top_k 1 is greedy also when bfloat16 makes two logits equal.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from itertools import chain, islice, takewhile
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from glimt.types import (
    PromptLogprob,
    SampledToken,
    SamplingParams,
    StepPlan,
    StepRow,
    TokenLogprob,
)

_GROWTH = 16  # candidates per retry over the last try: 1,024, then 16,384, then all 151,552
_GROUPS_PER_CANDIDATE = 4  # an eighth more tokens than candidates then reach the floor
_PIECE = 32768  # elements: at::internal::GRAIN_SIZE, which torch leaves to one thread
_LOWEST = float(np.finfo(np.float32).min)  # below it there is only -inf, which is never chosen

_Value = TypeVar("_Value", int, float)


class Sampler:
    """Chooses one token for every place that is sampled.

    Keeps no state of any request: only a scratch copy of the logits, reused because fresh pages
    for 64 rows of 151,552 cost more time than the copy. One step at a time; not thread-safe.
    """

    def __init__(self, vocab_size: int, *, num_candidates: int = 1024) -> None:
        """num_candidates: the most likely tokens looked at first; speed only, never the result."""
        self.vocab_size = vocab_size
        self.num_candidates = num_candidates
        self._scratch = np.empty((0, vocab_size), dtype=np.float32)

    def sample(self, logits: Tensor, plan: StepPlan) -> list[SampledToken]:
        """Choose one token for each of plan.sampled_rows, in their order; drafts are not judged.

        logits: [num_sampled, vocab_size], any float dtype and device; not changed
        A row that has no finite largest logit gets token_id -1 and says why in `error`; the other
        rows are not affected.
        """
        rows = plan.sampled_rows
        assert tuple(logits.shape) == (len(rows), self.vocab_size), (
            f"logits are {tuple(logits.shape)}, expected {(len(rows), self.vocab_size)}"
        )
        scores = self._load(logits)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            choices = self._choose(scores, rows)
            return [
                _report(row, choice, logits[i])
                for i, (row, choice) in enumerate(zip(rows, choices, strict=True))
            ]

    def score(self, pieces: Iterable[Tensor], plan: StepPlan) -> list[PromptLogprob]:
        """How likely the model had each of plan.targets, in their order.

        pieces: of the logits that predict them, [rows, vocab_size] each
        """
        copies = (piece.detach().to("cpu", torch.float32).numpy() for piece in pieces)
        rows = chain.from_iterable(copies)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            return [
                _prompt_logprob(target.token_id, raw, _given(row.sampling.prompt_logprobs))
                for (row, target), raw in zip(plan.targets, rows, strict=True)
            ]

    def _load(self, logits: Tensor) -> np.ndarray:
        """Copy logits into the scratch rows; [num_sampled, vocab_size] float32 on the CPU."""
        if len(logits) > len(self._scratch):
            self._scratch = np.empty(logits.shape, dtype=np.float32)
        scores = self._scratch[: len(logits)]
        # Wrapped anew in each step: a tensor kept from inference mode could not be written later.
        own = torch.from_numpy(scores)
        if logits.is_cpu:
            _copy_in_pieces(logits.detach(), own)
        else:
            own.copy_(logits.detach())
        return scores

    def _choose(self, scores: np.ndarray, rows: Sequence[StepRow]) -> list[int | str]:
        """Each row's token id, or the text of its error. Edits scores in place."""
        best = scores.argmax(axis=1)
        choices: list[int | str] = [
            int(token_id) if math.isfinite(row_scores[token_id]) else _model_error(row_scores)
            for row_scores, token_id in zip(scores, best, strict=True)
        ]
        for i, row in enumerate(rows):
            if not isinstance(choices[i], str) and _edit(scores[i], row):
                choices[i] = _greedy(scores[i], row)
        drawn = [i for i, row in enumerate(rows) if _draws(row) and not isinstance(choices[i], str)]
        for i, token_id in _draw_rows(scores, rows, drawn, self.num_candidates).items():
            choices[i] = token_id
        return choices


def _copy_in_pieces(source: Tensor, target: Tensor) -> None:
    """Copy equal shapes on the CPU, any dtypes, on this thread alone.

    torch shares out what is larger, and then waits for a thread that may have to wait for this
    one's core: 10 ms of 45 where a step's kernels keep both cores of a machine busy.
    """
    pieces = zip(target.view(-1).split(_PIECE), source.reshape(-1).split(_PIECE), strict=True)
    for own, given in pieces:
        own.copy_(given)


def verify(tokens: Sequence[SampledToken], plan: StepPlan) -> list[SampledToken]:
    """Of each row the tokens that agree with its drafts, and the one after them.

    tokens: one for each of plan.sampled_rows, in their order
    """
    left = iter(tokens)
    kept: list[SampledToken] = []
    for row in plan.rows:
        if row.samples:
            own = list(islice(left, 1 + len(row.drafts)))
            kept += own[: 1 + _num_agreed(own, row.drafts)]
    return kept


def _num_agreed(tokens: Sequence[SampledToken], drafts: Sequence[int]) -> int:
    """How many of the drafts, from the first on, are the tokens that were sampled."""
    are_equal = (token.token_id == draft for token, draft in zip(tokens, drafts, strict=False))
    return sum(takewhile(bool, are_equal))


def uniform(seed: int, position: int) -> float:
    """The random number in [0, 1) that draws output token number `position` of a sequence.

    A counter-based generator, so that there is no state to save when a sequence is preempted.
    seed: any integer; its low 64 bits are the key
    Source: Philox4x64-10, Salmon et al., SC 2011, as in numpy.random.Philox: its first word.
    """
    word = int(np.random.Philox(key=seed % 2**64, counter=position).random_raw())
    return (word >> 11) * 2.0**-53


# --- edits of few ids ------------------------------------------------------------------------


def _edit(scores: np.ndarray, row: StepRow) -> bool:
    """Apply penalties, bias and ban to one row's scores [vocab_size], in place; did any apply?"""
    stages = (_penalise_repetition, _penalise_presence, _add_bias, _ban_stops, _bar_by_grammar)
    applied = [stage(scores, row) for stage in stages]  # any() alone would stop at the first
    return any(applied)


def _penalise_repetition(scores: np.ndarray, row: StepRow) -> bool:
    """Make the ids of prompt and output less likely: divide above zero, multiply below.

    Source: CTRL, arXiv 1909.05858, section 4.1; the rule by sign is Hugging Face's.
    """
    penalty = _given(row.sampling.repetition_penalty)
    if penalty == 1.0:
        return False
    # An id may stand here many times: every copy reads the old score and writes the same new one.
    ids = _in_vocabulary([*row.prompt_ids, *row.output_ids], len(scores))
    old = scores[ids].astype(np.float64)
    scores[ids] = np.where(old > 0, old / penalty, old * penalty)
    return True


def _penalise_presence(scores: np.ndarray, row: StepRow) -> bool:
    """Subtract presence_penalty once, and frequency_penalty per occurrence, from output ids."""
    presence = _given(row.sampling.presence_penalty)
    frequency = _given(row.sampling.frequency_penalty)
    if presence == 0.0 and frequency == 0.0:
        return False
    ids, counts = np.unique(_in_vocabulary(row.output_ids, len(scores)), return_counts=True)
    scores[ids] -= presence + frequency * counts
    return True


def _add_bias(scores: np.ndarray, row: StepRow) -> bool:
    """Add logit_bias; -inf stays -inf."""
    for token_id, bias in row.sampling.logit_bias.items():
        if 0 <= token_id < len(scores):
            scores[token_id] += bias
    return bool(row.sampling.logit_bias)


def _ban_stops(scores: np.ndarray, row: StepRow) -> bool:
    """Forbid the stop ids while the output is shorter than min_tokens."""
    if len(row.output_ids) >= _given(row.sampling.min_tokens):
        return False
    scores[_in_vocabulary(row.stop_token_ids, len(scores))] = -math.inf
    return True


def _bar_by_grammar(scores: np.ndarray, row: StepRow) -> bool:
    """Forbid what the grammar does not allow after the output so far."""
    allowed = None if row.filter is None else row.filter.allowed(row.output_ids)
    if allowed is None:
        return False
    scores[~allowed] = -math.inf
    return True


def _in_vocabulary(ids: Collection[int], vocab_size: int) -> np.ndarray:
    """The ids as int64, without those outside the vocabulary: -1 would mean the last token."""
    try:
        array = np.fromiter(ids, dtype=np.int64, count=len(ids))
    except OverflowError:  # an id beyond 64 bits
        array = np.array([i for i in ids if 0 <= i < vocab_size], dtype=np.int64)
    return array[(array >= 0) & (array < vocab_size)]


# --- the draw --------------------------------------------------------------------------------


def _draws(row: StepRow) -> bool:
    """Is chance involved? Without it, the largest score is the answer."""
    return _given(row.sampling.temperature) > 0 and row.sampling.top_k != 1


def _greedy(scores: np.ndarray, row: StepRow) -> int | str:
    """The id of the largest edited score, lowest id on ties, or why there is none."""
    token_id = int(scores.argmax())
    return token_id if math.isfinite(scores[token_id]) else _edit_error(scores, row)


def _draw_rows(
    scores: np.ndarray, rows: Sequence[StepRow], drawn: list[int], num_candidates: int
) -> dict[int, int]:
    """Draw a token for each row in `drawn`, by row; ever more candidates until all are certain."""
    tokens: dict[int, int] = {}
    while drawn:
        floors = _floors(scores if len(drawn) == len(scores) else scores[drawn], num_candidates)
        for i, floor in zip(drawn, floors, strict=True):
            number = uniform(rows[i].seed, len(rows[i].output_ids))
            token_id = _try_draw(scores[i], floor, rows[i].sampling, number)
            if token_id is not None:
                tokens[i] = token_id
        drawn = [i for i in drawn if i not in tokens]
        num_candidates *= _GROWTH
    return tokens


def _try_draw(
    scores: np.ndarray, floor: float, sampling: SamplingParams, number: float
) -> int | None:
    """Draw among the tokens that score at least `floor`; None if the others could matter.

    floor -inf takes every token, sorts them all and always answers: the plain path. A higher floor
    sees a prefix of the same order, and sums over a prefix are the same to the last bit.
    """
    ids, is_all = _best_first(scores, floor), floor == -math.inf
    temperature, top_k = _given(sampling.temperature), _given(sampling.top_k)
    weights = _weights(scores[ids], scores[ids[0]], temperature)
    if top_k <= 0:
        total = float(_weights(scores, scores[ids[0]], temperature).sum())
        place = _place(weights, total, is_all, sampling, number)
    elif top_k <= len(ids) or is_all:
        place = _place(weights[:top_k], None, True, sampling, number)
    else:
        place = None
    return None if place is None else int(ids[place])


def _place(
    weights: np.ndarray,
    total: float | None,
    is_all: bool,
    sampling: SamplingParams,
    number: float,
) -> int | None:
    """Cut by top-p and min-p, then invert the cumulative distribution at `number`.

    weights: [num] float64, descending, the first is 1
    total:   of the weights and of those not seen; None: of the weights
    is_all:  no weight is missing
    Returns an index into weights, or None when a weight not seen could change it.
    """
    mass = np.cumsum(weights)
    total = float(mass[-1]) if total is None else total
    top_p, min_p = _given(sampling.top_p), _given(sampling.min_p)
    if top_p < 1.0 or min_p > 0.0:
        num_kept = min(_reaching(mass, top_p, total), _at_least(weights, min_p))
        if num_kept > len(weights) and not is_all:
            return None
        mass, is_all = mass[:num_kept], True
        total = float(mass[-1])
    place = int(np.searchsorted(mass, number * total, side="right"))
    if place < len(mass):
        return place
    # Rounding can leave the last step of the sum below the total: take the last that adds to it.
    return int(np.searchsorted(mass, mass[-1], side="left")) if is_all else None


def _reaching(mass: np.ndarray, top_p: float, total: float) -> int:
    """How many leading tokens first reach the share top_p; len(mass) + 1 if these do not.

    A token stays while those before it hold less than top_p. That is Hugging Face's boundary (drop
    what has an ascending cumulative sum <= 1 - top_p), counted from the other end.
    Source: The Curious Case of Neural Text Degeneration, arXiv 1904.09751, section 3.1.
    """
    if top_p >= 1.0:
        return len(mass) + 1
    return int(np.searchsorted(mass, top_p * total, side="left")) + 1


def _at_least(weights: np.ndarray, min_p: float) -> int:
    """How many leading tokens have min_p of the largest probability; len + 1 if all of them.

    Source: Min-p sampling, arXiv 2407.01082, section 3.
    """
    below = np.flatnonzero(weights < min_p)
    return int(below[0]) if len(below) else len(weights) + 1


def _weights(scores: np.ndarray, best: np.float32, temperature: float) -> np.ndarray:
    """exp((scores - best) / temperature) in float64: probabilities up to a factor."""
    shifted: np.ndarray = scores.astype(np.float64)
    shifted -= best  # before the division, which a tiny temperature would overflow
    shifted /= temperature
    np.exp(shifted, out=shifted)
    return shifted


def _floors(scores: np.ndarray, num_candidates: int) -> list[float]:
    """A score of each row that at least num_candidates of its tokens reach; -inf takes them all.

    scores: [num_rows, vocab_size] float32
    Of a row cut into equal groups, that many tokens reach the num_candidates-th largest of the
    groups' maxima, and hardly more if there are more groups. That is found much sooner than the
    num_candidates-th largest score.
    """
    if num_candidates >= scores.shape[1]:
        return [-math.inf] * len(scores)
    num_groups = num_candidates * _GROUPS_PER_CANDIDATE
    tops = scores if 2 * num_groups > scores.shape[1] else _group_maxima(scores, num_groups)
    return [float(row) for row in np.partition(tops, -num_candidates, axis=1)[:, -num_candidates]]


def _group_maxima(scores: np.ndarray, num_groups: int) -> np.ndarray:
    """[num_rows, num_groups]: group g has every num_groups-th score from g on; a rest is left out.

    Groups of neighbours would be reduced one by one; these are as wide as memory is read.
    """
    num_rows, vocab_size = scores.shape
    depth = vocab_size // num_groups
    whole: np.ndarray = scores[:, : depth * num_groups]
    return whole.reshape(num_rows, depth, num_groups).max(axis=1)


def _best_first(scores: np.ndarray, floor: float) -> np.ndarray:
    """Ids of all scores >= floor, but not of -inf, by descending score; ties by lower id.

    Every score that equals the floor is taken, or the answer would depend on the floor.
    """
    ids = np.flatnonzero(scores >= max(floor, _LOWEST))
    return ids[np.argsort(-scores[ids], kind="stable")]


# --- what is reported ------------------------------------------------------------------------


def _report(row: StepRow, choice: int | str, logits: Tensor) -> SampledToken:
    """The answer for one row, with log-probabilities if asked for. logits: [vocab_size], raw."""
    if isinstance(choice, str):
        return SampledToken(row.sequence_id, -1, error=choice)
    if row.sampling.logprobs is None:
        return SampledToken(row.sequence_id, choice)
    raw = logits.detach().to("cpu", torch.float32).numpy()
    logprob, top = _logprobs(raw, choice, row.sampling.logprobs)
    return SampledToken(row.sequence_id, choice, logprob, top)


def _prompt_logprob(token_id: int, raw: np.ndarray, num_top: int) -> PromptLogprob:
    """raw: [vocab_size] float32 logits. Of equal ones all have the best rank among them."""
    logprob, top = _logprobs(raw, token_id, num_top)
    if math.isnan(logprob):
        return PromptLogprob(token_id)
    rank = 1 + int(np.count_nonzero(raw > raw[token_id]))
    return PromptLogprob(token_id, logprob, rank, top)


def _logprobs(
    raw: np.ndarray, token_id: int, num_top: int
) -> tuple[float, tuple[TokenLogprob, ...]]:
    """Log-softmax of raw logits for a token and for the num_top best, ties by lower id.

    raw: [vocab_size] float32
    Tokens of probability 0 (-inf) are never listed, so there may be fewer than num_top.
    """
    best = raw.max()
    log_total = float(best) + math.log(_weights(raw, best, 1.0).sum())
    ids: np.ndarray = np.empty(0, np.int64)
    if num_top:
        floor = float(np.partition(raw, -num_top)[-num_top]) if num_top < len(raw) else -math.inf
        ids = _best_first(raw, floor)[:num_top]
    top = tuple(TokenLogprob(int(i), float(raw[i]) - log_total) for i in ids)
    return float(raw[token_id]) - log_total, top


def _model_error(scores: np.ndarray) -> str:
    """Say what is wrong with logits that have no finite largest value."""
    num_nan, num_inf = int(np.isnan(scores).sum()), int(np.isposinf(scores).sum())
    if num_nan or num_inf:
        found = f"{num_nan} NaN and {num_inf} infinite logits of {len(scores)}"
    else:
        found = f"no token a chance: all {len(scores)} logits are -inf"
    return f"the model gave {found}; check the weights, or use a wider dtype such as float32"


def _edit_error(scores: np.ndarray, row: StepRow) -> str:
    """Say why penalties, bias and bans leave nothing to choose."""
    if np.isneginf(scores).all() and row.filter is not None:
        return "no token that the grammar allows is possible; simplify it, or drop logit_bias"
    if np.isneginf(scores).all():
        return (
            f"min_tokens forbids the stop ids and no other of the {len(scores)} tokens is possible;"
            " lower min_tokens, or set ignore_eos"
        )
    return "the penalties and logit_bias push a logit beyond float32; use penalties nearer to 1"


def _given(value: _Value | None) -> _Value:
    """A sampling value that `SamplingParams.with_defaults` has filled in."""
    assert value is not None, "sampling defaults must be filled in before the first step"
    return value
