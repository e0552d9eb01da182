"""Sampling fields as the older protocols write them, and the one answer to "is this sampled?".

TextParameters  TGI, MindIE's own form and its Triton form: `parameters` of a body
VllmParameters  vLLM's SamplingParams at the top level of a body
Both end in `SamplingParams` with nothing left to a model's own defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from glimt.errors import RequestError
from glimt.server.bodies import Body, Bool, Float, Int, Text
from glimt.server.strict_json import parse_field
from glimt.types import Grammar, SamplingParams

Seed = Annotated[Int, Field(ge=-(2**63), le=2**64 - 1)]
Count = Annotated[Int, Field(ge=1, le=2**31 - 1)]
Penalty = Annotated[Float, Field(ge=-2, le=2)]
AboveZero = Annotated[Float, Field(gt=0)]
Seconds = Annotated[Float, Field(gt=0, le=65535)]
Stops = Annotated[list[Text], Field(max_length=1024)]
_GREEDY_BELOW, _LEAST_TEMPERATURE = 1e-5, 0.01  # vLLM, sampling_params.py
_INT32 = range(-(2**31), 2**31)


class TextParameters(Body):
    """What TGI's and MindIE's `parameters` have in common. Ranges that differ are the family's."""

    do_sample: Bool | None = None
    max_new_tokens: Count | None = None
    repetition_penalty: AboveZero | None = None
    seed: Seed | None = None
    details: Bool = False
    watermark: Bool = False
    priority: Annotated[Int, Field(ge=1, le=5)] = 5
    timeout: Seconds | None = None


def fixed_sampling(is_sampling: bool, **given: Any) -> SamplingParams:
    """Parameters with every default told: off, where a field is None. Raises RequestError.

    is_sampling: false is greedy whatever the temperature says
    """
    defaults: dict[str, Any] = {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
    }
    fields = {**defaults, **{name: each for name, each in given.items() if each is not None}}
    if not is_sampling:
        fields["temperature"] = 0.0
    return SamplingParams(**fields)


def is_sampled_in_tgi(
    do_sample: bool, temperature: float | None, top_k: int | None, top_p: float | None
) -> bool:
    """TGI's rule: a temperature of exactly 1 does not turn sampling on.

    Source: huggingface/text-generation-inference, server utils/tokens.py.
    """
    return do_sample or temperature not in (None, 1.0) or top_k is not None or (top_p or 1.0) < 1


def is_sampled_in_mindie(
    do_sample: bool | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    best_of: int = 1,
) -> bool:
    """MindIE's rule: any of the three turns it on unless do_sample is false; 0 turns it off.

    Source: Ascend/MindIE-LLM, text_generator/utils/batch_context.py.
    """
    if temperature == 0:
        return False
    is_any_given = any(each is not None for each in (temperature, top_k, top_p))
    return best_of > 1 or (is_any_given if do_sample is None else do_sample)


def schema_grammar(schema: Any, field: str) -> Grammar:
    """JSON that a schema allows, which may come as text. Raises RequestError naming the field."""
    read = parse_field(schema, field) if isinstance(schema, str) else schema
    return Grammar.of_schema(read, field)


def refuse_typical_p(value: float | None, off: Sequence[float] = ()) -> None:
    """Raise RequestError unless typical_p is not given, or has a value that does nothing."""
    if value is not None and value not in off:
        raise RequestError("typical_p", "is not supported; use top_p")


def ids_in_range(token_ids: Sequence[int]) -> tuple[int, ...]:
    """Stop ids without those that no vocabulary has."""
    return tuple(each for each in token_ids if each in _INT32 and each >= 0)


# --- vLLM ------------------------------------------------------------------------------------


class VllmParameters(Body):
    """vLLM's SamplingParams by name."""

    n: Annotated[Int, Field(ge=1, le=128)] = 1
    best_of: Annotated[Int, Field(ge=1, le=128)] | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[Float, Field(gt=0, le=2)] = 1.0
    temperature: Annotated[Float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[Int, Field(ge=-1, le=2**31 - 1)] = -1
    min_p: Annotated[Float, Field(ge=0, le=1)] = 0.0
    seed: Seed | None = None
    stop: Text | Stops = Field(default_factory=list)
    stop_token_ids: list[Int] = Field(default_factory=list)
    include_stop_str_in_output: Bool = False
    ignore_eos: Bool = False
    max_tokens: Count | None = None
    min_tokens: Annotated[Int, Field(ge=0)] = 0
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    skip_special_tokens: Bool = True
    spaces_between_special_tokens: Bool = True
    use_beam_search: Bool = False
    length_penalty: Float = 1.0
    early_stopping: Bool = False

    def sampling(self, default_max_tokens: int, wants_logprobs: bool = False) -> SamplingParams:
        """With best_of choices, to be ranked. Raises RequestError for what is not done here."""
        self._refuse()
        temperature = self.temperature
        is_sampling = temperature >= _GREEDY_BELOW
        num_choices = self.best_of or self.n
        if num_choices > 1 and not is_sampling:
            raise RequestError("n", "and best_of must be 1 with temperature 0: all would be equal")
        ranks = num_choices > self.n
        return fixed_sampling(
            is_sampling,
            temperature=max(temperature, _LEAST_TEMPERATURE),
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple([self.stop] if isinstance(self.stop, str) else self.stop),
            stop_token_ids=ids_in_range(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            max_tokens=self.max_tokens or default_max_tokens,
            min_tokens=self.min_tokens,
            n=num_choices,
            logprobs=(self.logprobs or 0) if wants_logprobs or ranks else None,
        )

    def _refuse(self) -> None:
        if self.use_beam_search or self.early_stopping or self.length_penalty != 1.0:
            raise RequestError("use_beam_search", "beam search is not supported")
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError("best_of", f"is {self.best_of}, but n is {self.n}")
