"""OpenAI's replies and requests without a socket: what each output and field becomes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from glimt.errors import RequestError
from glimt.server.openai_asks import chat_ask, completion_asks
from glimt.server.openai_bodies import ChatBody, CompletionBody
from glimt.server.openai_render import ChatChunks, CompletionChunks, Head
from glimt.server.openai_texts import TokenTexts, chat_logprobs
from glimt.server.replying import one_line
from glimt.types import (
    EncodedPrompt,
    Grammar,
    ImageSpan,
    Request,
    SampledToken,
    SamplingParams,
    StepOutput,
    TokenLogprob,
    Usage,
)


class Bytes:
    """Ids 0 … 255 are bytes, 256 is a special token."""

    def __init__(self) -> None:
        self.special_ids = {"<|end|>": 256}

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else b""


TEXTS = TokenTexts(Bytes())  # type: ignore[arg-type]
HEAD = Head("chatcmpl-1", 7, "m")


def request(**sampling: Any) -> Request:
    prompt = EncodedPrompt(
        (1, 2, 3), (1, 2, 3), (ImageSpan(0, 2, 0),), np.zeros((1, 3)), (3,), (1,)
    )
    params = SamplingParams(**{"temperature": 1.0, **sampling})
    stops = frozenset({256, *params.stop_token_ids})
    return Request("r", prompt, (), params, stops, (1,) * params.n, 9, 0.0)


def output(text: str, *ids: int, **more: Any) -> StepOutput:
    logprobs = tuple(SampledToken(0, i, -0.5, (TokenLogprob(i, -0.5),)) for i in ids)
    return StepOutput("r", more.pop("index", 0), text, ids, logprobs, **more)


def test_logprobs_wait_for_the_text_of_their_tokens():
    """Catches entries that come before their half character is whole, or not at all."""
    chunks = ChatChunks(HEAD, [request(logprobs=1)], TEXTS)
    cat = "猫".encode()
    first = chunks.feed(0, output("", cat[0]))
    assert [c["choices"][0]["delta"] for c in first] == [{"role": "assistant", "content": ""}]
    assert chunks.feed(0, output("", cat[1])) == []
    (whole,) = chunks.feed(0, output("猫", cat[2]))
    entries = whole["choices"][0]["logprobs"]["content"]
    assert [e["bytes"] for e in entries] == [[b] for b in cat]
    assert {e["token"] for e in entries} == {"\ufffd"}
    held = chunks.feed(0, output("", 65, finish_reason="length"))
    assert held[-1]["choices"][0]["logprobs"]["content"][0]["token"] == "A"


@pytest.mark.parametrize("is_shown", [False, True])
def test_the_token_that_ends_an_answer_is_told_only_with_its_text(is_shown):
    """Catches the end token among the log-probabilities of a text that does not hold it."""
    asked = request(logprobs=0, include_stop_str_in_output=is_shown)
    chunks = ChatChunks(HEAD, [asked], TEXTS)
    made = chunks.feed(0, output("A", 65, 256, finish_reason="stop", stop_reason=256))
    tokens = [
        e["token"] for c in made for e in (c["choices"][0]["logprobs"] or {}).get("content", [])
    ]
    assert tokens == (["A", "<|end|>"] if is_shown else ["A"])
    assert made[-1]["choices"][0]["stop_reason"] is None


def test_an_own_stop_id_and_a_stop_string_are_named():
    """Catches vLLM's stop_reason lost, or the model's own end given as one."""
    for stop, said in ((65, 65), ("x", "x"), (256, None)):
        chunks = ChatChunks(HEAD, [request(stop_token_ids=[65], stop=["x"])], TEXTS)
        (*_, last) = chunks.feed(0, output("", 65, finish_reason="stop", stop_reason=stop))
        assert last["choices"][0]["stop_reason"] == said
        assert last["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("reason", "word"), [("stop", "stop"), ("length", "length"), ("abort", "stop")]
)
def test_only_openais_words_leave(reason, word):
    """Catches a word that typed clients fail on."""
    for kind in (ChatChunks, CompletionChunks):
        (*_, last) = kind(HEAD, [request()], TEXTS).feed(0, output("", 65, finish_reason=reason))
        assert last["choices"][0]["finish_reason"] == word


def test_choices_of_several_prompts_are_numbered_through():
    """Catches two choices of one number."""
    chunks = CompletionChunks(HEAD, [request(n=2), request(n=2)], TEXTS)
    indices = [
        chunks.feed(number, output("a", 65, index=index))[0]["choices"][0]["index"]
        for number in (0, 1)
        for index in (0, 1)
    ]
    assert indices == [0, 1, 2, 3]
    assert chunks.usage.body()["completion_tokens"] == 4
    assert chunks.usage.body()["prompt_tokens_details"]["image_tokens"] == 4
    chunks.feed(0, output("", finish_reason="length", usage=Usage(3, 9, 1, 2)))
    assert chunks.last()["usage"]["completion_tokens"] == 9 + 2
    assert chunks.last()["choices"] == []


def test_completion_logprobs_go_on_where_the_last_chunk_ended():
    """Catches text_offset that starts anew with every chunk."""
    chunks = CompletionChunks(HEAD, [request(logprobs=1)], TEXTS)
    offsets = [
        chunks.feed(0, output(text, *text.encode()))[0]["choices"][0]["logprobs"]["text_offset"]
        for text in ("ab", "c", "de")
    ]
    assert offsets == [[0, 1], [2], [3, 4]]


def test_an_impossible_token_is_a_json_number():
    """Catches -inf, which is no JSON."""
    body = chat_logprobs([SampledToken(0, 65, -math.inf, ())], TEXTS)
    assert json.loads(one_line(body))["content"][0]["logprob"] == -9999.0


# --- requests ---


def chat(**fields: Any) -> SamplingParams:
    body = ChatBody(messages=[{"role": "user", "content": "a"}], **fields)
    return chat_ask(body, "id").sampling


def test_defaults_are_the_checkpoints_for_a_chat_and_none_for_a_completion():
    """Catches a completion sampled with a chat's settings."""
    assert chat().temperature is None
    assert chat().max_tokens is None
    (ask,) = completion_asks(CompletionBody(prompt="a"), "id")
    assert (ask.sampling.temperature, ask.sampling.top_p, ask.sampling.min_tokens) == (1, 1, 0)
    assert ask.sampling.max_tokens == 16
    assert ask.is_exact


def test_the_newer_limit_wins():
    """Catches max_tokens taken where both are given."""
    assert chat(max_tokens=5, max_completion_tokens=3).max_tokens == 3


def test_biases_are_cut_to_a_hundred():
    """Catches a bias that is refused, or taken as it is."""
    assert chat(logit_bias={"5": 1000, "6": -500.5, "7": 2}).logit_bias == {5: 100, 6: -100, 7: 2}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORMS = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, Grammar.of_schema({"type": "object"})),
    ({"response_format": {"type": "json_object", "value": SCHEMA}}, Grammar.of_schema(SCHEMA)),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": SCHEMA},
            }
        },
        Grammar.of_schema(SCHEMA),
    ),
    ({"response_format": {"type": "regex", "value": "a+"}}, Grammar.of_regex("a+")),
    ({"guided_json": SCHEMA}, Grammar.of_schema(SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, Grammar.of_schema(SCHEMA)),
    ({"guided_regex": "a+"}, Grammar.of_regex("a+")),
    ({"guided_choice": ["a", "b"]}, Grammar.of_choice(["a", "b"])),
    ({"structured_outputs": {"json": SCHEMA}}, Grammar.of_schema(SCHEMA)),
    ({"structured_outputs": {"json_object": True}}, Grammar.of_schema({"type": "object"})),
    ({"structured_outputs": {"choice": ["a"], "regex": None}}, Grammar.of_choice(["a"])),
]


@pytest.mark.parametrize(("fields", "grammar"), FORMS, ids=[str(f)[:50] for f, _ in FORMS])
def test_every_way_to_ask_for_a_form_is_read(fields, grammar):
    """Catches a form that is accepted and not kept."""
    assert chat(**fields).grammar == grammar


WRONG = [
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_choice": ["a"], "ignore_eos": True}, "ignore_eos"),
    ({"guided_choice": ["a"], "min_tokens": 2}, "min_tokens"),
    ({"guided_grammar": "x"}, "guided_grammar"),
    ({"priority": 3}, "priority"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[str(f)[:50] for f, _ in WRONG])
def test_a_form_that_cannot_be_is_refused_by_name(fields, param):
    """Catches a form that is dropped in silence."""
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    assert refused.value.field == param


def test_prompts_are_one_text_or_many_or_ids():
    """Catches a list of ids read as many prompts."""

    def read(prompt: Any) -> list[Any]:
        asks = completion_asks(CompletionBody(prompt=prompt), "id")
        assert len({ask.request_id for ask in asks}) == len(asks)
        return [ask.prompt if ask.token_ids is None else list(ask.token_ids) for ask in asks]

    assert read("a") == ["a"]
    assert read(["a", "b"]) == ["a", "b"]
    assert read([1, 2]) == [[1, 2]]
    assert read([[1], [2, 3]]) == [[1], [2, 3]]
    for bad in ([], "", ["a", ""], ["a"] * 129):
        with pytest.raises(RequestError):
            read(bad)


def test_texts_that_are_all_empty_are_no_question():
    """Catches the line feed that joins two of them, taken for a text."""
    from glimt.errors import RequestError
    from glimt.server.conversation import read_messages

    parts = [{"type": "text", "text": ""}] * 2
    with pytest.raises(RequestError, match="is empty; a user's message needs text or a picture"):
        read_messages([{"role": "user", "content": parts}])
    (message,) = read_messages(
        [{"role": "user", "content": [*parts, {"type": "text", "text": "a"}]}]
    )
    assert [part.text for part in message.parts] == ["a"]
