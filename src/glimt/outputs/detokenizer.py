"""One choice's token ids become the text that the caller sees, piece by piece.

Joins four promises: no half characters (the decoder), the text as the original shows it
(`finish_text`), nothing given that later text would change (`stable_length`), and nothing of a
stop string. Knows no tokenizer and no family: both come in as functions.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from glimt.outputs.stop import find_stop, partial_stop

if TYPE_CHECKING:
    from glimt.models.base import TokenDecoder


class ExactDecoder:
    """Gives what the tokens stand for, byte by byte: not a blank more or less at the beginning."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Text that became certain with this token."""
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """An incomplete last character as U+FFFD."""
        return self._utf8.decode(b"", final=True)


class NamingDecoder:
    """Another decoder that writes special tokens out by their names."""

    def __init__(self, inner: TokenDecoder, names: Mapping[int, str]) -> None:
        self._inner = inner
        self._names = names

    def feed(self, token_id: int) -> str:
        """Text that became certain with this token; a name ends a character that is incomplete."""
        if token_id in self._names:
            return self._inner.finish() + self._names[token_id]
        return self._inner.feed(token_id)

    def finish(self) -> str:
        """What the inner one held back."""
        return self._inner.finish()


class TextStream:
    """The visible text of one choice.

        raw       text of all tokens               ……………………………………………………
        stable    its finished form is certain     ……………………………………………
        given     and may not begin a stop string  …………………………………

    All that feed() and close() return, joined, is finish_text(whole raw text) up to the first
    stop string in it (first as find_stop has it), or to its end if it is to be shown, however the
    text is split into tokens.
    """

    stop_reason: str | None
    """The stop string that ended the text, once one was found."""

    def __init__(
        self,
        decoder: TokenDecoder,
        finish_text: Callable[[str], str],
        stable_length: Callable[[str], int],
        stops: tuple[str, ...],
        shows_stop: bool = False,
    ) -> None:
        """Start with no text. The functions are those of models.base.Processor."""
        self._shows_stop = shows_stop
        self.stop_reason = None
        self._decoder = decoder
        self._finish_text = finish_text
        self._stable_length = stable_length
        self._stops = stops
        self._raw = ""
        self._given = ""

    @property
    def text(self) -> str:
        """All text given so far."""
        return self._given

    def feed(self, token_id: int) -> str:
        """Take the next token; return the text that became visible, often none."""
        if self.stop_reason is not None:
            return ""
        new = self._decoder.feed(token_id)
        if not new:
            return ""
        self._raw += new
        finished = self._finish_text(self._raw[: self._stable_length(self._raw)])
        return self._give(finished, partial_stop(finished, self._stops))

    def close(self) -> str:
        """The answer is over: return what was held back."""
        if self.stop_reason is not None:
            return ""
        self._raw += self._decoder.finish()
        return self._give(self._finish_text(self._raw), held_back=0)

    def _give(self, finished: str, held_back: int) -> str:
        """Advance to the first stop string, or to the end less held_back characters."""
        # A new stop string cannot begin before len(given): what may begin one was held back.
        found = find_stop(finished, self._stops, len(self._given))
        end = len(finished) - held_back
        if found:
            end, self.stop_reason = found
            end += len(self.stop_reason) * self._shows_stop
        visible = finished[len(self._given) : end]
        self._given += visible
        return visible
