"""OpenAI bodies become `Ask`s: every default of the protocol is filled in here."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from glimt.errors import RequestError
from glimt.server.conversation import read_messages
from glimt.server.openai_bodies import ChatBody, CompletionBody, SamplingBody
from glimt.server.openai_prompt import PromptReport
from glimt.server.parameters import schema_grammar
from glimt.server.service import Ask, checked_id
from glimt.server.tools import Offer, read_offer
from glimt.types import Grammar, SamplingParams

log = logging.getLogger("glimt.server")

_MAX_PROMPTS = 128  # of one completion request
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_INT32 = range(-(2**31), 2**31)
_TAKEN_OVER = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "seed", "min_tokens", "n", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens",
)  # fmt: skip
# A completion is the protocol's own: the checkpoint's defaults are for chats.
_PLAIN: Mapping[str, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "min_tokens": 0,
}  # fmt: skip
_COMPLETION_TOKENS = 16


def chat_ask(body: ChatBody, request_id: str) -> Ask:
    """One conversation. Raises RequestError naming the field."""
    body.check()
    _log_ignored(body)
    top = (body.top_logprobs or 0) if body.logprobs else None
    offer = _offer(body)
    form = _grammar(body) if offer is None else _form_of_call(offer, _grammar(body))
    wanted = body.max_completion_tokens or body.max_tokens
    sampling = _sampling(body, {}, wanted, (top, body.prompt_logprobs), form)
    return Ask(
        protocol="openai",
        request_id=checked_id(body.request_id or request_id),
        sampling=sampling,
        messages=read_messages(body.messages),
        language=_language(body.chat_template_kwargs or {}),
        cache_salt=body.cache_salt or "",
        prompt_end=_prompt_end(body),
        offer=offer,
    )


def _offer(body: ChatBody) -> Offer | None:
    offer = read_offer(body.tools, body.tool_choice)
    if offer is not None:
        body.check_with_tools()
    return offer


def chat_report(body: ChatBody) -> PromptReport:
    """What is told of a conversation's tokens."""
    return PromptReport(num_top=body.prompt_logprobs)


def completion_reports(body: CompletionBody) -> list[PromptReport]:
    """What is told of each prompt."""
    return [
        PromptReport(
            echo=bool(body.echo),
            is_alone=body.max_tokens == 0,
            text=prompt if isinstance(prompt, str) else None,
            num_top=body.prompt_logprobs,
            echo_top=body.logprobs if body.echo else None,
        )
        for prompt in body.prompts()
    ]


def completion_asks(body: CompletionBody, request_id: str) -> list[Ask]:
    """One for each prompt. Raises RequestError naming the field."""
    body.check()
    _log_ignored(body)
    prompts = body.prompts()
    if not 1 <= len(prompts) <= _MAX_PROMPTS:
        said = f"holds {len(prompts)} prompts; 1 to {_MAX_PROMPTS} are taken"
        raise RequestError("prompt", said)
    if "" in prompts:
        raise RequestError("prompt", "is empty; there is nothing to continue")
    # A prompt is scored in the step that gives the first token: none at all costs no less.
    wanted = _COMPLETION_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    scored = completion_reports(body)[0].wanted
    sampling = _sampling(body, _PLAIN, wanted, (body.logprobs, scored), _grammar(body))
    base_id = checked_id(body.request_id or request_id)
    ids = [base_id] if len(prompts) == 1 else [f"{base_id[:250]}-{i}" for i in range(len(prompts))]
    keep = body.truncate_prompt_tokens
    return [
        Ask(
            protocol="openai",
            request_id=each_id,
            sampling=sampling,
            prompt=prompt if isinstance(prompt, str) else None,
            token_ids=None if isinstance(prompt, str) else _last(prompt, keep),
            cache_salt=body.cache_salt or "",
            is_exact=True,  # the client puts it behind its prompt: every blank counts
        )
        for each_id, prompt in zip(ids, prompts, strict=True)
    ]


def _last(token_ids: list[int], keep: int | None) -> list[int]:
    """The last `keep` ids; -1 and None keep all."""
    return token_ids if keep is None or keep < 0 else token_ids[max(0, len(token_ids) - keep) :]


def _log_ignored(body: SamplingBody) -> None:
    if names := body.ignored():
        log.debug("unknown fields ignored: %s", ", ".join(name[:60] for name in names[:20]))


def _sampling(
    body: SamplingBody,
    defaults: Mapping[str, Any],
    max_tokens: int | None,
    logprobs: tuple[int | None, int | None],
    grammar: Grammar | None,
) -> SamplingParams:
    """logprobs: of the answer and of the prompt."""
    given = {name: getattr(body, name) for name in _TAKEN_OVER}
    values = {**defaults, **{name: v for name, v in given.items() if v is not None}}
    ids = [token_id for token_id in body.stop_token_ids or () if token_id in _INT32]
    return SamplingParams(
        **values,
        max_tokens=max_tokens,
        stop=body.stop or (),
        stop_token_ids=ids,
        logit_bias=_logit_bias(body.logit_bias or {}),
        logprobs=logprobs[0],
        prompt_logprobs=logprobs[1],
        grammar=grammar,
    )


def _logit_bias(given: Mapping[str, float]) -> dict[int, float]:
    """Token ids come as text, as JSON has it; biases beyond 100 are taken as 100."""
    found = {}
    for key, bias in given.items():
        if not key.isascii() or not key.isdecimal() or len(key) > 10:
            raise RequestError("logit_bias", f"has the key {key[:40]!r}, which is no token id")
        found[int(key)] = max(-100.0, min(100.0, bias))
    return found


def _language(kwargs: Mapping[str, Any]) -> str:
    language = kwargs.get("language") or "auto"
    if not isinstance(language, str):
        raise RequestError("chat_template_kwargs.language", "must be auto, zh or en")
    return language


def _prompt_end(body: ChatBody) -> str:
    if body.continue_final_message:
        return "continue"
    return "none" if body.add_generation_prompt is False else "answer"


# --- grammars --------------------------------------------------------------------------------


def _grammar(body: SamplingBody) -> Grammar | None:
    """The one form that the answer must have. Raises RequestError for two of them."""
    asked = [
        found
        for found in (
            _of_response_format(body.response_format),
            *_of_structured(body.structured_outputs or {}),
            None if body.guided_json is None else schema_grammar(body.guided_json, "guided_json"),
            None
            if body.guided_regex is None
            else Grammar.of_regex(body.guided_regex, "guided_regex"),
            None
            if body.guided_choice is None
            else Grammar.of_choice(body.guided_choice, "guided_choice"),
        )
        if found is not None
    ]
    if len(asked) > 1:
        raise RequestError(asked[1].field, f"cannot go with {asked[0].field}: ask for one form")
    return asked[0] if asked else None


def _form_of_call(offer: Offer, asked: Grammar | None) -> Grammar | None:
    """The form of a call, where one must be made. Raises RequestError for another one beside."""
    if asked is not None:
        said = "cannot go with tools: an answer in this form could be no call"
        raise RequestError(asked.field, f"{said}; leave one out, or send tool_choice: none")
    return offer.grammar


def _of_response_format(given: Mapping[str, Any] | None) -> Grammar | None:
    kind = "text" if given is None else given.get("type")
    if given is None or kind == "text":
        return None
    if kind == "json_object":  # huggingface_hub puts a schema beside it
        schema = given.get("value") or given.get("schema") or {"type": "object"}
        return schema_grammar(schema, "response_format")
    if kind == "json_schema":
        return _of_json_schema(given)
    if kind == "regex":  # huggingface's
        return Grammar.of_regex(given.get("value"), "response_format")
    known = "text, json_object, json_schema"
    raise RequestError("response_format.type", f"is {str(kind)[:40]!r}; it must be one of {known}")


def _of_json_schema(given: Mapping[str, Any]) -> Grammar:
    if "json_schema" not in given and "value" in given:  # TGI's form of the same
        return schema_grammar(given["value"], "response_format.value")
    inner = given.get("json_schema")
    field = "response_format.json_schema"
    if not isinstance(inner, Mapping):
        raise RequestError(field, "is missing; an object with name and schema is needed")
    name = inner.get("name")
    if name is not None and not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise RequestError(f"{field}.name", "must be 1 to 64 letters, digits, - or _")
    schema = inner.get("schema")
    if not isinstance(schema, Mapping):
        raise RequestError(f"{field}.schema", "is missing; a JSON schema is needed")
    return schema_grammar(schema, f"{field}.schema")


def _of_structured(given: Mapping[str, Any]) -> Sequence[Grammar]:
    """vLLM's `structured_outputs`."""
    found = []
    for name, value in given.items():
        field = f"structured_outputs.{name}"
        if value is None or (name == "json_object" and value is False):
            continue
        if name == "json":
            found.append(schema_grammar(value, field))
        elif name == "json_object":
            found.append(schema_grammar({"type": "object"}, field))
        elif name == "regex":
            found.append(Grammar.of_regex(value, field))
        elif name == "choice":
            found.append(Grammar.of_choice(value, field))
        else:
            raise RequestError(field[:80], "is not supported; json, regex and choice are")
    return found
