"""Every row of the table of errors, in every family but OpenAI's: status and body."""

from __future__ import annotations

import json
import time

import pytest

from forms import PARTS, call
from glimt.errors import CapacityError, EngineError
from glimt.server.config import ServerConfig
from glimt.server.failures import Failure, HttpFailure, body_of, failure_of, status_of
from glimt.server.host import EngineUnavailable
from glimt.server.service import DeadlinePassed, HalfAnswer, Service
from glimt.types import StepOutput
from serving import serving

BROKEN = {"type": "image_url", "image_url": "data:image/png;base64,AAAA"}
WEB = {"type": "image_url", "image_url": "https://x.example/a.png"}

# Family -> path, a good body, and where its prompt is and its length.
FORMS = {
    "tgi": ("/generate", {"inputs": "hi", "parameters": {"max_new_tokens": 2}}, "inputs"),
    "triton": ("/v2/models/demo/generate", {"text_input": "hi", "max_tokens": 2}, "text_input"),
    "vllm": ("/generate", {"prompt": "hi", "max_tokens": 2}, "prompt"),
    "mindie": ("/infer", {"inputs": "hi", "parameters": {"max_new_tokens": 2}}, "inputs"),
}


def form(family, **changes):
    path, body, field = FORMS[family]
    return path, {**body, **{field if name == "prompt" else name: v for name, v in changes.items()}}


def check_body(family, reply, kind):
    told = reply.json
    if family == "triton":
        assert set(told) == {"error"}
        assert isinstance(told["error"], str)
    elif family == "vllm":
        assert set(told["error"]) == {"message", "type", "param", "code"}
    else:
        assert set(told) == {"error", "error_type"}
        assert told["error_type"] == kind
        assert isinstance(told["error"], str)


INVALID = [
    ("tgi", 422, "validation"),
    ("triton", 400, None),
    ("vllm", 400, None),
    ("mindie", 422, "Input Validation Error"),
]


@pytest.mark.parametrize(("family", "status", "kind"), INVALID)
@pytest.mark.parametrize(
    "prompt", [5, {"a": 1}, True, [PARTS[0], BROKEN], [PARTS[0], WEB], "x " * 9000]
)
def test_bad_prompts(upstream, family, status, kind, prompt):
    """Catches a wrong type, a broken picture, a URL or a length that is another family's error."""
    path, body = form(family, prompt=prompt)
    reply = call(upstream.url, path, body)
    assert reply.status == status
    check_body(family, reply, kind)


@pytest.mark.parametrize(("family", "status", "kind"), INVALID)
def test_unsupported_options(upstream, family, status, kind):
    """Catches an option that is ignored."""
    unsupported = {"vllm": {"use_beam_search": True}, "triton": {"use_beam_search": True}}
    inner = {"parameters": {"typical_p": 0.5}}
    path, body = form(family, **unsupported.get(family, inner))
    reply = call(upstream.url, path, body)
    assert reply.status == status
    check_body(family, reply, kind)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/generate", 422),
        ("/v2/models/demo/generate", 400),
        ("/infer", 400),
        ("/v2/models/demo/infer", 400),
        ("/generate_stream", 422),
        ("/", 422),
    ],
)
@pytest.mark.parametrize(
    "content", [b"{", b"", b"\xff", b'{"inputs": NaN}', b"[" * 5000, b'{"a": 1e999}', b"null"]
)
def test_what_is_no_json(upstream, path, status, content):
    """Catches a traceback, and FastAPI's own form."""
    reply = call(upstream.url, path, content)
    # What is JSON and no object of ours is a bad value, which MindIE tells apart.
    others = {"/infer": (422,), "/generate_stream": (200,)}  # TGI tells it in an event
    assert reply.status in (status, *others.get(path, ()))
    (told,) = reply.events if reply.status == 200 else [reply.json]
    assert "error" in told
    assert "detail" not in told


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/generate", 405),
        ("/infer", 405),
        ("/v2/models/demo/infer", 405),
        ("/generate_stream", 405),
    ],
)
def test_wrong_methods(upstream, path, status):
    """Catches a 404 where the path is right."""
    reply = call(upstream.url, path)
    assert reply.status == status
    assert reply.headers["allow"] == "POST"
    assert isinstance(reply.json["error"], str)


@pytest.mark.parametrize(
    "path", ["/v2/nothing", "/v2/models/demo/nothing", "/generate/x", "/infer/x"]
)
def test_unknown_paths(upstream, path):
    """Catches FastAPI's own form of a 404."""
    reply = call(upstream.url, path, {})
    assert reply.status == 404
    assert isinstance(reply.json["error"], str)


def test_keys():
    """Catches a family whose clients cannot tell what they lack."""
    with serving("demo", ServerConfig(num_decoders=0, api_keys=("sk-1",))) as served:
        for family, (path, body, _) in FORMS.items():
            reply = call(served.url, path, body)
            assert reply.status == 401
            assert reply.headers["www-authenticate"] == "Bearer"
            if path == "/generate":
                assert reply.content == b""
            good = call(served.url, path, body, {"Authorization": "bearer sk-1"})
            assert good.status == 200, family


def test_too_large():
    """Catches MindIE's own body for it, which has another key."""
    with serving("demo", ServerConfig(num_decoders=0, max_body_bytes=2000)) as served:
        for family, (path, body, field) in FORMS.items():
            reply = call(served.url, path, {**body, field: "x" * 3000})
            assert reply.status == 413
            assert set(reply.json) == ({"message"} if family == "mindie" else set(reply.json))


def test_not_loaded():
    """Catches a refusal that says it is for ever."""
    import glimt
    from glimt.server.app import create_app
    from serving import running

    def load():
        time.sleep(3)
        return glimt.AsyncEngine.load(glimt.EngineConfig(model="demo"))

    app, _ = create_app(load, ServerConfig(num_decoders=0), "demo", 0)
    with running(app) as url:
        for path, body, _ in FORMS.values():
            reply = call(url, path, body)
            assert reply.status == 503
            assert reply.headers["retry-after"] == "1"
        health = call(url, "/health")
        assert (health.status, health.json["error_type"]) == (503, "healthcheck")
        assert call(url, "/v2/health/ready").status == 503


ROWS = [
    (CapacityError("full"), 429, "overloaded", 503, 429, 503, "Service Unavailable"),
    (EngineUnavailable("draining"), 503, "healthcheck", 503, 503, 503, "Service Unavailable"),
    (DeadlinePassed("late"), 424, "generation", 504, 504, 424, "Generation Error"),
    (EngineError("broken"), 424, "generation", 500, 500, 424, "Generation Error"),
    (HalfAnswer("half"), 500, "incomplete_generation", 500, 500, 500, "Incomplete Generation"),
    (ValueError("secret"), 424, "generation", 500, 500, 424, "Generation Error"),
]


@pytest.mark.parametrize(("error", "tgi", "kind", "triton", "vllm", "mindie", "title"), ROWS)
def test_failures_of_ours(upstream, monkeypatch, error, tgi, kind, triton, vllm, mindie, title):
    """Catches one family's status in another, and what our inside says."""

    def refuse(self, ask):
        raise error

    monkeypatch.setattr(Service, "answer", refuse)
    statuses = {"tgi": tgi, "triton": triton, "vllm": vllm, "mindie": mindie}
    kinds = {"tgi": kind, "mindie": title}
    for family, status in statuses.items():
        path, body = form(family)
        reply = call(upstream.url, path, body)
        assert reply.status == status, family
        if not isinstance(error, ValueError) or family != "vllm":
            check_body(family, reply, kinds.get(family))
        assert "secret" not in reply.content.decode()
        if status in (429, 503) or isinstance(error, (CapacityError, EngineUnavailable)):
            assert isinstance(error, DeadlinePassed) or reply.headers["retry-after"] == "1"


STREAMS = {
    "tgi": ("/generate_stream", {"inputs": "hi"}),
    "triton": ("/v2/models/demo/generate_stream", {"text_input": "hi"}),
    "vllm": ("/generate", {"prompt": "hi", "stream": True}),
    "mindie": ("/infer", {"inputs": "hi", "stream": True}),
}


@pytest.mark.parametrize("family", STREAMS)
@pytest.mark.parametrize("profile", ["upstream", "mindie"])
def test_an_engine_that_fails_half_way(request, monkeypatch, family, profile):
    """Catches a stream that just ends, which reads as a whole answer."""
    served = request.getfixturevalue(profile)

    async def broken(self, *given):
        yield StepOutput("r", 0, "half", (5,))
        raise EngineError("the engine failed")

    monkeypatch.setattr(Service, "_stream", broken)
    path, body = STREAMS[family]
    reply = call(served.url, path, body)
    assert reply.status == 200
    if family == "vllm":
        objects = [json.loads(each) for each in reply.content.replace(b"\0", b"\n").splitlines()]
        assert objects[-1]["error"] == "the engine failed"
        assert set(objects[-1]) == {"text", "error"}
        return
    assert "half" in json.dumps(reply.events[0])
    last = reply.events[-1]
    assert last["error"] == "the engine failed"
    if family == "triton":
        assert set(last) == {"error"}
    else:
        is_mindie = family == "mindie" or profile == "mindie"
        assert last["error_type"] == ("Generation Error" if is_mindie else "generation")
    if family != "tgi" and family != "triton":
        return
    whole_path = path.removesuffix("_stream")
    assert call(served.url, whole_path, body).status == 500  # incomplete, since a part was there


@pytest.mark.parametrize("profile", ["upstream", "mindie"])
def test_every_failure_has_a_body_in_every_family(profile):
    """Catches a kind that was added to one table only."""
    kinds = (
        "invalid",
        "too_long",
        "unknown_model",
        "unknown_route",
        "method",
        "key",
        "too_large",
        "overloaded",
        "unavailable",
        "timeout",
        "engine",
        "malformed",
        "incomplete",
        "slow",
    )
    for kind in kinds:
        for family in (*FORMS, "openai"):
            failure = failure_of(HttpFailure(Failure(kind, "m")))
            assert 400 <= status_of(failure, family, profile) < 600
            assert json.dumps(body_of(failure, family, profile))


def test_mindie_flattens_what_openai_nests():
    """Catches the nested form under MindIE's profile."""
    failure = Failure("invalid", "m", "top_p")
    assert body_of(failure, "openai", "mindie") == {
        "error": "m",
        "error_type": "Input Validation Error",
    }
    assert status_of(failure, "vllm", "mindie") == 422
    assert status_of(failure, "openai", "mindie") == 400


def test_a_client_that_leaves_a_stream_frees_everything(upstream):
    """Catches a request that goes on for nobody."""
    import http.client
    from urllib.parse import urlsplit

    free = upstream.engine.stats().num_blocks
    for family, (path, body) in STREAMS.items():
        longer = {"tgi": "parameters", "mindie": "parameters"}
        limit = {"ignore_eos": True, "max_tokens": 3000}
        if family in longer:
            limit = {"parameters": {"max_new_tokens": 3000, "ignore_eos": True}}
        connection = http.client.HTTPConnection(urlsplit(upstream.url).netloc, timeout=30)
        connection.request("POST", path, json.dumps({**body, **limit}).encode())
        response = connection.getresponse()
        response.read(10)
        response.close()
        connection.close()
    for _ in range(500):
        stats = upstream.engine.stats()
        if not upstream.context.service.num_open and stats.num_free_blocks == free:
            return
        time.sleep(0.02)
    raise AssertionError(f"still held: {stats}")
