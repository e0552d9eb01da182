"""The OpenAI requests as they are sent: fields, types and ranges. Knows what is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from glimt.errors import RequestError
from glimt.server.bodies import Body, Bool, Float, Int, Text
from glimt.server.schemas import Messages, Tools

Penalty = Annotated[Float, Field(ge=-2, le=2)]

# What is accepted and changes nothing: it is about accounts, other models, or the default here.
IGNORED = frozenset(
    {
        "user", "metadata", "store", "service_tier", "reasoning_effort", "verbosity",
        "prompt_cache_key", "safety_identifier", "prompt_cache_retention", "modalities",
        "prediction", "web_search_options", "spaces_between_special_tokens", "add_special_tokens",
        "length_penalty",
    }
)  # fmt: skip
# What would change the answer and is not done, with the values that ask for nothing.
_REFUSED: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "chat_template": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "mm_processor_kwargs": ({},),
    "media_io_kwargs": ({},),
    "documents": ([],),
    "priority": (0,),
    "guided_grammar": (),
    "structural_tag": (),
    "logits_processors": ([],),
}
_HINTS: Mapping[str, str] = {
    "functions": "; send the same as tools",
    "function_call": "; send the same as tool_choice",
    "chat_template": "; the model's own is always used",
}


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: Bool | None = None
    continuous_usage_stats: Bool | None = None


class SamplingBody(Body):
    """What both requests have in common; the second half is vLLM's."""

    model: Text | None = None
    max_tokens: Annotated[Int, Field(ge=1)] | None = None
    temperature: Annotated[Float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    n: Annotated[Int, Field(ge=1, le=128)] | None = None
    stop: Text | list[Text] | None = None
    seed: Int | None = None
    stream: Bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Float] | None = None
    response_format: dict[str, Any] | None = None

    top_k: Annotated[Int, Field(ge=-1)] | None = None
    min_p: Annotated[Float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Float, Field(gt=0)] | None = None
    ignore_eos: Bool | None = None
    min_tokens: Annotated[Int, Field(ge=0)] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: Bool | None = None
    skip_special_tokens: Bool | None = None
    truncate_prompt_tokens: Annotated[Int, Field(ge=-1)] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: list[Text] | None = None
    cache_salt: Text | None = None
    request_id: Text | None = None
    prompt_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None

    @property
    def includes_usage(self) -> bool:
        """A last chunk tells the counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def has_running_usage(self) -> bool:
        """Every chunk tells them."""
        return self.includes_usage and bool(
            self.stream_options and self.stream_options.continuous_usage_stats
        )

    def check(self) -> None:
        """Raises RequestError for what goes with nothing here, or not with the rest."""
        for name in sorted(_REFUSED.keys() & (self.model_extra or {}).keys()):
            value = (self.model_extra or {})[name]
            if value is not None and value not in _REFUSED[name]:
                raise RequestError(name, f"is not supported{_HINTS.get(name, '')}")
        options = self.stream_options
        if options is not None and not self.stream and options.model_dump(exclude_none=True):
            raise RequestError("stream_options", "is only allowed with stream: true")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs", "is only possible without stream: true")
        if (self.n or 1) > 1 and self.temperature == 0:
            said = f"is {self.n}, but with temperature 0 all answers are the same; ask for one"
            raise RequestError("n", said)

    def ignored(self) -> list[str]:
        """Names of what came and nobody knows."""
        return [name for name in self.unknown() if name not in IGNORED and name not in _REFUSED]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[Messages, Field(min_length=1)]
    max_completion_tokens: Annotated[Int, Field(ge=1)] | None = None
    logprobs: Bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None
    tools: Tools | None = None
    tool_choice: Any = None
    parallel_tool_calls: Bool | None = None  # an answer holds one call at most, whatever it says
    add_generation_prompt: Bool | None = None
    continue_final_message: Bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Raises RequestError as above."""
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs", "needs logprobs: true")
        if self.add_generation_prompt and self.continue_final_message:
            said = "cannot go with continue_final_message: the prompt has one end"
            raise RequestError("add_generation_prompt", said)
        if self.truncate_prompt_tokens is not None:
            said = "is not supported in a chat: cut tokens would leave half a turn, or half a image"
            raise RequestError("truncate_prompt_tokens", f"{said}; send fewer messages")
        modalities = (self.model_extra or {}).get("modalities")
        if isinstance(modalities, list) and "audio" in modalities:
            raise RequestError("modalities", "holds audio, but this model answers with text")

    def check_with_tools(self) -> None:
        """Raises RequestError for what cannot go with functions that the model may call."""
        fields = ("continue_final_message", "include_stop_str_in_output")
        wrong = [name for name in fields if getattr(self, name)]
        if self.add_generation_prompt is False:
            wrong.append("add_generation_prompt")
        if wrong:
            said = "cannot go with tools: a call is an answer of its own, from its beginning"
            raise RequestError(wrong[0], f"{said}; leave it out, or send tool_choice: none")


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[Int] | list[list[Int]]
    max_tokens: Annotated[Int, Field(ge=0)] | None = None
    echo: Bool | None = None
    logprobs: Annotated[Int, Field(ge=0, le=5)] | None = None
    best_of: Int | None = None

    def check(self) -> None:
        """Raises RequestError as above."""
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise RequestError("best_of", "is not supported, unless it equals n")
        if self.max_tokens == 0 and not self.echo:
            said = "is 0, which leaves nothing to answer; with echo: true the prompt is shown"
            raise RequestError("max_tokens", said)
        if self.truncate_prompt_tokens is not None and not self._is_ids():
            said = "is supported only where prompt is token ids: a text's own are not known before"
            raise RequestError("truncate_prompt_tokens", said)

    def _is_ids(self) -> bool:
        return isinstance(self.prompt, list) and not any(
            isinstance(each, str) for each in self.prompt
        )

    def prompts(self) -> list[str | list[int]]:
        """One text or one list of ids for each answer."""
        given = self.prompt
        if isinstance(given, str):
            return [given]
        if all(isinstance(each, int) for each in given):
            return [given] if given else []  # type: ignore[list-item]
        return list(given)  # type: ignore[arg-type]
