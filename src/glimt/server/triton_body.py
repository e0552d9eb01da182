"""Triton's bodies for text: a request becomes an `Ask`, an answer an object, events or tensors.

Sources: triton-inference-server/vllm_backend, src/model.py and src/utils/request.py;
triton-inference-server/server, docs/protocol/extension_generate.md; MindIE's Triton forms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from glimt.errors import RequestError
from glimt.inputs.image_formats import format_of
from glimt.server.bodies import Bool, Float, Int, Text, parsed
from glimt.server.config import ServerConfig
from glimt.server.parameters import (
    Count,
    Penalty,
    Stops,
    TextParameters,
    fixed_sampling,
    ids_in_range,
    is_sampled_in_mindie,
    refuse_typical_p,
)
from glimt.server.parts import TRITON, Part, image_source, prompt_parts, text_of
from glimt.server.prompts import with_prompt
from glimt.server.schemas import TextsOrParts
from glimt.server.service import Ask
from glimt.server.strict_json import parse_field
from glimt.server.tensors import InferRequest, Tensor
from glimt.types import ImagePart, SamplingParams, TextPart

NAMES = {"prompt": "text_input"}
_UPSTREAM_MAX_TOKENS, _MINDIE_MAX_TOKENS = 16, 20
_RESERVED = ("sequence_id", "sequence_start", "sequence_end", "headers", "binary_data_output")
_RESERVED_UPSTREAM = ("priority", "timeout")  # Triton's own, in other units than MindIE's
TOKEN_TYPES = ("UINT32", "INT32", "INT64")


class TritonParameters(TextParameters):
    """Sampling by MindIE's and vLLM's names, and what the reply is to tell."""

    temperature: Annotated[Float, Field(ge=0)] | None = None
    top_k: Annotated[Int, Field(ge=-1, le=2**31 - 1)] | None = None
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    typical_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[Float, Field(ge=0, le=1)] | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[Int, Field(ge=0)] = 0
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    stop: Text | Stops = Field(default_factory=list)
    stop_token_ids: list[Int] = Field(default_factory=list)
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    skip_special_tokens: Bool = True
    use_beam_search: Bool = False
    n: Annotated[Int, Field(ge=1, le=128)] = 1
    best_of: Annotated[Int, Field(ge=1, le=128)] | None = None
    batch_size: Annotated[Int, Field(gt=0)] | None = None
    perf_stat: Bool = False
    stream: Bool = False
    exclude_input_in_output: Bool = True
    return_finish_reason: Bool = False
    return_cumulative_logprob: Bool = False
    return_logprobs: Bool = False
    return_num_input_tokens: Bool = False
    return_num_output_tokens: Bool = False


_RETURNS = (name for name in TritonParameters.model_fields if name.startswith("return_"))
FLAGS = ("stream", "exclude_input_in_output", *_RETURNS)
"""Inputs of a tensor request that are true or false, by the names of their parameters."""


class GenerateBody(TritonParameters):
    """A request of the generate extension: parameters may stand beside the text or inside."""

    text_input: Text | TextsOrParts
    image: Text | list[Text] | None = None
    id: Text | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TritonRequest:
    """A request, read. prompt: its texts; request_id: as the caller gave it."""

    ask: Ask
    parameters: TritonParameters
    prompt: str = ""
    request_id: str | None = None

    @property
    def prefix(self) -> str:
        """What stands before the answer."""
        return "" if self.parameters.exclude_input_in_output else self.prompt


# --- requests --------------------------------------------------------------------------------


def parse_generate(value: Any, config: ServerConfig, request_id: str) -> TritonRequest:
    """A body of the generate extension. Raises RequestError or HttpFailure, naming the field."""
    if isinstance(value, dict):
        value = {key: each for key, each in value.items() if each is not None}
        value = _without_reserved(value, config)
    body = parsed(GenerateBody, value)
    own = set(GenerateBody.model_fields) - set(TritonParameters.model_fields)
    top = {key: each for key, each in value.items() if key not in own}
    parameters = _parameters({**body.parameters, **top}, config)
    images = [body.image] if isinstance(body.image, str) else body.image or []
    pictures = [
        ImagePart(image_source(each, f"image[{i}]", TRITON)) for i, each in enumerate(images)
    ]
    parts: tuple[Part, ...] = (*pictures, *_text_parts(body.text_input))
    ask = _ask(parameters, config, request_id)
    asked = with_prompt(ask, parts, "text_input", config)
    return TritonRequest(asked, parameters, text_of(parts), body.id)


def _text_parts(text_input: str | list[Any]) -> tuple[Part, ...]:
    """A list of texts is one prompt, a list of objects are parts."""
    if isinstance(text_input, list) and all(isinstance(each, str) for each in text_input):
        return (TextPart("".join(text_input)),)
    return prompt_parts(text_input, "text_input", TRITON)


def parse_text(asked: InferRequest, config: ServerConfig, request_id: str) -> TritonRequest:
    """Tensors of a text request. Raises RequestError naming the tensor."""
    tensors = {tensor.name: tensor for tensor in asked.inputs}
    if len(tensors) != len(asked.inputs):
        raise RequestError("inputs", "names a tensor twice")
    text = _one(tensors, "text_input", "BYTES")
    if text is None:
        raise RequestError("inputs", "has no text_input of BYTES, nor one tensor of token ids")
    flags = {name: _one(tensors, name, "BOOL") for name in FLAGS}
    given = {name: flag for name, flag in flags.items() if flag is not None}
    if unknown := sorted(set(tensors) - {"text_input", "image", "sampling_parameters", *flags}):
        raise RequestError("inputs", f"{unknown[0][:80]!r} is no input of this model")
    if flags["stream"]:
        raise RequestError("stream", "must be false here; /generate_stream streams")
    sampling = _sampling_parameters(_one(tensors, "sampling_parameters", "BYTES"))
    parameters = _parameters({**asked.parameters, **sampling, **given}, config)
    prompt = _utf8(text, "text_input")
    parts: tuple[Part, ...] = (*_pictures(tensors.get("image")), TextPart(prompt))
    ask = with_prompt(_ask(parameters, config, request_id), parts, "text_input", config)
    return TritonRequest(ask, parameters, prompt, asked.request_id)


def parse_tokens(asked: InferRequest, config: ServerConfig, request_id: str) -> TritonRequest:
    """One tensor of token ids, in MindIE's form. Raises RequestError naming the field."""
    (tensor,) = asked.inputs
    if len(asked.wanted) > 1:
        raise RequestError("outputs", "must name exactly one output")
    shape = tensor.shape
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
        raise RequestError("inputs[0].shape", "must be [n] or [1, n]")
    parameters = _parameters({**tensor.parameters, **asked.parameters}, config)
    ask = replace(_ask(parameters, config, request_id), token_ids=tuple(tensor.values))
    return TritonRequest(ask, parameters, request_id=asked.request_id)


def is_of_tokens(asked: InferRequest) -> bool:
    """Whether the tensors are ids in MindIE's form."""
    return len(asked.inputs) == 1 and asked.inputs[0].datatype in TOKEN_TYPES


def _one(tensors: Mapping[str, Tensor], name: str, datatype: str) -> Any:
    """A tensor's only value; None if it is not there."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    if tensor.datatype != datatype or len(tensor.values) != 1:
        raise RequestError(name, f"must be {datatype} with one value")
    return tensor.values[0]


def _pictures(tensor: Tensor | None) -> list[ImagePart]:
    """Each element is an encoded file, or text such as base64 of one."""
    if tensor is None:
        return []
    if tensor.datatype != "BYTES":
        raise RequestError("image", "must be BYTES")
    return [_picture(each, f"image[{i}]") for i, each in enumerate(tensor.values)]


def _picture(content: bytes, field: str) -> ImagePart:
    if format_of(content) is not None:
        return ImagePart(content)
    return ImagePart(image_source(_utf8(content, field), field, TRITON))


def _utf8(content: bytes, field: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(field, "is no UTF-8") from error


def _sampling_parameters(content: bytes | None) -> dict[str, Any]:
    """JSON in a tensor; its numbers may be texts, as the backend's own client writes them."""
    if not content:
        return {}
    value = parse_field(content, "sampling_parameters")
    if not isinstance(value, dict):
        raise RequestError("sampling_parameters", "must be a JSON object")
    return {key: _number(each) if key != "stop" else each for key, each in value.items()}


def _number(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if len(value) < 40 else value
    except ValueError:
        return value


def _without_reserved(given: Mapping[str, Any], config: ServerConfig) -> dict[str, Any]:
    """Parameters without those that Triton itself reads, which are no sampling parameters."""
    dropped = _RESERVED if config.profile == "mindie" else (*_RESERVED, *_RESERVED_UPSTREAM)
    return {
        key: each
        for key, each in given.items()
        if key not in dropped and not key.startswith("triton_")
    }


def _parameters(given: Mapping[str, Any], config: ServerConfig) -> TritonParameters:
    parameters = parsed(TritonParameters, _without_reserved(given, config))
    refuse_typical_p(parameters.typical_p, off=(1.0,))
    if parameters.use_beam_search:
        raise RequestError("use_beam_search", "beam search is not supported")
    if parameters.best_of not in (None, parameters.n):
        raise RequestError("best_of", "must be equal to n")
    return parameters


def _ask(given: TritonParameters, config: ServerConfig, request_id: str) -> Ask:
    is_mindie = config.profile == "mindie"
    return Ask(
        protocol="triton",
        request_id=request_id,
        sampling=_sampling(given, _MINDIE_MAX_TOKENS if is_mindie else _UPSTREAM_MAX_TOKENS),
        timeout_s=given.timeout,
        takes_room=is_mindie,
    )


def _sampling(given: TritonParameters, default_max_tokens: int) -> SamplingParams:
    chosen = given.temperature, given.top_k, given.top_p
    is_sampling = is_sampled_in_mindie(given.do_sample, *chosen)
    if given.n > 1 and not is_sampling:
        raise RequestError("n", "must be 1 without sampling: all would be equal")
    needs_logprobs = given.return_logprobs or given.return_cumulative_logprob
    return fixed_sampling(
        is_sampling,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
        presence_penalty=given.presence_penalty,
        frequency_penalty=given.frequency_penalty,
        seed=given.seed,
        stop=tuple([given.stop] if isinstance(given.stop, str) else given.stop),
        stop_token_ids=ids_in_range(given.stop_token_ids),
        ignore_eos=given.ignore_eos,
        include_stop_str_in_output=given.include_stop_str_in_output,
        skip_special_tokens=given.skip_special_tokens,
        max_tokens=given.max_new_tokens or given.max_tokens or default_max_tokens,
        min_tokens=given.min_tokens,
        n=given.n,
        logprobs=0 if needs_logprobs else None,
    )
