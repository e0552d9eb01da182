"""Which pages of a browser may use the server: its own, and those that it was told of.

A page of any site can send requests to a server on its reader's machine, and a body is read as JSON
whatever it is called, so no browser asks first. `Guard` refuses what comes from a page of another
origin, and from one that reached this address under a name of its own (DNS rebinding). `Sharing`
tells browsers which other pages may read the answers (CORS). Programs send no Origin and notice
neither. Pure ASGI. Sources: RFC 6454; the Fetch standard, sections 3.2 and 3.3; Fetch Metadata.
"""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glimt.server.failures import Failure
from glimt.server.middleware import OPEN_PATHS
from glimt.server.refusals import send_failure

ANY = "*"
_PORTS = {"http": 80, "https": 443}
# To be read by links and dashboards of any page, with a key where there is one.
_HARMLESS = OPEN_PATHS | {"/", "/live", "/ready", "/metrics"}
# Names that no stranger can have: none of them is in the public DNS.
_OWN_NAMES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")
_METHODS = "GET, HEAD, POST"
_SHOWN = "X-Request-Id, RequestUUID, Retry-After, Inference-Header-Content-Length"
_PREFLIGHT_S = "600"


class Origins:
    """Origins that are allowed besides the server's own, as `ServerConfig` has them.

    own_name: where the server listens, which may be a name
    """

    def __init__(self, allowed: Sequence[str] = (), own_name: str = "") -> None:
        self.takes_any = ANY in allowed
        self._allowed = frozenset(map(_as_written, allowed))
        places = (_place(each.partition("://")[2]) for each in allowed)
        self._hosts = frozenset({own_name.lower(), *(name for name, _ in places)} - {""})

    def allows(self, origin: str) -> bool:
        """Whether this one was named, or any is."""
        return self.takes_any or _as_written(origin) in self._allowed

    def may_be_called(self, host: str) -> bool:
        """Whether a Host header is an address or name that no other site can have.

        An address cannot be made to lead elsewhere, a name of the public DNS can.
        """
        name = _place(host)[0].rstrip(".")
        is_single = bool(name) and "." not in name
        is_own = is_single or name.endswith(_OWN_NAMES) or _is_address(name)
        return is_own or self.takes_any or name in self._hosts


def _as_written(origin: str) -> str:
    """As browsers write it: small letters, without the port that the scheme has anyway."""
    origin = origin.lower()
    return origin.removesuffix(f":{_PORTS.get(origin.partition('://')[0], '')}")


def _place(authority: str) -> tuple[str, int | None]:
    """Name and port of HOST or HOST:PORT; an empty name for what is neither."""
    try:
        read = urlsplit(f"//{authority}")
        return read.hostname or "", read.port
    except ValueError:
        return "", None


def _is_address(name: str) -> bool:
    """No name of the DNS ends in a number or holds a colon."""
    return ":" in name or name.rpartition(".")[2].isdecimal()


def _is_same(origin: str, host: str) -> bool:
    """Whether a page of an origin was served under this Host, as far as the two tell.

    The scheme is left out: a proxy before the server may speak HTTPS for it.
    """
    scheme, _, authority = origin.lower().partition("://")
    usual = _PORTS.get(scheme)
    (name, port), (own_name, own_port) = _place(authority), _place(host)
    return bool(name) and (name, port or usual) == (own_name, own_port or usual)


class Guard:
    """Refuses what a page of another site sends, with 403 in the family's form.

    has_keys:      with them a strange page gets no further, whatever name it reached us by
    is_management: nothing but health and metrics is harmless there, not even GET
    """

    def __init__(
        self,
        app: ASGIApp,
        origins: Origins,
        profile: str,
        has_keys: bool = False,
        is_management: bool = False,
    ) -> None:
        self._app, self._origins, self._profile = app, origins, profile
        self._has_keys, self._is_management = has_keys, is_management

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        said = self._problem(scope) if scope["type"] == "http" else None
        if said is None:
            await self._app(scope, receive, send)
            return
        await send_failure(Failure("origin", said), scope["path"], self._profile, send)

    def _problem(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        origin, host = headers.get("origin"), headers.get("host", "")
        is_read = scope["method"] in ("GET", "HEAD")
        if is_read and scope["path"] in _HARMLESS:
            return None
        if origin is None:
            return self._problem_of_silent(headers, host, is_read)
        if self._origins.allows(origin):
            return None
        if not _is_same(origin, host):
            said = f"a page of {origin[:200]!r} may not use this server, which is {host[:200]!r}"
            return f"{said}; {self._advice(origin)}"
        return self._problem_of_name(host, origin)

    def _problem_of_silent(self, headers: Headers, host: str, is_read: bool) -> str | None:
        """Of a request without Origin: a program's, or a picture, link or form of a page."""
        site = headers.get("sec-fetch-site", "none")
        is_foreign = site in ("cross-site", "same-site")
        if is_foreign and (self._is_management or not is_read):
            return f"a page of another site may not use this server; {self._advice('ORIGIN')}"
        return self._problem_of_name(host, "") if self._is_management else None

    def _problem_of_name(self, host: str, origin: str) -> str | None:
        if self._has_keys or not host or self._origins.may_be_called(host):
            return None
        said = f"this server has no key and was called {host[:200]!r}, a name that others could own"
        return f"{said}; use its address, set --api-key, or {self._advice(origin or 'ORIGIN')}"

    def _advice(self, origin: str) -> str:
        if self._is_management:
            return "call the management port by 127.0.0.1, and from no page"
        return f"start it with --allow-origin {origin[:200]}"


class Sharing:
    """Lets pages of allowed origins read every reply, errors and streams too (CORS)."""

    def __init__(self, app: ASGIApp, origins: Origins) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a preflight; pass the rest on and mark its reply."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        origin = headers.get("origin")
        if origin is None or not self._origins.allows(origin):
            await self._app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._mark(MutableHeaders(scope=message), origin)
            await send(message)

        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _answer_preflight(headers, marked)
            return
        await self._app(scope, receive, marked)

    def _mark(self, headers: MutableHeaders, origin: str) -> None:
        headers["Access-Control-Allow-Origin"] = ANY if self._origins.takes_any else origin
        headers["Access-Control-Expose-Headers"] = _SHOWN
        headers.add_vary_header("Origin")


async def _answer_preflight(headers: Headers, send: Send) -> None:
    """Any header may be sent, as a program may send any; keys are told in headers."""
    told = {
        "access-control-allow-methods": _METHODS,
        "access-control-allow-headers": headers.get("access-control-request-headers", ANY),
        "access-control-max-age": _PREFLIGHT_S,
    }
    raw = [(name.encode(), value.encode("latin-1")) for name, value in told.items()]
    await send({"type": "http.response.start", "status": 204, "headers": raw})
    await send({"type": "http.response.body", "body": b""})
