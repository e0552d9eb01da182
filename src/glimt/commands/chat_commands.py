"""What can be typed in a chat besides questions. Each command changes the state and says what."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from glimt.commands.conversation import Conversation, expanded
from glimt.commands.pictures import read_picture
from glimt.config import ImageLimits
from glimt.engine import EngineStats
from glimt.errors import RequestError
from glimt.types import SamplingDefaults, SamplingParams


@dataclass(slots=True)
class ChatState:
    """What a chat remembers.

    defaults: what the family samples with where `sampling` does not say
    stats:    counters of the engine
    is_over:  the user asked to leave
    """

    conversation: Conversation
    sampling: SamplingParams
    defaults: SamplingDefaults
    stats: Callable[[], EngineStats]
    limits: ImageLimits = field(default_factory=ImageLimits)
    is_over: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A command. run(state, argument) returns what to tell the user."""

    usage: str
    says: str
    run: Callable[[ChatState, str], str]


def as_command(line: str) -> tuple[str, str] | None:
    """(name, argument) if the line is a command, None if it is a question.

    A line that starts with a slash is one; so is one of the originals' words typed alone.
    """
    if line.strip() in _WORDS:
        return _WORDS[line.strip()], ""
    if not line.startswith("/"):
        return None
    name, *rest = line.split(maxsplit=1)
    return name, rest[0].strip() if rest else ""


def run_command(state: ChatState, name: str, argument: str) -> str:
    """Run a command. Raises RequestError, with nothing changed, when it cannot be done."""
    command = COMMANDS.get(name)
    if command is None:
        raise RequestError(name, _unknown(f"{name} {argument}".strip()))
    return command.run(state, argument)


def _unknown(line: str) -> str:
    if os.path.exists(line):  # a file that was dragged into the terminal
        return f"is no command; to ask about this file: /image {line}"
    return "is no command; /help lists them, and a question may start with a space instead"


# --- pictures --------------------------------------------------------------------------------


def _image(state: ChatState, argument: str) -> str:
    waiting = state.conversation.waiting
    if not argument:
        shown = "\n".join(f"waiting: {picture}" for picture in waiting)
        return shown or "no picture waits for the next question; /image PATH adds one"
    if argument == "none":
        waiting.clear()
        return "no picture waits any more"
    pictures = [read_picture(path, state.limits) for path in _paths(argument)]
    waiting.extend(pictures)
    return "\n".join(f"picture for the next question: {picture}" for picture in pictures)


def _paths(argument: str) -> list[str]:
    """The whole argument if there is such a file, else its words, quoted as in a shell."""
    if os.path.exists(expanded(argument)):
        return [expanded(argument)]
    try:
        words = shlex.split(argument)
    except ValueError:  # a quote that never ends
        words = [argument]
    return [expanded(word) for word in words]


# --- the conversation ------------------------------------------------------------------------


def _clear(state: ChatState, argument: str) -> str:
    state.conversation.clear()
    return "the conversation is cleared; the system prompt and the settings stay"


def _system(state: ChatState, argument: str) -> str:
    conversation = state.conversation
    if not argument:
        return f"system prompt: {conversation.system or 'none'}; /system TEXT changes it"
    conversation.system = None if argument in ('""', "none") else argument
    return f"the system prompt is {'set' if conversation.system else 'removed'}"


def _save(state: ChatState, argument: str, overwrite: bool = False) -> str:
    if not argument:
        raise RequestError("save", "needs a path: /save talk.json")
    if not state.conversation.turns:
        raise RequestError("save", "nothing was said yet")
    path = Path(_paths(argument)[0])
    state.conversation.save(path, overwrite)
    return f"saved to {path}"


def _save_over(state: ChatState, argument: str) -> str:
    return _save(state, argument, overwrite=True)


# --- settings --------------------------------------------------------------------------------


def _texts(value: str) -> tuple[str, ...]:
    return (value,)


def _flag(value: str) -> bool:
    return {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}[value]


def _ids(value: str) -> tuple[int, ...]:
    return tuple(int(word) for word in value.replace(",", " ").split())


_SETTINGS: Mapping[str, tuple[Callable[[str], Any], str]] = MappingProxyType(
    {
        "temperature": (float, "a number"),
        "top_k": (int, "a whole number"),
        "top_p": (float, "a number"),
        "min_p": (float, "a number"),
        "repetition_penalty": (float, "a number"),
        "presence_penalty": (float, "a number"),
        "frequency_penalty": (float, "a number"),
        "seed": (int, "a whole number"),
        "max_tokens": (int, "a whole number"),
        "min_tokens": (int, "a whole number"),
        "stop": (_texts, "a text"),
        "stop_token_ids": (_ids, "whole numbers"),
        "ignore_eos": (_flag, "true or false"),
    }
)


def _set(state: ChatState, argument: str) -> str:
    name, _, value = argument.partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if not name:
        return "\n".join(_setting(state, each) for each in _SETTINGS)
    if name not in _SETTINGS:
        raise RequestError("set", f"{name!r} is unknown; choose one of {', '.join(_SETTINGS)}")
    if value:
        state.sampling = replace(state.sampling, **{name: _parse(name, value)})
    return _setting(state, name)


def _parse(name: str, value: str) -> Any:
    if value == "default":
        return getattr(SamplingParams(), name)
    parse, kind = _SETTINGS[name]
    try:
        return parse(value)
    except (ValueError, KeyError):
        raise RequestError(name, f"is {value!r}; {kind} or 'default' is needed") from None


def _setting(state: ChatState, name: str) -> str:
    value = getattr(state.sampling, name)
    if value is not None and value != ():
        return f"{name} = {value}"
    is_greedy = state.sampling.temperature == 0  # the family's own settings do not apply then
    value = None if is_greedy else getattr(state.defaults, name, None)
    return f"{name} = default" + ("" if value is None else f" ({value})")


# --- the rest --------------------------------------------------------------------------------


def _stats(state: ChatState, argument: str) -> str:
    stats, turns = state.stats(), state.conversation.turns
    used = stats.num_blocks - stats.num_free_blocks
    return "\n".join(
        (
            f"turns in this conversation: {len(turns)}",
            f"prompt tokens computed: {stats.prefill_tokens}",
            f"prompt tokens found in the cache: {stats.prefix_hit_tokens}",
            f"decode tokens computed: {stats.decode_tokens}",
            f"pictures encoded: {stats.tower_images} in {stats.tower_s:.2f} s",
            f"pictures found in the cache: {stats.feature_hits}",
            f"cache blocks in use: {used} of {stats.num_blocks}",
        )
    )


def _help(state: ChatState, argument: str) -> str:
    width = max(len(command.usage) for command in COMMANDS.values())
    lines = [f"{command.usage:<{width}}  {command.says}" for command in COMMANDS.values()]
    return "\n".join([*lines, *_HELP])


_HELP = (
    "A line that ends in a backslash goes on in the next one; so does everything between two",
    'lines of """. Ctrl-C stops an answer; at the prompt, Ctrl-C and Ctrl-D leave.',
)


def _quit(state: ChatState, argument: str) -> str:
    state.is_over = True
    return ""


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "/image": Command(
            "/image PATH …", "show pictures with the next question; none drops them", _image
        ),
        "/clear": Command("/clear", "start a new conversation", _clear),
        "/system": Command("/system TEXT", 'set the system prompt; "" removes it', _system),
        "/set": Command("/set NAME VALUE", "change the sampling; /set alone shows it", _set),
        "/save": Command("/save PATH", "write the conversation as JSON messages", _save),
        "/save!": Command("/save! PATH", "the same, over an existing file", _save_over),
        "/stats": Command("/stats", "what was computed and what was cached", _stats),
        "/help": Command("/help", "this list", _help),
        "/quit": Command("/quit", "leave; so does /exit", _quit),
        "/exit": Command("/exit", "leave", _quit),
    }
)
# What the original command lines listen to.
_WORDS: Mapping[str, str] = MappingProxyType({"clear": "/clear", "stop": "/quit"})
