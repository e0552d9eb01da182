"""`glimt serve`: the HTTP server, from its settings to its last running request."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from glimt.async_engine import AsyncEngine
from glimt.commands.console import note, say_error
from glimt.commands.running import load_engine
from glimt.config import EngineConfig
from glimt.errors import ConfigError, GlimtError
from glimt.loader import open_model
from glimt.server.app import SWITCH_S, Context, Stopping, create_app, create_management_app
from glimt.server.config import ServerConfig
from glimt.server.connections import Bound, Entrance
from glimt.server.logs import start_logging

_BACKLOG = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeJob:
    """What was asked for. engine: fields of EngineConfig."""

    engine: Mapping[str, Any]
    server: ServerConfig
    log_level: str = "info"
    log_format: str = "text"


def serve(job: ServeJob) -> int:
    """Serve until a signal ends it; the exit status.

    Raises ConfigError or CheckpointError for what can be told before the port is open.
    """
    config = EngineConfig(**job.engine)
    check_tls(job.server)
    open_model(config)  # a folder that cannot be served is told at once, and not by a 503
    start_logging(job.log_level, job.log_format)
    sys.setswitchinterval(SWITCH_S)
    return asyncio.run(_Server(job, config).run())


def check_tls(server: ServerConfig) -> None:
    """Read the certificate and its key once. Raises ConfigError if they are none."""
    if server.tls_cert is None:
        return
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # Without a password of ours OpenSSL would ask the terminal for one.
        context.load_cert_chain(server.tls_cert, server.tls_key, password="")
        if server.tls_ca is not None:
            context.load_verify_locations(server.tls_ca)
    except (OSError, ValueError) as error:
        said = "are no certificate and its key, in PEM and without a password"
        files = ", ".join(str(each) for each in (server.tls_cert, server.tls_key, server.tls_ca))
        raise ConfigError("tls_cert", [f"{files} {said}: {error}"]) from error


class _Server:
    """The public port, the management port if there is one, and the signals that end both."""

    def __init__(self, job: ServeJob, config: EngineConfig) -> None:
        self._job = job
        self._config = config
        self._status = 0
        self._stopping = Stopping()

    async def run(self) -> int:
        """Serve until a signal, drain, and end."""
        server = self._job.server
        app, context = create_app(
            lambda: AsyncEngine(load_engine(self._config)),
            server,
            model_name(self._config.model),
            int(time.time()),
            self._start_failed,
        )
        self._stopping = context.stopping
        ports = [(app, listen(server.host, server.port))]
        if server.management_port is not None:
            ports.append(
                (create_management_app(context), listen("127.0.0.1", server.management_port))
            )
        self._tell(ports, context)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        servers = [
            _Uvicorn(
                uvicorn.Config(
                    each,
                    http=partial(Entrance, self._bound(context)),  # type: ignore[arg-type]
                    **self._options(),
                    **(self._tls() if each is app else {}),
                )
            )
            for each, _ in ports
        ]
        running = [
            asyncio.create_task(one.serve([listener]))
            for one, (_, listener) in zip(servers, ports, strict=True)
        ]
        await _first(self._stopping.asked.wait(), *running)
        await self._drain(context)
        for one in servers:
            one.should_exit = True
        await asyncio.gather(*running)
        return self._status

    async def _drain(self, context: Context) -> None:
        """Take no more; let what runs go on for a while; what is left then is given up."""
        service = context.service
        service.host.drain()
        if service.num_open and not self._stopping.forced.is_set():
            limit = self._job.server.drain_timeout_s
            said = f"ending: {service.num_open} answers may go on for {limit:g} s"
            note(f"{said}; a second signal ends them at once")
            with suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await _first(service.wait_idle(), self._stopping.forced.wait())
        service.give_up()  # uvicorn then waits until their callers have been told

    def _signalled(self) -> None:
        """End; whoever asks again, by whatever way the first wish came, does not want to wait."""
        self._stopping.ask(is_forced=self._stopping.asked.is_set())

    def _start_failed(self, error: GlimtError) -> None:
        say_error(error)
        self._status = 1
        self._stopping.ask(is_forced=False)

    def _bound(self, context: Context) -> Bound:
        """Of one port: strangers who take all connections of one leave the other alone."""
        server = self._job.server
        return Bound(
            max_connections=server.connections_for(self._config.max_num_seqs),
            silent_s=server.idle_timeout_s,
            profile=server.profile,
            on_refused=lambda: context.metrics.failed("overloaded"),
        )

    def _options(self) -> dict[str, Any]:
        return {
            "loop": "asyncio",  # the loop that runs this already; not uvloop where it is installed
            "log_level": "warning",
            "access_log": False,
            "timeout_keep_alive": int(self._job.server.idle_timeout_s),
            "timeout_graceful_shutdown": 5,
            "ws": "none",
            "h11_max_incomplete_event_size": 64 * 2**10,
            "server_header": False,
            "lifespan": "on",
            "backlog": _BACKLOG,
        }

    def _tls(self) -> dict[str, Any]:
        """Of the public port; the management port is on loopback and speaks plain HTTP."""
        server = self._job.server
        if server.tls_cert is None:
            return {}
        checks = {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": str(server.tls_ca)}
        return {
            "ssl_certfile": str(server.tls_cert),
            "ssl_keyfile": str(server.tls_key),
            **(checks if server.tls_ca is not None else {}),
        }

    def _tell(self, ports: list[tuple[Any, socket.socket]], context: Context) -> None:
        host, port = ports[0][1].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        scheme = "http" if self._job.server.tls_cert is None else "https"
        note(f"serving {context.model_name} at {scheme}://{shown}:{port} (loading the model)")
        for _, listener in ports[1:]:
            note(f"management at http://127.0.0.1:{listener.getsockname()[1]}")
        if not self._job.server.api_keys and host not in ("127.0.0.1", "::1"):
            note("no API key is set: whoever reaches this port may use it (--api-key)")


async def _first(*awaited: Awaitable[Any]) -> None:
    """Return when any is done; of what was made for this, the others end."""
    tasks = {asyncio.ensure_future(each) for each in awaited}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks - set(awaited):
            task.cancel()


class _Uvicorn(uvicorn.Server):
    """Signals are ours: both ports end together, and only after the running requests."""

    def install_signal_handlers(self) -> None:
        """Leave them alone."""

    def capture_signals(self) -> Any:
        """Leave them alone, as newer releases call it."""
        from contextlib import nullcontext

        return nullcontext()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError if there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        listener.close()
        said = getattr(error, "strerror", None) or str(error)
        advice = "another program may have it; choose another --port"
        raise ConfigError("port", [f"{host}:{port} cannot be opened: {said}; {advice}"]) from error
    listener.setblocking(False)
    return listener


def model_name(model: str) -> str:
    """What a model is called where no name is given: the folder's."""
    return Path(model).expanduser().resolve().name if "/" in model else model
