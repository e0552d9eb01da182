"""Triton's replies to text: objects, events and tensors. No sockets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from glimt.server.config import ServerConfig
from glimt.server.failures import Failure, body_of
from glimt.server.replies import Finished
from glimt.server.replying import one_line
from glimt.server.service import Answer, TimedStep
from glimt.server.tensors import Tensor
from glimt.server.tokens import LEAST_LOGPROB, StepTimes, finish_word
from glimt.server.triton_body import TritonRequest
from glimt.types import Completion, Request, SampledToken, StepOutput


def head(asked: TritonRequest, model: str, config: ServerConfig) -> dict[str, Any]:
    """What every reply begins with. MindIE always tells an id, and no version."""
    is_mindie = config.profile == "mindie"
    request_id = asked.request_id or (asked.ask.request_id if is_mindie else None)
    begin = {} if request_id is None else {"id": request_id}
    return {**begin, "model_name": model, "model_version": None if is_mindie else "1"}


def render_generate(
    finished: Finished, asked: TritonRequest, model: str, config: ServerConfig
) -> dict[str, Any]:
    """The object of `/generate`; with n above 1 its texts are a list."""
    texts = [asked.prefix + each.text for each in finished.output.completions]
    reply = head(asked, model, config)
    reply["text_output"] = texts[0] if len(texts) == 1 else texts
    first = finished.output.completions[0]
    told = asked.parameters
    if told.return_finish_reason:
        reply["finish_reason"] = _word(finished.request, first)
    if told.return_cumulative_logprob:
        reply["cumulative_logprob"] = _cumulative(first)
    if told.return_logprobs:
        reply["logprobs"] = _logprobs(first)
    if told.return_num_input_tokens:
        reply["num_input_tokens"] = finished.output.usage.prompt_tokens
    if told.return_num_output_tokens:
        reply["num_output_tokens"] = len(first.token_ids)
    if told.details:
        reply["details"] = _details(finished.request, finished.steps[-1].output)
    if told.perf_stat:
        reply["perf_stat"] = [pair for step in finished.steps for pair in _perf(step)]
    return reply


def _word(request: Request, ended: Completion | StepOutput) -> str:
    return finish_word(request, ended.finish_reason, ended.stop_reason)


def _cumulative(completion: Completion) -> float:
    return sum(max(each.logprob or 0.0, LEAST_LOGPROB) for each in completion.logprobs or ())


def _logprobs(completion: Completion) -> list[dict[str, Any]]:
    return [_logprob(each) for each in completion.logprobs or ()]


def _logprob(sampled: SampledToken) -> dict[str, Any]:
    return {"token_id": sampled.token_id, "logprob": max(sampled.logprob or 0.0, LEAST_LOGPROB)}


def _details(request: Request, output: StepOutput) -> dict[str, Any]:
    """MindIE's details; queue_wait_time in µs."""
    usage, times = output.usage, output.timings
    assert usage is not None
    assert times is not None
    return {
        "finish_reason": _word(request, output),
        "generated_tokens": usage.completion_tokens,
        "first_token_cost": None,
        "decode_cost": None,
        "batch_size": 1,
        "queue_wait_time": round(times.queue_s * 1e6),
    }


def _perf(step: TimedStep) -> list[list[float]]:
    """Token ids and the milliseconds that each took; of one step, all in its first."""
    ids = step.output.token_ids
    return [
        [token_id, round(step.seconds * 1000, 3) if i == 0 else 0.0]
        for i, token_id in enumerate(ids)
    ]


# --- tensors ---------------------------------------------------------------------------------


def text_tensors(finished: Finished, asked: TritonRequest) -> list[Tensor]:
    """The outputs of `/infer` with a text, those that were asked for: [n], of the prompt [1]."""
    done, told = finished.output.completions, asked.parameters
    outputs = [_bytes("text_output", [asked.prefix + each.text for each in done])]
    if told.return_finish_reason:
        outputs.append(_bytes("finish_reason", [_word(finished.request, each) for each in done]))
    if told.return_cumulative_logprob:
        sums = [_cumulative(each) for each in done]
        outputs.append(Tensor("cumulative_logprob", "FP32", (len(done),), sums))
    if told.return_logprobs:
        outputs.append(_bytes("logprobs", [json.dumps(_logprobs(each)) for each in done]))
    if told.return_num_input_tokens:
        count = [finished.output.usage.prompt_tokens]
        outputs.append(Tensor("num_input_tokens", "UINT32", (1,), count))
    if told.return_num_output_tokens:
        counts = [len(each.token_ids) for each in done]
        outputs.append(Tensor("num_output_tokens", "UINT32", (len(done),), counts))
    return outputs


def _bytes(name: str, texts: Sequence[str]) -> Tensor:
    return Tensor(name, "BYTES", (len(texts),), [text.encode("utf-8", "replace") for text in texts])


def token_tensor(finished: Finished, name: str) -> Tensor:
    """The output of `/infer` with token ids: the answer's ids, [1, num_tokens]."""
    ids = finished.output.token_ids
    return Tensor(name, "UINT32", (1, len(ids)), ids)


# --- a stream --------------------------------------------------------------------------------


class TritonWriter:
    """One event per piece of text; the last may have details. There is no [DONE]."""

    def __init__(
        self,
        answer: Answer,
        asked: TritonRequest,
        model: str,
        config: ServerConfig,
        clock: Callable[[], float],
    ) -> None:
        self._request, self._asked = answer.request, asked
        self._head = head(asked, model, config)
        self._is_mindie = config.profile == "mindie"
        self._times = StepTimes(answer.arrival_s, clock)
        self._prefix = asked.prefix

    def add(self, output: StepOutput) -> bytes:
        """The event of a step that has new text or an end."""
        text = output.text
        if not text and not output.finish_reason and not (self._is_mindie and output.token_ids):
            return b""
        event = {**self._head, "text_output": self._prefix + text}
        if self._is_mindie:
            event |= self._times.next()
        self._prefix = ""
        told = self._asked.parameters
        if output.finish_reason:
            if told.return_finish_reason:
                event["finish_reason"] = _word(self._request, output)
            if told.return_num_input_tokens and output.usage is not None:
                event["num_input_tokens"] = output.usage.prompt_tokens
            if told.return_num_output_tokens and output.usage is not None:
                event["num_output_tokens"] = output.usage.completion_tokens
            if told.details:
                event["details"] = _details(self._request, output)
        return self._event(event)

    def failed(self, failure: Failure) -> bytes:
        """The last event."""
        return self._event(body_of(failure, "triton"))

    def _event(self, value: dict[str, Any]) -> bytes:
        prefix = b"data:" if self._is_mindie else b"data: "
        return prefix + one_line(value) + b"\n\n"
