"""An event stream's bytes -> the data of its events. Knows no clock, network or JSON.

Source of the form: HTML Living Standard, section 9.2, "Server-sent events".
"""

from __future__ import annotations


class EventReader:
    """Takes bytes as they come, cut anywhere; gives each event's data once it is whole."""

    def __init__(self) -> None:
        self._line = b""  # not ended yet
        self._data: list[str] = []  # of the event that is being read

    def feed(self, received: bytes) -> list[str]:
        """Data of the events that ended in these bytes. Raises UnicodeDecodeError."""
        *lines, self._line = (self._line + received).split(b"\n")
        return [data for line in lines if (data := self._take(line)) is not None]

    def finish(self) -> str | None:
        """Data of an event that the end of the stream ended, if there is one."""
        if self._line:
            self._take(self._line)
            self._line = b""
        return self._ended()

    def _take(self, raw: bytes) -> str | None:
        """Read one line; the event's data if it is the blank line after it."""
        line = raw.removesuffix(b"\r").decode()
        if not line:
            return self._ended()
        name, _, value = line.partition(":")
        if name == "data":  # a comment has no name; event, id and retry say nothing here
            self._data.append(value.removeprefix(" "))
        return None

    def _ended(self) -> str | None:
        data, self._data = self._data, []
        return "\n".join(data) if data else None
