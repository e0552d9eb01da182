"""`glimt bench serve`: puts a load on a running server and tells what a client sees of it."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import datetime

import aiohttp

from glimt.bench.load.client import Ask, Target, open_session, send
from glimt.bench.load.fields import Found, as_dict
from glimt.bench.load.load_report import (
    latency_headings,
    latency_rows,
    load_document,
    status_line,
    total_rows,
)
from glimt.bench.load.metrics import Metrics, measure
from glimt.bench.load.outcome import Outcome
from glimt.bench.load.run import Plan, Run
from glimt.bench.load.server import endpoint_url, find_model
from glimt.bench.load.texts import CountTokens
from glimt.bench.load.workload import Workload
from glimt.commands.bench_serve_job import Checked, ServeJob, check
from glimt.commands.console import count_bar, note, out_console, print_json, told_as_json, warn
from glimt.commands.reporting import (
    place_facts,
    write_output,
    write_report,
)
from glimt.commands.tables import figures, key_values
from glimt.errors import ConfigError

_NUM_PREPARED = 256  # requests made before the clock starts; further ones are made in threads
_PREPARED_BYTES = 256 * 2**20  # that they may take together: a body with photographs has megabytes
_BUSY = 0.8  # of a core: beyond, events wait to be read
_SETTLED_S = 2.0  # a shorter run is mostly its own beginning


def run(job: ServeJob) -> int:
    """Send the load, print and write what it came to; gives the exit code.

    130 for a run that was stopped by Ctrl-C, 1 if nothing completed or the server went away.
    Raises ConfigError for what can be known before: bad values, no server, a refused warm-up.
    """
    with told_as_json(job.as_json):
        checked = check(job)
        found = asyncio.run(_load(job, checked))
    for said in found.notes:
        warn(said)
    print_json(as_dict(found)) if job.as_json else _print(found)
    if job.out is not None:
        text = json.dumps(as_dict(found), ensure_ascii=False, allow_nan=False) + "\n"
        write_output(job.out, text.encode(), "out")
    if job.report is not None:
        write_report(load_document(found), job.report, "load")
    if found.cut_because == _BY_HAND:
        return 130
    return 1 if found.cut_because or not found.metrics.num_completed else 0


# --- the run ---------------------------------------------------------------------------------

_BY_HAND = "stopped by Ctrl-C"


async def _load(job: ServeJob, checked: Checked) -> Found:
    key = job.api_key or os.environ.get("OPENAI_API_KEY") or None
    async with open_session() as session:
        model = await find_model(session, checked.url, key, job.model)
        workload = replace(checked.workload, model=model)
        prepared = _prepare(workload, checked.plan)
        sender = _Sender(
            session,
            Target(endpoint_url(checked.url, job.endpoint), key, job.timeout_s),
            workload,
            prepared,
        )
        await _warm_up(sender, job.num_warmup, checked.plan)
        busy_s = -time.process_time()
        ran = await _measured(sender, checked.plan)
        busy_s += time.process_time()
    outcomes = _in_order(ran.outcomes, workload.count_tokens)
    metrics = measure(outcomes, checked.percentiles, checked.limits, job.output_len)
    return Found(
        server=checked.url,
        plan=checked.plan,
        workload=workload,
        num_warmup=job.num_warmup,
        tokenizer=job.tokenizer,
        outcomes=outcomes,
        metrics=metrics,
        has_limits=bool(job.goodput),
        cut_because=ran.cut_because,
        client_busy=metrics.per_s(busy_s),
        notes=tuple(_notes(metrics, workload, len(prepared), metrics.per_s(busy_s))),
        facts=_facts(key),
        date=datetime.now().strftime("%Y%m%d-%H%M%S"),
    )


class _Sender:
    """Sends the workload's requests, on a clock that begins when it is told to."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        target: Target,
        workload: Workload,
        prepared: Sequence[Ask],
    ) -> None:
        self.session = session
        self.target = target
        self.workload = workload
        self.prepared = prepared
        self.start_s = time.perf_counter()

    def begin(self) -> None:
        """It is 0 now."""
        self.start_s = time.perf_counter()

    def clock(self) -> float:
        """Seconds since it began, monotonic."""
        return time.perf_counter() - self.start_s

    async def send(self, number: int, due_s: float) -> Outcome:
        """Send one request; one that is not prepared is made first, and waits for that here."""
        if 0 <= number < len(self.prepared):
            ask = self.prepared[number]
        else:
            ask = await asyncio.to_thread(self.workload.ask, number)
        return await send(self.session, self.target, ask, due_s, self.clock)


def _prepare(workload: Workload, plan: Plan) -> list[Ask]:
    """The first requests, as many as _NUM_PREPARED and _PREPARED_BYTES let be kept."""
    num = min(_NUM_PREPARED, plan.num_requests or _NUM_PREPARED)
    prepared: list[Ask] = []
    room_bytes = _PREPARED_BYTES
    with count_bar("preparing requests", num) as on_done:
        while len(prepared) < num and room_bytes > 0:
            prepared.append(workload.ask(len(prepared)))
            room_bytes -= len(prepared[-1].body)
            if on_done:
                on_done(1)
    return prepared


async def _warm_up(sender: _Sender, num: int, plan: Plan) -> None:
    """Send requests that do not count. Raises ConfigError if none of them completes."""
    closed = replace(plan, rate=None, num_requests=num, duration_s=None)
    warm = Run(closed, lambda number, due_s: sender.send(-1 - number, due_s), sender.clock)
    await warm.finish()
    if num and not any(outcome.is_completed for outcome in warm.outcomes):
        last = warm.outcomes[-1]
        said = f"a request to warm up failed: {last.error}"
        raise ConfigError("server", [f"{said}; {_REMEDY.get(last.status or 0, _REMEDY[0])}"])


_REMEDY = {
    0: "see the server's log, or measure in spite of it with --warmup 0",
    401: "give the server's key with --api-key or OPENAI_API_KEY",
    404: "name one of the server's models with --model",
    429: "the server has no room; try again later",
}


async def _measured(sender: _Sender, plan: Plan) -> Run:
    is_counted = plan.num_requests is not None
    bar = count_bar("requests", plan.num_requests or 0) if is_counted else nullcontext()
    with bar as on_done:
        if not is_counted:
            note(f"sending for {plan.duration_s:g} s")
        sender.begin()
        ran = Run(plan, sender.send, sender.clock, on_done)
        with _stopped_by_hand(lambda: ran.stop(_BY_HAND)):
            await ran.finish()
    return ran


@contextmanager
def _stopped_by_hand(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C stops the run, so that it can be reported; a second one ends at once."""
    loop = asyncio.get_running_loop()

    def stop_once() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    with suppress(ValueError, RuntimeError):  # only the main thread may take signals
        loop.add_signal_handler(signal.SIGINT, stop_once)
    try:
        yield
    finally:
        with suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)


def _in_order(outcomes: Sequence[Outcome], count: CountTokens | None) -> tuple[Outcome, ...]:
    ordered = sorted(outcomes, key=lambda outcome: outcome.number)
    if count is None:
        return tuple(ordered)
    return tuple(replace(outcome, text_tokens=count(outcome.text)) for outcome in ordered)


# --- what it came to -------------------------------------------------------------------------


def _notes(metrics: Metrics, workload: Workload, num_prepared: int, busy: float) -> Iterator[str]:
    if metrics.num_short:
        why = "the server does not know ignore_eos" if workload.ignore_eos else "natural ends"
        said = f"{metrics.num_short} of {metrics.num_completed} answers have fewer than"
        yield f"{said} {workload.output_len} tokens ({why}, or there was no room)"
    if metrics.num_uncounted:
        by = "the tokenizer" if workload.count_tokens else "events with text"
        said = f"{metrics.num_uncounted} answers came without usage: their tokens are counted by"
        missing = "" if workload.count_tokens else ", and their input tokens are unknown"
        yield f"{said} {by}{missing}"
    if metrics.cached_tokens:
        share = metrics.cached_tokens / max(1, metrics.input_tokens)
        yield f"the server took {share:.0%} of the input tokens from its cache"
    if busy > _BUSY and metrics.duration_s > _SETTLED_S:
        said = f"this client was busy {busy:.0%} of the time of one core"
        yield f"{said}: it may have read late, and the times may be its own; send less"
    if metrics.num_sent > num_prepared:
        said = f"requests after the first {num_prepared} were made while the run went on"
        yield f"{said}, on this machine's processor"


def _facts(key: str | None) -> dict[str, str]:
    """Of the client; the key stays out of every file."""
    facts = place_facts()
    if key:
        facts["command"] = facts["command"].replace(shlex.quote(key), "***").replace(key, "***")
    return {
        ("client's machine" if name == "machine" else name): said for name, said in facts.items()
    }


def _print(found: Found) -> None:
    console = out_console()
    console.print(f"{found.workload.model} at {found.server}: {found.plan.said}", soft_wrap=True)
    console.print(status_line(found), "", soft_wrap=True)
    table = figures(*latency_headings(found), title="latency")
    for row in latency_rows(found):
        table.add_row(*row)
    console.print(table, "")
    console.print(key_values("throughput", total_rows(found)))
