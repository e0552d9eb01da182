"""`glimt evaluate`: the table, the JSON object, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from glimt.cli import app
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.evaluate import tasks
from glimt.evaluate.questions import FILE
from glimt.llm import LLM


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_noise_model(path, request.param)
    return path


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """Three questions of two tasks; the model's own answer is right for the first two."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "a.png")
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "什么？"}]
    seen = [{"type": "image", "image": str(tmp_path / "a.png")}, parts[1]]
    llm = LLM(str(model), num_blocks=64)
    output = llm.chat([{"role": "user", "content": seen}], tasks._GREEDY)
    answer = llm.engine.opened.processor.tokenizer.decode(output.token_ids)
    rows = [
        {"id": "a-0", "task": "a", "language": "zh", "answer": answer},
        {"id": "a-1", "task": "a", "language": "zh", "answer": answer},
        {"id": "b-0", "task": "b", "language": "en", "answer": "not this"},
    ]
    messages = [{"role": "user", "content": parts}]
    lines = [json.dumps({**row, "messages": messages}) for row in rows]
    (tmp_path / FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def run_json(*arguments: str | Path) -> dict[str, Any]:
    return json.loads(run(*arguments, "--json").stdout)


def test_the_table_names_every_task_with_its_share(model, folder):
    """Catches a table without its languages, and shares of the wrong total."""
    result = run(folder, "-m", model)
    assert result.exit_code == 0, result.stderr
    rows = [re.findall(r"[\w.%]+", line) for line in result.stdout.splitlines()]
    assert ["a", "zh", "2", "100.0%"] in rows
    assert ["b", "en", "1", "0.0%"] in rows


def test_json_is_one_object_with_exact_counts(model, folder):
    """Catches a rounded share in the place of the counts."""
    a, b = run_json(folder, "-m", model)["tasks"]
    assert a == {
        "task": "a",
        "language": "zh",
        "asked": 2,
        "right": 2,
        "agreed": None,
        "failed": 0,
        "accuracy": 1.0,
    }
    assert (b["asked"], b["right"], b["accuracy"]) == (1, 0, 0.0)
    assert run_json(folder, "-m", model)["divergence"] is None


def test_against_tells_agreement_and_divergence(model, folder):
    """Catches a reference that is loaded in the dtype under test, or not at all."""
    said = run_json(folder, "-m", model, "--dtype", "bfloat16", "--against", "float32")
    assert 0 < said["divergence"]["mean_kl"] < 0.1
    assert all(task["agreed"] is not None for task in said["tasks"])
    same = run_json(folder, "-m", model, "--dtype", "float32", "--against", "float32")
    assert same["divergence"]["mean_kl"] < 1e-9
    assert [task["agreed"] for task in same["tasks"]] == [2, 1]
    shown = run(folder, "-m", model, "--against", "float32").stdout
    assert "as float32" in shown
    assert "mean KL" in shown


def test_limit_takes_the_first_of_each_task_and_language(model, folder):
    """Catches a limit over all tasks together, which leaves the last ones out."""
    said = run_json(folder, "-m", model, "--limit", "1")
    assert [task["asked"] for task in said["tasks"]] == [1, 1]


def test_a_broken_picture_is_warned_of_by_the_question(model, folder):
    """Catches a silent wrong answer that looks like the model's fault."""
    (folder / "a.png").write_bytes(b"no picture")
    result = run(folder, "-m", model, "--json")
    assert result.exit_code == 0
    assert [task["failed"] for task in json.loads(result.stdout)["tasks"]] == [2, 1]
    for name in ("a-0", "a-1", "b-0"):
        assert f"question {name} counts as wrong: " in result.stderr
    assert str(folder / "a.png") in result.stderr


BAD = [
    (("--limit", "0"), "limit", "must be at least 1"),
    (("--dtype", "int3"), "dtype", "is unknown"),
    (("--against", "int3"), "dtype", "is unknown"),
    (("--device", "abacus"), "device", "is unknown"),
    (("-m", "nowhere"), "model", "does not exist"),
]


@pytest.mark.parametrize(("arguments", "field", "said"), BAD, ids=lambda value: str(value)[:20])
def test_bad_settings_are_refused_in_words_and_in_json(model, folder, arguments, field, said):
    """Catches a traceback, and a script that finds nothing on stdout."""
    result = run(folder, "-m", model, *arguments, "--json")
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "ConfigError"
    assert field in error["message"]
    assert said in error["message"]
    assert result.stderr.startswith("error: ")
    assert run(folder, "-m", model, *arguments).stdout == ""


def test_bad_questions_are_refused_before_the_model_is_loaded(tmp_path):
    """Catches a minute of loading for a mistyped folder."""
    result = run(tmp_path, "-m", "nowhere", "--json")
    assert result.exit_code == 2
    assert "questions.jsonl cannot be read" in json.loads(result.stdout)["error"]["message"]


def test_a_report_tells_what_was_asked_and_what_failed(model, folder, tmp_path):
    """Catches a report without its model's digest, or without the question that failed."""
    line = json.dumps(
        {
            "id": "c-0",
            "task": "c",
            "language": "zh",
            "answer": "",
            "messages": [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}],
        }
    )
    (folder / "b.png").write_bytes(b"no picture")
    with (folder / FILE).open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    out = tmp_path / "report"
    result = run(folder, "-m", model, "--report", out, "--against", "float32")
    assert result.exit_code == 0, result.stderr
    text = (out / "evaluate.md").read_text(encoding="utf-8")
    assert text.splitlines()[0].startswith(
        "**⚠ With errors: 4 questions asked, 50.0% answered right"
    )
    assert "| c-0 | c | zh |" in text
    assert "sha256:" in text
    assert "Divergence from float32" in text
    assert {path.name for path in out.iterdir()} == {"evaluate.html", "evaluate.md", "accuracy.png"}
    assert "With errors: 4 questions asked" in result.stdout


def test_a_report_that_cannot_be_written_is_refused_before_the_model_is_loaded(folder):
    """Catches an hour of answers that end in an error."""
    result = run(folder, "-m", "nowhere", "--report", "/dev/null/report")
    assert result.exit_code == 2
    assert "report: /dev/null/report cannot be made" in result.stderr


@pytest.mark.parametrize(
    "setting",
    [
        ("--draft-tokens", "4"),
        ("--kv-dtype", "int8"),
        ("--quant", "int8", "--quant-tower", "int8"),
        ("--max-model-len", "200"),
    ],
    ids=" ".join,
)
def test_any_setting_can_be_compared(model, folder, setting):
    """Catches drafts that shift the forced tokens, and a setting that the reference gets too."""
    result = run(folder, "-m", model, *setting, "--against", "float32", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)["divergence"]
    assert said["mean_kl"] < 0.2
    assert said["num_tokens"] > 3
