"""MindIE's management port: what it tells, and what only it may do."""

from __future__ import annotations

import pytest

from forms import call
from glimt.server.app import create_management_app
from glimt.server.config import ServerConfig
from serving import running, serving


@pytest.fixture(scope="module")
def served():
    config = ServerConfig(
        num_decoders=0, profile="mindie", served_model_names=("demo",), max_output_tokens=50
    )
    with serving("demo", config, max_num_seqs=4, num_blocks=64) as served:
        yield served


@pytest.fixture(scope="module")
def url(served):
    with running(create_management_app(served.context)) as url:
        yield url


def test_config_tells_what_is_served(url):
    """Catches a name or a number of another thing."""
    told = call(url, "/v1/config").json
    assert set(told) == {
        "modelName",
        "maxSeqLen",
        "npuMemSize",
        "cpuMemSize",
        "worldSize",
        "maxOutputLen",
        "cacheBlockSize",
    }
    assert (told["modelName"], told["maxOutputLen"], told["worldSize"]) == ("demo", 50, 1)


def test_status_and_slots_count_what_is_free(url):
    """Catches slots and blocks mixed up."""
    resource = call(url, "/v1/status").json["resource"]
    assert resource == {
        "availSlotsNum": 4,
        "availBlockNum": 64,
        "waitingRequestNum": 0,
        "runningRequestNum": 0,
        "swappedRequestNum": 0,
        "freeNpuBlockNums": 64,
        "freeCpuBlockNums": 0,
        "totalNpuBlockNums": 64,
        "totalCpuBlockNums": 0,
    }
    more = call(url, "/v2/status").json
    assert more["resource"]["totalAvailNpuSlotsNum"] == 4
    assert {"service", "linkStatus", "dpInstMap"} <= set(more)
    assert call(url, "/v2/models/demo/getSlotCount").json == {
        "total_slots": 4,
        "free_slots": 4,
        "available_tokens_length": 64 * 32,
    }
    assert call(url, "/v2/models/other/getSlotCount").status == 404


@pytest.mark.parametrize("path", ["/health/timed", "/health/timed-1", "/health/timed-600"])
def test_a_probe_makes_a_token(url, served, path):
    """Catches a health check that asks nobody."""
    before = served.engine.stats().prefill_tokens + served.engine.stats().prefix_hit_tokens
    reply = call(url, path)
    assert (reply.status, reply.content) == (200, b"")
    assert served.engine.stats().prefill_tokens + served.engine.stats().prefix_hit_tokens > before


@pytest.mark.parametrize("seconds", ["0", "601", "-1", "1.5", "x", "²", "9" * 30])
def test_a_bad_number_of_seconds_is_404(url, seconds):
    """Catches a probe of a length that nobody meant."""
    from urllib.parse import quote

    assert call(url, f"/health/timed-{quote(seconds)}").status == 404


def test_metrics_as_json(url):
    """Catches a name that MindIE's tools look for."""
    told = call(url, "/metrics-json").json
    assert told["resultType"] == "vector"
    values = {each["metric"][0]["__name__"]: each["value"] for each in told["result"]}
    assert set(values) == {
        "TTFT",
        "TBT",
        "waitingInferRequestNum",
        "processingInferRequestNum",
        "remainBlocks",
    }
    assert values["remainBlocks"] == 64


def test_health_is_empty_and_good(url):
    """Catches a route of the business port that is missing here."""
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/demo/ready", "/health"):
        reply = call(url, path)
        assert (reply.status, reply.content) == (200, b"")


def test_busy_is_alive_and_not_ready(url, served):
    """Catches an orchestrator that restarts a server because it works."""
    service = served.context.service
    service._num_open += 4
    try:
        assert call(url, "/v2/health/live").status == 200
        assert call(url, "/v2/health/ready").status == 503
    finally:
        service._num_open -= 4


def test_the_public_port_has_none_of_it(served):
    """Catches a stranger who stops the server."""
    for path in ("/stopService", "/v1/config", "/v1/status", "/health/timed", "/metrics-json"):
        assert call(served.url, path).status == 404
    assert not served.context.stopping.asked.is_set()


@pytest.mark.parametrize("mode", ["", "?mode=Force"])
def test_stop_service_drains_or_forces(mode):
    """Catches a stop that still takes requests."""
    with (
        serving("demo", ServerConfig(num_decoders=0)) as served,
        running(create_management_app(served.context)) as url,
    ):
        assert call(url, "/stopService?mode=x").status == 422
        assert not served.context.stopping.asked.is_set()
        assert call(url, f"/stopService{mode}").status == 200
        assert served.context.stopping.asked.is_set()
        assert served.context.stopping.forced.is_set() is bool(mode)
        assert call(served.url, "/infer", {"inputs": "hi"}).status == 503
        assert call(url, "/v2/health/ready").status == 503
