"""Teacher forcing: the logits of one answer under any setting, through the engine as it serves.

The sampler is the only stage that changes: it gives the wanted token and keeps the logits, so
batching, chunking, caches and kernels are those of a real answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from glimt.errors import EngineError
from glimt.inputs.request import RequestOptions
from glimt.llm import LLM
from glimt.sampling import Sampler
from glimt.types import Messages, Request, SampledToken, SamplingParams, StepOutput, StepPlan


class ForcingSampler(Sampler):
    """Gives every request its own answer, token by token.

    logits: by request id, one row [vocab_size] float32 on the CPU per token given
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self.answers: dict[str, Sequence[int]] = {}
        self.logits: dict[str, list[Tensor]] = {}

    def sample(self, logits: Tensor, plan: StepPlan) -> list[SampledToken]:
        """Give each row its answer's next token; keep a copy of its logits.

        logits: [num_sampled, vocab_size]
        """
        return [
            self._next(row.request_id, len(row.output_ids), row.sequence_id, logits[i])
            for i, row in enumerate(plan.sampled_rows)
        ]

    def _next(self, request_id: str, place: int, sequence_id: int, row: Tensor) -> SampledToken:
        kept = self.logits.setdefault(request_id, [])
        del kept[place:]  # a preempted sequence may sample a place twice
        kept.append(row.detach().to("cpu", torch.float32, copy=True))
        return SampledToken(sequence_id, self.answers[request_id][place])


@contextmanager
def _forcing(llm: LLM) -> Iterator[ForcingSampler]:
    engine = llm.engine
    forcing = ForcingSampler(engine.opened.config.vocab_size)
    sampler, engine.sampler = engine.sampler, forcing
    try:
        yield forcing
    finally:
        for request_id in forcing.answers:
            engine.abort(request_id)
        engine.sampler = sampler


def forced_logits(
    llm: LLM, conversations: Sequence[Messages], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Logits before each token of each answer, [len(answer), vocab_size] float32, as one batch.

    Raises RequestError when a conversation with its answer does not fit, EngineError when the
    engine cannot compute one of them.
    """
    asked = zip(conversations, answers, strict=True)
    requests = [_forced_request(llm, number, *each) for number, each in enumerate(asked)]
    with _forcing(llm) as forcing:
        forcing.answers = {r.request_id: a for r, a in zip(requests, answers, strict=True)}
        for request in requests:
            llm.engine.add_request(request)
        while llm.engine.has_work:
            _refuse_errors(llm.engine.step())
        return [torch.stack(forcing.logits[request.request_id]) for request in requests]


def _refuse_errors(outputs: Sequence[StepOutput]) -> None:
    for output in outputs:
        if output.finish_reason == "error":
            raise EngineError(f"an answer could not be computed: {output.error}")


def _forced_request(
    llm: LLM, number: int, conversation: Messages, answer: Sequence[int]
) -> Request:
    sampling = SamplingParams(temperature=0, max_tokens=len(answer), ignore_eos=True)
    options = RequestOptions(request_id=f"forced-{number}")
    return llm.engine.prepare_chat(conversation, sampling, options)


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
