"""Traces: one OpenTelemetry span for each request, if an endpoint is given. Never a prompt in it.

Names of attributes: OpenTelemetry's semantic conventions for generative AI.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from glimt.errors import MissingDependency
from glimt.types import StepOutput


class Trace:
    """What is known of one request's span; without an endpoint nothing is kept."""

    def __init__(self, span: Any = None) -> None:
        self._span = span

    def set(self, **values: str | float | int) -> None:
        """Note attributes; in their names `_` stands for `.`, and `__` for `_`."""
        for name, value in values.items() if self._span is not None else ():
            self._span.set_attribute(_dotted(name), value)

    def saw(self, output: StepOutput) -> None:
        """Note what the last output tells."""
        if self._span is None or output.usage is None or output.timings is None:
            return
        self.set(
            gen__ai_usage_input__tokens=output.usage.prompt_tokens,
            gen__ai_usage_output__tokens=output.usage.completion_tokens,
            glimt_image__tokens=output.usage.image_tokens,
            glimt_cached__tokens=output.usage.cached_tokens,
            glimt_ttft__s=output.timings.ttft_s,
            glimt_image__s=output.timings.image_s,
            gen__ai_response_finish__reason=output.finish_reason or "",
        )


def _dotted(name: str) -> str:
    return "_".join(part.replace("_", ".") for part in name.split("__"))


class Traces:
    """Spans of one server.

    endpoint: of an OTLP collector over HTTP, such as http://localhost:4318/v1/traces; None: none
    Raises MissingDependency where the extra is not installed.
    """

    def __init__(self, endpoint: str | None, exporter: Any = None) -> None:
        self._tracer: Any = None
        self._provider: Any = None
        if endpoint is None and exporter is None:
            return
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise MissingDependency("opentelemetry-sdk", "otel") from error
        self._provider = TracerProvider(resource=Resource.create({"service.name": "glimt"}))
        self._provider.add_span_processor(BatchSpanProcessor(exporter or _otlp(endpoint)))
        self._tracer = self._provider.get_tracer("glimt")

    @contextmanager
    def request(self, protocol: str, request_id: str) -> Iterator[Trace]:
        """A span around one request; what it raises is noted as its type alone."""
        if self._tracer is None:
            yield Trace()
            return
        options = {"record_exception": False, "set_status_on_exception": False}
        with self._tracer.start_as_current_span("glimt.request", **options) as span:
            trace = Trace(span)
            trace.set(glimt_protocol=protocol, glimt_request__id=request_id)
            try:
                yield trace
            except Exception as error:
                trace.set(error_type=type(error).__name__)
                raise

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def _otlp(endpoint: str | None) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise MissingDependency("opentelemetry-exporter-otlp-proto-http", "otel") from error
    return OTLPSpanExporter(endpoint=endpoint)
