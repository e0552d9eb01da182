"""Slow hosts of pictures: whom they hold up, and how much of them is held at one time."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import glimt
from glimt.errors import CapacityError
from glimt.inputs.chat import parse_messages
from glimt.server import fetch, fetch_places
from glimt.server.fetch_places import IN_ALL, OF_HOST, OF_REQUEST, FetchPlaces
from glimt.server.service import Ask, Service
from glimt.types import SamplingParams
from services import picture, run

LOCAL = {"allowed_media_domains": ("*",), "allowed_media_networks": ("127.0.0.0/8",)}
PATIENT_S = 600.0
"""Longer than any test: what is answered was not waiting for a slow host's limit to pass."""


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is slow here is given up."""
    monkeypatch.setattr(fetch, "_TOTAL_S", PATIENT_S)
    monkeypatch.setattr(fetch, "_READ_S", PATIENT_S)
    monkeypatch.setattr(fetch_places, "_PLACE_S", PATIENT_S)


class _Web(ThreadingHTTPServer):
    request_queue_size = 128  # all of a test's requests come at once


class Host:
    """A web server at one address of the loopback; a slow one answers when it is told to."""

    def __init__(self, address: str, is_slow: bool) -> None:
        self.num_asked = self.num_open = self.most_open = 0
        self.changed = threading.Condition()
        self.goes_on = threading.Event()
        if not is_slow:
            self.goes_on.set()
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.count(1)
                host.goes_on.wait(60)
                host.count(-1)
                self.send_response(200)
                self.end_headers()
                self.wfile.write(picture())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = _Web((address, 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that left  # type: ignore
        self.url = f"http://{address}:{self.server.server_port}/a.png"

    def count(self, change: int) -> None:
        with self.changed:
            self.num_open += change
            self.num_asked += change > 0
            self.most_open = max(self.most_open, self.num_open)
            self.changed.notify_all()

    def wait_asked(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.num_asked >= count, 30), self.num_asked


@contextmanager
def hosts(*addresses: str, is_slow: bool = False) -> Iterator[list[Host]]:
    with ExitStack() as stack:
        found = [Host(address, is_slow) for address in addresses]
        for host in found:
            threading.Thread(target=host.server.serve_forever, daemon=True).start()
            stack.callback(host.server.server_close)
            stack.callback(host.server.shutdown)
            stack.callback(host.goes_on.set)
        yield found


def showing(*urls: str, name: str = "r") -> Ask:
    """A question about pictures."""
    shown = [{"type": "image_url", "image_url": url} for url in urls]
    content = [*shown, {"type": "text", "text": "你好"}]
    messages = parse_messages([{"role": "user", "content": content}], glimt.ImageLimits())
    sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    return Ask(protocol="openai", request_id=name, messages=messages, sampling=sampling)


async def answered(opened: Service, asked: Ask) -> int:
    """Tokens of the answer."""
    async with opened.answer(asked) as answer:
        return len((await answer.whole()).token_ids)


@asynccontextmanager
async def in_flight(opened: Service, asks: list[Ask]) -> AsyncGenerator[list[Any], None]:
    """Requests that are being answered until the end of the block."""
    tasks = [asyncio.create_task(answered(opened, each)) for each in asks]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
def model(folders: dict[str, Path]) -> Path:
    return folders["glm4v_9b"]


def test_slow_hosts_hold_up_nobody_else(model):
    """Catches a wait for somebody's host in a place that every other picture needs."""
    data_url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"

    with (
        hosts("127.0.0.2", "127.0.0.3", "127.0.0.4", "127.0.0.5", is_slow=True) as slow,
        hosts("127.0.0.9") as (fast,),
    ):

        async def scene(opened: Service) -> None:
            many = [showing(host.url) for host in slow for _ in range(2 * OF_HOST)]
            async with in_flight(opened, many) as tasks:
                for host in slow:
                    await asyncio.to_thread(host.wait_asked, OF_HOST)
                async with asyncio.timeout(60):
                    assert await answered(opened, showing(data_url)) == 2
                    assert await answered(opened, showing(fast.url)) == 2
                assert not any(task.done() for task in tasks)
                for host in slow:
                    host.goes_on.set()
                assert await asyncio.wait_for(asyncio.gather(*tasks), 60) == [2] * len(many)

        run(model, scene, **LOCAL)
        assert [host.most_open for host in slow] == [OF_HOST] * 4


def test_one_request_takes_few_places(model):
    """Catches a request of many pictures that has all of a host's places, or all that there are."""
    with hosts(*(f"127.0.0.{n}" for n in range(2, 10)), is_slow=True) as slow:

        async def scene(opened: Service) -> None:
            async with in_flight(opened, [showing(*(host.url for host in slow))]) as (task,):
                for host in slow[:OF_REQUEST]:
                    await asyncio.to_thread(host.wait_asked, 1)
                assert sum(host.num_asked for host in slow) == OF_REQUEST
                slow[0].goes_on.set()
                await asyncio.to_thread(slow[OF_REQUEST].wait_asked, 1)
                for host in slow:
                    host.goes_on.set()
                assert await asyncio.wait_for(task, 60) == 2

        run(model, scene, **LOCAL)


def test_names_of_one_address_are_one_host(model):
    """Catches a limit that whoever owns a domain gets around with a name for each picture."""
    with hosts("127.0.0.1", is_slow=True) as (slow,):
        other = slow.url.replace("127.0.0.1", "localhost")

        async def scene(opened: Service) -> None:
            many = [showing(url) for url in (slow.url, other) for _ in range(OF_HOST)]
            async with in_flight(opened, many) as tasks:
                await asyncio.to_thread(slow.wait_asked, OF_HOST)
                slow.goes_on.set()
                await asyncio.wait_for(asyncio.gather(*tasks), 60)

        run(model, scene, **LOCAL)
        assert slow.most_open <= OF_HOST


def test_a_request_that_is_refused_anyway_asks_no_host(model):
    """Catches fetches for a request whose own words suffice to refuse it."""
    with hosts("127.0.0.2") as (host,):

        async def scene(opened: Service) -> None:
            with pytest.raises(glimt.RequestError, match="at most 1 are taken"):
                await answered(opened, showing(host.url, host.url))

        run(model, scene, limit_images=1, **LOCAL)
        assert host.num_asked == 0


def test_who_waits_too_long_for_a_place_is_told(model, monkeypatch):
    """Catches a queue before a slow host that keeps every place of the server for minutes."""
    monkeypatch.setattr(fetch_places, "_PLACE_S", 0.05)
    with hosts("127.0.0.2", is_slow=True) as (slow,):

        async def scene(opened: Service) -> None:
            async with in_flight(opened, [showing(slow.url)] * OF_HOST):
                await asyncio.to_thread(slow.wait_asked, OF_HOST)
                with pytest.raises(CapacityError, match=r"8 pictures of '127\.0\.0\.2'.* data URL"):
                    await answered(opened, showing(slow.url))
            places = opened.pictures._fetcher._places
            assert not places._names | places._networks, "nothing of it is kept"

        run(model, scene, **LOCAL)


def test_what_was_fetched_and_waits_has_a_limit(model):
    """Catches memory that small requests for large pictures fill, and room that stays taken."""
    most = 4 * 2 * 1024  # requests that are prepared, pictures of each, and bytes of a picture

    async def scene(opened: Service) -> None:
        places = opened.pictures._fetcher._places
        with places.holding() as held:
            held.add(most)
            with pytest.raises(CapacityError, match=f"at most {most:,} may; try again"):
                held.add(1)
            with places.holding() as other, pytest.raises(CapacityError):
                other.add(1)
        with places.holding() as held:
            held.add(most)

    run(model, scene, limit_images=2, max_image_bytes=1024)


def test_bytes_that_were_fetched_count_until_the_request_is_prepared(model):
    """Catches a count that ends with the download, or never."""
    with hosts("127.0.0.2") as (host,):

        async def scene(opened: Service) -> None:
            places, seen = opened.pictures._fetcher._places, []
            read = opened.pictures.read

            async def watched(messages: Any) -> Any:
                seen.append(places._num_held_bytes)
                return await read(messages)

            opened.pictures.read = watched  # type: ignore[method-assign]
            assert await answered(opened, showing(host.url, host.url)) == 2
            assert seen == [2 * len(picture())]
            assert places._num_held_bytes == 0

        run(model, scene, **LOCAL)


def test_there_are_no_more_fetches_than_places():
    """Catches hosts that each keep their limit, and sockets without end all together."""

    async def scene() -> int:
        places, goes_on = FetchPlaces(1), asyncio.Event()
        num_open = 0

        async def one(host: str) -> None:
            nonlocal num_open
            async with places.of_name(host), places.of_network(host):
                num_open += 1
                await goes_on.wait()

        tasks = [asyncio.create_task(one(f"host-{n}")) for n in range(IN_ALL + 10)]
        for _ in range(10):
            await asyncio.sleep(0)
        most = num_open
        goes_on.set()
        await asyncio.gather(*tasks)
        return most

    assert asyncio.run(scene()) == IN_ALL


def test_slow_name_servers_take_no_thread_of_the_loop(model, monkeypatch):
    """Catches look-ups that hold the few threads in which requests are prepared."""
    goes_on, looking = threading.Event(), threading.Semaphore(0)
    real: Callable[..., Any] = fetch._look_up

    def look_up(host: str, port: int) -> Any:
        looking.release()
        goes_on.wait(60)
        return real("127.0.0.2", port)

    def wait_looking() -> None:
        for _ in range(IN_ALL):
            assert looking.acquire(timeout=30)

    monkeypatch.setattr(fetch, "_look_up", look_up)
    monkeypatch.setattr(fetch, "_CONNECT_S", PATIENT_S)
    data_url = f"data:image/png;base64,{base64.b64encode(picture()).decode()}"

    async def scene(opened: Service) -> None:
        many = [showing(f"http://{n}.example.org/a.png") for n in range(IN_ALL)]
        with ThreadPoolExecutor(1) as outside:
            async with in_flight(opened, many), asyncio.timeout(60):
                try:
                    await asyncio.get_running_loop().run_in_executor(outside, wait_looking)
                    assert await answered(opened, showing(data_url)) == 2
                finally:
                    goes_on.set()

    run(model, scene, **LOCAL)
