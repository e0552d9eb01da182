"""Log lines on stderr: for people, or an object a line for machines."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from glimt.errors import ConfigError

LOG_FORMATS = ("text", "json")
LOG_LEVELS = ("debug", "info", "warning", "error")
# A terminal obeys these; a model or a file name may hold any of them.
_CONTROLS = {i: 0xFFFD for i in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(i) not in "\n\t"}


def printable(text: str) -> str:
    """The text with U+FFFD for every character that would steer a terminal."""
    return text.translate(_CONTROLS)


class _Lines(logging.Formatter):
    """A line for people, or an object for machines; facts of a request are part of both."""

    def __init__(self, as_json: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")
        self._as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback follows in the text form alone, and is a field in the other."""
        facts: dict[str, Any] = getattr(record, "facts", {})
        if not self._as_json:
            listed = " ".join(f"{name}={value}" for name, value in facts.items())
            return " ".join([printable(super().format(record)), *([listed] if facts else [])])
        said = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **facts,
        }
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, ensure_ascii=False)


def start_logging(level: str, form: str) -> None:
    """Log to stderr. Raises ConfigError for a level or form that is none."""
    for name, given, known in (("log_level", level, LOG_LEVELS), ("log_format", form, LOG_FORMATS)):
        if given not in known:
            said = f"{given!r} is unknown; choose one of {', '.join(known)}"
            raise ConfigError(name, [said])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(form == "json"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
