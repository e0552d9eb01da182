"""The engine's outputs as OpenAI's replies and chunks. Pure functions and plain state.

Log-probabilities are of the model's own distribution, before penalties and temperature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from glimt import __version__
from glimt.server.ending import usage_before
from glimt.server.openai_prompt import NOTHING, PromptReport
from glimt.server.openai_texts import TokenTexts, ToldTokens, chat_logprobs, told_tokens
from glimt.server.tokens import is_end_of_text
from glimt.server.tools import CallReader, Delta, Offer, whole_message
from glimt.types import (
    Completion,
    FinishReason,
    PromptLogprob,
    Request,
    RequestOutput,
    SampledToken,
    StepOutput,
    Usage,
)

FINGERPRINT = f"fp_glimt_{__version__}"


@dataclass(frozen=True, slots=True)
class Head:
    """What every reply and chunk of a request says: id, Unix time and the model's name."""

    reply_id: str
    created: int
    model: str

    def body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """One reply or chunk."""
        return {
            "id": self.reply_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        }


# --- counts ----------------------------------------------------------------------------------


def usage_body(counts: Sequence[Usage]) -> dict[str, Any]:
    """The counts of one or several prompts together."""
    prompt = sum(each.prompt_tokens for each in counts)
    completion = sum(each.completion_tokens for each in counts)
    image = sum(each.image_tokens for each in counts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(each.cached_tokens for each in counts),
            "image_tokens": image,
            "multimodal_tokens": image,
        },
    }


class RunningUsage:
    """The counts of a stream so far; those of a request that has finished are the engine's own."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._counts = [usage_before(request) for request in requests]

    def add(self, number: int, output: StepOutput) -> None:
        """Count the tokens of one output of request `number`."""
        old = self._counts[number]
        so_far = old.completion_tokens + len(output.token_ids)
        self._counts[number] = output.usage or Usage(
            old.prompt_tokens, so_far, old.cached_tokens, old.image_tokens
        )

    def body(self) -> dict[str, Any]:
        """The counts now."""
        return usage_body(self._counts)


# --- tokens ----------------------------------------------------------------------------------


def shown_tokens(
    tokens: Sequence[SampledToken],
    reason: FinishReason | None,
    stop: Any,
    request: Request,
    is_echoed: bool = False,
) -> list[SampledToken]:
    """Those that are told of: not the one that ended the answer, unless it is part of its text.

    Behind an echoed prompt it is told: evaluation tools cut off one token, whatever it is, and
    would lose the prompt's last.
    """
    if is_echoed:
        return list(tokens)
    is_by_token = reason == "stop" and isinstance(stop, int)
    if is_by_token and not request.sampling.include_stop_str_in_output:
        return list(tokens[:-1])
    return list(tokens)


# --- whole replies ---------------------------------------------------------------------------


def finish_word(reason: FinishReason) -> str:
    """OpenAI's word; an answer that was stopped by its id stops, since clients know no other."""
    return "length" if reason == "length" else "stop"


def stop_reason(stop: str | int | None, request: Request) -> str | int | None:
    """vLLM's field: the stop string, or the id that the request itself called a stop."""
    return None if is_end_of_text(request, stop) else stop


def chat_reply(
    head: Head,
    output: RequestOutput,
    request: Request,
    texts: TokenTexts,
    offer: Offer | None = None,
    report: PromptReport = NOTHING,
) -> Any:
    """The body of a whole chat answer; offer: functions that it may call."""
    choices = [_chat_choice(each, request, texts, offer) for each in output.completions]
    body = head.body("chat.completion", choices) | {"usage": usage_body([output.usage])}
    return body | _prompt_logprobs(report, output, texts)


def _prompt_logprobs(
    report: PromptReport, output: RequestOutput, texts: TokenTexts
) -> dict[str, Any]:
    told = report.logprobs(output.prompt_logprobs, texts)
    return {} if told is None else {"prompt_logprobs": told}


def _chat_choice(
    done: Completion, request: Request, texts: TokenTexts, offer: Offer | None
) -> dict[str, Any]:
    tokens = _tokens_of(done, request)
    reader = offer.reader() if offer else None
    text = {"role": "assistant", "content": done.text}
    return {
        "index": done.index,
        "message": text if reader is None else whole_message(done.text, reader),
        "logprobs": None if tokens is None else chat_logprobs(tokens, texts),
        "finish_reason": _word_of_chat(done.finish_reason, reader),
        "stop_reason": stop_reason(done.stop_reason, request),
    }


def _word_of_chat(reason: FinishReason, reader: CallReader | None) -> str:
    """A call that was cut off has ended as any text has."""
    return "tool_calls" if reader is not None and reader.is_call else finish_word(reason)


def completion_reply(
    head: Head,
    outputs: Sequence[RequestOutput],
    requests: Sequence[Request],
    texts: TokenTexts,
    reports: Sequence[PromptReport],
) -> Any:
    """The body of whole completions, those of every prompt in order."""
    choices, counts = [], []
    for number, (output, request) in enumerate(zip(outputs, requests, strict=True)):
        report = reports[number]
        counts.append(_shown_usage(output.usage, report))
        for done in output.completions:
            shown = _completion_choice(done, output.prompt_logprobs, request, texts, report)
            first = {"index": number * request.sampling.n + done.index}
            choices.append(first | shown | _prompt_logprobs(report, output, texts))
    return head.body("text_completion", choices) | {"usage": usage_body(counts)}


def _completion_choice(
    done: Completion,
    scores: Sequence[PromptLogprob] | None,
    request: Request,
    texts: TokenTexts,
    report: PromptReport,
) -> dict[str, Any]:
    text = report.shown_text(request, texts)
    told = report.shown_tokens(scores, texts)
    if report.is_alone:
        return {"text": text, "logprobs": told and told.body(0), **_END_OF_PROMPT}
    told = _joined(told, _tokens_of(done, request, report.echo), texts)
    return {
        "text": text + done.text,
        "logprobs": told and told.body(0),
        "finish_reason": finish_word(done.finish_reason),
        "stop_reason": stop_reason(done.stop_reason, request),
    }


# How a prompt ends that was only to be scored.
_END_OF_PROMPT = {"finish_reason": "length", "stop_reason": None}


def _shown_usage(usage: Usage, report: PromptReport) -> Usage:
    return replace(usage, completion_tokens=0) if report.is_alone else usage


def _joined(
    told: ToldTokens | None, tokens: Sequence[SampledToken] | None, texts: TokenTexts
) -> ToldTokens | None:
    """Tokens of a prompt, if they are told, and those of the completion behind it."""
    if tokens is None:
        return told
    own = told_tokens(tokens, texts)
    return own if told is None else told + own


def _tokens_of(
    done: Completion, request: Request, is_echoed: bool = False
) -> list[SampledToken] | None:
    if done.logprobs is None:
        return None
    return shown_tokens(done.logprobs, done.finish_reason, done.stop_reason, request, is_echoed)


# --- chunks ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Held:
    """One choice of a stream: log-probabilities whose text has not come yet.

    reader: of the choice's text, where it may be a call
    """

    has_begun: bool = False
    offset: int = 0
    tokens: list[SampledToken] = field(default_factory=list)
    reader: CallReader | None = None


class Chunks(ABC):
    """The chunks of one stream, chat or completion, of one or several prompts."""

    def __init__(self, head: Head, requests: Sequence[Request], texts: TokenTexts) -> None:
        self._head, self._requests, self._texts = head, requests, texts
        self._held: dict[int, _Held] = {}
        self.usage = RunningUsage(requests)

    def feed(self, number: int, output: StepOutput) -> list[dict[str, Any]]:
        """Chunks of one output of request `number`; none while its text is held back."""
        request = self._requests[number]
        index = number * request.sampling.n + output.index
        held = self._held.setdefault(index, _Held())
        self.usage.add(number, output)
        ending = output.finish_reason, output.stop_reason
        held.tokens += shown_tokens(output.logprobs, *ending, request, self._is_echoed(number))
        return [self._chunk(each) for each in self._choices(index, held, output, request)]

    def _is_echoed(self, number: int) -> bool:
        """Whether the prompt of request `number` stands before its answers."""
        return False

    def last(self) -> dict[str, Any]:
        """The chunk of counts, without a choice."""
        return self._chunk_of([]) | {"usage": self.usage.body()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return self._chunk_of([choice])

    @abstractmethod
    def _chunk_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """A chunk of these choices, under the name of its kind."""

    @abstractmethod
    def _choices(
        self, index: int, held: _Held, output: StepOutput, request: Request
    ) -> list[dict[str, Any]]:
        """What one output adds to a choice; held: of the choice, may be changed."""

    def _take_logprobs(self, held: _Held, request: Request) -> list[SampledToken] | None:
        """What was held back, with the text that has come."""
        taken, held.tokens = held.tokens, []
        return None if request.sampling.logprobs is None or not taken else taken


ChunksMaker = Callable[[Head, Sequence[Request], TokenTexts], Chunks]


class ChatChunks(Chunks):
    """Chunks of a chat: the role, then text or a call, then the reason for the end.

    offer: functions that the answer may call
    """

    def __init__(
        self,
        head: Head,
        requests: Sequence[Request],
        texts: TokenTexts,
        offer: Offer | None = None,
    ) -> None:
        super().__init__(head, requests, texts)
        self._offer = offer

    def _chunk_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head.body("chat.completion.chunk", choices)

    def _choices(
        self, index: int, held: _Held, output: StepOutput, request: Request
    ) -> list[dict[str, Any]]:
        deltas = self._deltas(held, output)
        choices = []
        if not held.has_begun and (deltas or output.finish_reason or self._offer is None):
            held.has_begun = True
            is_call = bool(deltas) and "tool_calls" in deltas[0]
            role = {"role": "assistant", "content": None if is_call else ""}
            choices.append(self._choice(index, role, None))
        for delta in deltas:
            choices.append(self._choice(index, delta, self._take_logprobs(held, request)))
        if output.finish_reason:
            last = self._choice(index, {}, self._take_logprobs(held, request))
            last["finish_reason"] = _word_of_chat(output.finish_reason, held.reader)
            choices.append(last | {"stop_reason": stop_reason(output.stop_reason, request)})
        return choices

    def _deltas(self, held: _Held, output: StepOutput) -> list[Delta]:
        """What an output adds to the message; nothing while it is not known what that is."""
        if self._offer is None:
            return [{"content": output.text}] if output.text else []
        held.reader = held.reader or self._offer.reader()
        return held.reader.feed(output.text, output.finish_reason is not None)

    def _choice(
        self, index: int, delta: dict[str, Any], tokens: list[SampledToken] | None
    ) -> dict[str, Any]:
        logprobs = None if tokens is None else chat_logprobs(tokens, self._texts)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


class CompletionChunks(Chunks):
    """Chunks of completions: text, the last with the reason for the end.

    reports: what is told of each prompt, with the first chunk of each of its completions
    """

    def __init__(
        self,
        head: Head,
        requests: Sequence[Request],
        texts: TokenTexts,
        reports: Sequence[PromptReport] | None = None,
    ) -> None:
        super().__init__(head, requests, texts)
        self._reports = reports or [NOTHING] * len(requests)
        # Kept for the later choices of a prompt: only the first one's output brings them.
        self._scores: dict[int, Sequence[PromptLogprob]] = {}

    def _chunk_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head.body("text_completion", choices)

    def _is_echoed(self, number: int) -> bool:
        return self._reports[number].echo

    def feed(self, number: int, output: StepOutput) -> list[dict[str, Any]]:
        """Chunks of one output of request `number`; none while its text is held back."""
        if output.prompt_logprobs is not None:
            self._scores[number] = output.prompt_logprobs
        if self._reports[number].is_alone:
            usage = output.usage and _shown_usage(output.usage, self._reports[number])
            output = replace(output, text="", token_ids=(), logprobs=(), usage=usage)
        return super().feed(number, output)

    def _choices(
        self, index: int, held: _Held, output: StepOutput, request: Request
    ) -> list[dict[str, Any]]:
        number = index // request.sampling.n
        report, is_first = self._reports[number], not held.has_begun
        held.has_begun = True
        text = (report.shown_text(request, self._texts) if is_first else "") + output.text
        if not text and not output.finish_reason:
            return []
        told = report.shown_tokens(self._scores.get(number), self._texts) if is_first else None
        told = _joined(told, self._take_logprobs(held, request), self._texts)
        offset, held.offset = held.offset, held.offset + (sum(told.widths) if told else 0)
        reason = output.finish_reason
        ending: dict[str, Any] = {
            "finish_reason": finish_word(reason) if reason else None,
            "stop_reason": stop_reason(output.stop_reason, request),
        }
        if reason and report.is_alone:
            ending = _END_OF_PROMPT
        return [
            {"index": index, "text": text, "logprobs": told and told.body(offset), **ending},
        ]
