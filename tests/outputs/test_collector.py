"""OutputCollector: what is counted and timed for a request, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from glimt.outputs.collector import OutputCollector
from glimt.types import EncodedPrompt, SamplingParams


def collector_of(request_id: str) -> OutputCollector:
    """A collector that knows one request of seven tokens, and a clock that stands still."""
    tokenizer = SimpleNamespace(decoder=lambda: SimpleNamespace(finish=str))
    processor: Any = SimpleNamespace(tokenizer=tokenizer, finish_text=str, stable_length=len)
    prompt = EncodedPrompt(tuple(range(7)), (), (), None, (7,), (1,))  # type: ignore[arg-type]
    request: Any = SimpleNamespace(
        request_id=request_id,
        is_exact=False,
        prompt=prompt,
        sampling=SamplingParams(),
        arrival_s=0.0,
    )
    collector = OutputCollector(processor, lambda: 5.0)
    collector.add(request)
    return collector


def step(request_id: str, start: int) -> Any:
    return SimpleNamespace(rows=[SimpleNamespace(request_id=request_id, start=start, drafts=())])


def test_cached_tokens_are_those_of_the_first_step_only() -> None:
    """Would catch recomputed tokens billed as cached ones after a preemption."""
    collector = collector_of("r")
    collector.note_step(step("r", 4), {}, 1.0)
    collector.note_step(step("r", 6), {}, 2.0)  # it was preempted and found more the second time
    usage = collector.finish("r", 0, "abort").usage
    assert usage is not None
    assert usage.cached_tokens == 4


def test_a_request_starts_with_its_first_picture_or_its_first_row() -> None:
    """Would catch a start that moves with each step, or a prefill that is charged for the tower."""
    collector = collector_of("r")
    collector.note_tower({"r": 1.5}, 1.0)
    collector.note_step(step("r", 0), {"r": 0.5}, 3.0)
    timings = collector.finish("r", 0, "abort").timings
    assert timings is not None
    assert (timings.image_s, timings.prefill_s, timings.ttft_s) == (2.0, 2.0, 5.0)
