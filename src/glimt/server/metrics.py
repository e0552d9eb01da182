"""Metrics: what Prometheus is told, in vLLM's names so that its dashboards work, and ours beside.

Label values are bounded: never a model name, path or key that a caller sent.
Source of names and buckets: vLLM, v1/metrics/loggers.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from glimt.engine import EngineStats
from glimt.server.host import EngineHost
from glimt.server.metrics_compat import TABLES, renamed_text
from glimt.types import Request, StepOutput

_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_E2E = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_TPOT = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20)
_TOKENS = (
    1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 16000, 20000, 32000, 50000, 64000,
    128000,
)  # fmt: skip
_IMAGE_S = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 15, 60)

PROTOCOLS = ("openai", "tgi", "triton", "vllm", "mindie", "visualglm")
FINISHED = ("stop", "length", "abort", "error")
FAILURES = ("invalid", "overloaded", "unavailable", "timeout", "engine")


class Metrics:
    """All counters of one server, in a registry of their own."""

    def __init__(self, host: EngineHost, model_name: str, compat: Sequence[str] = ()) -> None:
        """compat: whose names are told as well, of metrics_compat.TABLES."""
        self.registry = CollectorRegistry()
        self._renamed = [rows for name in compat for rows in TABLES.get(name, ())]
        self._labels = {"model_name": model_name}
        self.registry.register(_MeansCollector(self, time.monotonic()))
        self.last_finish_s = 0.0  # Unix time
        self.registry.register(_EngineCollector(host, model_name))
        self._received = self._counter("glimt:requests", "Requests by protocol.", "protocol")
        self._failures = self._counter("glimt:request_failures", "Refused or failed.", "reason")
        self._images = self._counter("glimt:images", "Pictures by what became of them.", "result")
        self._success = self._counter(
            "vllm:request_success", "Finished choices by reason.", "finished_reason"
        )
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens.")
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Found in the cache.")
        self._generated = self._counter("vllm:generation_tokens", "Generated tokens.")
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", _TTFT)
        self._itl = self._histogram("vllm:inter_token_latency_seconds", _TPOT)
        self._tpot = self._histogram("vllm:request_time_per_output_token_seconds", _TPOT)
        self._tpot_old = self._histogram("vllm:time_per_output_token_seconds", _TPOT)
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", _E2E)
        self._queue = self._histogram("vllm:request_queue_time_seconds", _E2E)
        self._inference = self._histogram("vllm:request_inference_time_seconds", _E2E)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", _E2E)
        self._decode = self._histogram("vllm:request_decode_time_seconds", _E2E)
        self._prompt_size = self._histogram("vllm:request_prompt_tokens", _TOKENS)
        self._answer_size = self._histogram("vllm:request_generation_tokens", _TOKENS)
        self._wanted = self._histogram("vllm:request_params_max_tokens", _TOKENS)
        self._choices = self._histogram("vllm:request_params_n", (1, 2, 5, 10, 20))
        self._fetch = self._histogram("glimt:image_fetch_seconds", _IMAGE_S)
        self._read = self._histogram("glimt:image_decode_seconds", _IMAGE_S)
        self._encode = self._histogram("glimt:vision_encode_seconds", _IMAGE_S)

    def _counter(self, name: str, said: str, label: str | None = None) -> Counter:
        names = [*self._labels, *([label] if label else [])]
        return Counter(name, said, names, registry=self.registry)

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        said = name.partition(":")[2].replace("_", " ")
        return Histogram(name, said, [*self._labels], buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format 0.0.4."""
        text = generate_latest(self.registry)
        return text + renamed_text(self.registry, self._renamed) if self._renamed else text

    def total(self, name: str, **labels: str) -> float:
        """One sample of one's own, as it stands now; 0 if nothing was counted yet."""
        return self.registry.get_sample_value(name, {**self._labels, **labels}) or 0.0

    # --- events ---

    def began(self, protocol: str, request: Request) -> None:
        """A request was admitted and prepared."""
        self._received.labels(**self._labels, protocol=protocol).inc()
        self._wanted.labels(**self._labels).observe(request.max_tokens)
        self._choices.labels(**self._labels).observe(request.sampling.n)

    def failed(self, reason: str) -> None:
        """A request was refused or failed; reason: one of FAILURES."""
        assert reason in FAILURES, reason
        self._failures.labels(**self._labels, reason=reason).inc()

    def refused(self, kind: str) -> None:
        """Count what an error reply says; what the service counts itself is not counted twice."""
        known = {"invalid": "invalid", "too_long": "invalid", "malformed": "invalid"}
        known |= {"unavailable": "unavailable", "engine": "engine", "incomplete": "engine"}
        if kind in known:
            self.failed(known[kind])

    def image_fetched(self, seconds: float) -> None:
        """A picture has come from its host; waiting for a place is part of the seconds."""
        self._fetch.labels(**self._labels).observe(seconds)

    def image(self, result: str, read_s: float | None) -> None:
        """A picture was read, or refused, be it by its host; result: "read" or "refused"."""
        self._images.labels(**self._labels, result=result).inc()
        if read_s is not None:
            self._read.labels(**self._labels).observe(read_s)

    def watch(self, request: Request) -> RequestWatch:
        """Follow one request's outputs."""
        return RequestWatch(self, request)


class RequestWatch:
    """One request's times as its caller sees them."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._m, self._request = metrics, request
        self._first_s: float | None = None
        self._last_s: dict[int, float] = {}
        self._num_tokens = 0
        self._num_open = request.sampling.n

    def saw(self, output: StepOutput) -> None:
        """Take one output."""
        m, now = self._m, time.monotonic()
        labels = m._labels
        if output.token_ids:
            if self._first_s is None:
                self._first_s = now
                m._ttft.labels(**labels).observe(now - self._request.arrival_s)
            elif output.index in self._last_s:
                m._itl.labels(**labels).observe(now - self._last_s[output.index])
            self._last_s[output.index] = now
            self._num_tokens += len(output.token_ids)
            m._generated.labels(**labels).inc(len(output.token_ids))
        if output.finish_reason:
            self._num_open -= 1
            m._success.labels(**labels, finished_reason=output.finish_reason).inc()
        if output.usage is not None and output.timings is not None and not self._num_open:
            self._finish(output, now)

    def _finish(self, output: StepOutput, now: float) -> None:
        assert output.usage
        assert output.timings
        m, usage, times = self._m, output.usage, output.timings
        labels = m._labels
        m.last_finish_s = time.time()
        m._prompt_tokens.labels(**labels).inc(usage.prompt_tokens)
        m._cached_tokens.labels(**labels).inc(usage.cached_tokens)
        m._prompt_size.labels(**labels).observe(usage.prompt_tokens)
        m._answer_size.labels(**labels).observe(usage.completion_tokens)
        m._e2e.labels(**labels).observe(now - self._request.arrival_s)
        m._inference.labels(**labels).observe(times.inference_s)
        m._queue.labels(**labels).observe(times.queue_s)
        m._prefill.labels(**labels).observe(times.prefill_s)
        m._decode.labels(**labels).observe(times.decode_s)
        if usage.image_tokens:
            m._encode.labels(**labels).observe(times.image_s)
        if usage.completion_tokens > 1:
            for histogram in (m._tpot, m._tpot_old):
                histogram.labels(**labels).observe(times.decode_s / (usage.completion_tokens - 1))

    def ended(self) -> None:
        """The stream is over; whoever left before its end has aborted what was open."""
        if self._num_open:
            labels = self._m._labels
            self._m._success.labels(**labels, finished_reason="abort").inc(self._num_open)
            self._num_open = 0


class _EngineCollector:
    """Figures that the engine counts itself, read when they are asked for."""

    def __init__(self, host: EngineHost, model_name: str) -> None:
        self._host, self._model_name = host, model_name

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters of the engine that runs now, or ran last."""
        engine = self._host.last_engine
        yield self._gauge("glimt:engine_restarts", "Restarts.", self._host.num_restarts)
        yield self._gauge("glimt:engine_ready", "1 if requests are taken.", self._host.is_ready)
        if engine is not None:
            yield from self._of_stats(engine.stats())

    def _of_stats(self, stats: EngineStats) -> Iterator[Metric]:
        used = 1 - stats.num_free_blocks / max(1, stats.num_blocks)
        yield self._gauge("vllm:num_requests_running", "Running.", stats.num_running)
        yield self._gauge("vllm:num_requests_waiting", "Waiting.", stats.num_waiting)
        yield self._gauge("vllm:num_requests_swapped", "Always 0.", 0)
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of blocks in use.", used)
        yield self._gauge("vllm:gpu_cache_usage_perc", "The same by its old name.", used)
        queried = stats.prefill_tokens + stats.prefix_hit_tokens
        pictures = stats.tower_images + stats.feature_hits
        yield self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up.", queried)
        yield self._counter("vllm:prefix_cache_hits", "Found.", stats.prefix_hit_tokens)
        yield self._counter("vllm:mm_cache_queries", "Pictures looked up.", pictures)
        yield self._counter("vllm:mm_cache_hits", "Found.", stats.feature_hits)
        rate = stats.prefix_hit_tokens / queried if queried else 0.0
        yield self._gauge("glimt:prefix_cache_hit_rate", "Of prompt tokens.", rate)
        yield self._counter("vllm:num_preemptions", "Preemptions.", stats.preemptions)
        yield self._counter("vllm:spec_decode_num_draft_tokens", "Drafted.", stats.drafted_tokens)
        yield self._counter(
            "vllm:spec_decode_num_accepted_tokens", "Drafts accepted.", stats.accepted_tokens
        )
        yield self._counter("glimt:tower_images", "Through the tower.", stats.tower_images)
        yield self._counter("glimt:tower_seconds", "In the tower.", stats.tower_s)
        yield self._counter("glimt:failed_steps", "Steps that failed.", stats.failed_steps)

    def _gauge(self, name: str, said: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, said, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, said: str, value: float) -> Metric:
        family = CounterMetricFamily(name, said, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family


class _MeansCollector:
    """Shares and means since the start, of what the counters hold."""

    def __init__(self, metrics: Metrics, began_s: float) -> None:
        self._metrics, self._began_s = metrics, began_s

    def collect(self) -> Iterator[Metric]:
        """Gauges."""
        m = self._metrics
        seconds = max(1e-3, time.monotonic() - self._began_s)
        failed, received = _sum(m._failures), _sum(m._received)
        values = {
            "glimt:failed_request_share": failed / max(1, failed + received),
            "glimt:mean_prompt_tokens_per_second": _sum(m._prompt_tokens) / seconds,
            "glimt:mean_generation_tokens_per_second": _sum(m._generated) / seconds,
        }
        for name, value in values.items():
            family = GaugeMetricFamily(name, "Since the start.", labels=["model_name"])
            family.add_metric([*m._labels.values()], value)
            yield family


def _sum(counter: Counter) -> float:
    """Over all labels."""
    samples = (sample for family in counter.collect() for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name.endswith("_total"))
