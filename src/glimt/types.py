"""The plain data that the stages hand to each other. No torch, no logic beyond checking itself.

A request is read from left to right:

    Message -> EncodedPrompt + ImageInput -> Request -> StepPlan -> SampledToken -> StepOutput
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from glimt.errors import RequestError

Role = Literal["system", "user", "assistant", "observation"]
FinishReason = Literal["stop", "length", "abort", "error"]
GrammarKind = Literal["json_schema", "regex", "choice", "call"]


# --- what the caller says -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextPart:
    """A run of text inside a message."""

    text: str


@dataclass(frozen=True, slots=True)
class ImagePart:
    """A picture inside a message.

    source: a path, encoded bytes, base64 text, a data URL, or a PIL image. Which of these are
    allowed is decided where the picture is read (`inputs.image`).
    """

    source: Any


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function as a model wrote it: the name, and the arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation: text and pictures in the order the caller gave them.

    calls: of functions, behind the text; only the assistant makes them. What they gave are the
        messages of role observation that follow, in the same order
    """

    role: Role
    parts: tuple[TextPart | ImagePart, ...]
    calls: tuple[ToolCall, ...] = ()

    @property
    def text(self) -> str:
        """The text parts, joined by line feeds."""
        return "\n".join(part.text for part in self.parts if isinstance(part, TextPart))

    @property
    def num_images(self) -> int:
        """How many pictures the message holds."""
        return sum(isinstance(part, ImagePart) for part in self.parts)


Messages: TypeAlias = Sequence[Mapping[str, Any] | Message]
"""A conversation as callers write it; `inputs.chat.parse_messages` says what a dictionary holds."""


@dataclass(frozen=True, slots=True)
class Function:
    """A function that a model may call.

    described: name, description and parameters as the caller gave them, which is what the model
        reads
    parameters: JSON schema of the arguments, which is always one of an object
    """

    name: str
    described: Mapping[str, Any]
    parameters: Mapping[str, Any]


_MAX_N = 128
# The widest limits of the protocols to be served (MindIE's); every token searches all of it.
_MAX_STOP_STRINGS = 1024
_MAX_STOP_CHARS = 1024
_MAX_STOP_CHARS_IN_ALL = 32768
_MAX_TOP_LOGPROBS = 64
_MAX_GRAMMAR_CHARS = 65536
_MAX_SCHEMA_DEPTH = 24
_MAX_CHOICES = 1024


@dataclass(frozen=True, slots=True)
class Grammar:
    """What the whole text of an answer must look like.

    text:  a JSON schema in JSON, a regular expression (Rust's syntax, anchored at both ends), a
        JSON list of the texts to choose from, or a JSON object of schemas by name, of which an
        answer has the name, a line feed and what the schema allows
    field: what errors call it
    Raises RequestError beyond 65,536 characters, 24 levels or 1,024 choices.
    """

    kind: GrammarKind
    text: str
    field: str = field(default="grammar", compare=False)

    def __post_init__(self) -> None:
        if len(self.text) > _MAX_GRAMMAR_CHARS:
            said = f"has {len(self.text)} characters; at most {_MAX_GRAMMAR_CHARS} are accepted"
            raise RequestError(self.field, said)

    @classmethod
    def of_schema(cls, schema: Any, field: str = "grammar") -> Grammar:
        """JSON that a schema allows; the schema as json.loads gives it, or as text."""
        try:
            parsed = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(parsed, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(field, f"is no JSON schema: {error}") from error
        if not isinstance(parsed, (dict, bool)):
            raise RequestError(field, "is no JSON schema: an object is needed")
        check_schema_depth(parsed, field)
        return cls("json_schema", text, field)

    @classmethod
    def of_regex(cls, pattern: Any, field: str = "grammar") -> Grammar:
        """Text that a regular expression matches from end to end."""
        if not isinstance(pattern, str) or not pattern:
            raise RequestError(field, "must be a regular expression")
        return cls("regex", pattern, field)

    @classmethod
    def of_choice(cls, texts: Any, field: str = "grammar") -> Grammar:
        """One of several texts."""
        is_list = isinstance(texts, (list, tuple))
        if not is_list or not texts or not all(isinstance(t, str) and t for t in texts):
            raise RequestError(field, "must be a list of texts, none of them empty")
        if len(texts) > _MAX_CHOICES:
            said = f"has {len(texts)} texts; at most {_MAX_CHOICES} are accepted"
            raise RequestError(field, said)
        return cls("choice", json.dumps(list(texts), ensure_ascii=False), field)

    @classmethod
    def of_calls(cls, functions: Sequence[Function], field: str = "grammar") -> Grammar:
        """A call of one of several functions: its name, a line feed and its arguments."""
        schemas = {function.name: dict(function.parameters) for function in functions}
        return cls("call", json.dumps(schemas, ensure_ascii=False), field)


def check_schema_depth(schema: Any, field: str) -> None:
    """Raises RequestError for a schema beyond 24 levels."""
    if (depth := _depth(schema)) > _MAX_SCHEMA_DEPTH:
        said = f"is nested {depth} levels deep; at most {_MAX_SCHEMA_DEPTH} are accepted"
        raise RequestError(field, said)


def _depth(value: Any) -> int:
    """Levels of lists and objects, read without recursion."""
    depth, level = 0, [value]
    while level := [
        inner
        for each in level
        if isinstance(each, (list, tuple, dict))
        for inner in (each.values() if isinstance(each, dict) else each)
    ]:
        depth += 1
    return depth


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. None means the family's default; temperature 0 means plain argmax.

    With temperature 0 the family's default penalties and minimum length do not apply either:
    only those that are given here do.
    Raises RequestError, naming the field and its limits, for a value out of range.
    """

    temperature: float | None = None
    top_k: int | None = None  # 0 or -1: no limit
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None  # over prompt and output, multiplicative
    presence_penalty: float | None = None  # over the output, once per distinct token
    frequency_penalty: float | None = None  # over the output, per occurrence
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None  # None: up to the end of the context
    min_tokens: int | None = None  # stop ids are barred before; a stop string still ends it
    stop: Sequence[str] | str = ()  # kept as a tuple; one text is one stop string
    stop_token_ids: Sequence[int] = ()  # kept as a tuple
    ignore_eos: bool = False  # go on past the family's stop ids; stop_token_ids still end it
    logprobs: int | None = None  # None: off; k: the chosen token and the k most likely
    prompt_logprobs: int | None = None  # the same of the prompt's own tokens
    n: int = 1
    include_stop_str_in_output: bool = False  # the text ends with what stopped it
    skip_special_tokens: bool = True  # false: special tokens show as their names
    grammar: Grammar | None = None  # what the whole answer must look like

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_k", self.top_k, -1, 2**31 - 1, integer=True)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        # Scores are divided by it: a smaller one makes them infinite.
        _check_range("repetition_penalty", self.repetition_penalty, 1e-6, 100.0)
        _check_range("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _check_range("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        _check_range("seed", self.seed, -(2**63), 2**64 - 1, integer=True)
        _check_range("max_tokens", self.max_tokens, 1, 2**31 - 1, integer=True)
        _check_range("min_tokens", self.min_tokens, 0, 2**31 - 1, integer=True)
        for name in ("logprobs", "prompt_logprobs"):
            _check_range(name, getattr(self, name), 0, _MAX_TOP_LOGPROBS, integer=True)
        _check_range("n", self.n, 1, _MAX_N, integer=True, optional=False)
        self._check_logit_bias()
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop, str))
        ids = _as_tuple("stop_token_ids", self.stop_token_ids, int)
        object.__setattr__(self, "stop_token_ids", ids)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, f"must be true or false, not {getattr(self, name)!r}")
        self._check_grammar()
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise RequestError(
                "min_tokens", f"is {self.min_tokens}, but max_tokens is {self.max_tokens}"
            )
        self._check_stop_lengths()

    def _check_grammar(self) -> None:
        """A finished text can only end: what forbids the end cannot go with it."""
        given: Any = self.grammar
        if given is None:
            return
        if not isinstance(given, Grammar):
            raise RequestError("grammar", f"must be a Grammar, not a {type(given).__name__}")
        for name, is_given in (("ignore_eos", self.ignore_eos), ("min_tokens", self.min_tokens)):
            if is_given:
                said = f"cannot go with {given.field}: the text ends when it is complete"
                raise RequestError(name, said)

    def _check_stop_lengths(self) -> None:
        if len(self.stop) > _MAX_STOP_STRINGS:
            said = f"has {len(self.stop)} strings; at most {_MAX_STOP_STRINGS} are accepted"
            raise RequestError("stop", said)
        lengths = [len(text) for text in self.stop]
        for i, length in enumerate(lengths):
            if not 1 <= length <= _MAX_STOP_CHARS:
                said = f"has {length} characters; 1 to {_MAX_STOP_CHARS} are accepted"
                raise RequestError(f"stop[{i}]", said)
        if sum(lengths) > _MAX_STOP_CHARS_IN_ALL:
            most = f"at most {_MAX_STOP_CHARS_IN_ALL} are accepted"
            raise RequestError("stop", f"has {sum(lengths)} characters in all; {most}")

    def _check_logit_bias(self) -> None:
        given: Any = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(given, Mapping):
            raise RequestError("logit_bias", f"must map token ids to biases, not {given!r}")
        # A copy: what the caller does to the mapping afterwards would not be checked.
        object.__setattr__(self, "logit_bias", dict(given))
        for token_id, bias in self.logit_bias.items():
            if isinstance(token_id, bool) or not isinstance(token_id, int):
                raise RequestError("logit_bias", f"must map token ids to biases, not {token_id!r}")
            _check_range(f"logit_bias[{token_id}]", bias, -100.0, 100.0, optional=False)

    def with_defaults(self, defaults: SamplingDefaults, prompt_tokens: int) -> SamplingParams:
        """Fill every None but seed, max_tokens and the logprobs from the family's defaults.

        prompt_tokens: length of the prompt as the original counts it, which its minimum length
        includes.
        """
        temperature = defaults.temperature if self.temperature is None else self.temperature
        family = defaults if temperature > 0 else SamplingDefaults(temperature=0.0)
        filled: dict[str, Any] = {
            name: getattr(family, name)
            for name in ("top_k", "top_p", "min_p", "repetition_penalty")
            if getattr(self, name) is None
        }
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name) is None:
                filled[name] = 0.0
        if self.min_tokens is None:
            least = max(0, family.min_length - prompt_tokens) if self.grammar is None else 0
            filled["min_tokens"] = least if self.max_tokens is None else min(least, self.max_tokens)
        return replace(self, temperature=temperature, **filled)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """What a family samples with when the request does not say."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_length: int = 0  # tokens, prompt included, before a stop id may be chosen


def _check_range(
    name: str,
    value: float | None,
    low: float,
    high: float,
    *,
    integer: bool = False,
    open_low: bool = False,
    optional: bool = True,
) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise RequestError(
            name, f"must be {'an integer' if integer else 'a number'}, not {value!r}"
        )
    assert value is not None
    below = value <= low if open_low else value < low
    if math.isnan(value) or below or value > high:
        sign = "above" if open_low else "at least"
        raise RequestError(name, f"is {value}; it must be {sign} {low} and at most {high}")


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    """One or many of a kind as a tuple; none for None. Raises RequestError for anything else."""
    values = () if value is None else (value,) if isinstance(value, (str, kind)) else value
    is_many = isinstance(values, Sequence) and not isinstance(values, (bytes, bytearray))
    if not is_many or any(not isinstance(v, kind) or isinstance(v, bool) for v in values):
        what = {str: "texts", int: "token ids"}[kind]
        raise RequestError(name, f"must be a list of {what}, not {value!r}")
    return tuple(values)


# --- what the inputs stage makes of it -------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ImageInput:
    """One picture, resized as its family wants it and ready for the tower.

    digest:     SHA-256 of the decoded picture, its mode and size, and the preprocessing settings
    num_tokens: that the picture takes in the prompt, which are as many rows of features
    grid:       patches as (rows, columns)
    pixels:     [height, width, 3] uint8, RGB, after the family's resize; kept as bytes because a
                preempted request needs them again and float pixels are four times larger
    """

    digest: bytes
    num_tokens: int
    grid: tuple[int, int]
    pixels: np.ndarray


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where a part of picture number `image` stands: token_ids[start : start + length].

    feature_start: the first of the picture's rows that stands there; 0 unless the picture is
        spread over several spans
    """

    start: int
    length: int
    image: int
    feature_start: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPrompt:
    """A prompt as the model will see it.

    token_ids:          one per cache slot; pictures expanded to their full length
    original_token_ids: the same prompt as the original implementation writes it
    spans:              the pictures' places, in order, not overlapping; one or several each
    positions:          [channels, len(token_ids)] int64 rotary positions
    decode_start, decode_step: the k-th output token (k = 0, 1, …) stands at rotary position
                        decode_start[c] + k * decode_step[c] in channel c
    bidirectional_len:  tokens 0 … bidirectional_len-1 all see each other; 0 in a causal model
    """

    token_ids: tuple[int, ...]
    original_token_ids: tuple[int, ...]
    spans: tuple[ImageSpan, ...]
    positions: np.ndarray
    decode_start: tuple[int, ...]
    decode_step: tuple[int, ...]
    bidirectional_len: int = 0

    def is_text(self, at: int) -> bool:
        """Whether no picture stands at a cache index."""
        return not any(0 <= at - span.start < span.length for span in self.spans)

    def original_places(self) -> list[int | None]:
        """Of each of original_token_ids its cache index; None where it stands for a picture.

        Every span has as many original ids as every other.
        """
        num_text = len(self.token_ids) - sum(span.length for span in self.spans)
        per_span = (len(self.original_token_ids) - num_text) // max(1, len(self.spans))
        places: list[int | None] = []
        start = 0
        for span in self.spans:
            places += [*range(start, span.start), *[None] * per_span]
            start = span.start + span.length
        return [*places, *range(start, len(self.token_ids))]

    def positions_between(self, start: int, stop: int) -> np.ndarray:
        """Rotary positions [channels, stop - start] of prompt and output tokens alike.

        The one place that knows the decode rule, so that a recomputed token stands exactly
        where it stood before.
        """
        num_prompt = self.positions.shape[1]
        if stop <= num_prompt:
            return self.positions[:, start:stop]
        outputs = range(max(start - num_prompt, 0), stop - num_prompt)
        rules = zip(self.decode_start, self.decode_step, strict=True)
        decoded = np.array([[first + k * step for k in outputs] for first, step in rules])
        if start >= num_prompt:
            return decoded
        return np.concatenate([self.positions[:, start:num_prompt], decoded], axis=1)


class TokenFilter(Protocol):
    """One sequence's grammar: says which tokens may come next. The implementation is `structured`.

    It follows the output wherever it goes, also back, so a preempted sequence needs nothing more.
    """

    def allowed(self, output_ids: Sequence[int]) -> np.ndarray | None:
        """[vocab_size] bool: what may follow this output; a stop id only if it is complete.

        None if the output itself is impossible: it ends in a draft that will be refused.
        """


class Constraint(Protocol):
    """A compiled grammar, shared by all that ask for it."""

    def start(self) -> TokenFilter:
        """A filter for one sequence, at its beginning."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A request that passed every check and waits for the scheduler.

    sampling:       every default filled in
    stop_token_ids: the ids that end it: the request's own and, without ignore_eos, the family's
    seeds:          one per choice (sampling.n)
    cache_salt:     requests share cached prefixes only with requests of the same salt
    constraint:     of sampling.grammar
    is_exact:       the text is what the tokens stand for, byte by byte, and not as the original
        shows it
    """

    request_id: str
    prompt: EncodedPrompt
    images: tuple[ImageInput, ...]
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    seeds: tuple[int, ...]
    max_tokens: int
    arrival_s: float
    cache_salt: str = ""
    constraint: Constraint | None = None
    is_exact: bool = False


# --- one step --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class ImageSlice:
    """Rows feature_start … feature_start+length-1 of a picture, at token `offset` of the row.

    is_first: the prompt shows no earlier part of the picture
    """

    image: ImageInput
    offset: int
    feature_start: int
    length: int
    is_first: bool


@dataclass(frozen=True, slots=True, eq=False)
class StepRow:
    """What one sequence does in one step: compute `token_ids` at cache indices start, start+1, …

    index:       which of the request's choices this is
    positions:   [channels, len(token_ids)] int64
    block_table: cache blocks of the sequence, covering at least start + len(token_ids) tokens
    samples:     the last token's logits are wanted, because it is the last one known
    upcoming:    pictures that a later chunk of the same prompt shows, or goes on with
    prompt_ids, output_ids: all ids so far (prompt as the original writes it), for penalties
    drafts:      tokens that may follow; they are the last of token_ids, and the logits of each
                 are wanted besides those of the last known token
    filter:      which tokens may be chosen; None: all
    targets:     tokens of the prompt that this step predicts and that are to be scored
    """

    sequence_id: int
    request_id: str
    index: int
    token_ids: Sequence[int]
    positions: np.ndarray
    start: int
    block_table: Sequence[int]
    bidirectional_len: int
    images: tuple[ImageSlice, ...]
    samples: bool
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    seed: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    upcoming: tuple[ImageInput, ...] = ()
    drafts: tuple[int, ...] = ()
    filter: TokenFilter | None = None
    targets: tuple[PromptTarget, ...] = ()

    @property
    def images_by_digest(self) -> dict[bytes, ImageInput]:
        """Every picture whose features the prompt needs from this row on, by digest."""
        shown = [part.image for part in self.images]
        return {image.digest: image for image in (*shown, *self.upcoming)}

    @property
    def is_decode(self) -> bool:
        """One new token on top of a cached context; with drafts it is a short chunk instead."""
        return len(self.token_ids) == 1 and self.start > 0

    @property
    def without_drafts(self) -> StepRow:
        """The same step with nothing drafted."""
        num_known = len(self.token_ids) - len(self.drafts)
        positions = self.positions[:, :num_known]
        return replace(self, token_ids=self.token_ids[:num_known], positions=positions, drafts=())

    @property
    def sampled_rows(self) -> list[StepRow]:
        """The row as sampling sees it: once, and once more behind each draft, taken as output."""
        behind = (self.drafts[:count] for count in range(1, len(self.drafts) + 1))
        return [self, *(replace(self, output_ids=[*self.output_ids, *d]) for d in behind)]


@dataclass(frozen=True, slots=True, eq=False)
class PromptTarget:
    """A prompt token to score: at cache index `place`, predicted by the token before."""

    place: int
    token_id: int


@dataclass(frozen=True, slots=True, eq=False)
class ImageWait:
    """A sequence that runs only when the features of these pictures are there."""

    sequence_id: int
    request_id: str
    images: tuple[ImageInput, ...]


@dataclass(frozen=True, slots=True, eq=False)
class StepPlan:
    """Which tokens of which sequences run now; rows that decode come first.

    open_images: digests of the pictures that later steps need: of running sequences, in this
        step or not, and of those that wait for their pictures
    waits: who waits for the tower, oldest first; it gets a bounded slice of this step
    """

    rows: tuple[StepRow, ...]
    open_images: frozenset[bytes] = frozenset()
    waits: tuple[ImageWait, ...] = ()

    @property
    def sampled_rows(self) -> list[StepRow]:
        """One row for each token to sample, in the order the runner returns the logits.

        A row with drafts is there once more for each of them.
        """
        return [each for row in self.rows if row.samples for each in row.sampled_rows]

    @property
    def targets(self) -> list[tuple[StepRow, PromptTarget]]:
        """Every prompt token to score, with its row, in the order the runner scores them."""
        return [(row, target) for row in self.rows for target in row.targets]

    @property
    def without_drafts(self) -> StepPlan:
        """The same step with nothing drafted; rows that decode come first again."""
        rows = sorted((row.without_drafts for row in self.rows), key=lambda row: not row.is_decode)
        return replace(self, rows=tuple(rows))

    @property
    def num_decodes(self) -> int:
        """Rows that go on by one token."""
        return sum(row.is_decode for row in self.rows)

    @property
    def num_tokens(self) -> int:
        """Tokens computed in this step."""
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its log-probability under the model, before penalties and temperature."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PromptLogprob:
    """A token of the prompt, and how likely the model had it after the tokens before.

    logprob, rank: None for the first token, for a picture's, and where the model gave no number;
        rank 1 is the likeliest
    top_logprobs: the likeliest tokens in its place, as many as the request asked for
    """

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token chosen for one sequence, or why none could be chosen.

    logprob, top_logprobs: only when the request asked for them
    error: set when the logits were not finite; token_id is then -1
    """

    sequence_id: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True)
class TokenOutcome:
    """What the scheduler made of a sampled token.

    is_text: false for a stop id, which is counted but not shown
    """

    request_id: str
    index: int
    sampled: SampledToken
    is_text: bool
    finish_reason: FinishReason | None
    stop_reason: int | None


# --- what comes back -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request. prompt_tokens counts pictures at their full length."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # prompt tokens whose keys and values were already in the cache
    image_tokens: int
    drafted_tokens: int = 0  # proposed ahead and checked
    accepted_tokens: int = 0  # of these, the ones that the model would have chosen itself

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds.

    image_s:   in the vision tower, as long as one of its pictures was in it, alone or with those of
               other requests; 0 when every picture's features were cached
    prefill_s: from the first step, be it of the tower, to the first token, without image_s
    decode_s:  from the first token to the last
    ttft_s:    from arrival to the first token, waiting included
    """

    image_s: float
    prefill_s: float
    decode_s: float
    ttft_s: float

    @property
    def queue_s(self) -> float:
        """From arrival to the first step, be it of the tower."""
        return max(0.0, self.ttft_s - self.image_s - self.prefill_s)

    @property
    def inference_s(self) -> float:
        """From the first step to the last token."""
        return self.image_s + self.prefill_s + self.decode_s

    def as_dict(self) -> dict[str, float]:
        """The four figures by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one choice of one request gained in one step.

    text:  the new text; may be empty while a character or a stop string is incomplete
    finish_reason: set exactly once, in the last output of the choice
    stop_reason:   the stop string or stop id that ended it, if one did
    prompt_logprobs: in the first output of the first choice, one for each token of the prompt, its
        pictures expanded; None where they were not asked for
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[SampledToken, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_logprobs: tuple[PromptLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished choice of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    error: str | None = None
    logprobs: tuple[SampledToken, ...] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A finished request: its choices, counts and times.

    prompt_token_ids: the prompt as the original implementation writes it
    prompt_logprobs:  as StepOutput says
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    completions: tuple[Completion, ...]
    usage: Usage
    timings: Timings
    prompt_logprobs: tuple[PromptLogprob, ...] | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.completions[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The first choice's token ids."""
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Why the first choice ended."""
        return self.completions[0].finish_reason
