"""Metrics by the names of TGI and MindIE."""

from __future__ import annotations

import re
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from forms import call

TGI = {
    "tgi_batch_current_size", "tgi_queue_size", "tgi_request_success", "tgi_request_count",
    "tgi_request_failure", "tgi_request_duration", "tgi_request_queue_duration",
    "tgi_request_inference_duration", "tgi_request_mean_time_per_token_duration",
    "tgi_request_input_length", "tgi_request_generated_tokens", "tgi_request_max_new_tokens",
}  # fmt: skip
MINDIE = {
    "num_requests_running", "num_requests_waiting", "num_requests_swapped",
    "npu_cache_usage_perc", "cpu_cache_usage_perc", "npu_prefix_cache_hit_rate",
    "num_preemptions_total", "prompt_tokens_total", "generation_tokens_total",
    "request_success_total", "request_received_total", "request_failed_total",
    "failed_request_perc", "time_to_first_token_seconds", "time_per_output_token_seconds",
    "e2e_request_latency_seconds", "request_prompt_tokens", "request_generation_tokens",
    "avg_prompt_throughput_toks_per_s", "avg_generation_throughput_toks_per_s",
}  # fmt: skip


SAMPLE = re.compile(r"([a-zA-Z0-9_:]+)(?:\{(.*)\})? (\S+)")
LABEL = re.compile(r'(\w+)="([^"]*)"')


class Sample(NamedTuple):
    labels: dict[str, str]
    value: float


def scrape(url):
    text = call(url, "/metrics").content.decode()
    types = dict(line.split()[2:4] for line in text.splitlines() if line.startswith("# TYPE"))
    list(text_string_to_metric_families(text))  # an ordinary reader takes it
    samples = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, labels, value = SAMPLE.fullmatch(line).groups()
            samples[name] = Sample(dict(LABEL.findall(labels or "")), float(value))
    return text, types, samples


def work(served):
    call(served.url, "/infer", {"inputs": "hello", "parameters": {"max_new_tokens": 3}})
    call(served.url, "/infer", {"inputs": ""})


def test_tgis_names_are_there_where_asked_for(upstream, mindie):
    """Catches a counter with _total, which TGI's boards do not ask for, and one profile's names
    in the other."""
    work(upstream)
    _, types, samples = scrape(upstream.url)
    assert set(types) >= TGI
    assert not MINDIE & set(types)
    assert samples["tgi_request_count"].labels == {"model_name": "demo", "method": "generate"}
    assert samples["tgi_request_count"].value == samples["tgi_request_success"].value > 0
    assert samples["tgi_request_failure"].labels["err"] == "invalid"
    assert types["tgi_request_duration"] == "histogram"
    assert samples["tgi_request_duration_count"].value > 0
    assert not TGI & set(scrape(mindie.url)[1])


def test_mindies_names_and_buckets_are_there_under_its_profile(mindie):
    """Catches a missing name, and buckets that its boards do not know."""
    work(mindie)
    text, types, samples = scrape(mindie.url)
    assert set(types) >= MINDIE
    assert samples["generation_tokens_total"].value > 0
    assert samples["avg_generation_throughput_toks_per_s"].value > 0
    assert 0 < samples["failed_request_perc"].value < 1
    prefix = 'e2e_request_latency_seconds_bucket{model_name="demo",le="'
    bounds = [
        line.removeprefix(prefix).partition('"')[0]
        for line in text.splitlines()
        if line.startswith(prefix)
    ]
    assert [float(bound) for bound in bounds[:-1]] == [1, 2.5, 5, 10, 15, 20, 30, 40, 50, 60]
    assert bounds[-1] == "+Inf"
    prefix = 'request_prompt_tokens_bucket{model_name="demo",le="'
    bounds = [
        line.removeprefix(prefix).partition('"')[0]
        for line in text.splitlines()
        if line.startswith(prefix)
    ]
    assert len(bounds) == 16


def test_vllms_names_are_always_there(upstream, mindie):
    """Catches names that a profile takes away."""
    for served in (upstream, mindie):
        assert "vllm:e2e_request_latency_seconds" in scrape(served.url)[1]
