"""Several replicas' metrics as one text, told apart by a label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

_LABEL = "replica"


def merged_metrics(texts: Mapping[str, str]) -> bytes:
    """One exposition, in Prometheus' text format 0.0.4.

    texts: of each replica, by its rank
    """
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)


class _Merged:
    """All samples of a name together, as the format wants them."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        """Every family once."""
        families: dict[str, Metric] = {}
        for rank in sorted(self._texts):
            for found in text_string_to_metric_families(self._texts[rank]):
                family = families.setdefault(
                    found.name, Metric(found.name, found.documentation, found.type)
                )
                for sample in found.samples:
                    family.add_sample(sample.name, {_LABEL: rank, **sample.labels}, sample.value)
        yield from families.values()
