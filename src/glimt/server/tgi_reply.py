"""TGI's replies: an answer becomes an object or events, and its headers. No sockets.

Sources: those of `tgi_body`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glimt.server.failures import Failure, body_of
from glimt.server.replies import Finished
from glimt.server.replying import data_event
from glimt.server.service import HalfAnswer
from glimt.server.tgi_body import TgiRequest
from glimt.server.tokens import ShownToken, TokenTexts, finish_word, seed_of
from glimt.types import Completion, Request, StepOutput

# --- a whole answer --------------------------------------------------------------------------


def render(finished: Finished, asked: TgiRequest, texts: TokenTexts) -> dict[str, Any]:
    """The object of `/generate`. Raises HalfAnswer for one that was stopped by its id."""
    if any(_is_cut(each, asked) for each in finished.output.completions):
        raise HalfAnswer(_CUT)
    best = max(finished.output.completions, key=_mean_logprob)
    sequence = _sequence(finished, best, asked, texts)
    reply: dict[str, Any] = {"generated_text": sequence.pop("generated_text")}
    if not asked.wants_details:
        return reply
    losers = [
        _sequence(finished, each, asked, texts)
        for each in finished.output.completions
        if each is not best
    ]
    details = {**sequence, "best_of_sequences": losers or None}
    reply["details"] = {**details, "prompt_tokens": finished.output.usage.prompt_tokens}
    return reply


_CUT = "the answer was stopped before its end"


def _is_cut(ended: Completion | StepOutput, asked: TgiRequest) -> bool:
    """Of its three words for an end TGI has none for this one; MindIE calls it a stop."""
    return ended.finish_reason == "abort" and not asked.is_mindie


def _mean_logprob(completion: Completion) -> float:
    logprobs = [each.logprob or 0.0 for each in completion.logprobs or ()]
    return sum(logprobs) / max(1, len(logprobs))


def _sequence(
    finished: Finished, completion: Completion, asked: TgiRequest, texts: TokenTexts
) -> dict[str, Any]:
    outputs = [each.output for each in finished.steps if each.output.index == completion.index]
    tokens = [token for each in outputs for token in texts.of_step(each)]
    text = completion.text
    reason = completion.finish_reason, completion.stop_reason
    sequence: dict[str, Any] = {
        "generated_text": asked.prompt + text if asked.parameters.return_full_text else text,
        "finish_reason": finish_word(finished.request, *reason),
        "generated_tokens": len(completion.token_ids),
        "seed": _seed(finished.request, completion.index),
        "prefill": _prefill(finished, asked, texts),
        "tokens": [_token(token) for token in tokens],
    }
    if asked.parameters.top_n_tokens:
        sequence["top_tokens"] = [[_token(top) for top in token.top] for token in tokens]
    return sequence


def _seed(request: Request, index: int) -> int | None:
    return None if seed_of(request) is None else request.seeds[index]


def _prefill(finished: Finished, asked: TgiRequest, texts: TokenTexts) -> list[dict[str, Any]]:
    """The prompt's tokens, of a picture its few; they have no log-probabilities."""
    if not asked.parameters.decoder_input_details:
        return []
    output, prompt = finished.output, finished.request.prompt
    scores = output.prompt_logprobs or [None] * len(prompt.token_ids)
    told = [None if at is None else scores[at] for at in prompt.original_places()]
    shown = [
        texts.shown(token_id, score.logprob if score else None)
        for token_id, score in zip(output.prompt_token_ids, told, strict=True)
    ]
    return [{"id": token.id, "text": token.text, "logprob": token.logprob} for token in shown]


def _token(token: ShownToken) -> dict[str, Any]:
    shown = {"id": token.id, "text": token.text, "logprob": token.logprob}
    return {**shown, "special": token.is_special}


def headers(finished: Finished, asked: TgiRequest, device: str) -> Mapping[str, str]:
    """Times in ms, but for x-compute-time, which is in s."""
    usage, times = finished.output.usage, finished.output.timings
    queue_s, inference_s = times.queue_s, times.inference_s
    per_token_s = inference_s / max(1, usage.completion_tokens)
    milliseconds = {
        "x-total-time": queue_s + inference_s,
        "x-validation-time": 0.0,
        "x-queue-time": queue_s,
        "x-inference-time": inference_s,
        "x-time-per-token": per_token_s,
    }
    return {
        "x-compute-type": device,
        "x-compute-time": f"{queue_s + inference_s:.6f}",
        "x-compute-characters": str(len(asked.prompt)),
        "x-prompt-tokens": str(usage.prompt_tokens),
        "x-generated-tokens": str(usage.completion_tokens),
        **{name: str(round(seconds * 1000)) for name, seconds in milliseconds.items()},
    }


# --- a stream --------------------------------------------------------------------------------


class TgiWriter:
    """One event per token; the last has the whole text. There is no [DONE]."""

    def __init__(self, request: Request, asked: TgiRequest, texts: TokenTexts) -> None:
        self._request, self._asked, self._texts = request, asked, texts
        self._text = asked.prompt if asked.parameters.return_full_text else ""
        self._num_tokens = 0

    def add(self, output: StepOutput) -> bytes:
        """The events of one step."""
        if _is_cut(output, self._asked):
            return self.failed(Failure("incomplete", _CUT))
        self._text += output.text
        tokens = self._texts.of_step(output)
        if not tokens and output.finish_reason:
            tokens = [ShownToken(-1, output.text, None, False)]
        last = len(tokens) - 1
        events = [self._event(t, output if i == last else None) for i, t in enumerate(tokens)]
        return b"".join(events)

    def _event(self, token: ShownToken, output: StepOutput | None) -> bytes:
        self._num_tokens += token.id >= 0
        is_last = output is not None and output.finish_reason is not None
        event: dict[str, Any] = {
            "index": self._num_tokens,
            "token": self._token(token),
            "generated_text": self._text if is_last else None,
            "details": self._details(output) if is_last and output is not None else None,
        }
        if self._asked.parameters.top_n_tokens and not self._asked.is_mindie:
            event["top_tokens"] = [_token(top) for top in token.top]
        return data_event(event)

    def _token(self, token: ShownToken) -> dict[str, Any]:
        if not self._asked.is_mindie:
            return _token(token)
        ids = [token.id] if token.id >= 0 else []
        text = "" if token.is_special else token.text
        return {"id": ids, "text": text, "logprob": None, "special": None}

    def _details(self, output: StepOutput) -> dict[str, Any] | None:
        if not self._asked.wants_details or output.usage is None:
            return None
        return {
            "finish_reason": finish_word(self._request, output.finish_reason, output.stop_reason),
            "generated_tokens": self._num_tokens,
            "seed": seed_of(self._request),
            "input_length": output.usage.prompt_tokens,
        }

    def failed(self, failure: Failure) -> bytes:
        """An error event; whatever came before it, it is the last."""
        return error_event(failure, "mindie" if self._asked.is_mindie else "upstream")


def error_event(failure: Failure, profile: str) -> bytes:
    """An error where the status is 200 already."""
    return data_event(body_of(failure, "tgi", profile))
