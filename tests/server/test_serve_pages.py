"""Every example of the pages about the server is run against one."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.serving import Served, paths, serving

from glimt.server.app import all_protocols
from glimt.server.config import ServerConfig

ROOT = Path(__file__).parents[2]
SERVE = ROOT / "docs" / "serve.md"
README = ROOT / "README.md"
SHOWN = "127.0.0.1:8000"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """One block of a page. expected: what the page says that it prints, if it says so."""

    name: str
    language: str
    code: str
    expected: str | None


def section(page: Path, title: str) -> str:
    text = page.read_text(encoding="utf-8")
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def examples(page: Path, title: str) -> Iterator[Example]:
    """Those that ask a server."""
    for number, match in enumerate(FENCE.finditer(section(page, title))):
        language, code, expected = match.groups()
        if SHOWN in code:
            yield Example(f"{page.name}-{number}-{language}", language, code, expected)


EXAMPLES = [
    *examples(README, "Serve"),
    *examples(SERVE, "Clients"),
    *examples(SERVE, "Function calling"),
]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving("demo", ServerConfig(num_decoders=0, enable_tools=True)) as found:
        yield found


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_every_example_runs(served, example, monkeypatch):
    """Catches an example that a reader copies and gets an error from."""
    monkeypatch.chdir(ROOT)
    code = example.code.replace(SHOWN, served.url.removeprefix("http://"))
    _skip_without(code)
    said = run_shell(code) if example.language == "sh" else run_python(code)
    assert said.strip()
    assert '"error"' not in said
    if example.expected is not None:
        assert said.strip() == example.expected.strip()


def _skip_without(code: str) -> None:
    """Skip where what an example needs is not installed, or its protocol not there yet."""
    for package in re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")
    asked = re.findall(r"127\.0\.0\.1:\d+(/[\w/]+)", code)
    if missing := [path for path in asked if path not in paths() and path != "/v1"]:
        pytest.skip(f"not served here: {missing[0]}")
    served = {each.name for each in all_protocols()}
    for words, protocol in {"tritonclient": "triton", "text_generation(": "tgi"}.items():
        if words in code and protocol not in served:
            pytest.skip(f"not served here: {protocol}")
    has_grammar = "response_format" in code or "tool_choice" in code
    if has_grammar and importlib.util.find_spec("llguidance") is None:
        pytest.skip('llguidance is not installed: pip install ".[structured]"')


def run_shell(code: str) -> str:
    """The output of a block as a reader's shell runs it; JSON must be whole."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not here: apt-get install curl")
    done = subprocess.run(["bash", "-euc", code], capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.decode()
    if "chat/completions" in code and '"stream": true' not in code:
        assert json.loads(said)["choices"][0]["message"]["content"]
    if '"stream": true' in code:
        assert said.endswith("data: [DONE]\n\n")
    return said


def run_python(code: str) -> str:
    """What a block prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    return said.getvalue()


def test_there_is_an_example_of_every_client():
    """Catches a section that was emptied, or whose blocks the test passes over."""
    titles = re.findall(r"^### (\S+)$", section(SERVE, "Clients"), re.MULTILINE)
    clients = ["curl", "openai", "huggingface_hub", "TGI", "tritonclient", "vLLM", "MindIE"]
    assert titles == clients
    assert [example.language for example in EXAMPLES].count("python") >= len(clients)
    assert [example.name.split("-")[0] for example in EXAMPLES].count("README.md") == 2


def test_every_limit_of_the_table_is_the_default():
    """Catches a default that was changed in the code and not on the page."""
    config = ServerConfig()
    table = section(SERVE, "Limits")
    for option, value in {
        "`--max-waiting`": f"{config.max_waiting}",
        "`--max-connections`": f"{config.connections_for(64)}",
        "`--request-timeout`": f"{config.request_timeout_s:g}",
        "`--limit-images`": f"{config.limit_images}",
        "`--max-image-bytes`": f"{config.max_image_bytes // 2**20} MiB",
    }.items():
        assert f"| {option} | {value} |" in table
    assert f"{config.max_image_pixels // 10**6} million" in table
    assert f"{config.max_body_bytes // 2**20} MiB" in table
