"""Pace: how much new work a step may take beside running answers, so that these keep streaming.

Learns from the steps themselves: how long one of nothing but decoding takes, and what a prompt's
token adds to it. A step with more in it may then take `max_stretch` times as long, and no longer.
Knows no tensor and no request; with no max_stretch it allows everything.
"""

from __future__ import annotations

from dataclasses import dataclass

_NEW = 0.2  # share of the newest step in what is remembered
_FIRST_TOKENS = 32  # of a prompt, while nobody knows what a token costs
_LEAST_TOKENS = 16  # or a long prompt would take for ever
_LEAST_ROOM = 0.5  # share of the tower's usual time that is worth beginning a part of it
_MOST_WAITS = 3  # steps in a row without a part, or a picture would take for ever
_MOST_S = 3.0  # a slower step is an accident (a page fault, a sleeping machine), not a pace


@dataclass(slots=True)
class Pace:
    """What steps have cost so far; max_stretch: over 1, or None."""

    max_stretch: float | None
    decode_s: float | None = None
    token_s: float | None = None
    _num_waits: int = 0  # steps in a row that left the tower to the next

    @property
    def prefill_tokens(self) -> int | None:
        """Prompt tokens beside rows that decode; None: as many as fit."""
        if self.max_stretch is None:
            return None
        if self.decode_s is None or self.token_s is None:
            return _FIRST_TOKENS
        room_s = (self.max_stretch - 1) * self.decode_s
        return max(_LEAST_TOKENS, int(room_s / max(self.token_s, 1e-9)))

    def tower_s(self, spent_s: float) -> float | None:
        """Seconds for the tower in a step that took spent_s so far; None: no limit in time."""
        if self.max_stretch is None:
            return None
        return 0.0 if self.decode_s is None else self.max_stretch * self.decode_s - spent_s

    def lets_tower_wait(self, spent_s: float) -> bool:
        """Whether a step that took spent_s leaves the tower to the next; asked once a step.

        One that was held up, or is full of a prompt's tokens, has no time for a part: these cannot
        be cut short. After a few such steps one runs all the same.
        """
        room_s, usual_s = self.tower_s(spent_s), self.tower_s(self.decode_s or 0.0)
        if room_s is None or usual_s is None:
            return False
        is_late = room_s < _LEAST_ROOM * usual_s and self._num_waits < _MOST_WAITS
        self._num_waits = self._num_waits + 1 if is_late else 0
        return is_late

    def saw(self, num_decodes: int, num_prefill: int, seconds: float) -> None:
        """A step ran: rows that decoded, prompt tokens beside them, and its time."""
        if self.max_stretch is None or not num_decodes or seconds > _MOST_S:
            return
        if not num_prefill:
            self.decode_s = _blended(self.decode_s, seconds)
        elif self.decode_s is not None:
            token_s = max(0.0, seconds - self.decode_s) / num_prefill
            self.token_s = _blended(self.token_s, token_s)


def _blended(known: float | None, new: float) -> float:
    return new if known is None else (1 - _NEW) * known + _NEW * new
