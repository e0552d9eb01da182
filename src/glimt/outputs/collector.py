"""OutputCollector: token outcomes -> text deltas, finish reasons, counts and times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from glimt.models.base import Processor
from glimt.outputs.detokenizer import TextStream
from glimt.types import (
    FinishReason,
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

    def usage(self) -> Usage:
        prompt = self.request.prompt
        return Usage(
            prompt_tokens=len(prompt.token_ids),
            completion_tokens=self.num_output,
            cached_tokens=self.cached_tokens or 0,
            image_tokens=sum(span.length for span in prompt.spans),
        )

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
        streams = [
            TextStream(
                self.processor.tokenizer.decoder(),
                self.processor.finish_text,
                self.processor.stable_length,
                tuple(request.sampling.stop),
            )
            for _ in range(request.sampling.n)
        ]
        self._records[request.request_id] = _Record(request, streams, len(streams))

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._records

    def note_step(self, plan: StepPlan, image_s: Mapping[str, float], began_s: float) -> None:
        """Remember when requests started, what they found cached and their tower time."""
        for row in plan.rows:
            record = self._records[row.request_id]
            if record.started_s is None:
                record.started_s = began_s
            if record.cached_tokens is None:
                record.cached_tokens = row.start
        self.note_tower(image_s, began_s)

    def note_tower(self, image_s: Mapping[str, float], began_s: float) -> None:
        """Remember tower time by request id; a request may start with it, before its first row."""
        for request_id, seconds in image_s.items():
            record = self._records[request_id]
            record.image_s += seconds
            if record.started_s is None:
                record.started_s = began_s

    def collect(self, outcomes: Sequence[TokenOutcome]) -> list[StepOutput]:
        """One output per sampled token, in order."""
        now_s = self.clock()
        return [self._collect(outcome, now_s) for outcome in outcomes]

    def _collect(self, outcome: TokenOutcome, now_s: float) -> StepOutput:
        record = self._records[outcome.request_id]
        if outcome.sampled.error is not None:
            error = outcome.sampled.error
            return self.finish(outcome.request_id, outcome.index, "error", error=error)
        record.num_output += 1
        record.first_token_s = record.first_token_s or now_s
        record.last_token_s = now_s
        stream = record.streams[outcome.index]
        text = stream.feed(outcome.sampled.token_id) if outcome.is_text else ""
        reason = "stop" if stream.stop_reason else outcome.finish_reason
        if reason:
            return self.finish(outcome.request_id, outcome.index, reason, text, outcome)
        return StepOutput(
            request_id=outcome.request_id,
            index=outcome.index,
            text=text,
            token_ids=(outcome.sampled.token_id,),
            logprobs=_logprobs(outcome),
        )

    def finish(
        self,
        request_id: str,
        index: int,
        reason: FinishReason,
        text: str = "",
        outcome: TokenOutcome | None = None,
        error: str | None = None,
    ) -> StepOutput:
        """The last output of a choice: the text held back, counts and times."""
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
            token_ids=(outcome.sampled.token_id,) if outcome else (),
            logprobs=_logprobs(outcome) if outcome else (),
            finish_reason=reason,
            stop_reason=_stop_reason(reason, stream, outcome),
            error=error,
            usage=record.usage(),
            timings=record.timings(self.clock()),
        )


def _stop_reason(
    reason: FinishReason, stream: TextStream, outcome: TokenOutcome | None
) -> str | int | None:
    """A stop string in the text that an abort or an error released did not end the choice."""
    if reason != "stop":
        return None
    return stream.stop_reason or (outcome.stop_reason if outcome else None)


def _logprobs(outcome: TokenOutcome) -> tuple[SampledToken, ...]:
    return (outcome.sampled,) if outcome.sampled.logprob is not None else ()
