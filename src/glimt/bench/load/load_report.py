"""A load run as a document, with plots. Knows no file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from glimt.bench.load.fields import Found
from glimt.bench.load.metrics import METRICS, Spread
from glimt.reports.document import Document, Paragraph, Plot, Section, Table
from glimt.reports.plots import Axis, Series, draw_lines

_NAMES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "e2el": "E2EL",
    "queue": "waiting in the client",
}
_SHARES = tuple(i / 100 for i in range(101))
_MOST_ERRORS = 10
_LEAST_SECONDS = 3


def status_line(found: Found) -> str:
    """One sentence: whether the run is whole, how much of it completed, and what failed."""
    metrics = found.metrics
    done = f"{metrics.num_completed} of {metrics.num_sent} requests completed"
    failed = {name: num for name, num in metrics.kinds.items() if name != "completed"}
    said = f" ({', '.join(f'{name}: {num}' for name, num in failed.items())})" if failed else ""
    if found.cut_because:
        return f"Cut after {metrics.duration_s:.1f} s, {found.cut_because}: {done}{said}"
    if failed:
        return f"With errors: {done}{said}"
    return f"Whole: {done}, in {metrics.duration_s:.1f} s"


def load_document(found: Found) -> Document:
    """The whole report."""
    return Document(
        title=f"Load on {found.workload.model} at {found.server}",
        status=status_line(found),
        is_whole=not found.cut_because and not found.num_failed,
        facts=_facts(found),
        sections=tuple(_sections(found)),
    )


def _facts(found: Found) -> dict[str, str]:
    work = found.workload
    pictures = ", ".join(map(str, work.image_sizes)) or f"{len(work.image_files)} files"
    shown = f"{work.images_per_request} a request ({pictures}), {work.text_share:.0%} without"
    unit = "tokens" if work.count_tokens else "words"
    return {
        "server": found.server,
        "model": f"{work.model} (as the server names it; its weights are not seen from here)",
        "endpoint": "chat" if work.is_chat else "completions",
        "load": found.plan.said,
        "text": f"{work.input_len} {unit}, template and pictures not counted",
        "answers": f"{work.output_len} tokens"
        + (", ignore_eos" if work.ignore_eos else " at most, natural end")
        + f", temperature {work.temperature:g}",
        "pictures": shown if work.has_images else "none",
        "seed": str(work.seed),
        "repeats and spread": f"one run of {found.metrics.num_sent} requests after "
        f"{found.num_warmup} to warm up, each with a text of its own; spread over the requests",
        "client": f"busy {found.client_busy:.0%} of the time of one core",
        "clock": "monotonic, of the client; sent: before the connection is made or taken again",
        **found.facts,
    }


# --- tables ----------------------------------------------------------------------------------


def latency_headings(found: Found) -> tuple[str, ...]:
    """Of the table of latencies."""
    percentiles = (f"p{at:g}" for at in found.metrics.spreads["ttft"].percentiles)
    return ("ms", "mean", "median", "std", *percentiles, "of")


def latency_rows(found: Found) -> list[tuple[str, ...]]:
    """Milliseconds; the last column says how many values there are."""
    spreads = found.metrics.spreads
    names = [*METRICS, *(["queue"] if found.plan.concurrency and found.plan.rate else [])]
    return [(_NAMES[name], *_spread_cells(spreads[name])) for name in names]


def _spread_cells(spread: Spread) -> tuple[str, ...]:
    values = (spread.mean, spread.median, spread.std, *spread.percentiles.values())
    shown = ("-" if value is None else _ms_text(value) for value in values)
    return (*shown, f"{spread.num:,}")


def _ms_text(value: float) -> str:
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def total_rows(found: Found) -> dict[str, str]:
    """Throughput and counts, by name."""
    metrics = found.metrics
    rows = {
        "duration": f"{metrics.duration_s:.2f} s",
        "requests": f"{metrics.num_completed} completed, {found.num_failed} failed, "
        f"{metrics.per_s(metrics.num_completed):.2f}/s",
        "input tokens": f"{metrics.input_tokens:,}, {metrics.cached_tokens:,} of them cached",
        "output tokens": f"{metrics.output_tokens:,}, "
        f"{metrics.per_s(metrics.output_tokens):,.1f}/s, at best "
        f"{max(metrics.timeline.output_tokens, default=0):,.0f} in a second",
        "all tokens": f"{metrics.per_s(metrics.input_tokens + metrics.output_tokens):,.1f}/s",
        "in flight": f"{metrics.peak_in_flight} at most",
    }
    if found.workload.has_images:
        tokens = f", {metrics.image_tokens:,} tokens" if metrics.image_tokens else ""
        rows["pictures"] = (
            f"{metrics.num_images}{tokens}, {metrics.per_s(metrics.num_images):.2f}/s"
        )
    for each in metrics.goodputs:
        share = each.num_good / metrics.num_sent if metrics.num_sent else 0.0
        rows[f"goodput, {each.name}"] = (
            f"{each.per_s:.2f} requests/s, {share:.0%} of those sent ({each.limits_text})"
        )
    return rows


def _sections(found: Found) -> Iterator[Section]:
    yield from (Paragraph(note) for note in found.notes)
    note = "ITL: gaps between events with text, of all requests together."
    yield Table("Latency", latency_headings(found), tuple(latency_rows(found)), note)
    yield Table("Throughput and goodput", ("", ""), tuple(total_rows(found).items()))
    if found.num_failed:
        yield _error_table(found)
    if found.metrics.num_completed:
        yield from _plots(found)


def _error_table(found: Found) -> Table:
    first: dict[tuple[str, str], int] = {}
    for outcome in found.outcomes:
        if not outcome.is_completed:
            key = outcome.said, outcome.error[:200]
            first[key] = first.get(key, 0) + 1
    rows = [(kind, said, str(num)) for (kind, said), num in first.items()]
    note = f"The first {_MOST_ERRORS} of {len(rows)}." if len(rows) > _MOST_ERRORS else ""
    marked = frozenset(range(min(len(rows), _MOST_ERRORS)))
    headings = ("how it ended", "what was said", "requests")
    return Table("Requests that failed", headings, tuple(rows[:_MOST_ERRORS]), note, marked)


# --- plots -----------------------------------------------------------------------------------


def _plots(found: Found) -> Iterator[Plot]:
    completed = [outcome for outcome in found.outcomes if outcome.is_completed]
    firsts = [1000 * outcome.event_s[0] - 1000 * outcome.sent_s for outcome in completed]
    gaps = [1000 * gap for outcome in completed for gap in outcome.itl_s]
    ends = [1000 * outcome.e2el_s for outcome in completed]
    yield _distribution("ttft", "Time to the first token", (("TTFT", firsts), ("E2EL", ends)))
    if gaps:
        yield _distribution("itl", "Between tokens", (("ITL", gaps),))
    yield from _over_time(found)
    sent = [outcome.sent_s for outcome in completed]
    drawn = draw_lines(
        [Series("E2EL", sent, ends), Series("TTFT", sent, firsts)],
        Axis("sent after the start (s)"),
        Axis("ms", is_log=min(firsts) > 0),
    )
    said = "Each completed request's time to the first and to the last token, by when it was sent."
    yield Plot("Latency of each request", "latency", drawn, said)


def _distribution(name: str, title: str, groups: Sequence[tuple[str, Sequence[float]]]) -> Plot:
    series = [Series(label, _quantiles(values), _SHARES) for label, values in groups]
    drawn = draw_lines(series, Axis("ms"), Axis("share of values at most as large"))
    said = f"Cumulative distribution of {' and '.join(label for label, _ in groups)}."
    return Plot(title, name, drawn, said)


def _quantiles(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in _SHARES]


def _over_time(found: Found) -> Iterator[Plot]:
    """Two plots, of a run that has seconds to compare."""
    time = found.metrics.timeline
    for name, title, values in (
        ("tokens", "Output tokens by second", time.output_tokens),
        ("in-flight", "Most requests in flight by second", time.in_flight),
    ):
        if len(time.seconds) >= _LEAST_SECONDS:
            drawn = draw_lines(
                [Series(title, time.seconds, values)], Axis("after the start (s)"), Axis(name)
            )
            yield Plot(title, name, drawn, f"{title} of the run; the last one may be cut short.")
