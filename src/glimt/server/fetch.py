"""Fetches a picture from a host that is allowed, and from no other place.

The order of the checks is the point: the URL is read once by the library that connects, the host
is looked up once, every address it has must be public (or in a network that is allowed), and the
connection goes to the address that was checked. Redirects are not followed. How many at one time
is `fetch_places`'s affair.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

from yarl import URL

from glimt.errors import ImageError
from glimt.server.config import ServerConfig
from glimt.server.fetch_places import IN_ALL, FetchPlaces, Held

_TOTAL_S, _CONNECT_S, _READ_S = 15.0, 5.0, 10.0
_CHUNK = 64 * 2**10
_PORTS = (80, 443)
_MOST_CHARACTERS = 4096

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Fetcher:
    """Downloads pictures for one server.

    max_held_bytes: fetched for all requests together, until each is prepared
    """

    def __init__(self, config: ServerConfig, max_held_bytes: int) -> None:
        self._domains = tuple(_plain_host(domain) for domain in config.allowed_media_domains)
        self._networks = tuple(map(ipaddress.ip_network, config.allowed_media_networks))
        self._max_bytes = config.max_image_bytes
        self._places = FetchPlaces(max_held_bytes)
        # Not the loop's own threads, which prepare requests: a name server that is slow would take
        # them all, since a look-up that was given up holds its thread until the system's own limit.
        self._lookups = ThreadPoolExecutor(IN_ALL, thread_name_prefix="picture-host")

    def holding(self) -> AbstractContextManager[Held]:
        """What one request fetches, counted until the block ends."""
        return self._places.holding()

    async def fetch(self, text: str, field: str, held: Held) -> bytes:
        """The bytes behind a URL, counted as held.

        Raises ImageError naming the field and what stands against it, or CapacityError.
        """
        url = self._checked_url(text, field)
        assert url.host is not None
        async with held.turns, self._places.of_name(_plain_host(url.host)):
            addresses = await self._checked_addresses(url, field)
            # By its address as well: whoever owns a domain can make names without end.
            async with self._places.of_network(_network_of(addresses[0]["host"])):
                return await self._in_time(url, addresses, field, held)

    async def _in_time(
        self, url: URL, addresses: list[dict[str, Any]], field: str, held: Held
    ) -> bytes:
        try:
            async with asyncio.timeout(_TOTAL_S):
                return await self._download(url, addresses, field, held)
        except TimeoutError:
            said = f"the picture did not come within {_TOTAL_S:g} s"
            raise ImageError(field, said) from None

    # --- what may be asked for ---

    def _checked_url(self, text: str, field: str) -> URL:
        if len(text) > _MOST_CHARACTERS:
            raise ImageError(field, f"is a URL of more than {_MOST_CHARACTERS} characters")
        try:
            url = URL(text)
            host, port = url.host, url.port
        except ValueError as error:
            raise ImageError(field, f"is no URL: {error}") from error
        if not self._domains:
            said = "pictures are not fetched here: send the picture itself as a data URL"
            raise ImageError(field, f"{said}, or start the server with --allowed-media-domains")
        if url.scheme not in ("http", "https") or not host:
            raise ImageError(field, "is no http or https URL with a host")
        if url.user is not None or url.password is not None:
            raise ImageError(field, "holds a user name or password; such URLs are not fetched")
        if port not in _PORTS and not self._networks:
            raise ImageError(field, f"names port {port}; only 80 and 443 are fetched from")
        if not self._is_allowed(_plain_host(host)):
            allowed = ", ".join(self._domains)
            raise ImageError(field, f"the host {host!r} is not among those allowed: {allowed}")
        return url

    def _is_allowed(self, host: str) -> bool:
        return any(
            domain in ("*", host) or (domain.startswith("*.") and host.endswith(domain[1:]))
            for domain in self._domains
        )

    async def _checked_addresses(self, url: URL, field: str) -> list[dict[str, Any]]:
        """What the host is called by now, every address of it checked."""
        assert url.host is not None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_S):
                found = await loop.run_in_executor(self._lookups, _look_up, url.host, url.port)
        except (OSError, TimeoutError, UnicodeError) as error:
            raise ImageError(field, f"the host {url.host!r} cannot be found") from error
        for *_, place in found:
            address = ipaddress.ip_address(str(place[0]).partition("%")[0])
            if not self._may_reach(address):
                said = f"the host {url.host!r} has the address {address}, which is not public"
                raise ImageError(field, f"{said}; such pictures are not fetched")
        return [
            {
                "hostname": url.host,
                "host": place[0],
                "port": place[1],
                "family": family,
                "proto": proto,
                "flags": socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            }
            for family, _, proto, _, place in found
        ]

    def _may_reach(self, address: Address) -> bool:
        inner = _inner(address)
        if any(inner in network for network in self._networks if network.version == inner.version):
            return True
        return inner.is_global and not inner.is_multicast and not inner.is_reserved

    # --- the download ---

    async def _download(
        self, url: URL, addresses: list[dict[str, Any]], field: str, held: Held
    ) -> bytes:
        import aiohttp

        pinned: Any = _Pinned(addresses)  # of AbstractResolver's form
        connector = aiohttp.TCPConnector(resolver=pinned, force_close=True)
        timeout = aiohttp.ClientTimeout(_TOTAL_S, connect=_CONNECT_S, sock_read=_READ_S)
        headers = {"Accept": "image/*", "Accept-Encoding": "identity"}
        options: dict[str, Any] = {"timeout": timeout, "trust_env": False, "auto_decompress": False}
        try:
            async with (
                aiohttp.ClientSession(connector=connector, **options) as session,
                session.get(url, headers=headers, allow_redirects=False) as response,
            ):
                return await self._body(response, field, held)
        except aiohttp.ClientError as error:
            said = f"the picture cannot be fetched: {type(error).__name__}"
            raise ImageError(field, said) from error

    async def _body(self, response: Any, field: str, held: Held) -> bytes:
        if response.status != 200:
            what = "a redirect, which is not followed" if 300 <= response.status < 400 else "that"
            raise ImageError(field, f"the host answered {response.status}: {what} is no picture")
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ImageError(field, "the host sent a compressed body that nobody asked for")
        body = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK):
            held.add(len(chunk))
            body += chunk
            if len(body) > self._max_bytes:
                most = f"at most {self._max_bytes:,} bytes are fetched"
                raise ImageError(field, f"the picture is larger than that: {most}")
        return bytes(body)

    def close(self) -> None:
        """Wait for no look-up."""
        self._lookups.shutdown(wait=False, cancel_futures=True)


class _Pinned:
    """A resolver that knows one host, and only the addresses that were checked."""

    def __init__(self, addresses: list[dict[str, Any]]) -> None:
        self._addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
        """The checked addresses, whatever the name says by now."""
        return self._addresses

    async def close(self) -> None:
        """Nothing is open."""


def _look_up(host: str, port: int | None) -> list[Any]:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


def _network_of(text: str) -> str:
    """What one owner has of addresses: one of IPv4, of IPv6 all with the same first 64 bits."""
    address = _inner(ipaddress.ip_address(text.partition("%")[0]))
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    return str(ipaddress.ip_network((address, 64), strict=False))


def _plain_host(host: str) -> str:
    """Lower-case, in ASCII, without the dot that may end a name."""
    text = host.strip().rstrip(".").lower()
    try:
        return text.encode("idna").decode() if not text.isascii() else text
    except UnicodeError:
        return text


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for (mapped, NAT64, 6to4), else the address."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in ipaddress.ip_network("64:ff9b::/96"):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour or address
