"""Spans: one for each request, with its counts, and without its words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from glimt.server.tracing import Traces
from glimt.types import StepOutput, Timings, Usage

pytest.importorskip("opentelemetry.sdk.trace")


class Kept:
    """An exporter that keeps spans."""

    def __init__(self) -> None:
        self.spans: list[Any] = []

    def export(self, spans: Sequence[Any]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        self.spans += spans
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


def last_output() -> StepOutput:
    usage = Usage(prompt_tokens=40, completion_tokens=7, cached_tokens=3, image_tokens=32)
    times = Timings(image_s=0.25, prefill_s=0.1, decode_s=1.0, ttft_s=0.5)
    return StepOutput("r", 0, "secret", (1,), finish_reason="length", usage=usage, timings=times)


def test_a_request_is_one_span_with_its_counts():
    """Catches names that no dashboard knows, and words of an answer in a trace."""
    kept = Kept()
    traces = Traces(None, kept)
    with traces.request("openai", "id-1") as trace:
        trace.saw(StepOutput("r", 0, "first", (1,)))
        trace.saw(last_output())
    traces.close()
    (span,) = kept.spans
    assert dict(span.attributes) == {
        "glimt.protocol": "openai",
        "glimt.request_id": "id-1",
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": 7,
        "glimt.image_tokens": 32,
        "glimt.cached_tokens": 3,
        "glimt.ttft_s": 0.5,
        "glimt.image_s": 0.25,
        "gen_ai.response.finish_reason": "length",
    }


def test_an_error_is_noted_as_its_type_alone():
    """Catches a message, which may quote a prompt, in a trace."""
    kept = Kept()
    traces = Traces(None, kept)
    with pytest.raises(ValueError, match="secret"), traces.request("tgi", "id-2"):
        raise ValueError("secret prompt")
    traces.close()
    (span,) = kept.spans
    assert span.attributes["error.type"] == "ValueError"
    assert "secret" not in str(span.to_json())


def test_without_an_endpoint_nothing_is_kept():
    """Catches a server that needs the extra although nobody asked for traces."""
    traces = Traces(None)
    with traces.request("openai", "id") as trace:
        trace.saw(last_output())
    traces.close()
