"""The comparison with llama.cpp: the same shapes on both sides, and what it says without it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers import llama_cpp
from benchmarks.peers.llama_cpp import FIGURES, FORMATS, INSTALL, main, text_config
from typer import Typer
from typer.testing import CliRunner

from glimt.config import EngineConfig
from glimt.loader import open_model
from glimt.quant.base import find_format

# The vocabulary stays: a text model is known by its size.
TINY = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 96}
app = Typer()
app.command()(main)


@pytest.fixture
def installed() -> None:
    if llama_cpp.llama_cpp is None:
        pytest.skip(INSTALL)


@pytest.mark.parametrize("raw", [text_config(2), text_config(2) | TINY], ids=["published", "tiny"])
def test_both_sides_have_the_same_weights(raw: dict[str, Any], tmp_path: Path) -> None:
    """Catches a tensor that one side lacks: its times would be another model's."""
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = open_model(EngineConfig(model=f"synthetic:{tmp_path}")).model
    ours = sum(parameter.numel() for parameter in model.parameters())
    assert sum(math.prod(shape) for _, shape, _ in llama_cpp._tensors(raw)) == ours


@pytest.mark.parametrize("name", FORMATS)
def test_both_sides_have_the_format(name: str) -> None:
    """Catches a format that glimt has renamed, and a head in more bits on one side."""
    quant, _, head = FORMATS[name]
    ours = find_format(quant)
    assert (ours.head if ours else "none") in {"BF16": ["none"], "Q8_0": ["int8", "w8a8"]}[head]


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    """Catches minutes of work for a typing error."""
    result = CliRunner().invoke(app, ["--format", "fp4"])
    assert result.exit_code == 2
    assert "'fp4' is none of bf16, int8" in " ".join(result.output.split())


def test_without_the_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where one line of advice is due."""
    monkeypatch.setattr(llama_cpp, "llama_cpp", None)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "pip install llama-cpp-python gguf" in result.output


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_answers(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a file that llama.cpp does not load, and rows that a step leaves out."""
    monkeypatch.setattr(llama_cpp, "text_config", lambda layers: text_config(layers) | TINY)
    monkeypatch.setattr(llama_cpp, "PROMPT_TOKENS", 40)
    main(name, layers=2, repeats=1, tokens=2)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(said["figures"]) == list(FIGURES)
    assert min(row["llama_cpp_s"] for row in said["figures"].values()) > 0
