"""Functions and calls as OpenAI's requests describe them."""

from __future__ import annotations

from typing import Any

import pytest

from glimt.config import ImageLimits
from glimt.errors import RequestError
from glimt.inputs.chat import parse_messages
from glimt.inputs.tools import parse_tools
from glimt.types import Message, TextPart, ToolCall

LIMITS = ImageLimits(max_images=1)


def tool(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def nested(depth: int) -> dict[str, Any]:
    """A schema of so many levels."""
    schema: dict[str, Any] = {"properties": {}}
    for _ in range(depth // 2 - 1):
        schema = {"properties": {"a": schema}}
    return schema


def test_a_function_is_shown_as_it_was_sent():
    """Catches a key that the model should read and does not, and an order that changes."""
    sent = {"parameters": {"properties": {}}, "name": "查天气-2_b", "strict": True, "x": [1]}
    (function,) = parse_tools([{"type": "function", "function": sent}])
    assert (function.name, list(function.described.items())) == ("查天气-2_b", list(sent.items()))
    assert function.parameters == {"type": "object", "properties": {}}


def test_arguments_are_an_object_whatever_is_said_of_them():
    """Catches a call without braces, and arguments of a function that takes none."""
    without, empty = parse_tools([tool("a"), tool("b", parameters={})])
    assert without.parameters == {
        "type": "object", "properties": {}, "additionalProperties": False,
    }  # fmt: skip
    assert empty.parameters == {"type": "object"}
    assert parse_tools(None) == parse_tools([]) == ()


def test_the_limits_themselves_are_allowed():
    """Catches a limit that is one too low."""
    assert len(parse_tools([tool(f"f{i}") for i in range(128)])) == 128
    assert parse_tools([tool("n" * 64)])[0].name == "n" * 64
    assert parse_tools([tool(parameters=nested(24))])[0].parameters["properties"]
    least = len('{"name": "f", "description": ""}')
    assert parse_tools([tool(description="d" * (65536 - least))])


BAD_TOOLS = [
    ("x", "tools"),
    ({"type": "function"}, "tools"),
    ([tool(f"f{i}") for i in range(129)], "tools"),
    (["f"], "tools[0]"),
    ([{"function": {"name": "f"}}], "tools[0].type"),
    ([{"type": "web_search"}], "tools[0].type"),
    ([tool(), {"type": "function"}], "tools[1].function"),
    ([{"type": "function", "function": {}}], "tools[0].function.name"),
    ([tool("")], "tools[0].function.name"),
    ([tool("n" * 65)], "tools[0].function.name"),
    ([tool("a b")], "tools[0].function.name"),
    ([tool("a\n{}")], "tools[0].function.name"),
    ([tool(3)], "tools[0].function.name"),
    ([tool("a"), tool("b"), tool("a")], "tools[2].function.name"),
    ([tool(description=["x"])], "tools[0].function.description"),
    ([tool(parameters=[])], "tools[0].function.parameters"),
    ([tool(parameters={"type": "string"})], "tools[0].function.parameters.type"),
    ([tool(parameters={"type": ["object", "null"]})], "tools[0].function.parameters.type"),
    ([tool(parameters=nested(26))], "tools[0].function.parameters"),
    ([tool(description="d" * 65536)], "tools"),
    ([tool(f"f{i}", description="d" * 9000) for i in range(8)], "tools"),
    ([tool(x="\ud800")], "tools[0].function"),
    ([tool(x=float("nan"))], "tools[0].function"),
    ([tool(x=object())], "tools[0].function"),
]


@pytest.mark.parametrize(("raw", "field"), BAD_TOOLS, ids=[f"{i}" for i in range(len(BAD_TOOLS))])
def test_a_wrong_function_is_refused_by_its_path(raw, field):
    """Catches a description that the prompt or the grammar would fail on, or leave out."""
    with pytest.raises(RequestError) as refused:
        parse_tools(raw)
    assert refused.value.field == field
    assert len(str(refused.value)) < 300


# --- calls -----------------------------------------------------------------------------------


def call(name: Any = "f", arguments: Any = "{}", **more: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def assistant(*calls: Any, **more: Any) -> tuple[Message, ...]:
    said = {"role": "assistant", "tool_calls": list(calls), **more}
    return parse_messages([{"role": "user", "content": "q"}, said], LIMITS)


def test_calls_stand_behind_what_was_said():
    """Catches a call dropped, after which its result answers nothing."""
    message = assistant(call(arguments='{"a": 1}'), call("g", ""), content="x")[1]
    calls = (ToolCall("f", '{"a": 1}'), ToolCall("g", "{}"))
    assert message == Message("assistant", (TextPart("x"),), calls)
    assert assistant(call())[1] == assistant(call(), content=None)[1]
    assert assistant(call())[1] == Message("assistant", (), (ToolCall("f", "{}"),))


BAD_CALLS = [
    ({"tool_calls": "x"}, "tool_calls"),
    ({"tool_calls": {"a": 1}}, "tool_calls"),
    ({"tool_calls": ["x"]}, "tool_calls[0]"),
    ({"tool_calls": [{"id": "1"}]}, "tool_calls[0].function"),
    ({"tool_calls": [call(), {"type": "custom"}]}, "tool_calls[1].type"),
    ({"tool_calls": [call("a\nb")]}, "tool_calls[0].function.name"),
    ({"tool_calls": [{"function": {"name": "f"}}]}, "tool_calls[0].function.arguments"),
    ({"tool_calls": [call(arguments={"a": 1})]}, "tool_calls[0].function.arguments"),
    ({"tool_calls": [call(arguments="\ud800")]}, "tool_calls[0].function.arguments"),
    ({"role": "user", "content": "x", "tool_calls": [call()]}, "tool_calls"),
    ({"content": "x", "function_call": {"name": "f"}}, "function_call"),
    ({"content": None, "tool_calls": [], "function_call": {"name": "f"}}, "function_call"),
]


@pytest.mark.parametrize(("said", "field"), BAD_CALLS, ids=[f"{i}" for i in range(len(BAD_CALLS))])
def test_a_wrong_call_is_refused_by_its_path(said, field):
    """Catches a name that would write a line of the prompt, and a call that nobody made."""
    with pytest.raises(RequestError) as refused:
        parse_messages([{"role": "assistant", "content": None, **said}], LIMITS)
    assert refused.value.field == f"messages[0].{field}"


WRONG_MESSAGES: list[tuple[Any, str]] = [
    (Message("user", (TextPart("x"),), (ToolCall("f", "{}"),)), "calls"),
    (Message("assistant", (), ({"name": "f"},)), "calls[0]"),  # type: ignore[arg-type]
    (Message("assistant", (), (ToolCall("a b", "{}"),)), "calls[0].name"),
    (Message("assistant", (), (ToolCall("f", {}),)), "calls[0].arguments"),  # type: ignore
    (Message("assistant", (), "f"), "calls"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("message", "field"), WRONG_MESSAGES, ids=[f for _, f in WRONG_MESSAGES])
def test_calls_of_a_message_object_are_checked_too(message, field):
    """Catches what Python callers put where no type checker looks."""
    with pytest.raises(RequestError) as refused:
        parse_messages([message], LIMITS)
    assert refused.value.field == f"messages[0].{field}"
