"""TGI's requests: a body becomes an `Ask`. No sockets.

Sources: huggingface/text-generation-inference, router/src; MindIE's variant of it under the
profile `mindie` and where `inputs` is a list of parts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from glimt.errors import ImageError, RequestError
from glimt.server.bodies import Body, Bool, Float, Int, Text, parsed
from glimt.server.config import ServerConfig
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
    schema_grammar,
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
from glimt.server.schemas import Parts
from glimt.server.service import Ask
from glimt.types import (
    Grammar,
    ImagePart,
    SamplingParams,
    TextPart,
)

MOST_BEST_OF = 128
NAMES = {"prompt": "inputs", "max_tokens": "parameters.max_new_tokens", "n": "parameters.best_of"}
"""What our fields are called here."""
_MINDIE_MAX_TOKENS = 20
_PICTURE = re.compile(r"!\[\]\(([^)]*)\)")


class TgiGrammar(Body):
    """What an answer must look like: a JSON schema, one with a name, or a regular expression."""

    type: Literal["json", "regex", "json_schema"]
    value: Any


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
    grammar: TgiGrammar | None = None
    stop_token_ids: list[Int] = Field(default_factory=list)
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    skip_special_tokens: Bool = True


class TgiBody(Body):
    """A whole request."""

    inputs: Text | Parts
    parameters: TgiParameters | None = None
    stream: Bool = False


@dataclass(frozen=True, slots=True)
class TgiRequest:
    """A request, read.

    prompt: its texts, for return_full_text
    """

    ask: Ask
    prompt: str
    parameters: TgiParameters
    is_mindie: bool

    @property
    def wants_details(self) -> bool:
        """Whether the reply tells more than its text."""
        return self.parameters.details or self.parameters.decoder_input_details


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
        scores_prompt=parameters.decoder_input_details,
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
    if given.adapter_id is not None and given.adapter_id not in models:
        raise RequestError("parameters.adapter_id", "is unknown; adapters are not served")


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
        include_stop_str_in_output=given.include_stop_str_in_output or not is_mindie,
        skip_special_tokens=given.skip_special_tokens,
        grammar=_grammar(given.grammar),
        max_tokens=given.max_new_tokens or (_MINDIE_MAX_TOKENS if is_mindie else None),
        n=best_of,
        logprobs=given.top_n_tokens or (0 if shows_logprobs or best_of > 1 else None),
    )


def _grammar(given: TgiGrammar | None) -> Grammar | None:
    if given is None:
        return None
    where = "parameters.grammar.value"
    if given.type == "regex":
        return Grammar.of_regex(given.value, where)
    schema = given.value
    if given.type == "json_schema" and isinstance(schema, dict) and "schema" in schema:
        schema = schema["schema"]
    return schema_grammar(schema, where)
