"""The metrics by TGI's and MindIE's names: our own samples once more, renamed.

Sources: huggingface/text-generation-inference, docs/source/reference/metrics.md; Ascend/MindIE-LLM.
TGI's counters have no `_total`, which prometheus_client would add: so the text is written here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric


@dataclass(frozen=True, slots=True)
class Row:
    """One metric by another name.

    source: our family, as its TYPE line has it without `_total`
    labels: added to each sample; our `label` is called `renamed_label`, and without that dropped
    bounds: of a histogram's buckets; None keeps ours
    """

    name: str
    source: str
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    label: str = ""
    renamed_label: str = ""
    bounds: tuple[float, ...] | None = None


_GENERATE: Mapping[str, str] = MappingProxyType({"method": "generate"})
_TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_E2E = (1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60)
_TOKENS = (
    10,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10000,
    16000,
    20000,
    32000,
    50000,
    64000,
    128000,
)

_TGI = (
    Row("tgi_batch_current_size", "vllm:num_requests_running"),
    Row("tgi_queue_size", "vllm:num_requests_waiting"),
    Row("tgi_request_success", "vllm:request_success", _GENERATE, "finished_reason"),
    Row("tgi_request_count", "glimt:requests", _GENERATE, "protocol"),
    Row("tgi_request_failure", "glimt:request_failures", label="reason", renamed_label="err"),
    Row("tgi_request_duration", "vllm:e2e_request_latency_seconds"),
    Row("tgi_request_queue_duration", "vllm:request_queue_time_seconds"),
    Row("tgi_request_inference_duration", "vllm:request_inference_time_seconds"),
    Row("tgi_request_mean_time_per_token_duration", "vllm:request_time_per_output_token_seconds"),
    Row("tgi_request_input_length", "vllm:request_prompt_tokens"),
    Row("tgi_request_generated_tokens", "vllm:request_generation_tokens"),
    Row("tgi_request_max_new_tokens", "vllm:request_params_max_tokens"),
)
_MINDIE = (
    Row("num_requests_running", "vllm:num_requests_running"),
    Row("num_requests_waiting", "vllm:num_requests_waiting"),
    Row("num_requests_swapped", "vllm:num_requests_swapped"),
    Row("npu_cache_usage_perc", "vllm:kv_cache_usage_perc"),
    Row("cpu_cache_usage_perc", "vllm:num_requests_swapped"),
    Row("npu_prefix_cache_hit_rate", "glimt:prefix_cache_hit_rate"),
    Row("num_preemptions_total", "vllm:num_preemptions"),
    Row("prompt_tokens_total", "vllm:prompt_tokens"),
    Row("generation_tokens_total", "vllm:generation_tokens"),
    Row("request_success_total", "vllm:request_success", label="finished_reason"),
    Row("request_received_total", "glimt:requests", label="protocol"),
    Row("request_failed_total", "glimt:request_failures", label="reason"),
    Row("failed_request_perc", "glimt:failed_request_share"),
    Row("time_to_first_token_seconds", "vllm:time_to_first_token_seconds", bounds=_TTFT),
    Row("time_per_output_token_seconds", "vllm:request_time_per_output_token_seconds"),
    Row("e2e_request_latency_seconds", "vllm:e2e_request_latency_seconds", bounds=_E2E),
    Row("request_prompt_tokens", "vllm:request_prompt_tokens", bounds=_TOKENS),
    Row("request_generation_tokens", "vllm:request_generation_tokens", bounds=_TOKENS),
    Row("avg_prompt_throughput_toks_per_s", "glimt:mean_prompt_tokens_per_second"),
    Row("avg_generation_throughput_toks_per_s", "glimt:mean_generation_tokens_per_second"),
)
TABLES: Mapping[str, Sequence[Row]] = MappingProxyType({"tgi": _TGI, "mindie": _MINDIE})


def renamed_text(registry: CollectorRegistry, rows: Sequence[Row]) -> bytes:
    """The rows whose source there is, in Prometheus' text format 0.0.4."""
    families = {family.name: family for family in registry.collect()}
    lines: list[str] = []
    for row in rows:
        if (family := families.get(row.source)) is not None:
            lines += _family(row, family)
    return "".join(f"{line}\n" for line in lines).encode()


def _family(row: Row, family: Metric) -> Iterator[str]:
    yield f"# HELP {row.name} {family.documentation}"
    yield f"# TYPE {row.name} {family.type}"
    sums: dict[str, float] = {}
    for sample in family.samples:
        if sample.name.endswith("_created") or not _is_kept(row, sample.labels):
            continue
        is_histogram = family.type == "histogram"
        suffix = sample.name.removeprefix(family.name) if is_histogram else ""
        shown = f"{row.name}{suffix}{_labels(row, sample.labels)}"
        sums[shown] = sums.get(shown, 0.0) + sample.value
    for shown, value in sums.items():  # samples that a dropped label had told apart are one now
        yield f"{shown} {value!r}"


def _is_kept(row: Row, labels: Mapping[str, str]) -> bool:
    bound = labels.get("le")
    if bound is None or row.bounds is None or bound == "+Inf":
        return True
    return float(bound) in row.bounds


def _labels(row: Row, labels: Mapping[str, str]) -> str:
    kept = {name: value for name, value in labels.items() if name != row.label}
    if row.renamed_label:
        kept[row.renamed_label] = labels[row.label]
    pairs = [f'{name}="{_escaped(value)}"' for name, value in {**kept, **row.labels}.items()]
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
