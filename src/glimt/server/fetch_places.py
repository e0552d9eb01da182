"""How many pictures are fetched at one time, and how many bytes of them may wait to be decoded.

Waiting for somebody else's host costs a socket and no work, so it has places of its own, apart from
those of preparation: a host that is slow holds up whoever asked for its pictures, and nobody else.
Knows no URL and no HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

from glimt.errors import CapacityError

IN_ALL = 64
OF_HOST = 8  # an eighth of all: one slow host leaves the others theirs
OF_REQUEST = 4  # half of a host's: one request leaves others some of the same host
_PLACE_S = 15.0  # until there is a place: as long as one fetch may take


class FetchPlaces:
    """One server's.

    max_held_bytes: that may have come and not be decoded, of all requests together
    """

    def __init__(self, max_held_bytes: int) -> None:
        self._all = asyncio.Semaphore(IN_ALL)
        # Hosts of which something is fetched or waits to be. Names apart from addresses: a name may
        # be an address, and whoever had all its places would then wait for one of them.
        self._names: dict[str, _Host] = {}
        self._networks: dict[str, _Host] = {}
        self._max_held_bytes = max_held_bytes
        self._num_held_bytes = 0

    def of_name(self, name: str) -> AbstractAsyncContextManager[None]:
        """A place among those of a host, to be taken first. Raises CapacityError."""
        return _place_of(self._names, name)

    @asynccontextmanager
    async def of_network(self, network: str) -> AsyncGenerator[None, None]:
        """A place among those of what the name leads to, and one of all. Raises CapacityError."""
        said = f"{IN_ALL} pictures are being fetched and come slowly"
        async with _place_of(self._networks, network), _place(self._all, said):
            yield

    @contextmanager
    def holding(self) -> Iterator[Held]:
        """What one request has fetched, counted until the block ends."""
        held = Held(self)
        try:
            yield held
        finally:
            self._num_held_bytes -= held.num_bytes

    def _take(self, num_bytes: int) -> None:
        # Refused and not made to wait: it might wait for a request that waits for its own pictures.
        most = self._max_held_bytes
        if self._num_held_bytes + num_bytes > most:
            said = f"fetched pictures of {self._num_held_bytes:,} bytes wait to be decoded"
            raise CapacityError(f"{said}, at most {most:,} may; try again in a second")
        self._num_held_bytes += num_bytes


class Held:
    """The fetched bytes of one request, and its own few places."""

    def __init__(self, places: FetchPlaces) -> None:
        self._places = places
        self.turns = asyncio.Semaphore(OF_REQUEST)
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count bytes that have come. Raises CapacityError if too many of all requests wait."""
        self._places._take(num_bytes)
        self.num_bytes += num_bytes


class _Host:
    """num_users: that have one of its places or wait for one; without any it is forgotten."""

    def __init__(self) -> None:
        self.semaphore = asyncio.Semaphore(OF_HOST)
        self.num_users = 0


@asynccontextmanager
async def _place_of(hosts: dict[str, _Host], key: str) -> AsyncGenerator[None, None]:
    host = hosts.setdefault(key, _Host())
    host.num_users += 1
    try:
        said = f"{OF_HOST} pictures of {key!r} are being fetched and come slowly"
        async with _place(host.semaphore, said):
            yield
    finally:
        host.num_users -= 1
        if not host.num_users:
            del hosts[key]


@asynccontextmanager
async def _place(semaphore: asyncio.Semaphore, said: str) -> AsyncGenerator[None, None]:
    """One of a semaphore's places; said: of an error when there is none for too long."""
    try:
        async with asyncio.timeout(_PLACE_S):
            await semaphore.acquire()
    except TimeoutError:
        instead = "try again later, or send the picture itself as a data URL"
        raise CapacityError(f"{said}; {instead}") from None
    try:
        yield
    finally:
        semaphore.release()
