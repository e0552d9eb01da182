"""The metrics of several replicas as one text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from glimt.cluster.merged import merged_metrics


def text(count: int) -> str:
    registry = CollectorRegistry()
    Counter("vllm:hits", "Hits.", ["model_name"], registry=registry).labels("m").inc(count)
    Histogram("glimt:seconds", "Seconds.", buckets=(1, 2), registry=registry).observe(count)
    return generate_latest(registry).decode()


def test_samples_are_told_apart_and_none_is_lost():
    """Would catch a replica whose figures overwrite another's, or a family that stands twice,
    which Prometheus refuses to read.
    """
    merged = merged_metrics({"0": text(1), "1": text(2)}).decode()
    assert merged.count("# TYPE vllm:hits_total counter") == 1
    assert 'vllm:hits_total{model_name="m",replica="0"} 1.0' in merged
    assert 'vllm:hits_total{model_name="m",replica="1"} 2.0' in merged
    assert 'glimt:seconds_bucket{le="1.0",replica="0"} 1.0' in merged
    assert 'glimt:seconds_bucket{le="1.0",replica="1"} 0.0' in merged
    (hits,) = [one for one in text_string_to_metric_families(merged) if one.name == "vllm:hits"]
    assert {sample.labels["replica"] for sample in hits.samples} == {"0", "1"}


def test_no_replica_has_no_figures():
    assert merged_metrics({}) == b""
