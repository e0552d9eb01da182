"""Whose pages may use the server: its own, those it was told of, and no others."""

from __future__ import annotations

import json

import pytest

from forms import call
from glimt.errors import ConfigError
from glimt.server.app import create_management_app
from glimt.server.config import ServerConfig
from glimt.server.origins import Origins, _is_same
from serving import running, serving

CHAT = "https://chat.example.org"
STRANGE = "https://evil.example"
PLAIN = {"Content-Type": "text/plain"}  # what a page may send without asking first

# Path -> a good body, and where an error of the family has its text.
FORMS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "hi", "max_tokens": 1},
    "/generate": {"inputs": "hi", "parameters": {"max_new_tokens": 1}},
    "/generate_stream": {"inputs": "hi", "parameters": {"max_new_tokens": 1}},
    "/": {"inputs": "hi", "parameters": {"max_new_tokens": 1}},
    "/infer": {"inputs": "hi", "parameters": {"max_new_tokens": 1}},
    "/v2/models/demo/generate": {"text_input": "hi", "max_tokens": 1},
}


@pytest.fixture(scope="module")
def shared():
    config = ServerConfig(
        num_decoders=0, served_model_names=("demo",), allowed_origins=(CHAT, "null")
    )
    with serving("demo", config) as served:
        yield served.url


def host_of(url):
    return url.removeprefix("http://")


def said(reply):
    error = reply.json["error"]
    return error if isinstance(error, str) else error["message"]


def num_begun(url):
    """Requests that reached the engine, of every form."""
    lines = call(url, "/metrics").content.decode().splitlines()
    counts = [line.split()[-1] for line in lines if line.startswith("glimt:requests_total{")]
    return sum(map(float, counts))


# --- one origin against one host -------------------------------------------------------------


@pytest.mark.parametrize(
    ("origin", "host", "is_same"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1:8000", True),
        ("http://Box:8000", "box:8000", True),
        ("https://box", "box", True),
        ("https://box", "box:443", True),
        ("http://box", "box:80", True),
        ("http://[::1]:8000", "[::1]:8000", True),
        ("http://127.0.0.1:3000", "127.0.0.1:8000", False),
        ("http://localhost:8000", "127.0.0.1:8000", False),
        ("http://box", "box:8000", False),
        ("http://box.evil.example", "box", False),
        ("http://evil.example/box", "box", False),
        ("null", "null", False),
        ("null", "", False),
        ("http://[box", "[box", False),
        ("http://box:port", "box:port", False),
    ],
)
def test_a_page_is_ours_by_host_and_port(origin, host, is_same):
    """Catches a comparison of beginnings, and a header that is none and ends in a 500."""
    assert _is_same(origin, host) is is_same


@pytest.mark.parametrize(
    ("host", "may_be"),
    [
        ("127.0.0.1:8000", True),
        ("[::1]", True),
        ("localhost:8000", True),
        ("box", True),
        ("box.local:8000", True),
        ("glimt.default.svc.cluster.local", True),
        ("chat.example.org", True),
        ("GPU7.example.org:8000", True),
        ("evil.example", False),
        ("evil.example.:8000", False),
        ("127.0.0.1.evil.example", False),
        ("local.evil.example", False),
        ("evil.example:port", False),
        ("[evil.example", False),
    ],
)
def test_a_name_of_the_public_dns_may_lead_anywhere(host, may_be):
    """Catches a page that names itself and then turns its name into this machine's address."""
    assert Origins((CHAT,), "gpu7.example.org").may_be_called(host) is may_be


NO_ORIGINS = [
    "chat.example.org", "https://a.b/", "https://a.b/c", "", "a b", "https://*.a.b", "https://聊天.cn",
]  # fmt: skip


@pytest.mark.parametrize("origin", NO_ORIGINS)
def test_an_origin_that_is_none_is_refused_at_the_start(origin):
    """Catches a setting that never matches: browsers write no path, no star and ASCII alone."""
    with pytest.raises(ConfigError, match=r"allowed_origins: .* is no origin such as"):
        ServerConfig(allowed_origins=(origin,))


# --- requests --------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["upstream", "mindie"])
@pytest.mark.parametrize("path", FORMS)
def test_a_strange_page_gets_no_answer(request, profile, path):
    """Catches a site that uses the server on its reader's machine."""
    served = request.getfixturevalue(profile)
    before = num_begun(served.url)
    body = json.dumps(FORMS[path]).encode()
    reply = call(served.url, path, body, {"Origin": STRANGE, **PLAIN})
    assert reply.status == 403
    assert f"start it with --allow-origin {STRANGE}" in said(reply)
    assert "x-request-id" in reply.headers
    assert "access-control-allow-origin" not in reply.headers
    assert num_begun(served.url) == before
    assert call(served.url, path, body, PLAIN).status == 200
    assert num_begun(served.url) == before + 1


@pytest.mark.parametrize("path", FORMS)
def test_programs_and_our_own_page_are_answered(upstream, path):
    """Catches a check that stops the chat page, or a client that is no browser."""
    for headers in ({}, {"Origin": upstream.url}, {"Origin": upstream.url, **PLAIN}):
        assert call(upstream.url, path, FORMS[path], headers).status == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_strange_page_without_an_origin_is_known_by_its_site(upstream, site):
    """Catches a form of a browser that tells no Origin."""
    headers = {"Sec-Fetch-Site": site}
    assert call(upstream.url, "/generate", FORMS["/generate"], headers).status == 403
    assert call(upstream.url, "/", None, headers).status == 200  # a link to the chat page


PROBES = ["/health", "/metrics", "/ping", "/live", "/ready", "/v2/health/live", "/"]


@pytest.mark.parametrize("path", PROBES)
def test_probes_are_harmless(upstream, path):
    """Catches a dashboard in a browser that no longer sees whether the server lives."""
    reply = call(upstream.url, path, None, {"Origin": STRANGE})
    assert reply.status == 200
    assert "access-control-allow-origin" not in reply.headers  # so the page cannot read it


def test_a_page_that_took_our_address_for_its_name_gets_no_answer(upstream):
    """Catches DNS rebinding: Origin and Host agree, and both are the attacker's."""
    named = {"Origin": "http://evil.example:8000", "Host": "evil.example:8000"}
    reply = call(upstream.url, "/generate", FORMS["/generate"], named)
    assert reply.status == 403
    assert "a name that others could own" in said(reply)
    # A program may call it so: nothing but a browser can be led astray.
    host = {"Host": "gpu7.example.org"}
    assert call(upstream.url, "/generate", FORMS["/generate"], host).status == 200


def test_with_a_key_any_name_will_do():
    """Catches a server behind its public name that needs two settings to be reached."""
    config = ServerConfig(num_decoders=0, api_keys=("sk-1",))
    named = {"Origin": CHAT, "Host": "chat.example.org", "Authorization": "Bearer sk-1"}
    with serving("demo", config) as served:
        assert call(served.url, "/generate", FORMS["/generate"], named).status == 200
        other = {**named, "Origin": STRANGE}
        assert call(served.url, "/generate", FORMS["/generate"], other).status == 403


@pytest.mark.parametrize("host", ["[box", "box:port", "", "a b", "\xff"])
def test_a_host_that_is_none_ends_in_a_plain_error(upstream, host):
    """Catches a header that brings the check down."""
    headers = {"Origin": "http://box", "Host": host}
    assert call(upstream.url, "/generate", FORMS["/generate"], headers).status in (400, 403)


# --- allowed pages ---------------------------------------------------------------------------


def test_behind_a_proxy_that_renames_the_host_the_public_origin_is_allowed(shared):
    """Catches the chat page that is refused by its own server behind a proxy."""
    headers = {"Origin": CHAT, "Host": "glimt:8000"}
    assert call(shared, "/v1/completions", FORMS["/v1/completions"], headers).status == 200
    assert call(shared, "/", None, headers).status == 200


@pytest.mark.parametrize("origin", [CHAT, "null"])
def test_an_allowed_page_may_read_answers_errors_and_streams(shared, origin):
    """Catches an error that the page sees only as a failed request."""
    stream = {**FORMS["/v1/completions"], "stream": True}
    wrong_id = {"X-Request-Id": "a b"}
    asked = [
        ("/v1/completions", FORMS["/v1/completions"], {}, 200),
        ("/v1/completions", stream, {}, 200),
        ("/v1/completions", b"{", {}, 400),
        ("/v1/completions", FORMS["/v1/completions"], wrong_id, 400),
        ("/nowhere", None, {}, 404),
        ("/v1/models", None, {}, 200),
    ]
    for path, body, headers, status in asked:
        reply = call(shared, path, body, {"Origin": origin, **headers})
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (status, origin)
        assert "X-Request-Id" in reply.headers["access-control-expose-headers"]
        assert reply.headers["vary"] == "Origin"


def preflight(url, origin):
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return call(url, "/v1/chat/completions", None, asked, "OPTIONS")


def test_a_preflight_is_answered_to_allowed_pages_only(shared):
    """Catches keys and JSON that a browser will not send, and a stranger that is let in."""
    reply = preflight(shared, CHAT)
    assert (reply.status, reply.content) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == CHAT
    assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    assert "POST" in reply.headers["access-control-allow-methods"]
    stranger = preflight(shared, STRANGE)
    assert stranger.status == 403
    assert "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize("strange", [CHAT + ":8443", "http://chat.example.org", CHAT + ".evil.org"])
def test_an_allowed_origin_is_that_one_alone(shared, strange):
    """Catches one that is compared by its beginning, or without its scheme."""
    reply = call(shared, "/v1/completions", FORMS["/v1/completions"], {"Origin": strange})
    assert reply.status == 403


def test_a_star_lets_every_page_in():
    """Catches a star that is taken for a name, and a key that it makes needless."""
    config = ServerConfig(num_decoders=0, api_keys=("sk-1",), allowed_origins=("*",))
    with serving("demo", config) as served:
        assert preflight(served.url, STRANGE).headers["access-control-allow-origin"] == "*"
        reply = call(served.url, "/generate", FORMS["/generate"], {"Origin": STRANGE})
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (401, "*")
        keyed = {"Origin": STRANGE, "Authorization": "Bearer sk-1"}
        assert call(served.url, "/generate", FORMS["/generate"], keyed).status == 200


# --- the management port ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": STRANGE},
        {"Origin": CHAT},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example:1026"},
        {"Host": "evil.example:port"},
        {"Host": "evil.example:1026", "Origin": "http://evil.example:1026"},
    ],
)
def test_no_page_may_end_the_server(mindie, headers):
    """Catches a picture whose address is /stopService: a GET without any Origin."""
    with running(create_management_app(mindie.context)) as url:
        reply = call(url, "/stopService", None, headers)
        assert reply.status == 403
        assert "call the management port by 127.0.0.1" in said(reply)
        assert call(url, "/health", None, headers).status == 200
        assert call(url, "/v1/status", None, headers).status == 403
        for own in ({}, {"Sec-Fetch-Site": "none"}, {"Origin": url}):
            assert call(url, "/v1/status", None, own).status == 200
    assert not mindie.context.stopping.asked.is_set()
