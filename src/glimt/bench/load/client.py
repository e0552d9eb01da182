"""Sends one request to an OpenAI-compatible server and times its stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp

from glimt.bench.load.outcome import Kind, Outcome
from glimt.bench.load.recording import Recording, StreamFailure, message_of_body
from glimt.bench.load.sse import EventReader

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """A request, ready to be sent.

    number:     its place in the order of sending
    body:       JSON, written before the clock starts
    own_tokens: of its text, by this client's tokenizer; None without one
    """

    number: int
    body: bytes
    num_images: int
    own_tokens: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Where requests go, and how long each may take in all."""

    url: str
    api_key: str | None
    timeout_s: float

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        plain = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        return plain | ({"Authorization": f"Bearer {self.api_key}"} if self.api_key else {})


def open_session() -> aiohttp.ClientSession:
    """A session that holds back no request: how many are in flight is the plan's business."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    )


async def send(
    session: aiohttp.ClientSession, target: Target, ask: Ask, due_s: float, clock: Clock
) -> Outcome:
    """Send a request and read its answer; whatever happens becomes its outcome.

    A task that is cancelled while it waits here ends with the outcome "cut".
    """
    recording, sent_s = Recording(), clock()
    try:
        await asyncio.wait_for(_answer(session, target, ask, recording, clock), target.timeout_s)
        recording.check_whole()
        failure = None
    except StreamFailure as error:
        failure = error
    except asyncio.CancelledError:
        failure = StreamFailure("cut", "the run was stopped")
    except (asyncio.TimeoutError, TimeoutError):
        failure = StreamFailure("timeout", f"not finished after {target.timeout_s:g} s")
    except aiohttp.ClientConnectorError as error:
        failure = StreamFailure("connection", str(error))
    except (aiohttp.ClientError, OSError, UnicodeDecodeError) as error:
        failure = StreamFailure("broken", f"{type(error).__name__}: {error}")
    return _outcome(ask, recording, failure, (due_s, sent_s, clock()))


async def _answer(
    session: aiohttp.ClientSession,
    target: Target,
    ask: Ask,
    recording: Recording,
    clock: Clock,
) -> None:
    async with session.post(target.url, data=ask.body, headers=target.headers) as reply:
        if reply.status != 200:
            kind: Kind = "refused" if reply.status == 429 else "http"
            said = f"HTTP {reply.status}: {message_of_body(await reply.text(errors='replace'))}"
            after = reply.headers.get("Retry-After")
            said += f" (Retry-After: {after})" if after else ""
            raise StreamFailure(kind, said, reply.status)
        if reply.content_type != "text/event-stream":
            raise StreamFailure("broken", f"the reply is {reply.content_type}, no event stream")
        reader = EventReader()
        async for received in reply.content.iter_any():
            now = clock()
            for data in reader.feed(received):
                recording.add(data, now)
        if (last := reader.finish()) is not None:
            recording.add(last, clock())


def _outcome(
    ask: Ask,
    recording: Recording,
    failure: StreamFailure | None,
    times: tuple[float, float, float],
) -> Outcome:
    due_s, sent_s, now = times
    end_s = now if failure or recording.end_s is None else recording.end_s
    return Outcome(
        number=ask.number,
        kind=failure.kind if failure else "completed",
        due_s=due_s,
        sent_s=sent_s,
        end_s=end_s,
        num_images=ask.num_images,
        event_s=tuple(recording.event_s),
        counts=recording.counts,
        own_tokens=ask.own_tokens,
        text=recording.text,
        status=failure.status if failure else 200,
        error=str(failure) if failure else "",
    )
