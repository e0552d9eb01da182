"""A real server over loopback for tests: the application as `glimt serve` runs it, in a thread."""

from __future__ import annotations

import asyncio
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

import glimt
from glimt.server.app import Context, _operation, all_protocols, create_app
from glimt.server.config import ServerConfig


@dataclass(frozen=True)
class Served:
    """url: http://127.0.0.1:PORT"""

    url: str
    context: Context
    engine: glimt.AsyncEngine


@contextmanager
def serving(
    model: str = "demo", server: ServerConfig | None = None, waits: bool = True, **engine: Any
) -> Iterator[Served]:
    """Serve a model until the end of the block; waits: until it is ready.

    server: settings, of which host and port are not used; engine: fields of EngineConfig
    """
    config = server or ServerConfig(num_decoders=0)
    loaded = glimt.AsyncEngine.load(glimt.EngineConfig(model=model, **engine))
    app, context = create_app(lambda: loaded, config, "demo", created=1760000000)
    with running(app) as url:
        if waits:
            wait_ready(url)
        yield Served(url, context, loaded)


@contextmanager
def running(app: Any, **options: Any) -> Iterator[str]:
    """Any ASGI application on a free port; gives its address. options: more of uvicorn's."""
    usual = {"host": "127.0.0.1", "port": 0, "log_level": "warning", "lifespan": "on"}
    # As glimt serve, whatever else is installed.
    usual |= {"loop": "asyncio", "http": "h11", "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app, **{**usual, **options}))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


def paths() -> frozenset[str]:
    """Every path that some server answers, those of the management port too."""
    _, context = create_app(lambda: None, ServerConfig(num_decoders=0), "demo", 0)  # type: ignore
    routers = [protocol.routes(context) for protocol in all_protocols()] + [_operation(context)]
    return frozenset(route.path for router in routers for route in router.routes)  # type: ignore


def wait_ready(url: str, timeout_s: float = 60.0) -> None:
    """Return once /health says that requests are answered."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except urllib.error.HTTPError:
            time.sleep(0.02)
    raise AssertionError("the server did not become ready")
