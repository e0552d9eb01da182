"""Single tokens as protocols show them: id, text, log-probability, and whether they are special.

And the times of the steps they came in, as MindIE's forms have them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from glimt.types import Request, SampledToken, StepOutput

if TYPE_CHECKING:
    from glimt.models.base import Processor

LEAST_LOGPROB = -9999.0  # JSON has no infinity; vLLM's value


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token. logprob: None where nobody asked; top: the likeliest ones, where asked for."""

    id: int
    text: str
    logprob: float | None
    is_special: bool
    top: tuple[ShownToken, ...] = ()


class TokenTexts:
    """What the tokens of one model look like."""

    def __init__(self, processor: Processor) -> None:
        self._tokenizer = processor.tokenizer
        self._names = {number: name for name, number in processor.tokenizer.special_ids.items()}

    def shown(self, token_id: int, logprob: float | None = None) -> ShownToken:
        """A token by itself: half a character is U+FFFD, a special token its name."""
        if token_id in self._names:
            return ShownToken(token_id, self._names[token_id], finite(logprob), True)
        text = self._tokenizer.decode([token_id])
        return ShownToken(token_id, text, finite(logprob), False)

    def of_step(self, output: StepOutput) -> list[ShownToken]:
        """The tokens of one step; all text that became visible with it is the last one's.

        So the texts of the tokens that are not special add up to the answer. A special token that
        releases text shows the text.
        """
        sampled: tuple[SampledToken | None, ...] = output.logprobs or (None,) * len(
            output.token_ids
        )
        last = len(output.token_ids) - 1
        return [
            self._of_step(token_id, each, output.text if i == last else "")
            for i, (token_id, each) in enumerate(zip(output.token_ids, sampled, strict=True))
        ]

    def _of_step(self, token_id: int, sampled: SampledToken | None, text: str) -> ShownToken:
        logprob = finite(sampled.logprob) if sampled is not None else None
        top = tuple(
            self.shown(each.token_id, each.logprob)
            for each in (sampled.top_logprobs if sampled is not None else ())
        )
        name = self._names.get(token_id)
        is_special = name is not None and not text
        shown = text if name is None or text else name
        return ShownToken(token_id, shown, logprob, is_special, top)


def finite(logprob: float | None) -> float | None:
    """As JSON can say it; None for none."""
    return None if logprob is None else max(logprob, LEAST_LOGPROB)


def is_end_of_text(request: Request, stop_reason: str | int | None) -> bool:
    """Whether a finish reason "stop" is the model's own end, and nothing the caller asked for."""
    return not isinstance(stop_reason, str) and stop_reason not in request.sampling.stop_token_ids


def finish_word(request: Request, reason: str | None, stop_reason: str | int | None) -> str:
    """A finish reason in TGI's and MindIE's words."""
    if reason == "length":
        return "length"
    is_end = reason == "stop" and is_end_of_text(request, stop_reason)
    return "eos_token" if is_end else "stop_sequence"


def seed_of(request: Request) -> int | None:
    """The first choice's seed; None for a greedy answer, which has none."""
    return request.seeds[0] if request.sampling.temperature else None


class StepTimes:
    """Times of MindIE's events, in ms: the first tells its prefill's, the others their decode's.

    begin_s: the request's arrival, by the clock
    """

    def __init__(self, begin_s: float, clock: Callable[[], float]) -> None:
        self._clock, self._last_s = clock, begin_s
        self._is_first = True

    def next(self) -> dict[str, float | None]:
        """Of the event that is written now."""
        now_s = self._clock()
        took, self._last_s = round((now_s - self._last_s) * 1000, 3), now_s
        is_first, self._is_first = self._is_first, False
        return {
            "prefill_time": took if is_first else None,
            "decode_time": None if is_first else took,
        }
