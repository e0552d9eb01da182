"""Function calling in OpenAI's form: which functions are offered, and the call that an answer is.

GLM-4 calls a function by writing its name, a line feed and the arguments as a JSON object, and by
nothing else; any other answer is text. Where the call is the model's choice (`auto`), that is
MindIE's rule for the family (Ascend/MindIE-LLM, tool_call_process_chatglm.py), for the functions
that were offered alone: so nothing of an answer is given away while it can still become a call.
Where a call is asked for (`required`, or one by name), a grammar makes the answer one. The form of
the prompt is the family's (models/).
"""

from __future__ import annotations

import json
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glimt.errors import RequestError
from glimt.inputs.tools import field_of_tools, parse_tools
from glimt.models.base import Processor, ToolPrompts
from glimt.server.json_prefix import JsonObjectPrefix
from glimt.types import Function, Grammar, Message, ToolCall

Delta = dict[str, Any]
_JSON_BLANKS = " \t\n\r"


@dataclass(frozen=True, slots=True)
class Offer:
    """Functions that a model may call.

    tools:  as they were sent, for the prompt
    forced: those of which it must call one; empty: it may answer with text
    """

    tools: Sequence[Mapping[str, Any]]
    functions: tuple[Function, ...]
    forced: tuple[Function, ...] = ()

    @property
    def grammar(self) -> Grammar | None:
        """What the answer must look like. Raises RequestError for schemas that are too long."""
        return Grammar.of_calls(self.forced, "tool_choice") if self.forced else None

    def reader(self) -> CallReader:
        """One choice's answer, from its beginning."""
        names = frozenset(function.name for function in self.functions)
        return ForcedReader(names) if self.forced else AutoReader(names)


def read_offer(tools: Any, choice: Any) -> Offer | None:
    """What `tools` and `tool_choice` of a request offer; None: no function.

    Raises RequestError naming the field.
    """
    if not tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice", "needs tools: without any there is nothing to call")
        return None
    if choice == "none":
        return None
    functions = parse_tools(tools)
    return Offer(tools, functions, _forced(functions, choice))


def _forced(functions: tuple[Function, ...], choice: Any) -> tuple[Function, ...]:
    if choice is None or choice == "auto":
        return ()
    if choice == "required":
        return functions
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        known = 'none, auto, required, {"type": "function", "function": {"name": "…"}}'
        raise RequestError("tool_choice", f"must be one of {known}")
    wanted = choice.get("function")
    name = wanted.get("name") if isinstance(wanted, Mapping) else None
    chosen = tuple(function for function in functions if function.name == name)
    if not chosen:
        said = f"is {str(name)[:80]!r}, which none of the tools is called"
        raise RequestError("tool_choice.function.name", said)
    return chosen


def check_is_enabled(
    offer: Offer | None, messages: Sequence[Message], processor: Processor, is_enabled: bool
) -> None:
    """Raises RequestError for functions and calls that the model was not trained for.

    is_enabled: the server was told to try it all the same (--enable-tools)
    """
    field = field_of_tools(offer.functions if offer else (), messages)
    is_untrained = isinstance(processor, ToolPrompts) and not processor.knows_tools
    if field is not None and is_untrained and not is_enabled:
        said = "is not supported: this model was not trained to call functions; leave it out"
        if field == "tools":
            said += ", send tool_choice: none"
        raise RequestError(field, f"{said}, or start the server with --enable-tools to try it")


# --- answers ---------------------------------------------------------------------------------


def read_call(text: str, names: frozenset[str]) -> ToolCall | None:
    """The call that a whole answer is; None: it is text."""
    line, _, rest = text.lstrip().partition("\n")
    name, arguments = line.strip(), rest.rstrip(_JSON_BLANKS)
    if name not in names or not arguments.startswith("{"):
        return None
    try:
        json.loads(arguments, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return ToolCall(name, arguments)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class CallReader(ABC):
    """One choice's text, taken apart as it comes. What to give when is the subclasses' affair.

    name: of the function, once something of its call was given
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.name: str | None = None
        self._names = names
        self._text = ""

    def feed(self, text: str, is_last: bool) -> list[Delta]:
        """Deltas of a stream's message that have become certain; none while nothing has.

        is_last: nothing follows, so nothing may be held back
        """
        self._text += text
        return self._feed(text, is_last)

    @abstractmethod
    def _feed(self, text: str, is_last: bool) -> list[Delta]:
        """The same; `_text` is all there is, and `text` its end."""

    @property
    def is_call(self) -> bool:
        """Whether all that was fed is one whole call."""
        return self.name is not None and read_call(self._text, self._names) is not None

    def _begin(self, name: str, arguments: str) -> list[Delta]:
        """The call's name; then the first of its arguments, if there are any."""
        self.name = name
        called = {"name": name, "arguments": ""}
        call = {"index": 0, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
        return [{"tool_calls": [{**call, "function": called}]}, *self._go_on(arguments)]

    def _go_on(self, arguments: str) -> list[Delta]:
        call = {"index": 0, "function": {"arguments": arguments}}
        return [{"tool_calls": [call]}] if arguments else []


class AutoReader(CallReader):
    """Text or a call, as the model likes.

    Only the end tells that an answer is a call, since any text behind the arguments makes it text.
    Most answers are told to be text by their first characters.
    """

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self._is_text = False
        self._arguments: JsonObjectPrefix | None = None  # once the name's line is whole

    def _feed(self, text: str, is_last: bool) -> list[Delta]:
        if self._is_text:
            return _content(text)
        if is_last and (call := read_call(self._text, self._names)):
            return self._begin(call.name, call.arguments)
        self._is_text = is_last or not self._can_be_call(text)
        return _content(self._text) if self._is_text else []

    def _can_be_call(self, text: str) -> bool:
        if self._arguments is not None:
            return self._arguments.feed(text)
        line, line_end, rest = self._text.lstrip().partition("\n")
        if not line_end:
            begun = line.rstrip()
            return begun in self._names or any(name.startswith(line) for name in self._names)
        if line.strip() not in self._names or not rest:
            return line.strip() in self._names
        self._arguments = JsonObjectPrefix()
        return rest.startswith("{") and self._arguments.feed(rest)


class ForcedReader(CallReader):
    """A call by a grammar: what follows the name's line is arguments, as they come.

    A name that was cut off gives nothing.
    """

    def _feed(self, text: str, is_last: bool) -> list[Delta]:
        if self.name is not None:
            return self._go_on(text)
        name, line_end, arguments = self._text.partition("\n")
        return self._begin(name, arguments) if line_end else []


def _content(text: str) -> list[Delta]:
    return [{"content": text}] if text else []


def whole_message(text: str, reader: CallReader) -> dict[str, Any]:
    """The message of a whole answer: its text, or null beside the call. Leaves the reader read."""
    deltas = reader.feed(text, is_last=True)
    if reader.name is None:
        content = "".join(delta["content"] for delta in deltas)
        return {"role": "assistant", "content": content}
    first, *rest = (delta["tool_calls"][0] for delta in deltas)
    arguments = "".join(each["function"]["arguments"] for each in rest)
    called = {"name": reader.name, "arguments": arguments}
    call = {"id": first["id"], "type": "function", "function": called}
    return {"role": "assistant", "content": None, "tool_calls": [call]}
