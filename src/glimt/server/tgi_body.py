"""TGI's bodies: a request becomes an `Ask`, an answer becomes an object or events. No sockets.

Sources: huggingface/text-generation-inference, router/src; MindIE's variant of it under the
profile `mindie` and where `inputs` is a list of parts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from glimt.errors import ImageError, RequestError
from glimt.server.bodies import Body, Bool, Float, Int, Text, parsed
from glimt.server.config import ServerConfig
from glimt.server.failures import Failure, body_of, one_line
from glimt.server.parameters import (
    AboveZero,
    Penalty,
    Stops,
    TextParameters,
    fixed_sampling,
    ids_in_range,
    is_sampled_in_mindie,
    is_sampled_in_tgi,
    refuse_typical_p,
)
from glimt.server.parts import (
    Part,
    PartRules,
    image_source,
    joined,
    prompt_parts,
    text_of,
)
from glimt.server.prompts import with_prompt
from glimt.server.replies import Finished
from glimt.server.service import Ask
from glimt.server.tokens import ShownToken, TokenTexts, finish_word, seed_of
from glimt.types import Completion, ImagePart, Request, SamplingParams, StepOutput, TextPart

MOST_BEST_OF = 64
NAMES = {"prompt": "inputs", "max_tokens": "parameters.max_new_tokens", "n": "parameters.best_of"}
"""What our fields are called here."""
_MINDIE_MAX_TOKENS = 20
_PICTURE = re.compile(r"!\[\]\(([^)]*)\)")


class TgiParameters(TextParameters):
    """`parameters` of TGI and, from stop_token_ids on, of MindIE's form of it."""

    adapter_id: Text | None = None
    best_of: Annotated[Int, Field(ge=1, le=MOST_BEST_OF)] | None = None
    temperature: AboveZero | None = None
    frequency_penalty: Penalty | None = None
    top_k: Annotated[Int, Field(gt=0, le=2**31 - 1)] | None = None
    top_p: Annotated[Float, Field(gt=0, lt=1)] | None = None
    typical_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    return_full_text: Bool = False
    stop: Stops = Field(default_factory=list)
    truncate: Annotated[Int, Field(ge=1)] | None = None
    decoder_input_details: Bool = False
    top_n_tokens: Annotated[Int, Field(ge=0, le=5)] | None = None
    grammar: dict[str, Any] | None = None
    stop_token_ids: list[Int] = Field(default_factory=list)
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    skip_special_tokens: Bool = True


class TgiBody(Body):
    """A whole request."""

    inputs: Text | list[dict[str, Any]]
    parameters: TgiParameters | None = None
    stream: Bool = False


@dataclass(frozen=True, slots=True)
class TgiRequest:
    """A request, read.

    prompt: its texts, for return_full_text
    shows:  how an answer is to be shown
    """

    ask: Ask
    prompt: str
    parameters: TgiParameters
    is_mindie: bool

    @property
    def wants_details(self) -> bool:
        """Whether the reply tells more than its text."""
        return self.parameters.details or self.parameters.decoder_input_details

    @property
    def keeps_stop(self) -> bool:
        """TGI keeps the stop text at the end of an answer, MindIE takes it away."""
        return not self.is_mindie or self.parameters.include_stop_str_in_output


# --- a request -------------------------------------------------------------------------------


def parse(
    value: Any, config: ServerConfig, request_id: str, models: tuple[str, ...], is_stream: bool
) -> TgiRequest:
    """A body that came as JSON. Raises RequestError or HttpFailure, naming the field."""
    body = parsed(TgiBody, value)
    parameters = body.parameters or TgiParameters(do_sample=config.profile == "upstream")
    is_mindie = config.profile == "mindie"
    _refuse(parameters, models, is_mindie)
    parts = _parts(body.inputs)
    if is_stream and (parameters.best_of or 1) > 1:
        raise RequestError("parameters.best_of", "must be 1 for a stream")
    if is_stream and parameters.decoder_input_details:
        said = "is not possible for a stream"
        raise RequestError("parameters.decoder_input_details", said)
    ask = Ask(
        protocol="tgi",
        request_id=request_id,
        sampling=_sampling(parameters, is_mindie, is_stream),
        timeout_s=parameters.timeout,
        takes_room=is_mindie,
        keep_last=parameters.truncate,
    )
    return TgiRequest(
        with_prompt(ask, parts, "inputs", config), text_of(parts), parameters, is_mindie
    )


def _parts(inputs: str | list[dict[str, Any]]) -> tuple[Part, ...]:
    if isinstance(inputs, list):
        return prompt_parts(inputs, "inputs")
    parts: list[Part] = []
    for i, piece in enumerate(_PICTURE.split(inputs)):
        if i % 2:
            parts.append(ImagePart(_picture(piece)))
        elif piece:
            parts.append(TextPart(piece))
    return joined(parts)


def _picture(address: str) -> Any:
    """What stands in `![](…)`: a data URL or a web address."""
    if not address.strip():
        raise ImageError("inputs", "holds ![]() without an address")
    return image_source(address.strip(), "inputs", PartRules())


def _refuse(given: TgiParameters, models: tuple[str, ...], is_mindie: bool) -> None:
    refuse_typical_p(given.typical_p, off=(1.0,) if is_mindie else ())
    if given.watermark and not is_mindie:
        raise RequestError("parameters.watermark", "is not supported")
    if given.grammar is not None:
        said = "is not supported here; use response_format of /v1/chat/completions"
        raise RequestError("parameters.grammar", said)
    if given.adapter_id is not None and given.adapter_id not in models:
        raise RequestError("parameters.adapter_id", "is unknown; adapters are not served")
    if not given.skip_special_tokens:
        raise RequestError("parameters.skip_special_tokens", "false is not supported")


def _sampling(given: TgiParameters, is_mindie: bool, is_stream: bool) -> SamplingParams:
    chosen = given.temperature, given.top_k, given.top_p
    best_of = given.best_of or 1
    if is_mindie:
        is_sampling = is_sampled_in_mindie(given.do_sample, *chosen, best_of)
    else:
        is_sampling = is_sampled_in_tgi(bool(given.do_sample), *chosen)
    if best_of > 1 and not is_sampling:
        raise RequestError("parameters.best_of", "needs sampling: give do_sample")
    if best_of > 1 and given.seed is not None:
        raise RequestError("parameters.seed", "is not possible with best_of above 1")
    shows_logprobs = not is_mindie and (is_stream or given.details or best_of > 1)
    return fixed_sampling(
        is_sampling,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        seed=given.seed,
        stop=tuple(given.stop),
        stop_token_ids=ids_in_range(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
        max_tokens=given.max_new_tokens or (_MINDIE_MAX_TOKENS if is_mindie else None),
        n=best_of,
        logprobs=given.top_n_tokens or (0 if shows_logprobs or best_of > 1 else None),
    )


# --- a whole answer --------------------------------------------------------------------------


def render(finished: Finished, asked: TgiRequest, texts: TokenTexts) -> dict[str, Any]:
    """The object of `/generate`."""
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


def _mean_logprob(completion: Completion) -> float:
    logprobs = [each.logprob or 0.0 for each in completion.logprobs or ()]
    return sum(logprobs) / max(1, len(logprobs))


def _sequence(
    finished: Finished, completion: Completion, asked: TgiRequest, texts: TokenTexts
) -> dict[str, Any]:
    outputs = [each.output for each in finished.steps if each.output.index == completion.index]
    tokens = [token for each in outputs for token in texts.of_step(_with_stop(each, asked))]
    text = completion.text + _kept_stop(completion.stop_reason, asked)
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
    """The prompt's tokens; the engine gives no log-probabilities of a prompt."""
    if not asked.parameters.decoder_input_details:
        return []
    shown = (texts.shown(token_id) for token_id in finished.output.prompt_token_ids)
    return [{"id": token.id, "text": token.text, "logprob": None} for token in shown]


def _kept_stop(stop_reason: str | int | None, asked: TgiRequest) -> str:
    return stop_reason if isinstance(stop_reason, str) and asked.keeps_stop else ""


def _with_stop(output: StepOutput, asked: TgiRequest) -> StepOutput:
    """The same with the stop text that its family keeps."""
    return replace(output, text=output.text + _kept_stop(output.stop_reason, asked))


def _token(token: ShownToken) -> dict[str, Any]:
    shown = {"id": token.id, "text": token.text, "logprob": token.logprob}
    return {**shown, "special": token.is_special}


def headers(finished: Finished, asked: TgiRequest, device: str) -> Mapping[str, str]:
    """Times in ms, but for x-compute-time, which is in s."""
    usage, times = finished.output.usage, finished.output.timings
    inference_s = times.image_s + times.prefill_s + times.decode_s
    queue_s = max(0.0, times.ttft_s - times.image_s - times.prefill_s)
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
        if output.finish_reason == "abort" and not self._asked.is_mindie:
            return self.failed(Failure("incomplete", "the answer was stopped before its end"))
        output = _with_stop(output, self._asked)
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
        return _event(event)

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

    def end(self) -> bytes:
        """Nothing."""
        return b""

    def failed(self, failure: Failure) -> bytes:
        """An error event; whatever came before it, it is the last."""
        return error_event(failure, "mindie" if self._asked.is_mindie else "upstream")


def error_event(failure: Failure, profile: str) -> bytes:
    """An error where the status is 200 already."""
    return _event(body_of(failure, "tgi", profile))


def _event(value: Any) -> bytes:
    return b"data: " + one_line(value) + b"\n\n"
