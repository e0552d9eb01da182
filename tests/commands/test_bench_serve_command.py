"""`glimt bench serve` against small servers over loopback: what it measures, tells and refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse, Response
from PIL import Image
from typer.testing import CliRunner, Result

import glimt
from glimt.bench.load.pictures import Size
from glimt.bench.load.run import Plan
from glimt.bench.load.workload import Workload
from glimt.cli import app
from glimt.commands import bench_serve
from openai_server import (
    BREAK,
    DONE,
    HANG,
    MODEL,
    Script,
    answer_of,
    chunk,
    engine_app,
    event,
    refusal,
    serving,
    usage_chunk,
)

QUICK = ("--warmup", "0", "--input-len", "4", "--output-len", "3")


def bench(url: str, *arguments: str | Path) -> Result:
    given = ["bench", "serve", "--base-url", url, *map(str, arguments)]
    return CliRunner().invoke(app, given, env={"OPENAI_API_KEY": ""})


def said(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout)


def scripted(answer: Any, *arguments: str | Path) -> tuple[dict[str, Any], Script, Result]:
    """Send three requests to a script; gives the JSON object as well."""
    script = answer if isinstance(answer, Script) else Script(answer)
    with serving(script.app()) as url:
        result = bench(url, *QUICK, "-n", "3", "--json", *arguments)
    return said(result), script, result


# --- over an engine --------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["glm4v_9b", "visualglm"])
def engine(
    request: pytest.FixtureRequest, folders: dict[str, Path]
) -> Iterator[tuple[glimt.AsyncEngine, Path]]:
    folder = folders[request.param]
    config = glimt.EngineConfig(model=str(folder), num_blocks=128, num_threads=1)
    engine = glimt.AsyncEngine.load(config)
    yield engine, folder
    engine.close()


def test_a_closed_loop_with_pictures_counts_what_the_engine_counts(engine):
    """Catches token counts of the client's own making, and pictures that do not arrive."""
    engine, folder = engine
    bodies: list[dict[str, Any]] = []
    with serving(engine_app(engine, bodies)) as url:
        result = bench(
            url, "-n", "6", "-c", "3", "--output-len", "5", "--image-size", "20x10",
            "--text-share", "0.5", "--tokenizer", folder, "--input-len", "9", "--json",
        )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = said(result)
    assert found["kinds"] == {"completed": 6}
    assert found["model_id"] == MODEL
    assert found["output_lens"] == [5] * 6
    assert found["total_output_tokens"] == 30
    assert found["max_concurrent_requests"] == 3
    assert found["num_images"] == 3
    assert found["total_image_tokens"] > 0
    with_picture = [
        n for n, count in zip(found["input_lens"], found["images"], strict=True) if count
    ]
    without = [
        n for n, count in zip(found["input_lens"], found["images"], strict=True) if not count
    ]
    for lengths in (with_picture, without):  # a text may join with the template around it
        assert max(lengths) - min(lengths) <= 2, "every text has as many tokens"
    assert len(bodies) == 8, "two to warm up"
    assert found["num_warmup"] == 2
    assert all(ttft > 0 for ttft in found["ttfts"])


def test_an_open_loop_of_completions_runs_to_its_end(engine):
    """Catches an endpoint that is not asked, and arrivals that never come."""
    engine, _ = engine
    with serving(engine_app(engine)) as url:
        result = bench(
            url, *QUICK, "--endpoint", "completions", "--rate", "500", "-n", "5", "--json"
        )  # fmt: skip
    found = said(result)
    assert found["completed"] == 5
    assert found["request_rate"] == 500
    assert found["backend"] == "openai"


# --- by a script: what is measured -----------------------------------------------------------


def test_every_request_ends_in_exactly_one_outcome():
    """Catches an error that is counted twice, or not at all, or ends the run."""
    answers = [
        answer_of("a", "b", "c"),
        refusal(500, "out of order"),
        refusal(429, "too many", **{"Retry-After": "7"}),
        [chunk(text="a"), BREAK],
        [chunk(text="a")],
        [event({"error": {"message": "the engine failed"}}), DONE],
        [event("{")],
        JSONResponse({"choices": []}),
        [chunk(finish="stop"), DONE],
        [chunk(text="a"), HANG],
    ]
    found, script, result = scripted(
        lambda n: answers[n], "-n", str(len(answers)), "--timeout", "1"
    )
    assert found["outcomes"] == [
        "completed", "http", "refused", "broken", "broken", "server", "broken", "broken", "empty",
        "timeout",
    ]  # fmt: skip
    assert len(script.bodies) == len(answers), "nothing is tried again"
    assert (found["completed"], found["failed"]) == (1, 9)
    assert found["kinds"]["HTTP 500"] == 1
    assert found["errors"][1] == "HTTP 500: out of order"
    assert found["errors"][2] == "HTTP 429: too many (Retry-After: 7)"
    assert found["errors"][5] == "the engine failed"
    assert found["errors"][7] == "the reply is application/json, no event stream"
    assert "not finished after 1 s" in found["errors"][9]
    assert found["is_whole"], "it was not cut"
    assert result.exit_code == 0


def test_usage_decides_how_many_tokens_there_were():
    """Catches events that pass for tokens where the server says how many there were."""
    stream = [chunk(text="ab"), chunk(text="c"), chunk(finish="length"), usage_chunk(11, 3), DONE]
    found, _, _ = scripted(lambda n: stream)
    assert found["input_lens"] == [11] * 3
    assert found["output_lens"] == [3] * 3
    assert found["generated_texts"] == ["abc"] * 3
    assert [len(gaps) for gaps in found["itls"]] == [1, 1, 1]
    assert found["notes"] == []


def test_missing_usage_is_told_and_counted_otherwise(folders):
    """Catches zero tokens per second without a word."""
    stream = [chunk(text="ab"), chunk(text="c"), chunk(finish="length"), DONE]
    found, _, result = scripted(lambda n: stream)
    assert found["total_output_tokens"] == 6
    assert found["num_without_usage"] == 3
    assert "counted by events with text, and their input tokens are unknown" in result.stderr
    found, _, result = scripted(lambda n: stream, "--tokenizer", folders["glm4v_9b"])
    assert found["total_input_tokens"] == 12
    assert "counted by the tokenizer" in result.stderr


def test_answers_that_end_early_are_told():
    """Catches a server that ignores ignore_eos and looks quick for it."""
    found, _, result = scripted(lambda n: answer_of("a"))
    assert found["num_short_answers"] == 3
    assert "3 of 3 answers have fewer than 3 tokens" in result.stderr
    assert "does not know ignore_eos" in result.stderr


def test_tokens_that_the_server_had_cached_are_told():
    """Catches a warm cache that passes for a fast server."""
    stream = [*answer_of("a", "b", "c")[:-2], usage_chunk(10, 3, cached_tokens=5), DONE]
    found, _, result = scripted(lambda n: stream)
    assert found["total_cached_tokens"] == 15
    assert "50% of the input tokens from its cache" in result.stderr


def test_named_limits_come_beside_the_two_proposed():
    """Catches limits in seconds, and proposals that vanish once others are named."""
    found, _, _ = scripted(
        lambda n: answer_of("a", "b", "c"), "--goodput", "e2el:1e6", "--goodput", "ttft:0"
    )
    names = [(each["name"], each["num_good"]) for each in found["goodput"]]
    assert names[0] == ("as asked", 0)
    assert [name for name, _ in names[1:]] == ["server", "interactive"]
    assert found["request_goodput"] == 0


def test_percentiles_are_those_asked_for():
    """Catches p99.9 written as p99.90 or rounded away."""
    found, _, _ = scripted(lambda n: answer_of("a", "b", "c"), "--percentiles", "25,99.9")
    assert {"p25_ttft_ms", "p99.9_itl_ms"} <= found.keys()
    assert "p50_ttft_ms" not in found


# --- the server ------------------------------------------------------------------------------


def test_the_first_listed_model_is_asked():
    """Catches an empty name, and a listed one in the place of the named."""
    script = Script(lambda n: answer_of("a", "b", "c"), names=("first", "second"))
    found, _, _ = scripted(script)
    assert found["model_id"] == "first"
    assert {body["model"] for body in script.bodies} == {"first"}
    named = Script(lambda n: answer_of("a", "b", "c"), listing=refusal(404, "no such path"))
    assert scripted(named, "--model", "mine")[0]["model_id"] == "mine"


def test_the_key_is_sent_and_told_nowhere(tmp_path, monkeypatch):
    """Catches a key in a report that goes into a pull request."""
    monkeypatch.setattr("sys.argv", ["glimt", "bench", "serve", "--api-key", "sk-secret 1"])
    out = tmp_path / "out.json"
    files = ("--out", out, "--report", tmp_path / "report")
    _, script, result = scripted(
        lambda n: answer_of("a", "b", "c"), "--api-key", "sk-secret 1", *files
    )
    assert set(script.keys) == {"Bearer sk-secret 1"}
    written = [out, *(tmp_path / "report").glob("*.md"), *(tmp_path / "report").glob("*.html")]
    assert len(written) == 3
    for file in written:
        assert "sk-secret" not in file.read_text(encoding="utf-8")
    assert "sk-secret" not in result.stdout + result.stderr


def test_warm_up_is_not_counted():
    """Catches a cold start in the figures, or the first text asked twice."""
    script = Script(lambda n: answer_of("a", "b", "c"))
    found, _, _ = scripted(script, "--warmup", "4")
    assert len(script.bodies) == 7
    assert found["completed"] == 3
    texts = {json.dumps(body["messages"]) for body in script.bodies}
    assert len(texts) == 7


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_server_that_is_not_there_is_one_plain_error():
    """Catches a traceback, and a hundred failed requests."""
    result = bench(f"http://127.0.0.1:{closed_port()}", "--json")
    assert result.exit_code == 2
    error = said(result)["error"]
    assert error["type"] == "ConfigError"
    assert "cannot be reached (Connection refused); start the server" in error["message"]


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        (Script(lambda n: refusal(400, "prompt too long")), (), "HTTP 400: prompt too long; see"),
        (Script(lambda n: refusal(404, "no model x")), ("-m", "x"), "--model"),
        (Script(lambda n: refusal(401, "no key")), (), "--api-key"),
        (Script(lambda n: [], listing=refusal(401, "no key")), (), "--api-key"),
        (Script(lambda n: [], names=()), (), "lists none (HTTP 200); name one with --model"),
        (Script(lambda n: [], listing=Response("<html>")), (), "lists none"),
    ],
)
def test_what_the_server_refuses_at_once_is_told_before_the_load(script, arguments, words):
    """Catches an hour of requests that all fail for one reason."""
    with serving(script.app()) as url:
        result = bench(url, "--json", *arguments)
    assert result.exit_code == 2
    assert words in said(result)["error"]["message"]
    assert len(script.bodies) <= 2


def test_nothing_completed_is_a_failure():
    """Catches exit code 0 for a load that no request survived."""
    found, _, result = scripted(lambda n: refusal(500, "no"))
    assert found["completed"] == 0
    assert found["mean_ttft_ms"] is None
    assert result.exit_code == 1


# --- what people see, and files --------------------------------------------------------------


def test_the_table_and_the_report_say_the_same(tmp_path):
    """Catches a report of another run, or one that cannot be opened."""
    Image.new("RGB", (6, 6), "red").save(tmp_path / "a.png")
    script = Script(lambda n: answer_of("a", "b", "c"))
    out, folder = tmp_path / "out.json", tmp_path / "report"
    with serving(script.app()) as url:
        result = bench(
            url, *QUICK, "-n", "3", "--images", tmp_path, "--out", out, "--report", folder
        )
    assert result.exit_code == 0, result.stderr
    for word in ("TTFT", "TPOT", "ITL", "E2EL", "goodput, interactive", "pictures"):
        assert word in result.stdout
    assert "Whole: 3 of 3 requests completed" in result.stdout
    text = (folder / "load.md").read_text(encoding="utf-8")
    assert text.startswith("**Whole: 3 of 3 requests completed")
    assert {path.name for path in folder.iterdir()} >= {"load.html", "load.md", "ttft.png"}
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["num_images"] == 3
    assert found["workload"]["num_image_files"] == 1


BAD = [
    (("--rate", "0"), "rate is 0.0"),
    (("--rate", "nan"), "rate is nan"),
    (("--burstiness", "-1"), "burstiness is -1.0"),
    (("--concurrency", "0"), "concurrency is 0"),
    (("-n", "0"), "num_requests is 0"),
    (("--duration", "0"), "duration_s is 0.0"),
    (("--input-len", "0"), "input_len is 0"),
    (("--output-len", "0"), "output_len is 0"),
    (("--warmup", "-1"), "num_warmup is -1"),
    (("--timeout", "0"), "timeout_s is 0.0"),
    (("--text-share", "1.5"), "text_share is 1.5"),
    (("--temperature", "3"), "temperature is 3.0"),
    (("--endpoint", "embeddings"), "choose one of chat, completions"),
    (("--endpoint", "completions", "--image-size", "9x9"), "takes no pictures"),
    (("--image-size", "9x9", "--images", "."), "not both"),
    (("--image-size", "9"), "1120x1120"),
    (("--images", "nowhere"), "cannot be read"),
    (("--percentiles", "50,101"), "numbers from 0 to 100"),
    (("--percentiles", ""), "numbers from 0 to 100"),
    (("--goodput", "ttft=5"), "as in ttft:2000"),
    (("--goodput", "itl:5"), "metrics are ttft, tpot, e2el"),
    (("--goodput", "ttft:-5"), "as in ttft:2000"),
    (("--tokenizer", "nowhere"), "does not exist"),
    (("--out", "/dev/null/x.json"), "cannot be made"),
    (("--out", "/dev"), "is a folder"),
    (("--report", "/dev/null"), "cannot be made"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=lambda value: str(value)[:30])
def test_bad_settings_are_refused_before_the_server_is_asked(arguments, words):
    """Catches a traceback, and a minute of load before a mistyped file name shows."""
    result = bench(f"http://127.0.0.1:{closed_port()}", *arguments, "--json")
    assert result.exit_code == 2, result.output
    assert words in said(result)["error"]["message"]


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://a:b@c", "http://x:y"]
)
def test_an_address_that_is_none_is_refused(url):
    """Catches a password in a report, and a library's own words."""
    result = bench(url, "--json")
    assert result.exit_code == 2
    assert said(result)["error"]["message"].startswith("base_url: ")


def test_an_address_may_end_in_v1():
    """Catches /v1/v1/models, as other programs want their base URL with it."""
    script = Script(lambda n: answer_of("a", "b", "c"))
    with serving(script.app()) as url:
        assert said(bench(f"{url}/v1/", *QUICK, "-n", "1", "--json"))["completed"] == 1


# --- Ctrl-C ----------------------------------------------------------------------------------


def test_ctrl_c_reports_what_was_measured(tmp_path):
    """Catches an hour's figures that are lost, a cut run that looks whole, and exit code 0."""
    enough = threading.Event()

    def answer(number: int) -> list[bytes]:
        if number >= 3:
            enough.set()
            return [chunk(text="a"), HANG]
        return answer_of("a", "b", "c")

    def interrupt() -> None:
        assert enough.wait(30)
        time.sleep(0.05)  # the test's server has seen the request; its answer is on its way
        os.kill(os.getpid(), signal.SIGINT)

    waiting = threading.Thread(target=interrupt)
    waiting.start()
    found, _, result = scripted(answer, "-n", "50", "--report", tmp_path)
    waiting.join()
    assert result.exit_code == 130
    assert found["cut_because"] == "stopped by Ctrl-C"
    assert found["is_whole"] is False
    assert found["outcomes"] == ["completed"] * 3 + ["cut"]
    text = (tmp_path / "load.md").read_text(encoding="utf-8")
    assert "stopped by Ctrl-C: 3 of 4 requests completed (cut: 1)" in text.splitlines()[0]


def test_the_handler_of_ctrl_c_is_given_back():
    """Catches a program that no Ctrl-C ends after a run."""
    scripted(lambda n: answer_of("a", "b", "c"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_busy_client_is_told(monkeypatch):
    """Catches a client too slow for its load, whose own delay passes for the server's."""
    found, _, result = scripted(lambda n: answer_of("a", "b", "c"))
    assert found["client_busy"] > 0
    monkeypatch.setattr(bench_serve, "_BUSY", 0.0)
    monkeypatch.setattr(bench_serve, "_SETTLED_S", 0.0)
    _, _, result = scripted(lambda n: answer_of("a", "b", "c"))
    assert "this client was busy " in result.stderr


def test_requests_beyond_those_prepared_are_made_on_the_way(monkeypatch):
    """Catches an index past the end, and a request that is sent twice."""
    monkeypatch.setattr(bench_serve, "_NUM_PREPARED", 2)
    script = Script(lambda n: answer_of("a", "b", "c"))
    found, _, result = scripted(script, "-n", "7", "-c", "2", "--image-size", "9x9")
    assert found["completed"] == 7
    assert len({json.dumps(body["messages"]) for body in script.bodies}) == 7
    assert "requests after the first 2 were made while the run went on" in result.stderr


def test_what_is_prepared_is_bounded_in_bytes(monkeypatch):
    """Catches a folder of photographs that fills the client's memory before anything is sent."""
    plan = Plan(rate=None, burstiness=1.0, concurrency=2, num_requests=50, duration_s=None, seed=0)
    workload = Workload(
        model="m", is_chat=True, input_len=4, output_len=2, ignore_eos=True, temperature=0,
        seed=0, image_sizes=(Size(40, 30),),
    )  # fmt: skip
    size = len(workload.ask(0).body)
    for room, num in ((10**9, 50), (int(3.5 * size), 4), (1, 1)):
        monkeypatch.setattr(bench_serve, "_PREPARED_BYTES", room)
        prepared = bench_serve._prepare(workload, plan)
        assert [ask.number for ask in prepared] == list(range(num))
    script = Script(lambda n: answer_of("a", "b", "c"))
    found, _, result = scripted(script, "-n", "7", "-c", "2", "--image-size", "9x9")
    assert found["completed"] == 7
    assert "requests after the first 1 were made while the run went on" in result.stderr


def test_a_duration_ends_a_run_that_has_no_number():
    """Catches a hundred requests by default where a duration was given."""
    found, _, result = scripted(
        lambda n: answer_of("a", "b", "c"), "-n", "100000", "--duration", "0.2"
    )
    assert 0 < found["completed"] < 100_000
    assert found["is_whole"]
    script = Script(lambda n: answer_of("a", "b", "c"))
    with serving(script.app()) as url:
        result = bench(url, *QUICK, "--duration", "0.2", "--json")
    assert said(result)["num_prompts"] is None
    assert "sending for 0.2 s" in result.stderr
