"""What outcomes come to, on timelines that can be worked out by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glimt.bench.load import metrics
from glimt.bench.load.fields import Found, as_dict
from glimt.bench.load.load_report import load_document, status_line, total_rows
from glimt.bench.load.metrics import INTERACTIVE, SERVER, is_good, measure, peak_in_flight, spread
from glimt.bench.load.outcome import Counts, Outcome
from glimt.bench.load.run import Plan
from glimt.bench.load.workload import Workload

PERCENTILES = (50.0, 90.0, 99.0)


def outcome(number: int, kind: Any = "completed", **given: Any) -> Outcome:
    """Sent at 1 s; tokens at 1.5, 1.6, 1.8 s, the last one's end at 1.8 s."""
    plain = {"due_s": 1.0, "sent_s": 1.0, "end_s": 1.8, "event_s": (1.5, 1.6, 1.8)}
    plain["counts"] = Counts(prompt_tokens=10, output_tokens=3)
    return Outcome(number, kind, **plain | given)


# --- one request -----------------------------------------------------------------------------


def test_times_of_one_request():
    """Catches TPOT over all tokens in the place of those after the first, and ITL from sending."""
    one = outcome(0)
    assert one.ttft_s == pytest.approx(0.5)
    assert one.e2el_s == pytest.approx(0.8)
    assert one.tpot_s == pytest.approx(0.15)
    assert one.itl_s == pytest.approx((0.1, 0.2))


def test_tpot_goes_by_tokens_and_not_by_events():
    """Catches a server that sends two tokens an event looking half as fast as it is."""
    one = outcome(0, counts=Counts(output_tokens=7))
    assert one.tpot_s == pytest.approx(0.3 / 6)


def test_one_token_has_no_tpot():
    """Catches a division by zero, and a 0 that drags the mean down."""
    assert outcome(0, event_s=(1.5,), end_s=1.5, counts=Counts(output_tokens=1)).tpot_s is None


def test_tokens_come_from_usage_then_the_tokenizer_then_events():
    """Catches a tokenizer's count of the text winning over the server's of the tokens."""
    assert outcome(0, text_tokens=9).output_tokens == 3
    assert outcome(0, counts=Counts(), text_tokens=9).output_tokens == 9
    assert outcome(0, counts=Counts()).output_tokens == 3
    assert outcome(0, counts=Counts(output_tokens=0), text_tokens=9).output_tokens == 0
    assert outcome(0, counts=Counts(), own_tokens=5).prompt_tokens == 5
    assert outcome(0, counts=Counts()).prompt_tokens == 0


# --- a run -----------------------------------------------------------------------------------


def two_and_failed() -> list[Outcome]:
    """Two that overlap by 0.3 s, and one that failed while both ran."""
    later = outcome(
        1, sent_s=1.5, due_s=1.2, end_s=4.0, event_s=(2.5, 4.0), counts=Counts(20, 2, 8, 6)
    )
    failed = outcome(
        2, "http", sent_s=1.55, end_s=1.6, event_s=(), status=500, error="HTTP 500: no"
    )
    return [outcome(0, num_images=1), later, failed]


def found(outcomes: list[Outcome], **given: Any) -> Found:
    limits = (SERVER, INTERACTIVE)
    plan = Plan(rate=None, burstiness=1, concurrency=2, num_requests=3, duration_s=None, seed=0)
    workload = Workload(
        model="m",
        is_chat=True,
        input_len=4,
        output_len=3,
        ignore_eos=True,
        temperature=0.0,
        seed=0,
    )
    plain = {
        "server": "http://s",
        "plan": plan,
        "workload": workload,
        "num_warmup": 1,
        "tokenizer": None,
        "outcomes": tuple(outcomes),
        "metrics": measure(outcomes, PERCENTILES, limits, output_len=3),
        "has_limits": False,
        "cut_because": "",
        "client_busy": 0.1,
        "notes": (),
        "facts": {"glimt": "0"},
        "date": "d",
    }
    return Found(**plain | given)


def test_totals_count_completed_requests_over_the_whole_time():
    """Catches throughput over the sum of latencies, and a failed request's tokens."""
    ran = measure(two_and_failed(), PERCENTILES, (), output_len=3)
    assert (ran.num_sent, ran.num_completed) == (3, 2)
    assert ran.duration_s == 4.0
    assert (ran.input_tokens, ran.output_tokens) == (30, 5)
    assert (ran.cached_tokens, ran.image_tokens, ran.num_images) == (8, 6, 1)
    assert ran.per_s(ran.output_tokens) == pytest.approx(1.25)
    assert ran.kinds == {"completed": 2, "HTTP 500": 1}
    assert ran.num_short == 1
    assert ran.num_uncounted == 0


def test_spreads_are_of_all_requests_together():
    """Catches gaps averaged per request first, and seconds in the place of milliseconds."""
    ran = measure(two_and_failed(), PERCENTILES, (), output_len=3)
    assert ran.spreads["ttft"].mean == pytest.approx(750)
    assert ran.spreads["itl"].num == 3
    assert ran.spreads["itl"].mean == pytest.approx(600)
    assert ran.spreads["tpot"].median == pytest.approx((150 + 1500) / 2)
    assert ran.spreads["queue"].percentiles[99.0] == pytest.approx(297)


def test_percentiles_lie_between_neighbours():
    """Catches the nearest rank, with which two tools cannot be laid side by side."""
    one = spread([10.0, 20.0, 30.0, 40.0], (0.0, 50.0, 90.0))
    assert one.percentiles == pytest.approx({0.0: 10, 50.0: 25, 90.0: 37})
    assert one.std == pytest.approx(11.1803, abs=1e-4)


def test_nothing_completed_has_no_latency():
    """Catches zeros that read as the fastest server there is, and NaN in JSON."""
    ran = measure([outcome(0, "timeout", event_s=())], PERCENTILES, (SERVER,), output_len=3)
    assert ran.spreads["ttft"].mean is None
    assert ran.spreads["ttft"].percentiles == dict.fromkeys(PERCENTILES)
    assert ran.goodputs[0].per_s == 0


def test_a_run_that_sent_nothing_is_all_zero():
    """Catches a division by the duration of a run that was stopped at once."""
    ran = measure([], PERCENTILES, (SERVER,), output_len=3)
    assert (ran.duration_s, ran.per_s(5), ran.peak_in_flight) == (0, 0, 0)
    assert ran.timeline.seconds == ()


def test_peak_counts_failed_requests_and_frees_before_it_takes():
    """Catches a hand-over in a closed loop that counts as two, and errors that load nothing."""
    assert peak_in_flight(two_and_failed()) == 3
    first, second = outcome(0, end_s=2.0), outcome(1, sent_s=2.0, end_s=3.0)
    assert peak_in_flight([first, second]) == 1


def test_timeline_spreads_tokens_over_events():
    """Catches events counted as tokens, and the last second's lost."""
    ran = measure(two_and_failed(), PERCENTILES, (), output_len=3)
    assert ran.timeline.output_tokens == pytest.approx((0, 3, 1, 0, 1))
    assert ran.timeline.in_flight == (0, 3, 1, 1, 1)
    assert sum(ran.timeline.output_tokens) == ran.output_tokens


# --- goodput ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "is_met"),
    [
        ({"ttft": 500.0001}, True),
        ({"ttft": 499}, False),
        ({"tpot": 151, "ttft": 501}, True),
        ({"tpot": 149, "ttft": 501}, False),
        ({"e2el": 801}, True),
        ({"e2el": 799}, False),
        ({}, True),
    ],
)
def test_goodput_needs_every_limit(limits, is_met):
    """Catches any in the place of all, and seconds held against milliseconds."""
    assert is_good(outcome(0), limits) is is_met


def test_an_undefined_tpot_breaks_no_limit():
    """Catches answers of one token that can never be good."""
    one = outcome(0, event_s=(1.1,), end_s=1.1, counts=Counts(output_tokens=1))
    assert is_good(one, SERVER[1])


def test_both_proposed_limits_are_reported():
    """Catches limits that were mixed up: 500 ms is met, 30 ms a token is not."""
    ran = measure(two_and_failed(), PERCENTILES, (SERVER, INTERACTIVE), output_len=3)
    assert [each.name for each in ran.goodputs] == ["server", "interactive"]
    assert [each.num_good for each in ran.goodputs] == [0, 0]
    quick = outcome(0, event_s=(1.4, 1.45, 1.5), end_s=1.45)
    both = measure([quick, outcome(1, end_s=1.6)], PERCENTILES, (SERVER, INTERACTIVE), 3)
    assert [each.num_good for each in both.goodputs] == [2, 1]


# --- JSON and report -------------------------------------------------------------------------

VLLM_FIELDS = """
    date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness
    max_concurrency duration completed failed total_input_tokens total_output_tokens
    request_throughput request_goodput output_throughput total_token_throughput input_lens
    output_lens ttfts itls latencies start_times queue_times generated_texts errors
    max_output_tokens_per_s max_concurrent_requests
"""


def test_json_has_every_field_of_vllms_result():
    """Catches a field that a script for vLLM's files would miss."""
    said = as_dict(found(two_and_failed()))
    measured = [
        f"{kind}_{name}_ms"
        for name in ("ttft", "tpot", "itl", "e2el")
        for kind in ("mean", "median", "std", "p50", "p90", "p99")
    ]
    assert {*VLLM_FIELDS.split(), *measured} <= said.keys()
    assert json.loads(json.dumps(said, allow_nan=False)) == said


def test_json_has_one_entry_for_each_request_in_every_list():
    """Catches lists of completed requests only, which no longer line up."""
    said = as_dict(found(two_and_failed()))
    lists = (
        "input_lens output_lens ttfts itls latencies start_times generated_texts errors outcomes"
    )
    assert {name: len(said[name]) for name in lists.split()} == dict.fromkeys(lists.split(), 3)
    assert said["errors"] == ["", "", "HTTP 500: no"]
    assert said["output_lens"] == [3, 2, 0]
    assert said["ttfts"][2] == 0.0
    assert said["request_goodput"] is None
    assert said["p99_client_queue_time_ms"] == pytest.approx(297)


def test_named_limits_are_vllms_goodput():
    """Catches the server's proposal in the place of what was asked for."""
    named = ("as asked", {"e2el": 1000.0})
    ran = measure(two_and_failed(), PERCENTILES, (named, SERVER), output_len=3)
    said = as_dict(found(two_and_failed(), metrics=ran, has_limits=True))
    assert said["request_goodput"] == pytest.approx(1 / 4)
    assert [each["name"] for each in said["goodput"]] == ["as asked", "server"]


def test_the_first_line_says_whether_the_run_is_whole():
    """Catches a cut run, or one with errors, that looks like any other."""
    whole = found([outcome(0)])
    assert status_line(whole) == "Whole: 1 of 1 requests completed, in 1.8 s"
    assert load_document(whole).is_whole
    errors = found(two_and_failed())
    assert status_line(errors) == "With errors: 2 of 3 requests completed (HTTP 500: 1)"
    assert not load_document(errors).is_whole
    cut = found([outcome(0), outcome(1, "cut")], cut_because="stopped by Ctrl-C")
    assert status_line(cut).startswith("Cut after 1.8 s, stopped by Ctrl-C: 1 of 2")


def test_report_holds_errors_plots_and_what_it_belongs_to():
    """Catches a report without what was said of failures, or without its load."""
    document = load_document(found(two_and_failed()))
    titles = [getattr(section, "title", "") for section in document.sections]
    assert "Requests that failed" in titles
    assert "Latency of each request" in titles
    assert document.facts["load"] == "closed loop, at most 2 in flight"
    assert "HTTP 500: no" in str(document.sections)
    empty = load_document(found([outcome(0, "timeout", event_s=())]))
    assert [getattr(s, "title", "") for s in empty.sections] == [
        "Latency",
        "Throughput and goodput",
        "Requests that failed",
    ]


def test_total_rows_name_both_goodputs():
    """Catches a table that tells one of them only."""
    rows = total_rows(found(two_and_failed()))
    assert {"goodput, server", "goodput, interactive"} <= rows.keys()
    assert metrics.METRICS == ("ttft", "tpot", "itl", "e2el")
