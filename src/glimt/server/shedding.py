"""Load shedding: while every place is taken, a request is refused by its head alone.

The service says no as well, but only once a body has been read and understood, which takes longer
than the next requests take to arrive. Pure ASGI; stands behind the keys, so that whoever has none
learns nothing of the load. Knows no form but that of errors.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glimt.errors import CapacityError
from glimt.server.failures import failure_of
from glimt.server.refusals import turn_away
from glimt.server.service import Service


class Shedding:
    """Refuses what there is no place for, before its body is read.

    answers: paths whose POST makes answers, as routes are written: "/v2/models/{model}/infer"
    """

    def __init__(self, app: ASGIApp, service: Service, answers: Iterable[str]) -> None:
        self._app, self._service = app, service
        self._patterns = [compile_path(path)[0] for path in answers]
        self._reading: set[object] = set()  # one for each request whose body is not here yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it may find a place."""
        if not self._makes_answer(scope):
            await self._app(scope, receive, send)
            return
        try:
            self._service.check_room(len(self._reading))
            await self._read(scope, receive, send)
        except CapacityError as error:
            config, failure = self._service.config, failure_of(error)
            await turn_away(failure, config.profile, config.max_body_bytes, scope, receive, send)

    def _makes_answer(self, scope: Scope) -> bool:
        if scope["type"] != "http" or scope["method"] != "POST":
            return False
        return any(pattern.match(scope["path"]) for pattern in self._patterns)

    async def _read(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; it counts as one that is read until its body is whole or refused."""
        mark = object()
        self._reading.add(mark)

        async def watched() -> Message:
            message = await receive()
            if not message.get("more_body"):
                self._reading.discard(mark)
            return message

        async def replying(message: Message) -> None:
            self._reading.discard(mark)
            await send(message)

        try:
            await self._app(scope, watched, replying)
        finally:
            self._reading.discard(mark)
