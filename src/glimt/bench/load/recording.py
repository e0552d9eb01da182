"""Recording: the events of one answer's stream, in OpenAI's form, with the times of reading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from glimt.bench.load.outcome import Counts, Kind

_DONE = "[DONE]"
_TEXT_KEYS = ("content", "reasoning_content", "reasoning")  # thinking aloud is generated as well


class StreamFailure(Exception):
    """A request that will not complete. kind: how it ends; the message says why."""

    def __init__(self, kind: Kind, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status


class Recording:
    """What a stream has said so far.

    event_s: when each event with text was read
    end_s:   when the last one with text or a finish reason was; None before the first. The token
             that ends an answer has no text, so its finish reason is when it came
    """

    def __init__(self) -> None:
        self.event_s: list[float] = []
        self.end_s: float | None = None
        self.counts = Counts()
        self._pieces: list[str] = []
        self._is_finished = False

    @property
    def text(self) -> str:
        """All text so far; JSON can write half a character, which no file takes."""
        return _mended("".join(self._pieces))

    def add(self, data: str, now: float) -> None:
        """Take one event, read at `now`. Raises StreamFailure for an error and for no event."""
        if data.strip() == _DONE:
            self._is_finished = True
            return
        chunk = _parse(data)
        if error := chunk.get("error"):
            raise StreamFailure("server", _message(error))
        for choice in _objects(chunk.get("choices")):
            self._add_choice(choice, now)
        if isinstance(usage := chunk.get("usage"), dict):
            self.counts = _counts(usage)

    def _add_choice(self, choice: Mapping[str, Any], now: float) -> None:
        if text := _text(choice):
            self.event_s.append(now)
            self._pieces.append(text)
            self.end_s = now
        if choice.get("finish_reason") is not None:
            self._is_finished = True
            self.end_s = now

    def check_whole(self) -> None:
        """Raise StreamFailure if the stream ended before the answer did, or it has no text."""
        if not self._is_finished:
            said = "the stream ended without a finish reason or [DONE]"
            raise StreamFailure("broken", f"{said}, after {len(self.event_s)} events with text")
        if not self.event_s:
            raise StreamFailure("empty", "the answer has no text")


def _parse(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StreamFailure("broken", f"an event is not JSON: {data[:80]!r}") from error
    if not isinstance(chunk, dict):
        raise StreamFailure("broken", f"an event is not an object: {data[:80]!r}")
    return chunk


def _objects(raw: Any) -> list[dict[str, Any]]:
    """The objects of a list; what is something else is left out."""
    return [each for each in raw if isinstance(each, dict)] if isinstance(raw, list) else []


def _text(choice: Mapping[str, Any]) -> str:
    """What a choice of a chat or of a completion adds."""
    delta = choice.get("delta")
    found = [delta.get(key) for key in _TEXT_KEYS] if isinstance(delta, dict) else []
    said = [text for text in (*found, choice.get("text")) if isinstance(text, str)]
    return "".join(said)


def _counts(usage: Mapping[str, Any]) -> Counts:
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    return Counts(
        prompt_tokens=_count(usage.get("prompt_tokens")),
        output_tokens=_count(usage.get("completion_tokens")),
        cached_tokens=_count(details.get("cached_tokens")),
        image_tokens=_count(details.get("image_tokens")),
    )


def _count(raw: Any) -> int | None:
    return raw if isinstance(raw, int) and not isinstance(raw, bool) and raw >= 0 else None


def _message(error: Any) -> str:
    said = error.get("message") if isinstance(error, dict) else error
    return _mended(str(said or error))[:300]


def _mended(text: str) -> str:
    """The text with halves of a surrogate pair joined, and U+FFFD for one that stands alone."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def message_of_body(body: str) -> str:
    """What an error's body says, in OpenAI's form or in any other, shortened."""
    try:
        raw = json.loads(body)
    except (ValueError, RecursionError):
        return " ".join(body.split())[:300]
    if isinstance(raw, dict):
        raw = raw.get("error") or raw.get("detail") or raw.get("message") or raw
    return _message(raw)
