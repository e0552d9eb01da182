"""Outcome: all that a client saw of one request, as plain data on one clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal[
    "completed", "empty", "refused", "http", "server", "broken", "timeout", "connection", "cut"
]
"""How a request ended; each ends in exactly one way.

completed:  the stream came to its end, with text
empty:      the same, without any text, so that there is no first token to time
refused:    HTTP 429: the server has no room now; not tried again
http:       any other status but 200
server:     the server reported an error inside the stream
broken:     no event stream, or one that is not in the protocol's form, or ends before its end
timeout:    not finished in time
connection: could not be made
cut:        in flight when the run was stopped
"""

SAID: Mapping[Kind, str] = MappingProxyType(
    {
        "completed": "completed",
        "empty": "no text",
        "refused": "refused, HTTP 429",
        "http": "HTTP",
        "server": "error in the stream",
        "broken": "broken stream",
        "timeout": "timeout",
        "connection": "no connection",
        "cut": "cut",
    }
)


@dataclass(frozen=True, slots=True)
class Counts:
    """The server's own counts of a request; None where it did not say.

    prompt_tokens counts pictures at their full length; output_tokens counts an end token.
    """

    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    image_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request. All times are seconds of one monotonic clock that starts with the run.

    number:      its place in the order of sending
    due_s:       when it should have been sent: later than that only where a limit held it back
    sent_s:      just before it was handed to the connection; making a connection counts
    end_s:       its last token, or when its failure showed
    event_s:     when each event with text was read
    own_tokens:  tokens of its text as this client counted them, without template and pictures;
                 None where no tokenizer was given
    text_tokens: tokens of the answer's text by the client's tokenizer; None without one
    """

    number: int
    kind: Kind
    due_s: float
    sent_s: float
    end_s: float
    num_images: int = 0
    event_s: tuple[float, ...] = ()
    counts: Counts = Counts()
    own_tokens: int | None = None
    text_tokens: int | None = None
    text: str = ""
    status: int | None = None
    error: str = ""

    @property
    def is_completed(self) -> bool:
        """Whether its times and tokens count."""
        return self.kind == "completed"

    @property
    def said(self) -> str:
        """Its kind in words, an HTTP error's with the status."""
        return f"HTTP {self.status}" if self.kind == "http" else SAID[self.kind]

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first token; None if there was none."""
        return self.event_s[0] - self.sent_s if self.event_s else None

    @property
    def itl_s(self) -> tuple[float, ...]:
        """Gaps between successive events with text."""
        return tuple(later - earlier for earlier, later in pairwise(self.event_s))

    @property
    def e2el_s(self) -> float:
        """From sending to the last token."""
        return self.end_s - self.sent_s

    @property
    def queue_s(self) -> float:
        """How long it waited in this client."""
        return self.sent_s - self.due_s

    @property
    def prompt_tokens(self) -> int:
        """As the server counted them; else its text alone, as the client did; else 0."""
        said = self.counts.prompt_tokens
        return said if said is not None else self.own_tokens or 0

    @property
    def output_tokens(self) -> int:
        """As the server counted them; else by the client's tokenizer; else its events."""
        for said in (self.counts.output_tokens, self.text_tokens):
            if said is not None:
                return said
        return len(self.event_s)

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None where there is no second."""
        if self.ttft_s is None or self.output_tokens < 2:
            return None
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1)
