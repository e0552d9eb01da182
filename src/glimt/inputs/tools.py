"""Functions that a model may call, and calls that it made, as OpenAI's requests describe them.

Every mistake is named by its path. Knows no template and no answer.
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from glimt.errors import RequestError
from glimt.inputs.values import check_object, check_text, kind_of, required
from glimt.types import Function, Message, ToolCall, check_schema_depth

_MAX_TOOLS = 128  # OpenAI's limit
_MAX_CHARS = 65536  # of all descriptions together, in JSON
# MindIE's letters, which are OpenAI's and Chinese ones.
_NAME = re.compile(r"[A-Za-z0-9_\-\u4e00-\u9fff]{1,64}")
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def parse_tools(raw: Any) -> tuple[Function, ...]:
    """Check `tools` of a request: null, or a list of

        {"type": "function", "function": {"name": "…", "description": "…", "parameters": {…}}}

    description and parameters may be missing; what else a function says is shown to the model too.
    At most 128, of 65,536 characters together; a name has 1 to 64 letters, digits, _ or -;
    parameters is a JSON schema of an object, at most 24 levels deep.
    Raises RequestError; its field is the exact path, as `tools[1].function.name`.
    """
    given = [] if raw is None else raw
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RequestError("tools", f"is {kind_of(raw)}; a list of functions is needed")
    if len(given) > _MAX_TOOLS:
        said = f"holds {len(given)} functions; at most {_MAX_TOOLS} are accepted"
        raise RequestError("tools", said)
    parsed = [_parse_tool(each, f"tools[{i}]") for i, each in enumerate(given)]
    functions = tuple(function for function, _ in parsed)
    _check_names(functions)
    _check_size(sum(num_chars for _, num_chars in parsed))
    return functions


def _parse_tool(raw: Any, path: str) -> tuple[Function, int]:
    """A function, and its characters in JSON."""
    check_object(raw, path, "a type and a function")
    _check_type(required(raw, "type", path), path)
    path = f"{path}.function"
    described = check_object(raw.get("function"), path, "a name")
    num_chars = len(_json(described, path))
    name = _check_name(required(described, "name", path), f"{path}.name")
    if described.get("description") is not None:
        check_text(described["description"], f"{path}.description")
    schema = _parse_schema(described, f"{path}.parameters")
    return Function(name, described, schema), num_chars


def _check_type(raw: Any, path: str) -> None:
    if raw != "function":
        said = f"is {reprlib.repr(raw)}; function is the only type that can be called"
        raise RequestError(f"{path}.type", said)


def _check_name(raw: Any, path: str) -> str:
    if not isinstance(raw, str) or not _NAME.fullmatch(raw):
        said = f"is {reprlib.repr(raw)}; 1 to 64 letters, digits, _ or - are needed"
        raise RequestError(path, said)
    return raw


def _parse_schema(described: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The schema of the arguments, which are an object whether it says so or not."""
    raw = described.get("parameters")
    if raw is None:
        return _NO_ARGUMENTS
    check_object(raw, path, "a JSON schema")
    if raw.get("type", "object") != "object":
        said = f"is {reprlib.repr(raw['type'])}; arguments are always an object"
        raise RequestError(f"{path}.type", said)
    check_schema_depth(raw, path)
    return {"type": "object", **raw}


def _check_names(functions: Sequence[Function]) -> None:
    """Two functions of one name could not be told apart in a call."""
    names = [function.name for function in functions]
    for i, name in enumerate(names):
        if (first := names.index(name)) < i:
            said = f"is {name!r}, which is the name of tools[{first}] too"
            raise RequestError(f"tools[{i}].function.name", said)


def _check_size(num_chars: int) -> None:
    if num_chars > _MAX_CHARS:
        said = f"has {num_chars} characters in all; at most {_MAX_CHARS} are accepted"
        raise RequestError("tools", said)


def _json(described: Mapping[str, Any], path: str) -> str:
    """A function as text, which has a UTF-8 form."""
    try:
        text = json.dumps(described, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(path, f"has no form in JSON: {error}") from error
    return check_text(text, path)


def field_of_tools(functions: Sequence[Function], messages: Sequence[Message]) -> str | None:
    """The path of what only a model with functions can be told; None if there is nothing."""
    if functions:
        return "tools"
    paths = (f"messages[{i}].tool_calls" for i, message in enumerate(messages) if message.calls)
    return next(paths, None)


# --- calls -----------------------------------------------------------------------------------


def parse_calls(raw: Any, path: str) -> tuple[ToolCall, ...]:
    """Check `tool_calls` of an assistant's message: a list of

        {"id": "…", "type": "function", "function": {"name": "…", "arguments": "JSON text"}}

    The id may be missing, as may the type; the template has no place for either.
    Raises RequestError naming the path, as parse_tools does.
    """
    if not isinstance(raw, Sequence) or isinstance(raw, (str, bytes)):
        raise RequestError(path, f"is {kind_of(raw)}; a list of calls is needed")
    return tuple(_parse_call(each, f"{path}[{i}]") for i, each in enumerate(raw))


def _parse_call(raw: Any, path: str) -> ToolCall:
    check_object(raw, path, "a function")
    _check_type(raw.get("type", "function"), path)
    path = f"{path}.function"
    called = check_object(raw.get("function"), path, "name and arguments")
    name = _check_name(required(called, "name", path), f"{path}.name")
    arguments = check_text(required(called, "arguments", path), f"{path}.arguments")
    return ToolCall(name, arguments or "{}")  # some clients send none so


def check_calls(message: Message, path: str) -> None:
    """Check the calls of a Message: its fields can hold anything, whatever their types say.

    Raises RequestError naming the path.
    """
    calls: Any = message.calls
    if calls and message.role != "assistant":
        raise RequestError(path, f"is given for {message.role}; only the assistant calls")
    if not isinstance(calls, (list, tuple)):
        raise RequestError(path, f"is {kind_of(calls)}; a tuple of calls is needed")
    for i, call in enumerate(calls):
        if not isinstance(call, ToolCall):
            raise RequestError(f"{path}[{i}]", f"is {kind_of(call)}; a ToolCall is needed")
        _check_name(call.name, f"{path}[{i}].name")
        check_text(call.arguments, f"{path}[{i}].arguments")
