"""Pictures from outside: what is fetched, and from where nothing ever is."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from glimt.errors import ImageError
from glimt.server import fetch as fetching
from glimt.server.config import ServerConfig
from glimt.server.fetch import Fetcher

LOCAL = ("127.0.0.0/8",)


def fetched(url: str, **settings: Any) -> bytes:
    config = ServerConfig(allowed_media_domains=settings.pop("domains", ("*",)), **settings)
    fetcher = Fetcher(config, 2**30)
    try:
        with fetcher.holding() as held:
            return asyncio.run(fetcher.fetch(url, "messages[0].content[0]", held))
    finally:
        fetcher.close()


def refusal(url: str, **settings: Any) -> str:
    with pytest.raises(ImageError) as caught:
        fetched(url, **settings)
    assert caught.value.field == "messages[0].content[0]"
    return caught.value.message


@contextmanager
def host(respond: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[int]:
    """A web server on loopback; gives its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            respond(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def answering(status: int, body: bytes = b"", **headers: str) -> Callable[..., None]:
    def respond(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return respond


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/a.png",
        "http://localhost/a.png",
        "http://[::1]/a.png",
        "http://0x7f.1/a.png",
        "http://2130706433/a.png",
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:10.0.0.1]/a.png",
        "http://[64:ff9b::a00:1]/a.png",
        "http://[2002:a00:1::]/a.png",
        "http://10.1.2.3/a.png",
        "http://192.168.0.1/a.png",
        "http://100.64.0.1/a.png",
        "http://0.0.0.0/a.png",
        "http://224.0.0.1/a.png",
        "http://[fe80::1]/a.png",
        "http://[fd00::1]/a.png",
    ],
)
def test_no_address_that_is_not_public_is_reached(url):
    """Catches a server that can be sent to its own network, in any of the ways to write that."""
    assert "not public" in refusal(url)


def test_a_name_that_leads_inside_is_refused_by_its_address(monkeypatch):
    """Catches a check of names alone: anybody can give a private address a public name."""

    def inside(*_: Any, **__: Any) -> list[Any]:
        public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))
        return [public, (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.7", 80))]

    monkeypatch.setattr(socket, "getaddrinfo", inside)
    said = refusal("http://pictures.example.com/a.png")
    assert "'pictures.example.com' has the address 10.0.0.7" in said


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch):
    """Catches a second look-up when connecting, for which the name may have changed its mind."""
    with host(answering(200, b"bytes")) as port:
        lookups = []

        def first(name: str, *_: Any, **__: Any) -> list[Any]:
            lookups.append(name)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(socket, "getaddrinfo", first)
        url = f"http://pictures.example.com:{port}/a.png"
        assert fetched(url, allowed_media_networks=LOCAL) == b"bytes"
        assert lookups == ["pictures.example.com"]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://example.com/a.png", "no http or https URL"),
        ("http:///a.png", "no http or https URL"),
        ("http://user:secret@example.com/a.png", "user name or password"),
        ("http://example.com:22/a.png", "only 80 and 443"),
        ("http://evil.example.net/a.png", "is not among those allowed"),
        ("http://example.com.evil.net/a.png", "is not among those allowed"),
        ("http://notexample.com/a.png", "is not among those allowed"),
        ("http://example.com@evil.net/a.png", "user name or password"),
        ("http://" + "a" * 5000, "more than 4096 characters"),
    ],
)
def test_what_is_no_allowed_url_is_refused_unasked(url, said):
    """Catches a URL that two parsers read in two ways, and a host that only looks allowed."""
    assert said in refusal(url, domains=("example.com", "*.example.com"))


def test_without_an_allow_list_nothing_is_fetched():
    """Catches a server that fetches out of the box."""
    assert "--allowed-media-domains" in refusal("http://example.com/a.png", domains=())


@pytest.mark.parametrize("name", ["Example.COM", "pictures.example.com", "example.com."])
def test_hosts_match_whatever_their_case_and_final_dot(name, monkeypatch):
    """Catches an allow-list that a capital letter gets around, or that refuses its own hosts."""
    monkeypatch.setattr(Fetcher, "_checked_addresses", _told)
    with pytest.raises(LookupError):
        fetched(f"http://{name}/a.png", domains=("example.com", "*.example.com"))


async def _told(self: Any, url: Any, field: str) -> Any:
    raise LookupError("the host was allowed")


@pytest.mark.parametrize(
    ("respond", "said"),
    [
        (answering(302, Location="http://127.0.0.1/b.png"), "answered 302: a redirect"),
        (answering(404), "answered 404"),
        (answering(200, b"x" * 3000), "at most 2,000 bytes are fetched"),
        (answering(200, b"x" * 10, Content_Length="5000"), "cannot be fetched"),
        (answering(200, b"x", Content_Encoding="gzip"), "compressed body"),
    ],
)
def test_what_a_host_may_answer(respond, said):
    """Catches a redirect to the inside, a body without end, and a bomb that decompresses."""
    with host(respond) as port:
        url = f"http://127.0.0.1:{port}/a.png"
        assert said in refusal(url, allowed_media_networks=LOCAL, max_image_bytes=2000)


def test_a_host_that_is_too_slow_is_given_up(monkeypatch):
    """Catches a request that one byte a minute keeps alive."""
    monkeypatch.setattr(fetching, "_TOTAL_S", 0.2)
    never = threading.Event()
    with host(lambda handler: never.wait(2) and None) as port:
        said = refusal(f"http://127.0.0.1:{port}/a.png", allowed_media_networks=LOCAL)
        never.set()
    assert "did not come within 0.2 s" in said or "cannot be fetched" in said


def test_a_closed_port_is_an_error_of_the_picture():
    """Catches a library's own exception, which would be the server's fault."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "cannot be fetched" in refusal(
        f"http://127.0.0.1:{port}/a.png", allowed_media_networks=LOCAL
    )
