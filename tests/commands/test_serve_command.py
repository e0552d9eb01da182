"""`glimt serve` as a process: it opens its port, tells how it is, and ends when told."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from glimt.cli import app
from glimt.demo.noise import write_noise_model

COMMAND = [sys.executable, "-c", "from glimt.cli import main; main()", "serve", "--port", "0"]


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    """A server that is started in this process sets them: logs would go to a stream that ended."""
    root = logging.getLogger()
    handlers, level, interval = list(root.handlers), root.level, sys.getswitchinterval()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    sys.setswitchinterval(interval)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_noise_model(path, "glm4v_9b")
    return path


@contextmanager
def served(
    folder: Path, *options: str, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server in a process of its own, and its address; ended at the end if it still runs."""
    command = [*COMMAND, "-m", str(folder), "--decoders", "0", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", first)
        assert found, first
        yield found[0], process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


def get(url: str, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def until_ready(url: str) -> list[int]:
    """Statuses of /health until it is 200."""
    seen = []
    deadline = time.monotonic() + 60
    while not seen or seen[-1] != 200:
        assert time.monotonic() < deadline
        try:
            seen.append(get(f"{url}/health")[0])
        except urllib.error.URLError:
            seen.append(0)
        time.sleep(0.02)
    return seen


def test_a_server_loads_answers_probes_and_ends_with_0(folder):
    """Catches a port that opens late, a probe that lies, and a signal that is an error."""
    with served(folder) as (url, process):
        assert set(until_ready(url)) <= {0, 503, 200}
        assert get(f"{url}/live")[0] == get(f"{url}/ready")[0] == get(f"{url}/ping")[0] == 200
        assert json.loads(get(f"{url}/version")[1])["version"]
        assert b"vllm:num_requests_running" in get(f"{url}/metrics")[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("uvloop", "httptools"))),
    reason="needs uvloop and httptools, which ray[serve] brings: pip install 'glimt[cluster]'",
)
def test_what_uvicorn_finds_installed_changes_neither_loop_nor_parser(folder):
    """Catches limits of headers and connections that are h11's and hold only where uvloop and
    httptools are missing: uvicorn takes both by itself.
    """
    with served(folder) as (url, process):
        until_ready(url)
        loaded = Path(f"/proc/{process.pid}/maps").read_text()
    assert "uvloop" not in loaded
    assert "httptools" not in loaded


def ask(url: str, num_tokens: int) -> tuple[int, int]:
    """Status and number of tokens of an answer that is as long as that."""
    body = {
        "messages": [{"role": "user", "content": "你好"}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=100) as reply:
            return reply.status, json.load(reply)["usage"]["completion_tokens"]
    except urllib.error.HTTPError as error:
        return error.code, 0


def until_running(url: str, count: int) -> None:
    """Return once so many requests are being answered."""
    while f'running{{model_name="model0"}} {count}.0'.encode() not in get(f"{url}/metrics")[1]:
        time.sleep(0.005)


def test_what_runs_when_the_signal_comes_is_finished(folder):
    """Catches a deployment that cuts everybody's answers."""
    with served(folder) as (url, process), ThreadPoolExecutor(4) as clients:
        until_ready(url)
        running = [clients.submit(ask, url, 480) for _ in range(4)]
        until_running(url, 4)
        process.send_signal(signal.SIGTERM)
        assert [each.result() for each in running] == [(200, 480)] * 4
        assert process.wait(20) == 0


def test_what_runs_for_too_long_is_aborted_and_the_server_ends(folder):
    """Catches a server that one endless answer keeps from ending."""
    with served(folder, "--drain-timeout", "0.01") as (url, process), ThreadPoolExecutor(1) as one:
        until_ready(url)
        running = one.submit(ask, url, 480)
        until_running(url, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        with suppress(OSError, http.client.HTTPException):
            assert running.result()[0] != 0


def until_said(process: subprocess.Popen[str], text: str) -> str:
    """The line of stderr that holds the text."""
    assert process.stderr is not None
    for line in iter(process.stderr.readline, ""):
        if text in line:
            return line
    raise AssertionError(f"{text!r} was not said")


PICTURES_FROM_HERE = ("--allowed-media-domains", "*", "--allowed-media-networks", "127.0.0.0/8")


@pytest.mark.parametrize("signals", [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT")])
def test_a_second_signal_ends_what_the_first_lets_go_on(folder, signals):
    """Catches a user who presses Ctrl-C again and waits all the same, or callers told nothing.

    The request waits for a picture that never comes, so nothing but the signal ends it with a 503.
    """
    first, second = (getattr(signal, name) for name in signals)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        served(folder, *PICTURES_FROM_HERE) as (url, process),
        ThreadPoolExecutor(1) as one,
    ):
        until_ready(url)
        shown = f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"
        waiting = one.submit(ask_about, url, shown)
        silent.settimeout(30)
        with silent.accept()[0]:
            process.send_signal(first)
            said = until_said(process, "ending: 1 answers may go on for 90 s")
            assert "a second signal ends them at once" in said
            process.send_signal(second)
            status, told = waiting.result(60)
            assert (status, told["type"]) == (503, "ServiceUnavailableError")
            assert "shutting down" in told["message"]
            assert process.wait(20) == 0


def ask_about(url: str, shown: str) -> tuple[int, dict[str, str]]:
    """Status and error of a question about a picture that is not there."""
    content = [{"type": "image_url", "image_url": {"url": shown}}]
    body = {"messages": [{"role": "user", "content": content}]}
    try:
        urllib.request.urlopen(f"{url}/v1/chat/completions", json.dumps(body).encode(), timeout=60)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]
    raise AssertionError("it was answered")


def children_of(pid: int) -> list[int]:
    files = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


def runs(pid: int) -> bool:
    """A process that ended and that nobody waits for has no command any more."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


def picture() -> str:
    content = io.BytesIO()
    Image.new("RGB", (32, 32), (200, 30, 30)).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def test_a_server_that_is_killed_leaves_no_child(folder):
    """Catches processes that decode pictures for nobody until the machine is started anew."""
    with served(folder, "--decoders", "1") as (url, process):
        until_ready(url)
        shown = {"type": "image_url", "image_url": {"url": picture()}}
        body = {"messages": [{"role": "user", "content": [shown]}], "max_tokens": 1}
        chat = f"{url}/v1/chat/completions"
        with urllib.request.urlopen(chat, json.dumps(body).encode(), timeout=60) as reply:
            assert reply.status == 200
        children = children_of(process.pid)
        assert children
        process.kill()
        deadline = time.monotonic() + 30
        while any(map(runs, children)):
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_ctrl_c_ends_it_too(folder):
    """Catches a traceback after Ctrl-C."""
    with served(folder) as (url, process):
        until_ready(url)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_keys_come_from_options_and_from_the_environment(folder):
    """Catches a key that is taken and asked for by nobody, and one that is shown."""
    with served(folder, "--api-key", "k-one", GLIMT_API_KEY="k-two") as (url, process):
        until_ready(url)  # without a key
        assert get(f"{url}/metrics")[0] == 401
        for key in ("k-one", "k-two"):
            assert get(f"{url}/metrics", Authorization=f"Bearer {key}")[0] == 200
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert process.stderr is not None
        assert "k-one" not in process.stderr.read()


def test_management_has_a_port_of_its_own(folder):
    """Catches routes that stop a server on the port that strangers reach."""
    with served(folder, "--management-port", "0") as (url, process):
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"management at (http://127\.0\.0\.1:\d+)", line)
        assert found, line
        until_ready(url)
        assert get(f"{found[1]}/health")[0] == 200


def test_logs_can_be_objects_and_hold_no_prompt(folder):
    """Catches a line that no program can read, and one that tells what somebody asked."""
    with served(folder, "--log-format", "json") as (url, process):
        until_ready(url)
        get(f"{url}/v1/nothing?secret=1", **{"X-Request-Id": "my-id"})
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{")]
    (found,) = [line for line in told if line.get("request_id") == "my-id"]
    assert (found["method"], found["path"], found["status"]) == ("GET", "/v1/nothing", 404)
    assert "secret" not in "".join(lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-m", "/nowhere"), "'/nowhere' does not exist"),
        (("--profile", "other"), "profile 'other' is unknown; choose one of upstream, mindie"),
        (("--limit-images", "0"), "limit_images is 0"),
        (("--request-timeout", "0"), "request_timeout_s is 0.0; seconds above 0"),
        (("--allowed-media-networks", "10.0.0.0/99"), "'10.0.0.0/99' is no network"),
        (("--api-key", ""), "a key is empty"),
        (("--media-path", "/nowhere"), "is no folder"),
        (("--log-level", "loud"), "'loud' is unknown"),
        (("--host", "256.1.1.1"), "256.1.1.1:0 cannot be opened"),
        (("--port", "99999"), "99999 cannot be opened"),
    ],
)
def test_settings_that_cannot_be_served_are_told_before_anything_is_loaded(folder, options, said):
    """Catches a traceback, and minutes of loading before a typing error is told."""
    model = () if "-m" in options else ("-m", str(folder))
    done = CliRunner().invoke(app, ["serve", "--port", "0", *model, *options])
    assert done.exit_code == 2, done.stderr
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_one_plain_error(folder):
    """Catches a server that loads a model and then finds its port taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = CliRunner().invoke(app, ["serve", "-m", str(folder), "--port", port])
    assert done.exit_code == 2
    assert "another program may have it; choose another --port" in " ".join(done.stderr.split())
