"""The HTTP application: routes of every protocol, health, metrics, and the order of it all.

A protocol is one file of this folder that ends in `PROTOCOL`; the folder is scanned, there is no
list of them. What it gets is a `Context`.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import pkgutil
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from glimt import __version__
from glimt.async_engine import AsyncEngine
from glimt.errors import GlimtError
from glimt.server.bodies import StrictRoute, validation_failure
from glimt.server.config import ServerConfig
from glimt.server.failures import (
    Failure,
    Family,
    HttpFailure,
    content_of,
    failure_of,
    family_of,
    headers_of,
    status_of,
)
from glimt.server.host import EngineHost
from glimt.server.metrics import Metrics
from glimt.server.middleware import BodyLimit, Keys, LastResort, RequestIds, RequestLog
from glimt.server.origins import Guard, Origins, Sharing
from glimt.server.service import Service
from glimt.server.shedding import Shedding
from glimt.server.streaming import ClientLeft
from glimt.server.tracing import Traces

log = logging.getLogger("glimt.server")

PAGE = Path(__file__).parent / "page"
ALIASES = ("glm4v", "visualglm", "tgi", "dummy")
"""Names that clients of the originals and of TGI send, whatever is served."""
# Each system call of the server's thread lets the engine's thread have the interpreter, and gets it
# back this much later at worst. Python's 5 ms, several times a request, outlast the next arrivals.
SWITCH_S = 0.0005


class Stopping:
    """A wish that the server ends, by a signal or over HTTP."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.forced = asyncio.Event()

    def ask(self, is_forced: bool) -> None:
        """End soon; is_forced: without waiting for running answers, or for them any longer."""
        self.asked.set()
        if is_forced:
            self.forced.set()


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a protocol works with.

    model_names: under which the model is served, the told one first
    created:     Unix time of the server's start
    """

    service: Service
    config: ServerConfig
    metrics: Metrics
    model_names: tuple[str, ...]
    created: int
    stopping: Stopping = field(default_factory=Stopping)

    @property
    def model_name(self) -> str:
        """The name to tell."""
        return self.model_names[0]

    def check_model(self, name: str | None) -> None:
        """Raise HttpFailure for a model that is not served; None is the one that is."""
        if name is None or name == "" or name in (*self.model_names, *ALIASES):
            return
        said = f"the model {name[:200]!r} is not served here; {self.model_name!r} is"
        raise HttpFailure(Failure("unknown_model", said, "model"))


@dataclass(frozen=True, slots=True)
class Protocol:
    """One file's routes.

    answers: paths of these whose POST makes answers: refused unread while every place is taken
    is_management: on the management port only
    """

    name: str
    routes: Callable[[Context], APIRouter]
    answers: tuple[str, ...] = ()
    is_management: bool = False


def all_protocols() -> Iterator[Protocol]:
    """Every protocol of this folder, by name of its file."""
    package = importlib.import_module("glimt.server")
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"glimt.server.{info.name}")
        for found in (getattr(module, "PROTOCOL", None), getattr(module, "MANAGEMENT", None)):
            if found is not None:
                yield found


def create_app(
    load: Callable[[], AsyncEngine],
    config: ServerConfig,
    model_name: str,
    created: int,
    on_failed_start: Callable[[GlimtError], None] = lambda error: None,
) -> tuple[Any, Context]:
    """The application, to be run by any ASGI server, and what it works with.

    load: makes the engine, in a worker thread, after the port is open
    on_failed_start: told when the engine cannot be loaded at all
    """
    app, context = _routes(load, config, model_name, created, on_failed_start)
    return _wrapped(app, context), context


def create_inner_app(
    load: Callable[[], AsyncEngine], config: ServerConfig, model_name: str, created: int
) -> tuple[Any, Context]:
    """The same for whoever has the door (`behind_door`) elsewhere, and starts and closes it itself.

    load: makes the engine when `context.service.host` is started; `close` ends what it began
    """
    app, context = _routes(load, config, model_name, created, lambda error: None)
    return RequestIds(LastResort(app, config.profile), config.profile), context


def _routes(
    load: Callable[[], AsyncEngine],
    config: ServerConfig,
    model_name: str,
    created: int,
    on_failed_start: Callable[[GlimtError], None],
) -> tuple[FastAPI, Context]:
    """Every route of the public port."""
    host = EngineHost(load, config.max_restarts, config.stall_timeout_s)
    compat = [config.metrics_compat, "mindie" if config.profile == "mindie" else "none"]
    names = config.served_model_names or (model_name,)
    metrics = Metrics(host, names[0], compat)
    service = Service(host, config, metrics, Traces(config.otlp_endpoint))
    context = Context(service, config, metrics, names, created)
    app = FastAPI(
        title="glimt",
        version=__version__,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan(context, on_failed_start),
    )
    for protocol in all_protocols():
        if not protocol.is_management:
            app.include_router(protocol.routes(context))
    app.include_router(_operation(context))
    _handle_errors(app, context)
    return app, context


def create_management_app(context: Context) -> Any:
    """The routes of the management port, which is bound to loopback and asks for no key."""
    app = FastAPI(title="glimt management", version=__version__, docs_url=None, redoc_url=None)
    for protocol in all_protocols():
        if protocol.is_management:
            app.include_router(protocol.routes(context))
    app.include_router(_operation(context))
    _handle_errors(app, context)
    profile = context.config.profile
    guarded = Guard(_bounded(app, context.config), Origins(), profile, is_management=True)
    return RequestIds(guarded, profile)


def _wrapped(app: Any, context: Context) -> Any:
    """The application of one server: a place for each request between its key and its body."""
    answers = [path for protocol in all_protocols() for path in protocol.answers]
    return _door(Shedding(_bounded(app, context.config), context.service, answers), context.config)


def behind_door(app: Any, config: ServerConfig) -> Any:
    """Any application behind what a server has in front of its own, but for the place."""
    return _door(_bounded(app, config), config)


def _bounded(app: Any, config: ServerConfig) -> Any:
    inner = LastResort(app, config.profile)
    return BodyLimit(inner, config.max_body_bytes, config.profile, config.idle_timeout_s)


def _door(app: Any, config: ServerConfig) -> Any:
    """Outermost last: the key, whose page asks, an id for the reply, who may read it."""
    origins = Origins(config.allowed_origins, config.host)
    app = Keys(app, config.api_keys, config.profile)
    app = Guard(app, origins, config.profile, has_keys=bool(config.api_keys))
    return Sharing(RequestIds(RequestLog(app), config.profile), origins)


def _lifespan(context: Context, on_failed_start: Callable[[GlimtError], None]) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        async def start() -> None:
            try:
                await context.service.host.start()
            except GlimtError as error:
                on_failed_start(error)

        starting = asyncio.create_task(start(), name="engine-start")
        yield
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await close(context)

    return lifespan


async def close(context: Context) -> None:
    """End the engine and what serves it; requests that still run are aborted."""
    await context.service.host.stop()
    context.service.pictures.close()
    context.service.traces.close()


# --- errors ----------------------------------------------------------------------------------


def failure_response(
    failure: Failure, path: str, profile: str, family: Family | None = None
) -> Response:
    """An error in the form of the path's family, or of the one that the body was found to be of."""
    family = family or family_of(path)
    return Response(
        content_of(failure, family, profile),
        status_of(failure, family, profile),
        headers_of(failure),
        "application/json",
    )


def _handle_errors(app: FastAPI, context: Context) -> None:
    def respond(request: Request, failure: Failure) -> Response:
        context.metrics.refused(failure.kind)
        family: Family | None = getattr(request.state, "family", None)
        return failure_response(failure, request.url.path, context.config.profile, family)

    async def ours(request: Request, error: Exception) -> Response:
        return respond(request, failure_of(error))

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return respond(request, validation_failure(error))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kinds = {404: "unknown_route", 405: "method"}
        kind: Any = kinds.get(error.status_code, "invalid")
        said = f"{request.method} {request.url.path}: {error.detail}"
        response = respond(request, Failure(kind, said))
        response.headers.update(error.headers or {})  # Allow, which RFC 9110 wants with a 405
        return response

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    app.add_exception_handler(GlimtError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(ClientLeft, left)
    # Whatever else there is would be answered with a plain text; `LastResort` logs it.
    app.add_exception_handler(Exception, ours)


# --- operation -------------------------------------------------------------------------------


def _operation(context: Context) -> APIRouter:
    """Health, metrics, version and the chat page."""
    router = APIRouter(route_class=StrictRoute)
    host = context.service.host

    @router.get("/health", summary="200 when requests are answered, else 503")
    async def health() -> Response:
        if host.is_ready:
            return Response(status_code=200)
        unhealthy = {"error": "unhealthy", "error_type": "healthcheck"}  # as TGI says it
        body = {"status": host.state, "detail": host.failure or None, **unhealthy}
        return JSONResponse(body, 503, {"Retry-After": "1"})

    @router.get("/ping", summary="The same as /health")
    async def ping() -> Response:
        return await health()

    @router.get("/live", summary="503 when the engine is beyond help")
    async def live() -> Response:
        return JSONResponse({"state": host.state}, 200 if host.is_live else 503)

    @router.get("/ready", summary="503 while loading, draining or failed")
    async def ready() -> Response:
        return JSONResponse({"state": host.state}, 200 if host.is_ready else 503)

    @router.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(context.metrics.text(), media_type="text/plain; version=0.0.4")

    @router.get("/version", summary="The server's version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)

    @router.get("/page/limits.json", include_in_schema=False)
    async def page_limits() -> Response:
        names = ("limit_images", "max_image_bytes", "max_image_pixels")
        return JSONResponse({name: getattr(context.config, name) for name in names})

    @router.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        path = PAGE / name
        if name not in _page_files() or not path.is_file():
            raise HTTPException(404, "there is no such file")
        return FileResponse(path, headers=PAGE_HEADERS)

    return router


PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def _page_files() -> frozenset[str]:
    return frozenset(path.name for path in PAGE.iterdir()) if PAGE.is_dir() else frozenset()
