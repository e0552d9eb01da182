"""The engine's outputs as OpenAI's replies and chunks. Pure functions and plain state.

Log-probabilities are of the model's own distribution, before penalties and temperature.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from glimt import __version__
from glimt.models.base import Tokenizer
from glimt.server.ending import usage_before
from glimt.server.tokens import LEAST_LOGPROB, is_end_of_text
from glimt.server.tools import CallReader, Delta, Offer, whole_message
from glimt.types import (
    Completion,
    FinishReason,
    Request,
    RequestOutput,
    SampledToken,
    StepOutput,
    TokenLogprob,
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


class TokenTexts:
    """What single tokens are called in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._names = {i: name for name, i in tokenizer.special_ids.items()}

    def content(self, token_id: int) -> bytes:
        """The token's bytes, of a special one its name's."""
        if token_id in self._names:
            return self._names[token_id].encode()
        return self._token_bytes(token_id)

    def text(self, token_id: int) -> str:
        """The token decoded alone: half a character is U+FFFD."""
        return self.content(token_id).decode("utf-8", "replace")

    def entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        """One token of a chat's log-probabilities."""
        content = self.content(token_id)
        return {
            "token": content.decode("utf-8", "replace"),
            "logprob": max(logprob, LEAST_LOGPROB),
            "bytes": list(content),
        }


def shown_tokens(
    tokens: Sequence[SampledToken], reason: FinishReason | None, stop: Any, request: Request
) -> list[SampledToken]:
    """Those that are told of: not the one that ended the answer, unless it is part of its text."""
    is_by_token = reason == "stop" and isinstance(stop, int)
    if is_by_token and not request.sampling.include_stop_str_in_output:
        return list(tokens[:-1])
    return list(tokens)


def chat_logprobs(tokens: Sequence[SampledToken], texts: TokenTexts) -> dict[str, Any]:
    """`logprobs` of a chat's choice."""
    content = [
        {
            **texts.entry(token.token_id, token.logprob or 0.0),
            "top_logprobs": [texts.entry(top.token_id, top.logprob) for top in token.top_logprobs],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[SampledToken], texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """`logprobs` of a completion's choice; offset: of the first token in the text."""
    names = [texts.text(token.token_id) for token in tokens]
    *starts, _ = accumulate(map(len, names), initial=offset)
    return {
        "tokens": names,
        "token_logprobs": [max(token.logprob or 0.0, LEAST_LOGPROB) for token in tokens],
        "top_logprobs": [_top(token, texts) for token in tokens],
        "text_offset": starts,
    }


def _top(token: SampledToken, texts: TokenTexts) -> dict[str, float]:
    """By text; of two tokens with one text, the likelier counts. The chosen one is always there."""
    chosen = TokenLogprob(token.token_id, token.logprob or 0.0)
    found: dict[str, float] = {}
    for each in (*token.top_logprobs, chosen):
        found.setdefault(texts.text(each.token_id), max(each.logprob, LEAST_LOGPROB))
    return found


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
) -> Any:
    """The body of a whole chat answer; offer: functions that it may call."""
    choices = [_chat_choice(each, request, texts, offer) for each in output.completions]
    return head.body("chat.completion", choices) | {"usage": usage_body([output.usage])}


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
    head: Head, outputs: Sequence[RequestOutput], requests: Sequence[Request], texts: TokenTexts
) -> Any:
    """The body of whole completions, those of every prompt in order."""
    choices = []
    for number, (output, request) in enumerate(zip(outputs, requests, strict=True)):
        for done in output.completions:
            tokens = _tokens_of(done, request)
            logprobs = None if tokens is None else completion_logprobs(tokens, texts, 0)
            choices.append(
                {
                    "index": number * request.sampling.n + done.index,
                    "text": done.text,
                    "logprobs": logprobs,
                    "finish_reason": finish_word(done.finish_reason),
                    "stop_reason": stop_reason(done.stop_reason, request),
                }
            )
    usage = usage_body([output.usage for output in outputs])
    return head.body("text_completion", choices) | {"usage": usage}


def _tokens_of(done: Completion, request: Request) -> list[SampledToken] | None:
    if done.logprobs is None:
        return None
    return shown_tokens(done.logprobs, done.finish_reason, done.stop_reason, request)


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
        held.tokens += shown_tokens(
            output.logprobs, output.finish_reason, output.stop_reason, request
        )
        return [self._chunk(each) for each in self._choices(index, held, output, request)]

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
    """Chunks of completions: text, the last with the reason for the end."""

    def _chunk_of(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head.body("text_completion", choices)

    def _choices(
        self, index: int, held: _Held, output: StepOutput, request: Request
    ) -> list[dict[str, Any]]:
        if not output.text and not output.finish_reason:
            return []
        tokens = self._take_logprobs(held, request)
        logprobs = None
        if tokens is not None:
            logprobs = completion_logprobs(tokens, self._texts, held.offset)
            held.offset += sum(map(len, logprobs["tokens"]))
        reason = output.finish_reason
        return [
            {
                "index": index,
                "text": output.text,
                "logprobs": logprobs,
                "finish_reason": finish_word(reason) if reason else None,
                "stop_reason": stop_reason(output.stop_reason, request),
            }
        ]
