"""A run as one JSON object, in the names of vLLM's benchmark result, with ours beside them.

Source of the names: vllm-project/vllm, vllm/benchmarks/serve.py, `benchmark` and `main_async`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glimt.bench.load.metrics import METRICS, Metrics, Spread
from glimt.bench.load.outcome import Outcome
from glimt.bench.load.run import Plan
from glimt.bench.load.workload import Workload


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """A run with all that it belongs to.

    outcomes:    in the order of sending
    tokenizer:   folder of the model's tokenizer; None where none was given
    has_limits:  whether the caller named goodput limits; they are then the first
    cut_because: why the run was stopped; empty for a whole one
    client_busy: this process's processor time over the run's time
    notes:       what a reader must know, one sentence each
    facts:       the client, the command and the time
    """

    server: str
    plan: Plan
    workload: Workload
    num_warmup: int
    tokenizer: str | None
    outcomes: tuple[Outcome, ...]
    metrics: Metrics
    has_limits: bool
    cut_because: str
    client_busy: float
    notes: tuple[str, ...]
    facts: Mapping[str, str]
    date: str

    @property
    def num_failed(self) -> int:
        """Requests that did not complete."""
        return self.metrics.num_sent - self.metrics.num_completed


def as_dict(found: Found) -> dict[str, Any]:
    """Plain data. Times are seconds, but where a name ends in _ms."""
    return {**_settings(found), **_totals(found), **_spreads(found.metrics), **_per_request(found)}


def _settings(found: Found) -> dict[str, Any]:
    return {
        "date": found.date,
        "endpoint_type": "openai-chat" if found.workload.is_chat else "openai",
        "backend": "openai-chat" if found.workload.is_chat else "openai",
        "label": "glimt",
        "model_id": found.workload.model,
        "tokenizer_id": found.tokenizer,
        **found.plan.as_dict(),
        # ours
        "server": found.server,
        "num_warmup": found.num_warmup,
        "workload": found.workload.as_dict(),
        "client": dict(found.facts),
        "is_whole": not found.cut_because,
        "cut_because": found.cut_because or None,
        "client_busy": found.client_busy,
        "notes": list(found.notes),
    }


def _totals(found: Found) -> dict[str, Any]:
    metrics = found.metrics
    named = metrics.goodputs[0].per_s if found.has_limits else None
    return {
        "duration": metrics.duration_s,
        "completed": metrics.num_completed,
        "failed": found.num_failed,
        "total_input_tokens": metrics.input_tokens,
        "total_output_tokens": metrics.output_tokens,
        "request_throughput": metrics.per_s(metrics.num_completed),
        "request_goodput": named,
        "output_throughput": metrics.per_s(metrics.output_tokens),
        "total_token_throughput": metrics.per_s(metrics.input_tokens + metrics.output_tokens),
        "max_output_tokens_per_s": max(metrics.timeline.output_tokens, default=0.0),
        "max_concurrent_requests": metrics.peak_in_flight,
        # ours
        "kinds": dict(metrics.kinds),
        "num_images": metrics.num_images,
        "image_throughput": metrics.per_s(metrics.num_images),
        "total_image_tokens": metrics.image_tokens,
        "image_token_throughput": metrics.per_s(metrics.image_tokens),
        "total_cached_tokens": metrics.cached_tokens,
        "total_text_tokens": metrics.text_tokens,
        "num_short_answers": metrics.num_short,
        "num_without_usage": metrics.num_uncounted,
        "goodput": [
            {
                "name": each.name,
                "limits_ms": dict(each.limits),
                "num_good": each.num_good,
                "request_goodput": each.per_s,
            }
            for each in metrics.goodputs
        ],
    }


def _spreads(metrics: Metrics) -> dict[str, float | None]:
    names = {name: name for name in METRICS} | {"queue": "client_queue_time"}
    return {
        field: value
        for name, said in names.items()
        for field, value in _spread(said, metrics.spreads[name]).items()
    }


def _spread(name: str, spread: Spread) -> dict[str, float | None]:
    plain = {"mean": spread.mean, "median": spread.median, "std": spread.std}
    named = {f"{kind}_{name}_ms": value for kind, value in plain.items()}
    return named | {f"p{at:g}_{name}_ms": value for at, value in spread.percentiles.items()}


def _per_request(found: Found) -> dict[str, Sequence[Any]]:
    """One entry for each request that was sent; 0 stands for what a failed one did not reach."""
    outcomes = found.outcomes
    return {
        "input_lens": [each.prompt_tokens for each in outcomes],
        "output_lens": [each.output_tokens if each.is_completed else 0 for each in outcomes],
        "ttfts": [each.ttft_s or 0.0 for each in outcomes],
        "itls": [list(each.itl_s) for each in outcomes],
        "latencies": [each.e2el_s if each.is_completed else 0.0 for each in outcomes],
        "start_times": [each.sent_s for each in outcomes],
        "queue_times": [each.queue_s for each in outcomes],
        "generated_texts": [each.text for each in outcomes],
        "errors": [each.error for each in outcomes],
        # ours
        "outcomes": [each.kind for each in outcomes],
        "images": [each.num_images for each in outcomes],
    }
