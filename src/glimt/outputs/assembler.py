"""OutputAssembler: the step outputs of one request -> one RequestOutput."""

from __future__ import annotations

from dataclasses import dataclass, field

from glimt.types import (
    Completion,
    FinishReason,
    PromptLogprob,
    Request,
    RequestOutput,
    SampledToken,
    StepOutput,
)


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[SampledToken] = field(default_factory=list)
    last: StepOutput | None = None


class OutputAssembler:
    """Collects until every choice has finished."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._choices = [_Choice() for _ in range(request.sampling.n)]
        self._prompt_logprobs: tuple[PromptLogprob, ...] | None = None

    def add(self, output: StepOutput) -> RequestOutput | None:
        """Take one step's output. Returns the whole once the last choice has finished."""
        choice = self._choices[output.index]
        choice.text.append(output.text)
        choice.token_ids += output.token_ids
        choice.logprobs += output.logprobs
        self._prompt_logprobs = self._prompt_logprobs or output.prompt_logprobs
        if output.finish_reason:
            choice.last = output
        if any(choice.last is None for choice in self._choices):
            return None
        return self._whole(output)

    def _whole(self, last: StepOutput) -> RequestOutput:
        assert last.usage is not None, "a finished output carries counts"
        assert last.timings is not None, "a finished output carries times"
        return RequestOutput(
            request_id=self.request.request_id,
            prompt_token_ids=self.request.prompt.original_token_ids,
            completions=tuple(self._completion(i) for i in range(len(self._choices))),
            usage=last.usage,
            timings=last.timings,
            prompt_logprobs=self._prompt_logprobs,
        )

    def _completion(self, index: int) -> Completion:
        choice = self._choices[index]
        assert choice.last is not None
        reason: FinishReason | None = choice.last.finish_reason
        assert reason is not None
        wants_logprobs = self.request.sampling.logprobs is not None
        return Completion(
            index=index,
            text="".join(choice.text),
            token_ids=tuple(choice.token_ids),
            finish_reason=reason,
            stop_reason=choice.last.stop_reason,
            error=choice.last.error,
            logprobs=tuple(choice.logprobs) if wants_logprobs else None,
        )
