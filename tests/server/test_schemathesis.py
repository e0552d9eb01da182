"""A few hundred made-up requests to every route: whatever comes, the server answers and goes on."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from forms import call
from fuzzing import attack
from glimt.server.app import create_management_app
from glimt.server.config import ServerConfig
from serving import running, serving

SEED = 20261127
GOLDEN = {"messages": [{"role": "user", "content": "你好"}], "temperature": 0, "max_tokens": 4}
ANSWERING = ("/v1/chat/completions", "/v1/completions", "/generate", "/", "/infer")


@pytest.fixture(scope="module", params=["upstream", "mindie"])
def served(request):
    """Short answers, since most bodies say nothing of their length; VisualGLM's form as well."""
    config = ServerConfig(
        num_decoders=0,
        profile=request.param,
        served_model_names=("demo",),
        visualglm_api=True,
        max_output_tokens=4,
        max_choices=2,
    )
    with serving("demo", config, num_blocks=512) as served:
        yield served


def golden(url):
    reply = call(url, "/v1/chat/completions", GOLDEN)
    return reply.status, reply.json["choices"][0]["message"]["content"]


def attacked(served, url, num_cases, is_good):
    """The statuses by path, after every check of one attack."""
    before = golden(served.url)

    def check(case, reply):
        # 424 is what TGI and MindIE call a failure of the engine.
        assert reply.status_code < 500, (case.as_curl_command(), reply.text)
        assert reply.status_code != 424, (case.as_curl_command(), reply.text)

    seen = attack(url, num_cases, SEED, is_good, check)
    assert call(url, "/health").status == 200
    assert golden(served.url) == before
    assert all_blocks_come_back(served.engine)
    # An error after the first byte of a stream has no status; it is counted all the same.
    assert 'reason="engine"' not in call(served.url, "/metrics").content.decode()
    return seen


def all_blocks_come_back(engine):
    """Soon: a request that a client left is ended by the engine's next step."""
    for _ in range(100):
        stats = engine.stats()
        if (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks):
            return stats.failed_steps == 0
        time.sleep(0.05)
    return False


def test_good_requests_reach_the_engine_and_leave_nothing_behind(served):
    """Catches a body that OpenAPI allows and that brings a step, or the server, down."""
    seen = attacked(served, served.url, 7, is_good=True)
    assert sum(seen.values()) > 120
    # OpenAPI says enough of bodies for many to be answered.
    assert sum(seen[f"{path} 200"] for path in ANSWERING) > len(ANSWERING)


def test_bad_requests_are_refused_and_leave_nothing_behind(served):
    """Catches a 500 where a type, a range or a name is wrong."""
    seen = attacked(served, served.url, 3, is_good=False)
    statuses = Counter(path.split()[1] for path in seen.elements())
    assert sum(statuses.values()) > 50
    assert statuses["400"] + statuses["404"] + statuses["422"] > 0.9 * sum(statuses.values())


def test_the_management_port_answers_whatever_comes(served):
    """Catches a path or a query that brings the operator's own port down."""
    with running(create_management_app(served.context)) as url:
        seen = attacked(served, url, 5, is_good=True)
    assert seen["/health/timed-{seconds} 404"] > 0
    assert seen["/v1/config 200"] > 0
    assert not served.context.stopping.asked.is_set()
