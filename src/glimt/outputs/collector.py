"""OutputCollector: token outcomes -> text deltas, finish reasons, counts and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from glimt.models.base import Processor, TokenDecoder
from glimt.outputs.detokenizer import ExactDecoder, NamingDecoder, TextStream
from glimt.types import (
    FinishReason,
    PromptLogprob,
    Request,
    SampledToken,
    StepOutput,
    StepPlan,
    Timings,
    TokenOutcome,
    Usage,
)


@dataclass(slots=True)
class _Record:
    """What is known of one unfinished request; times in seconds of one monotonic clock."""

    request: Request
    streams: list[TextStream]
    num_open: int
    num_output: int = 0
    cached_tokens: int | None = None
    started_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    image_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    scores: dict[int, PromptLogprob] = field(default_factory=dict)
    has_scores: bool = False  # to tell, with the first choice's first token

    def usage(self) -> Usage:
        prompt = self.request.prompt
        return Usage(
            prompt_tokens=len(prompt.token_ids),
            completion_tokens=self.num_output,
            cached_tokens=self.cached_tokens or 0,
            image_tokens=sum(span.length for span in prompt.spans),
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
        )

    def tell_scores(self, gained: Sequence[TokenOutcome]) -> tuple[PromptLogprob, ...] | None:
        """Of every token of the prompt, once: with the first token of the choice that scored it."""
        if not self.has_scores or not gained or gained[0].index:
            return None
        self.has_scores, scores = False, self.scores
        ids = enumerate(self.request.prompt.token_ids)
        return tuple(scores.get(at) or PromptLogprob(token_id) for at, token_id in ids)

    def timings(self, now_s: float) -> Timings:
        """A phase that was never reached took no time."""
        first = now_s if self.first_token_s is None else self.first_token_s
        started = first if self.started_s is None else self.started_s
        last = first if self.last_token_s is None else self.last_token_s
        return Timings(
            image_s=self.image_s,
            prefill_s=max(0.0, first - started - self.image_s),
            decode_s=last - first,
            ttft_s=first - self.request.arrival_s,
        )


class OutputCollector:
    """Owns the text of every unfinished request.

    clock: seconds; the one that stamped Request.arrival_s
    """

    def __init__(self, processor: Processor, clock: Callable[[], float]) -> None:
        self.processor = processor
        self.clock = clock
        self._records: dict[str, _Record] = {}

    def add(self, request: Request) -> None:
        """Start collecting a request."""
        streams = [self._stream(request) for _ in range(request.sampling.n)]
        has_scores = request.sampling.prompt_logprobs is not None
        record = _Record(request, streams, len(streams), has_scores=has_scores)
        self._records[request.request_id] = record

    def _stream(self, request: Request) -> TextStream:
        sampling, processor = request.sampling, self.processor
        is_exact = request.is_exact
        return TextStream(
            self._decoder(request),
            _as_it_is if is_exact else processor.finish_text,
            len if is_exact else processor.stable_length,
            tuple(sampling.stop),
            sampling.include_stop_str_in_output,
        )

    def _decoder(self, request: Request) -> TokenDecoder:
        tokenizer = self.processor.tokenizer
        is_exact = request.is_exact
        decoder = ExactDecoder(tokenizer.token_bytes) if is_exact else tokenizer.decoder()
        if request.sampling.skip_special_tokens:
            return decoder
        return NamingDecoder(decoder, {i: name for name, i in tokenizer.special_ids.items()})

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._records

    def note_step(self, plan: StepPlan, image_s: Mapping[str, float], began_s: float) -> None:
        """Remember when requests started, what they found cached, tower time and drafts.

        image_s: seconds in the tower by request id; began_s: of the step, by `clock`
        """
        for row in plan.rows:
            record = self._records[row.request_id]
            if record.started_s is None:
                record.started_s = began_s
            if record.cached_tokens is None:
                record.cached_tokens = row.start
            record.drafted_tokens += len(row.drafts)
        self.note_tower(image_s, began_s)

    def note_tower(self, image_s: Mapping[str, float], began_s: float) -> None:
        """The same of tower time alone: a request may start with it, before its first row."""
        for request_id, seconds in image_s.items():
            record = self._records[request_id]
            record.image_s += seconds
            if record.started_s is None:
                record.started_s = began_s

    def note_scores(self, plan: StepPlan, scores: Sequence[PromptLogprob]) -> None:
        """Remember how likely tokens of prompts were; a place may come again.

        scores: one for each of plan.targets, in their order
        """
        for (row, target), score in zip(plan.targets, scores, strict=True):
            self._records[row.request_id].scores[target.place] = score

    def collect(self, outcomes: Sequence[TokenOutcome]) -> list[StepOutput]:
        """One output per choice that gained tokens, in order."""
        now_s = self.clock()
        by_choice = groupby(outcomes, key=lambda outcome: (outcome.request_id, outcome.index))
        return [self._collect(list(gained), now_s) for _, gained in by_choice]

    def _collect(self, gained: Sequence[TokenOutcome], now_s: float) -> StepOutput:
        """Feed one choice's tokens; those behind the one that ends it are dropped."""
        request_id, index = gained[0].request_id, gained[0].index
        record = self._records[request_id]
        record.accepted_tokens += len(gained) - 1
        text = ""
        for number, outcome in enumerate(gained):
            if outcome.sampled.error is not None:
                taken, error = gained[:number], outcome.sampled.error
                return self.finish(request_id, index, "error", text, taken, error)
            text += self._feed(record, outcome, now_s)
            is_stopped = record.streams[index].stop_reason is not None
            reason = "stop" if is_stopped else outcome.finish_reason
            if reason:
                return self.finish(request_id, index, reason, text, gained[: number + 1])
        return StepOutput(
            request_id=request_id,
            index=index,
            text=text,
            token_ids=_token_ids(gained),
            logprobs=_logprobs(gained),
            prompt_logprobs=record.tell_scores(gained),
        )

    def _feed(self, record: _Record, outcome: TokenOutcome, now_s: float) -> str:
        """Count a token and return the text that became visible with it."""
        record.num_output += 1
        record.first_token_s = record.first_token_s or now_s
        record.last_token_s = now_s
        stream = record.streams[outcome.index]
        is_shown = outcome.is_text or record.request.sampling.include_stop_str_in_output
        return stream.feed(outcome.sampled.token_id) if is_shown else ""

    def finish(
        self,
        request_id: str,
        index: int,
        reason: FinishReason,
        text: str = "",
        gained: Sequence[TokenOutcome] = (),
        error: str | None = None,
    ) -> StepOutput:
        """The last output of a choice: its last tokens, the text held back, counts and times."""
        record = self._records[request_id]
        stream = record.streams[index]
        text += stream.close()
        if stream.stop_reason and reason == "length":
            reason = "stop"
        record.num_open -= 1
        if record.num_open == 0:
            del self._records[request_id]
        return StepOutput(
            request_id=request_id,
            index=index,
            text=text,
            token_ids=_token_ids(gained),
            logprobs=_logprobs(gained),
            finish_reason=reason,
            stop_reason=_stop_reason(reason, stream, gained),
            error=error,
            prompt_logprobs=record.tell_scores(gained),
            usage=record.usage(),
            timings=record.timings(self.clock()),
        )


def _as_it_is(raw: str) -> str:
    return raw


def _stop_reason(
    reason: FinishReason, stream: TextStream, gained: Sequence[TokenOutcome]
) -> str | int | None:
    """A stop string in the text that an abort or an error released did not end the choice."""
    if reason != "stop":
        return None
    return stream.stop_reason or (gained[-1].stop_reason if gained else None)


def _token_ids(gained: Sequence[TokenOutcome]) -> tuple[int, ...]:
    return tuple(outcome.sampled.token_id for outcome in gained)


def _logprobs(gained: Sequence[TokenOutcome]) -> tuple[SampledToken, ...]:
    return tuple(o.sampled for o in gained if o.sampled.logprob is not None)
