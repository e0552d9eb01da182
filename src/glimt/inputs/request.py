"""RequestFactory: what a caller wants -> a Request that is known to fit. Thread-safe."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from glimt.config import ImageLimits
from glimt.errors import PromptTooLong, RequestError
from glimt.inputs.chat import parse_messages
from glimt.inputs.image import OpenedImage, decode_image, open_image
from glimt.inputs.tools import field_of_tools, parse_tools
from glimt.models.base import OpenEnded, Processor, ToolPrompts
from glimt.structured import GrammarCompiler
from glimt.types import (
    EncodedPrompt,
    ImageInput,
    ImagePart,
    Message,
    Messages,
    Request,
    SamplingParams,
    TextPart,
)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What any request must fit.

    context_tokens: the longest sequence that is allowed, in tokens with pictures expanded
    cache_tokens: what the whole KV cache holds; one sequence must fit it alone, or it could wait
        for ever
    max_positions: rotary positions that exist
    """

    context_tokens: int
    cache_tokens: int
    max_positions: int
    vocab_size: int

    @property
    def max_model_len(self) -> int:
        """Tokens of one sequence, prompt and answer."""
        return min(self.context_tokens, self.cache_tokens)

    @property
    def of_cache(self) -> str:
        """What the cache adds to the model's own limit; nothing where it holds a whole context."""
        if self.cache_tokens >= self.context_tokens:
            return ""
        return f", and the KV cache holds {self.cache_tokens} tokens"

    def remedy(self, num_tokens: int) -> str:
        """Which settings must be raised, and to what, for a sequence of so many tokens."""
        settings = []
        if self.context_tokens < num_tokens:
            settings.append(f"max_model_len (--max-model-len) to {num_tokens}")
        if self.cache_tokens < num_tokens:
            settings.append(
                f"kv_bytes (--kv-bytes) or num_blocks until the cache holds {num_tokens}"
            )
        return f"or raise {' and '.join(settings)}"


LANGUAGES = ("auto", "zh", "en")
PROMPT_ENDS = ("answer", "continue", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What a caller may say besides the prompt and the sampling.

    request_id:  None makes one up
    language:    "auto", "zh" or "en": the prompt template, where a family has one per language
    cache_salt:  cached prefixes are shared only between equal salts
    allow_files: whether text may name a file on this machine
    prompt_end:  "answer": the assistant is to speak; "continue": it goes on with the last
        message, which is its own; "none": nobody's turn is begun
    tools:       functions that the model may call in a conversation, as OpenAI's requests describe
        them (`inputs.tools.parse_tools`); a call is the answer's text, for the caller to read
    is_exact:    the text comes as the tokens have it, not stripped or mended as the original does;
        always so for an answer that goes on or has a grammar
    Raises RequestError, naming the field, for a value of the wrong kind.
    """

    request_id: str | None = None
    language: str = "auto"
    cache_salt: str = ""
    allow_files: bool = True
    prompt_end: str = "answer"
    is_exact: bool = False
    tools: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if self.request_id is not None and not (
            isinstance(self.request_id, str) and self.request_id
        ):
            raise RequestError("request_id", f"must be a text, not {self.request_id!r}")
        if self.language not in LANGUAGES:
            known = ", ".join(LANGUAGES)
            raise RequestError("language", f"is {self.language!r}; choose one of {known}")
        if not isinstance(self.cache_salt, str):
            raise RequestError("cache_salt", f"must be a text, not {self.cache_salt!r}")
        for name in ("allow_files", "is_exact"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, f"must be true or false, not {getattr(self, name)!r}")
        if self.prompt_end not in PROMPT_ENDS:
            known = ", ".join(PROMPT_ENDS)
            raise RequestError("prompt_end", f"is {self.prompt_end!r}; choose one of {known}")


class RequestFactory:
    """Encodes prompts and pictures with one family's processor and checks every limit."""

    def __init__(
        self, processor: Processor, limits: RequestLimits, image_limits: ImageLimits
    ) -> None:
        self.processor = processor
        self.limits = limits
        self.image_limits = image_limits
        stops = processor.stop_token_ids
        self._grammars = GrammarCompiler(processor.tokenizer, limits.vocab_size, stops)

    def warm_up(self) -> None:
        """Do now what the first request with a grammar would hold the others up for."""
        self._grammars.warm_up()

    def from_chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Request:
        """Encode a conversation. Pictures are decoded only once the prompt is known to fit.

        Raises RequestError naming the field; of its kinds, ImageError and PromptTooLong too.
        """
        arrival_s = time.monotonic()
        sampling = _or_defaults(sampling, SamplingParams, "sampling")
        options = _or_defaults(options, RequestOptions, "options")
        parsed = parse_messages(messages, self.image_limits)
        opened = self._open_images(parsed, options.allow_files)
        sizes = [(image.width, image.height) for image in opened]
        prompt = self._encode_chat(parsed, sizes, options)
        max_tokens = self._check_fit(prompt, sampling)
        images = tuple(self._prepare(image) for image in opened)
        return self._request(prompt, images, sampling, max_tokens, arrival_s, options)

    def _encode_chat(
        self,
        messages: Sequence[Message],
        sizes: Sequence[tuple[int, int]],
        options: RequestOptions,
    ) -> EncodedPrompt:
        messages = (*self._offer(messages, options.tools), *messages)
        if options.prompt_end == "answer":
            return self.processor.encode_chat(messages, sizes, options.language)
        last = messages[-1]
        can_go_on = last.role == "assistant" and last.text and not last.calls
        if options.prompt_end == "continue" and not can_go_on:
            said = "the last message says nothing of the assistant's that could go on"
            raise RequestError("messages", said)
        if not isinstance(self.processor, OpenEnded):
            said = f"{options.prompt_end!r} is not possible with this model's template"
            raise RequestError("prompt_end", said)
        return self.processor.encode_open(messages, sizes, options.language, options.prompt_end)

    def _offer(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
    ) -> Sequence[Message]:
        """What comes before the conversation to offer functions; nothing without them."""
        functions = parse_tools(tools)
        field = field_of_tools(functions, messages)
        if field is None:
            return ()
        if not isinstance(self.processor, ToolPrompts):
            said = "is given, but this model's template has no form for functions; leave it out"
            raise RequestError(field, said)
        if not functions:
            return ()
        return (Message("system", (TextPart(self.processor.tools_text(functions)),)),)

    def from_text(
        self,
        text: str,
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Request:
        """Encode a bare text to be continued. Raises RequestError, PromptTooLong among them."""
        arrival_s = time.monotonic()
        sampling = _or_defaults(sampling, SamplingParams, "sampling")
        options = _or_defaults(options, RequestOptions, "options")
        if not isinstance(text, str):
            raise RequestError("prompt", f"must be a text, not a {type(text).__name__}")
        _refuse_tools(options)
        prompt = self.processor.encode_text(text)
        max_tokens = self._check_fit(prompt, sampling)
        return self._request(prompt, (), sampling, max_tokens, arrival_s, options)

    def from_tokens(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Request:
        """Continue a prompt that is given as ids, which may be special ones; text alone.

        Raises RequestError, PromptTooLong among them.
        """
        arrival_s = time.monotonic()
        sampling = _or_defaults(sampling, SamplingParams, "sampling")
        options = _or_defaults(options, RequestOptions, "options")
        self.check_ids("prompt", token_ids)
        _refuse_tools(options)
        prompt = self.processor.encode_tokens(token_ids)
        max_tokens = self._check_fit(prompt, sampling)
        return self._request(prompt, (), sampling, max_tokens, arrival_s, options)

    def _open_images(self, messages: Sequence[Message], allow_files: bool) -> list[OpenedImage]:
        return [
            open_image(
                part.source,
                self.image_limits,
                allow_files=allow_files,
                field=f"messages[{m}].content[{p}]",
            )
            for m, message in enumerate(messages)
            for p, part in enumerate(message.parts)
            if isinstance(part, ImagePart)
        ]

    def _prepare(self, opened: OpenedImage) -> ImageInput:
        decoded = decode_image(opened)
        digest = decoded.digest(self.processor.image_settings)
        return self.processor.prepare_image(decoded.rgb, digest)

    def _check_fit(self, prompt: EncodedPrompt, sampling: SamplingParams) -> int:
        """How many tokens may be generated. Raises PromptTooLong, with the numbers."""
        if not prompt.token_ids:
            raise RequestError("prompt", "is empty")
        cache_room = self.limits.max_model_len - len(prompt.token_ids)
        room = min(cache_room, self._position_room(prompt))
        wanted = max(1, sampling.max_tokens or 0, sampling.min_tokens or 0)
        remedy = self._remedy(prompt, wanted)
        if room < 1:
            raise PromptTooLong(
                "prompt", f"{self._describe(prompt)}; shorten the conversation{remedy}"
            )
        if room < wanted:
            name = "max_tokens" if sampling.max_tokens else "min_tokens"
            said = f"is {wanted} but only {room} fit: {self._describe(prompt)}"
            raise PromptTooLong(
                name, f"{said}; shorten the conversation or ask for fewer tokens{remedy}"
            )
        return sampling.max_tokens or room

    def _remedy(self, prompt: EncodedPrompt, num_outputs: int) -> str:
        """What else lets so many tokens follow the prompt; nothing gives a model positions."""
        if self._position_room(prompt) < num_outputs:
            return ": the model knows no more positions"
        return f", {self.limits.remedy(len(prompt.token_ids) + num_outputs)}"

    def _position_room(self, prompt: EncodedPrompt) -> int:
        """Output tokens whose rotary positions still exist."""
        rooms = [
            -(-(self.limits.max_positions - start) // step)
            for start, step in zip(prompt.decode_start, prompt.decode_step, strict=True)
            if step
        ]
        is_inside = int(prompt.positions.max(initial=0)) < self.limits.max_positions
        return min(rooms, default=self.limits.max_positions) if is_inside else 0

    def _describe(self, prompt: EncodedPrompt) -> str:
        tokens = sum(span.length for span in prompt.spans)
        count = len({span.image for span in prompt.spans})
        of_pictures = f" ({tokens} of them {count} picture{'s' * (count > 1)})" if count else ""
        return (
            f"the prompt is {len(prompt.token_ids)} tokens{of_pictures} and reaches position "
            f"{int(prompt.positions.max(initial=0))}, but this model's maximum context length is "
            f"{self.limits.context_tokens} tokens and {self.limits.max_positions} positions"
            f"{self.limits.of_cache}"
        )

    def _request(
        self,
        prompt: EncodedPrompt,
        images: tuple[ImageInput, ...],
        sampling: SamplingParams,
        max_tokens: int,
        arrival_s: float,
        options: RequestOptions,
    ) -> Request:
        self.check_ids("logit_bias", sampling.logit_bias)
        self.check_ids("stop_token_ids", sampling.stop_token_ids)
        if sampling.prompt_logprobs is not None and prompt.bidirectional_len:
            said = "are not possible with this model: every token of its prompts sees those behind"
            raise RequestError("prompt_logprobs", f"{said} it; leave it out")
        filled = sampling.with_defaults(
            self.processor.sampling_defaults, len(prompt.original_token_ids)
        )
        seed = secrets.randbits(64) if sampling.seed is None else sampling.seed
        return Request(
            request_id=options.request_id or uuid.uuid4().hex,
            prompt=prompt,
            images=images,
            sampling=filled,
            stop_token_ids=self._stop_ids(sampling),
            seeds=tuple((seed + index) % 2**64 for index in range(sampling.n)),
            max_tokens=max_tokens,
            arrival_s=arrival_s,
            cache_salt=options.cache_salt,
            constraint=self._grammars.compile(sampling.grammar) if sampling.grammar else None,
            is_exact=options.is_exact or bool(sampling.grammar) or options.prompt_end != "answer",
        )

    def _stop_ids(self, sampling: SamplingParams) -> frozenset[int]:
        """ignore_eos goes on past the family's stop ids, but not past those asked for."""
        family = frozenset() if sampling.ignore_eos else self.processor.stop_token_ids
        return family | frozenset(sampling.stop_token_ids)

    def check_ids(self, field: str, token_ids: Iterable[int]) -> None:
        """Raises RequestError for an id outside the vocabulary: it would index another row."""
        for token_id in token_ids:
            if not 0 <= token_id < self.limits.vocab_size:
                last = self.limits.vocab_size - 1
                raise RequestError(field, f"token id {token_id!r} is not between 0 and {last}")


def _refuse_tools(options: RequestOptions) -> None:
    if options.tools:
        raise RequestError("tools", "are offered in a conversation alone; ask with messages")


T = TypeVar("T", SamplingParams, RequestOptions)


def _or_defaults(value: T | None, kind: type[T], field: str) -> T:
    """The value; for None, what the kind has by default.

    A dictionary is refused by name: read as defaults it would be ignored in silence.
    """
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise RequestError(field, f"must be a {kind.__name__}, not a {type(value).__name__}")
    return value
