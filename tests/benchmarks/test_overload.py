"""What the overload run calls broken, without a server or a clock."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from benchmarks.overload import (
    RISE_BYTES,
    Seen,
    Watched,
    _streamed,
    broken_promises,
    memory_broken,
    memory_facts,
)

MIB = 2**20
ALONE = ["zero", "one"]


def seen(outcome: int | str, text: str = "one", sent_s: float = 1.0, retry: bool = True) -> Seen:
    return Seen(1, outcome, text, sent_s, sent_s + 1, retry)


@pytest.mark.parametrize("each", [seen(200), seen(429), seen("left", "")])
def test_what_was_promised_is_not_broken(each: Seen) -> None:
    """Catches a run that calls a refusal a failure."""
    assert list(broken_promises([each], ALONE, math.inf)) == []


@pytest.mark.parametrize(
    ("each", "said"),
    [
        (seen(500, "boom"), "500 boom"),
        (seen(503, "busy"), "503 busy"),
        (seen("broken", "cut"), "broken cut"),
        (seen("refused", ""), "refused "),
        (seen(429, retry=False), "429 without Retry-After"),
        (seen(200, "two"), "1 answers are not those of an undisturbed server"),
    ],
)
def test_what_was_not_kept_is_told(each: Seen, said: str) -> None:
    """Catches a run that passes whatever the server does."""
    assert list(broken_promises([seen(200), each], ALONE, math.inf)) == [said]


def test_after_the_signal_a_request_may_be_turned_away_and_one_before_it_may_not() -> None:
    """Catches a drain that cuts running answers and passes for a closed port."""
    for outcome in (503, "refused", "broken"):
        assert list(broken_promises([seen(outcome, sent_s=3.0)], ALONE, 2.0)) == []
        assert len(list(broken_promises([seen(outcome, sent_s=1.0)], ALONE, 2.0))) == 1


def test_memory_is_judged_after_the_beginning() -> None:
    """Catches a start that counts as a leak, and a leak that does not."""
    flat = [300 * MIB] * 10 + [400 * MIB] * 50
    assert memory_facts(flat)["slope_per_min"] == pytest.approx(0.0, abs=0.01)
    assert not list(memory_broken(Watched(own=flat)))
    leak = [300 * MIB + i * MIB for i in range(70)]
    assert memory_facts(leak) == {
        "first": 300, "settled": 310, "most": 369, "last": 369, "slope_per_min": 60.0,
    }  # fmt: skip
    assert list(memory_broken(Watched(own=leak))) == ["memory grew by 59 MiB after 10 s"]
    assert RISE_BYTES < 59 * MIB


class Reply:
    """The lines of a stream, as aiohttp gives them."""

    def __init__(self, *events: Any) -> None:
        self._lines = [f"data: {json.dumps(event)}\n".encode() for event in events]

    @property
    def content(self) -> AsyncGenerator[bytes, None]:
        return self._all()

    async def _all(self) -> AsyncGenerator[bytes, None]:
        for line in self._lines:
            yield line
            yield b"\n"


def choice(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


def test_a_stream_has_exactly_one_end() -> None:
    """Catches a stream that is cut, ends twice or by another reason, and passes for an answer."""
    done = Reply("[DONE]")._lines[0].replace(b'"', b"")
    good = Reply(choice("a"), choice("b"), choice("", "length"))
    good._lines.append(done)
    assert asyncio.run(_streamed(good)) == "ab"  # type: ignore[arg-type]
    for events in ([choice("a")], [choice("a", "length")] * 2, [choice("a", "stop")], []):
        bad = Reply(*events)
        bad._lines.append(done)
        with pytest.raises(ValueError, match="a stream with the ends"):
            asyncio.run(_streamed(bad))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a stream without an end"):
        asyncio.run(_streamed(Reply(choice("a", "length"))))  # type: ignore[arg-type]
