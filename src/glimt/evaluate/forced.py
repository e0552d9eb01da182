"""Teacher forcing: the logits of one answer under any setting, through the engine as it serves.

The sampler is the only stage that changes: it gives the wanted token and keeps the logits, so
batching, chunking, caches and kernels are those of a real answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glimt.errors import EngineError
from glimt.inputs.request import RequestOptions
from glimt.llm import LLM
from glimt.sampling import Sampler
from glimt.types import Messages, Request, SampledToken, SamplingParams, StepPlan


class ForcingSampler(Sampler):
    """Gives every request its own answer, token by token; its likeliest one if it has none.

    answers: by request id; whoever is not in it answers greedily
    logits:  by request id, one row [vocab_size] float32 on the CPU per token given
    given:   by request id, the tokens
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.answers: dict[str, Sequence[int]] = {}
        self.logits: dict[str, list[Tensor]] = {}
        self.given: dict[str, list[int]] = {}

    def sample(self, logits: Tensor, plan: StepPlan) -> list[SampledToken]:
        """Give each row its answer's next token; keep a copy of its logits.

        logits: [num_sampled, vocab_size]
        """
        return [
            SampledToken(
                row.sequence_id, self._next(row.request_id, len(row.output_ids), logits[i])
            )
            for i, row in enumerate(plan.sampled_rows)
        ]

    def _next(self, request_id: str, place: int, row: Tensor) -> int:
        kept = self.logits.setdefault(request_id, [])
        given = self.given.setdefault(request_id, [])
        del kept[place:], given[place:]  # a preempted sequence may sample a place twice
        kept.append(row.detach().to("cpu", torch.float32, copy=True))
        answer = self.answers.get(request_id)
        given.append(likeliest(kept[-1]) if answer is None else answer[place])
        return given[-1]


def likeliest(row: Tensor) -> int:
    """The id of the largest of [vocab_size] logits on the CPU; of equal ones the lowest."""
    return int(row.numpy().argmax())


@contextmanager
def _forcing(llm: LLM) -> Iterator[ForcingSampler]:
    engine = llm.engine
    forcing = ForcingSampler(engine.opened.config.vocab_size)
    sampler, engine.sampler = engine.sampler, forcing
    try:
        yield forcing
    finally:
        engine.sampler = sampler


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """An answer and what each of its tokens was chosen from.

    token_ids: the stop token included, if one was given
    logits:    [len(token_ids), vocab_size] float32
    """

    token_ids: tuple[int, ...]
    logits: Tensor


def answer_all(
    llm: LLM, requests: Sequence[Request], answers: Mapping[str, Sequence[int]]
) -> list[Answered]:
    """Run requests as one batch, in which those that `answers` names by id get these tokens.

    Raises EngineError when the engine cannot compute one of them.
    """
    with _forcing(llm) as forcing:
        forcing.answers = dict(answers)
        try:
            _run(llm, requests)
        finally:
            for request in requests:
                llm.engine.abort(request.request_id)
        return [
            Answered(tuple(forcing.given[r.request_id]), torch.stack(forcing.logits[r.request_id]))
            for r in requests
        ]


def forced_logits(
    llm: LLM, conversations: Sequence[Messages], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits before each token of each answer, [len(answer), vocab_size] float32, as one batch.

    Raises RequestError when a conversation with its answer does not fit, EngineError when the
    engine cannot compute one of them.
    """
    asked = zip(conversations, answers, strict=True)
    requests = [forced_request(llm, f"forced-{i}", *each) for i, each in enumerate(asked)]
    by_id = {r.request_id: answer for r, answer in zip(requests, answers, strict=True)}
    return [answered.logits for answered in answer_all(llm, requests, by_id)]


def _run(llm: LLM, requests: Sequence[Request]) -> None:
    for request in requests:
        llm.engine.add_request(request)
    while llm.engine.has_work:
        for output in llm.engine.step():
            if output.finish_reason == "error":
                raise EngineError(f"an answer could not be computed: {output.error}")


def forced_request(
    llm: LLM, request_id: str, conversation: Messages, answer: Sequence[int]
) -> Request:
    """A request for exactly these tokens. Raises RequestError when it does not fit."""
    sampling = SamplingParams(temperature=0, max_tokens=len(answer), ignore_eos=True)
    return llm.engine.prepare_chat(conversation, sampling, RequestOptions(request_id=request_id))


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far one setting's distributions are from the reference's, over all tokens.

    mean_kl, p99_kl: of KL(reference || setting), nats
    top1:            share of tokens for which both have the same likeliest token
    """

    num_tokens: int
    mean_kl: float
    p99_kl: float
    top1: float


@dataclass(frozen=True, slots=True, eq=False)
class PerToken:
    """The divergence at each of some tokens: [num_tokens] float64 nats, and bool."""

    kl: Tensor
    same_top: Tensor


def compare(reference: Tensor, setting: Tensor) -> PerToken:
    """Compare the logits of the same tokens, [num_tokens, vocab_size] each.

    Source of the measure: Kullback and Leibler, 1951; natural logarithms.
    """
    p, q = reference.double().log_softmax(-1), setting.double().log_softmax(-1)
    return PerToken((p.exp() * (p - q)).sum(-1), setting.argmax(-1) == reference.argmax(-1))


def summary(parts: Sequence[PerToken]) -> Divergence:
    """All tokens together."""
    kl = torch.cat([part.kl for part in parts])
    same = torch.cat([part.same_top for part in parts])
    p99 = float(np.quantile(kl.numpy(), 0.99))
    return Divergence(len(kl), float(kl.mean()), p99, float(same.double().mean()))
