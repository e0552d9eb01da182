"""Function calling over loopback: unmodified clients, real small models, and replayed answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import glimt
from forms import call as http_call
from glimt.demo.noise import random_weights, write_noise_model
from glimt.errors import RequestError
from glimt.inputs.request import RequestOptions
from glimt.server.config import ServerConfig
from glimt.server.tools import AutoReader, ForcedReader, Offer, read_offer, whole_message
from glimt.types import SampledToken, SamplingParams
from openai_client import connect, said
from serving import Served, serving

WEATHER = {
    "name": "get_weather",
    "description": "查询天气",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"enum": ["北京", "Oslo", 'a "b" \\ c\n']},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "where": {
                "type": "object",
                "properties": {"lat": {"type": "number"}, "tags": {"$ref": "#/$defs/tags"}},
                "required": ["lat"],
                "additionalProperties": False,
            },
        },
        "required": ["city", "days"],
        "additionalProperties": False,
        "$defs": {"tags": {"type": "array", "items": {"enum": ["x", None]}, "maxItems": 2}},
    },
}
TIME = {"name": "get_weather_time"}
LOOSE = {
    "name": "find",
    "parameters": {
        "properties": {"q": {"type": "string", "maxLength": 4}},
        "additionalProperties": False,
    },
}
TOOLS = [{"type": "function", "function": each} for each in (WEATHER, TIME, LOOSE)]
SCHEMAS = {
    "get_weather": WEATHER["parameters"],
    "get_weather_time": {"type": "object", "additionalProperties": False},
    "find": {"type": "object", **LOOSE["parameters"]},
}
NAMES = frozenset(SCHEMAS)
ARGUMENTS = '{"city": "北京", "days": 2}'
CALL = f"get_weather\n{ARGUMENTS}"


def offer(choice: Any = "auto") -> Offer:
    found = read_offer(TOOLS, choice)
    assert found is not None
    return found


# --- what is offered -------------------------------------------------------------------------


def named(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        (None, []),
        ("auto", []),
        ("required", ["get_weather", "get_weather_time", "find"]),
        (named("find"), ["find"]),
    ],
)
def test_a_choice_says_what_must_be_called(choice, forced):
    """Catches a forced call of another function, and functions hidden from the prompt."""
    found = offer(choice)
    assert [function.name for function in found.forced] == forced
    assert [function.name for function in found.functions] == list(SCHEMAS)
    assert (found.grammar is None) == (not forced)
    assert found.grammar is None or list(json.loads(found.grammar.text)) == forced


@pytest.mark.parametrize("tools", [None, []])
@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_no_functions_are_none(tools, choice):
    """Catches a client refused for an empty list, which some send always."""
    assert read_offer(tools, choice) is None
    assert read_offer(TOOLS, "none") is None


@pytest.mark.parametrize(
    ("tools", "choice", "field"),
    [
        ([], "required", "tool_choice"),
        (None, named("find"), "tool_choice"),
        (TOOLS, "any", "tool_choice"),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice"),
        (TOOLS, {"type": "function"}, "tool_choice.function.name"),
        (TOOLS, named("other"), "tool_choice.function.name"),
        (TOOLS, named(["find"]), "tool_choice.function.name"),
        ("x", "auto", "tools"),
        ([{}], "auto", "tools[0].type"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_by_name(tools, choice, field):
    """Catches a choice that is read as another one."""
    with pytest.raises(RequestError) as refused:
        read_offer(tools, choice)
    assert refused.value.field == field


# --- answers taken apart ---------------------------------------------------------------------


def parts(reader: Any, pieces: Sequence[str]) -> tuple[str, str | None, str]:
    """Content, name and arguments of a text that comes in pieces; checks the deltas' form."""
    deltas = [
        delta
        for i, piece in enumerate(pieces)
        for delta in reader.feed(piece, i == len(pieces) - 1)
    ]
    content = "".join(delta.get("content", "") for delta in deltas)
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
    if not calls:
        return content, None, ""
    first, *rest = calls
    assert first["id"].startswith("call_")
    assert (first["index"], first["type"], first["function"]["arguments"]) == (0, "function", "")
    assert all(set(each) == {"index", "function"} for each in rest)
    assert all(set(each["function"]) == {"arguments"} for each in rest)
    return content, first["function"]["name"], "".join(e["function"]["arguments"] for e in rest)


def by_mindies_rule(text: str) -> tuple[str, str | None, str]:
    """The rule written again: name of a function on the first line, an object behind it."""
    line, *rest = text.strip().split("\n")
    arguments = "\n".join(rest)
    try:
        is_call = arguments.startswith("{") and isinstance(json.loads(arguments), dict)
    except ValueError:
        is_call = False
    return ("", line.strip(), arguments) if is_call and line.strip() in NAMES else (text, None, "")


TEXTS = [
    CALL, f"\n{CALL}", f"{CALL}\n", f"get_weather \n{ARGUMENTS}", "get_weather_time\n{}",
    'find\n{\n  "q": "\\u732b\\n"\n}', "get_weather", "get_weather\n", "get_weather\n{", "get_wea",
    "get_weather\n\n{}", "get_weather\n {}", f"{CALL} 好", f"{CALL}\n{CALL}", f"好\n{CALL}",
    "get_weather\n[1]", 'get_weather\n{"a": 1,}', "get_weather\n{'a': 1}", "other\n{}", "{}", "",
    "get_weather: 晴", "get weather\n{}", "\n\n你好", "find find\n{}", 'find\n{"q": NaN}',
    "get_weather_times\n{}", "find\n{}{}", 'find\n{"a": [1, {"b": true}]}',
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_is_the_same_wherever_it_is_cut(text):
    """Catches text that is lost, told twice or told before a call, and a call told as text."""
    expected = by_mindies_rule(text) if "NaN" not in text else (text, None, "")
    cuts = [[text[:at], text[at:]] for at in range(len(text) + 1)]
    for pieces in [[text], list(text), [*text, ""], ["", *text], *cuts]:
        assert parts(AutoReader(NAMES), pieces) == expected


FRAGMENTS = [
    "get_weather", "get", "find", "\n", "\n{", "{", "}", '"q"', '"', ":", "1", "[", "]", ",", " ",
    "true", "\\", "猫", "-", ".5", "e", "\t", '{"q": "x"}',
]  # fmt: skip


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12), st.booleans())
def test_any_answer_follows_mindies_rule(pieces, is_begun):
    """Catches a difference to the rule that other servers of the model have."""
    pieces = ["find\n{", *pieces, "}"] if is_begun else [*pieces, ""]
    assert parts(AutoReader(NAMES), pieces) == by_mindies_rule("".join(pieces))


@pytest.mark.parametrize(
    ("held", "released"),
    [
        ("", "好"),
        ("get_wea", "k"),
        ("get_weather", "s"),
        ("get_weather\n", "x"),
        ("get_weather\n", "\n"),
        ("get_weather\n{", "x"),
        ('find\n{"q": "x', "\n"),
        ('find\n{"q": tr', "o"),
        ("find\n{}", "x"),
        ("\n find", "."),
    ],
)
def test_text_waits_only_while_it_can_become_a_call(held, released):
    """Catches a name's line that is shown before it is known, and text that waits for the end."""
    reader = AutoReader(NAMES)
    assert [reader.feed(char, False) for char in held] == [[]] * len(held)
    assert reader.feed(released, False) == [{"content": held + released}]
    assert reader.feed("get_weather\n{}", True) == [{"content": "get_weather\n{}"}]
    assert not reader.is_call


def test_a_forced_calls_arguments_come_as_they_are_written():
    """Catches arguments that wait for the end, where nothing but a call can come."""
    reader = ForcedReader(NAMES)
    assert reader.feed("get_wea", False) == []
    (begun,) = reader.feed("ther\n", False)
    assert begun["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ""}
    for piece in ('{"city', '": ', '"Oslo"'):
        (delta,) = reader.feed(piece, False)
        assert delta["tool_calls"] == [{"index": 0, "function": {"arguments": piece}}]
        assert not reader.is_call
    reader.feed("}", True)
    assert reader.is_call


@pytest.mark.parametrize("cut", range(len(CALL) + 1))
def test_a_forced_call_that_is_cut_off_shows_no_name_as_text(cut):
    """Catches half a name as the answer's text."""
    message = whole_message(CALL[:cut], reader := ForcedReader(NAMES))
    name, _, arguments = CALL[:cut].partition("\n")
    if "\n" not in CALL[:cut]:
        assert message == {"role": "assistant", "content": ""}
    else:
        assert message["content"] is None
        assert message["tool_calls"][0]["function"] == {"name": name, "arguments": arguments}
    assert reader.is_call == (cut == len(CALL))


# --- over loopback ---------------------------------------------------------------------------


def write_text_model(folder: Path) -> None:
    """A GLM-4 text checkpoint of random weights."""
    write_noise_model(folder, "glm4v_9b")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"vision_config": None, "seq_length": 4096}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(random_weights(config, 0), folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tools") / "glm-4-text"
    write_text_model(folder)
    with serving(str(folder), num_threads=1) as found:
        yield found


@pytest.fixture
def replay(served, monkeypatch) -> Any:
    """Let the model say texts, byte by byte: the first choice the first, and so on."""
    processor = served.engine.engine.inputs.processor
    tokenizer = processor.tokenizer
    id_of = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.num_ids))}
    end = tokenizer.special_ids["<|observation|>"]

    def start(*texts: str) -> None:
        ids = [[*(id_of[bytes([byte])] for byte in text.encode()), end] for text in texts]

        def sample(logits: Any, plan: Any) -> list[SampledToken]:
            return [
                SampledToken(row.sequence_id, ids[row.index][len(row.output_ids)], -0.5)
                for row in plan.sampled_rows
            ]

        monkeypatch.setattr(served.engine.engine.sampler, "sample", sample)

    return start


def create(client: openai.OpenAI, **more: Any) -> Any:
    fields = {"model": "demo", "messages": said("hi"), "tools": TOOLS, "max_tokens": 200}
    return client.chat.completions.create(**{**fields, **more})


def streamed(client: openai.OpenAI, **more: Any) -> tuple[list[dict[str, Any]], list[Any], Any]:
    """Messages put together from their deltas, finish reasons by choice, and the counts."""
    options = {"include_usage": True}
    *chunks, last = create(client, stream=True, stream_options=options, **more)
    n = more.get("n", 1)
    messages: list[dict[str, Any]] = [{} for _ in range(n)]
    reasons = [None] * n
    for chunk in chunks:
        (choice,) = chunk.choices
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        _merge(messages[choice.index], choice.delta)
    return messages, reasons, last.usage


def _merge(message: dict[str, Any], delta: Any) -> None:
    if delta.role:
        assert message == {}  # the role comes first, and once
        message.update(role=delta.role, content=delta.content, arguments=[])
        return
    if delta.content is not None:
        assert delta.content
        message["content"] += delta.content
    for each in delta.tool_calls or ():
        if each.id:
            assert "name" not in message
            message.update(id=each.id, type=each.type, name=each.function.name)
            assert each.function.arguments == ""
        else:
            assert each.index == 0
            message["arguments"].append(each.function.arguments)


def test_a_call_its_result_and_the_answer(served, client, replay):
    """Catches a conversation that cannot go on: the call is sent back as it came."""
    replay(CALL)
    first = create(client)
    choice = first.choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (called,) = choice.message.tool_calls
    assert (called.type, called.function.name) == ("function", "get_weather")
    assert called.function.arguments == ARGUMENTS
    assert first.usage.completion_tokens == len(CALL.encode()) + 1
    result = {"role": "tool", "tool_call_id": called.id, "content": '{"t": 21}'}
    messages = [*said("hi"), choice.message.model_dump(), result]
    replay("\n21 °C。")
    for more in ({}, {"tool_choice": "none"}):
        second = create(client, messages=messages, **more)
        assert second.choices[0].message.content == "21 °C。"
        assert second.choices[0].finish_reason == "stop"
        assert second.choices[0].message.tool_calls is None
        shown = TOOLS if not more else []
        prompt = served.engine.engine.prepare_chat(messages, None, RequestOptions(tools=shown))
        assert second.usage.prompt_tokens == len(prompt.prompt.token_ids)


def test_a_streamed_call_is_the_whole_one(client, replay):
    """Catches deltas that do not add up, and a name's line among the text."""
    replay(CALL)
    (message,), reasons, usage = streamed(client)
    assert (message["role"], message["content"], reasons) == ("assistant", None, ["tool_calls"])
    assert (message["type"], message["name"]) == ("function", "get_weather")
    assert message["id"].startswith("call_")
    assert "".join(message["arguments"]) == ARGUMENTS
    assert usage.completion_tokens == len(CALL.encode()) + 1


def test_ids_of_calls_differ(client, replay):
    """Catches two results for one call."""
    replay(CALL, CALL)
    choices = create(client, n=2, seed=1).choices
    assert len({choice.message.tool_calls[0].id for choice in choices}) == 2


@pytest.mark.parametrize("text", ["好，我看看。", "get_weather", f"{CALL}!", "get_weather\n{}x"])
def test_text_is_text_streamed_or_not(client, replay, text):
    """Catches an answer that loses its beginning, which looked like a call."""
    replay(text)
    whole = create(client).choices[0]
    assert (whole.message.content, whole.finish_reason) == (text, "stop")
    (message,), reasons, _ = streamed(client)
    assert (message["content"], reasons) == (text, ["stop"])
    assert "name" not in message


def test_every_choice_is_taken_apart_alone(client, replay):
    """Catches one choice's text in another's call."""
    texts = [CALL, "你好", "find\n{}", "find\n{"]
    replay(*texts)
    whole = create(client, n=4, seed=1).choices
    words = [choice.finish_reason for choice in whole]
    assert words == ["tool_calls", "stop", "tool_calls", "stop"]
    assert [choice.message.content for choice in whole] == [None, "你好", None, "find\n{"]
    messages, reasons, usage = streamed(client, n=4, seed=1)
    assert reasons == words
    assert [message["content"] for message in messages] == [None, "你好", None, "find\n{"]
    assert ["".join(message["arguments"]) for message in messages] == [ARGUMENTS, "", "{}", ""]
    assert usage.completion_tokens == sum(len(text.encode()) + 1 for text in texts)


def test_logprobs_of_a_call_are_all_told_once(client, replay):
    """Catches log-probabilities that are lost with the text that was held back."""
    replay(CALL)
    whole = create(client, logprobs=True).choices[0].logprobs.content
    assert bytes(b for token in whole for b in token.bytes) == CALL.encode()
    chunks = create(client, logprobs=True, stream=True)
    told = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert bytes(b for tokens in told for token in tokens for b in token.bytes) == CALL.encode()


def test_running_counts_go_on_while_text_waits(client, replay):
    """Catches counts of a chunk that leave out tokens whose text was held back."""
    replay(CALL)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(create(client, stream=True, stream_options=options))
    assert chunks[0].usage.completion_tokens == len(CALL.encode()) + 1
    assert len({chunk.usage.completion_tokens for chunk in chunks}) == 1


def test_tokenize_counts_the_functions_too(served):
    """Catches a client that is told of more room than a request with functions leaves it."""
    messages = [*HISTORY, *said("hi")]
    for tools in (TOOLS, [], None):
        told = http_call(served.url, "/tokenize", {"messages": messages, "tools": tools}).json
        options = RequestOptions(tools=tools or ())
        prompt = served.engine.engine.prepare_chat(messages, None, options).prompt
        assert told["tokens"] == list(prompt.token_ids)
    for bare in ({"prompt": "hi"}, {"prompt": "hi", "add_special_tokens": False}):
        reply = http_call(served.url, "/tokenize", {**bare, "tools": TOOLS})
        assert (reply.status, reply.json["error"]["param"]) == (400, "tools")


class GetWeather(pydantic.BaseModel):
    """A function as the client's own helper describes one."""

    city: str
    days: int


def test_the_clients_own_helpers_read_calls(client, replay):
    """Catches a form that the plain client takes and its parsers do not."""
    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    replay(CALL)
    fields = {"model": "demo", "messages": said("hi"), "tools": [tool], "max_tokens": 200}
    parsed = client.chat.completions.parse(**fields)
    called = parsed.choices[0].message.tool_calls[0].function
    assert called.parsed_arguments == GetWeather(city="北京", days=2)
    with client.chat.completions.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    assert "content.delta" not in kinds
    assert final.choices[0].message.tool_calls[0].function.parsed_arguments.city == "北京"
    assert final.choices[0].finish_reason == "tool_calls"


# --- forced calls, by a real model of random weights -----------------------------------------


def check_call(name: str, arguments: str) -> None:
    jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("seed", range(6))
def test_every_required_call_is_valid(client, seed):
    """Catches a grammar that lets anything but a call through, whatever the model wants to say."""
    more = {"tool_choice": "required", "seed": seed, "n": 4, "max_tokens": 400}
    choices = create(client, temperature=1.5, **more).choices
    for choice in choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (called,) = choice.message.tool_calls
        check_call(called.function.name, called.function.arguments)


def test_required_calls_are_of_every_function(client):
    """Catches a grammar of the first function alone, or of a name that hides a longer one."""
    found = {
        choice.message.tool_calls[0].function.name
        for seed in range(4)
        for choice in create(
            client, tool_choice="required", seed=seed, n=8, temperature=2, max_tokens=400
        ).choices
    }
    assert found == NAMES


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function_is_called(client, name):
    """Catches another function's call, and a stream that differs from the whole answer."""
    more = {"tool_choice": named(name), "seed": 3, "max_tokens": 400, "temperature": 1}
    (called,) = create(client, **more).choices[0].message.tool_calls
    assert called.function.name == name
    check_call(name, called.function.arguments)
    (message,), reasons, _ = streamed(client, **more)
    assert (message["name"], message["content"], reasons) == (name, None, ["tool_calls"])
    assert "".join(message["arguments"]) == called.function.arguments
    assert len(message["arguments"]) > 1  # as they are written, not at the end


def test_a_forced_call_may_be_cut_by_the_limit(client):
    """Catches half a call that claims to be a whole one, and half a name as text."""
    more = {"tool_choice": named("get_weather"), "temperature": 0}
    whole = create(client, max_tokens=400, **more)
    arguments = whole.choices[0].message.tool_calls[0].function.arguments
    cut = create(client, max_tokens=whole.usage.completion_tokens - 2, **more).choices[0]
    assert cut.finish_reason == "length"
    assert arguments.startswith(cut.message.tool_calls[0].function.arguments)
    assert cut.message.tool_calls[0].function.arguments != arguments
    short = create(client, max_tokens=1, **more).choices[0]
    assert (short.finish_reason, short.message.content) == ("length", "")
    assert short.message.tool_calls is None


def test_a_schema_that_cannot_be_used_names_its_function(client):
    """Catches an error that leaves the caller with a hundred functions to look through."""
    wrong = {"name": "wrong", "parameters": {"properties": {"a": {"type": "king"}}}}
    tools = [*TOOLS, {"type": "function", "function": wrong}]
    with pytest.raises(openai.BadRequestError, match=r"parameters of wrong.*king") as refused:
        create(client, tools=tools, tool_choice="required")
    assert refused.value.param == "tool_choice"


def test_openapi_describes_a_conversation_with_calls(served):
    """Catches a generated client that cannot send a function's result."""
    told = http_call(served.url, "/openapi.json").json
    schema = {**told, "$ref": "#/components/schemas/ChatBody"}
    body = {"messages": HISTORY, "tools": TOOLS}
    jsonschema.validate(body, schema)
    for wrong in ({"messages": [{"role": "tool"}]}, {"tools": [{}]}, {"tools": [{"type": "x"}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(body | wrong, schema)


# --- who may ---------------------------------------------------------------------------------

REFUSED = [
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"tool_choice": "any"}, "tool_choice"),
    ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"response_format": {"type": "json_object"}, "tool_choice": "required"}, "response_format"),
    ({"extra_body": {"guided_regex": "a"}}, "guided_regex"),
    ({"extra_body": {"ignore_eos": True}, "tool_choice": "required"}, "ignore_eos"),
    ({"extra_body": {"include_stop_str_in_output": True}}, "include_stop_str_in_output"),
    ({"extra_body": {"continue_final_message": True}}, "continue_final_message"),
    ({"extra_body": {"add_generation_prompt": False}}, "add_generation_prompt"),
    ({"extra_body": {"parallel_tool_calls": "x"}}, "parallel_tool_calls"),
    ({"messages": [*said("q"), {"role": "assistant", "tool_calls": [{}]}]}, None),
]


@pytest.mark.parametrize(("fields", "param"), REFUSED, ids=[str(f)[:50] for f, _ in REFUSED])
def test_what_cannot_be_with_tools_is_refused_by_name(client, fields, param):
    """Catches a field that is dropped beside tools, streamed or not."""
    for more in ({}, {"stream": True}):
        with pytest.raises(openai.BadRequestError) as refused:
            create(client, **fields, **more)
        assert refused.value.param == (param or "messages[1].tool_calls[0].function")


def test_what_asks_for_nothing_is_accepted(client):
    """Catches clients turned away for fields that they always send."""
    answers = [
        create(client, max_tokens=1, parallel_tool_calls=each) for each in (True, False, None)
    ]
    answers.append(create(client, tools=[], max_tokens=1))
    answers.append(create(client, max_tokens=1, response_format={"type": "text"}))
    assert [answer.usage.completion_tokens for answer in answers] == [1] * 5


HISTORY = [
    *said("hi"),
    {"role": "assistant", "content": None, "tool_calls": [{"function": {
        "name": "find", "arguments": "{}"}}]},
    {"role": "tool", "content": "x"},
]  # fmt: skip


@pytest.fixture(scope="module", params=["demo", "demo-visualglm"])
def untrained(request) -> Iterator[tuple[str, Served]]:
    with serving(request.param) as found:
        yield request.param, found


@pytest.fixture(scope="module", params=["demo", "demo-visualglm"])
def enabled(request) -> Iterator[tuple[str, Served]]:
    with serving(request.param, ServerConfig(num_decoders=0, enable_tools=True)) as found:
        yield request.param, found


def test_models_that_were_not_trained_for_it_refuse(untrained):
    """Catches functions offered to a model that cannot know what they are."""
    model, served = untrained
    with connect(served) as client:
        for fields, param in [
            ({}, "tools"),
            ({"tool_choice": "required"}, "tools"),
            ({"messages": HISTORY, "tools": []}, "messages[1].tool_calls"),
        ]:
            with pytest.raises(openai.BadRequestError) as refused:
                create(client, **fields)
            assert refused.value.param == param
            assert ("--enable-tools" in str(refused.value)) == (model == "demo")
        answer = create(client, tool_choice="none", max_tokens=1)
        plain = create(client, tools=[], max_tokens=1)
        assert answer.usage.prompt_tokens == plain.usage.prompt_tokens


def test_the_flag_turns_it_on_for_glm4v_alone(enabled):
    """Catches a flag that does nothing, and VisualGLM with a prompt that it has no form for."""
    model, served = enabled
    with connect(served) as client:
        if model == "demo-visualglm":
            for fields in ({}, {"messages": HISTORY, "tools": []}):
                with pytest.raises(openai.BadRequestError, match="no form for functions"):
                    create(client, **fields)
            return
        choice = create(client, messages=HISTORY, tool_choice=named("find"), max_tokens=400)
        (called,) = choice.choices[0].message.tool_calls
        check_call("find", called.function.arguments)


def test_python_callers_get_the_same_prompt_and_the_models_text(tmp_path):
    """Catches tools that only the server knows of."""
    write_text_model(tmp_path / "model")
    llm = glimt.LLM(str(tmp_path / "model"), num_threads=1)
    grammar = offer(named("find")).grammar
    sampling = SamplingParams(grammar=grammar, max_tokens=400, seed=1)
    answer = llm.chat(HISTORY, sampling, options=RequestOptions(tools=TOOLS))
    name, _, arguments = answer.text.partition("\n")
    check_call(name, arguments)
    assert len(answer.prompt_token_ids) > 2 * len(llm.chat(HISTORY, sampling).prompt_token_ids)
    options = RequestOptions(tools=TOOLS)
    for prepare, prompt in ((llm.engine.prepare_text, "x"), (llm.engine.prepare_tokens, [1])):
        with pytest.raises(RequestError, match="conversation alone"):
            prepare(prompt, sampling, options)


def test_a_raw_reply_has_the_wire_form(served, replay):
    """Catches a field that the client adds by itself, such as a null content."""
    replay(CALL)
    body = {"messages": said("hi"), "tools": TOOLS}
    message = http_call(served.url, "/v1/chat/completions", body).json["choices"][0]["message"]
    assert message["content"] is None
    assert set(message) == {"role", "content", "tool_calls"}
    assert set(message["tool_calls"][0]) == {"id", "type", "function"}
    replay("x")
    plain = http_call(served.url, "/v1/chat/completions", body).json["choices"][0]["message"]
    assert plain == {"role": "assistant", "content": "x"}
