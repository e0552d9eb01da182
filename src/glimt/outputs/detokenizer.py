"""One choice's token ids become the text that the caller sees, piece by piece.

Joins four promises: no half characters (the decoder), the text as the original shows it
(`finish_text`), nothing given that later text would change (`stable_length`), and nothing of a
stop string. Knows no tokenizer and no family: both come in as functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from glimt.outputs.stop import find_stop, partial_stop

if TYPE_CHECKING:
    from glimt.models.base import TokenDecoder


class TextStream:
    """The visible text of one choice.

        raw       text of all tokens               ……………………………………………………
        stable    its finished form is certain     ……………………………………………
        given     and may not begin a stop string  …………………………………

    All that feed() and close() return, joined, is finish_text(whole raw text) up to the first
    stop string in it (first as find_stop has it), however the text is split into tokens.
    """

    stop_reason: str | None
    """The stop string that ended the text, once one was found."""

    def __init__(
        self,
        decoder: TokenDecoder,
        finish_text: Callable[[str], str],
        stable_length: Callable[[str], int],
        stops: tuple[str, ...],
    ) -> None:
        """Start with no text. The functions are those of models.base.Processor."""
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
        visible = finished[len(self._given) : end]
        self._given += visible
        return visible
