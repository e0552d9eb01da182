"""Which prompt a text of the older protocols becomes: a turn of a chat, or what it says itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from glimt.server.config import ServerConfig
from glimt.server.markers import has_own_template
from glimt.server.parts import Part, text_of, user_message
from glimt.server.service import Ask


def with_prompt(ask: Ask, parts: Sequence[Part], field: str, config: ServerConfig) -> Ask:
    """The request with its prompt in the chat template, which these models were trained for.

    As it is if it brings its own turns, or if the server was told so (--raw-prompt). A picture
    has its place in a turn, so a prompt with one is always a turn.
    Raises RequestError if the prompt is empty.
    """
    message = user_message(parts, field)
    is_own = has_own_template(message.text)
    if not message.num_images and (is_own or config.raw_prompt):
        return replace(ask, prompt=text_of(parts), has_markers=is_own)
    return replace(ask, messages=(message,))
