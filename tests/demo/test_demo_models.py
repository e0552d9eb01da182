"""The built-in models give the right answers about every example, by every way in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import glimt
from glimt import LLM, SamplingParams
from glimt.cli import app
from glimt.demo.questions import FILE
from glimt.loader import BUILT_IN, model_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS: list[dict[str, Any]] = json.loads((EXAMPLES / FILE).read_text(encoding="utf-8"))
GREEDY = SamplingParams(temperature=0, max_tokens=64)
FAMILIES = {"demo": "glm4v_9b", "demo-visualglm": "visualglm"}


@pytest.fixture(scope="module", params=BUILT_IN)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def llm(name: str) -> LLM:
    return LLM(name, max_num_seqs=16)


def question(text: str, picture: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": EXAMPLES / picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("row", ROWS, ids=[row["picture"] for row in ROWS])
def test_every_example_is_answered_right(llm, row, language):
    """Catches weights of another run, and a change of engine that weights have to notice."""
    asked = row[language]
    output = llm.chat(question(asked["question"], row["picture"]), GREEDY)
    assert output.finish_reason == "stop"
    assert output.text == llm.engine.opened.processor.finish_text(asked["answer"])


def test_answers_are_the_same_in_a_batch(llm):
    """Catches rows of a batch that disturb each other where the logits mean something."""
    asked = [
        (row[language]["question"], row["picture"]) for row in ROWS for language in ("zh", "en")
    ]
    together = llm.chat([question(*one) for one in asked], GREEDY)
    assert [o.token_ids for o in together] == [
        llm.chat(question(*one), GREEDY).token_ids for one in asked
    ]


@pytest.mark.parametrize(
    ("first", "said", "second", "right"),
    [
        ("最左边是什么图形？", "它是五角星。", "它是什么颜色的？", "它是紫色的。"),
        ("最右边是什么图形？", "它是圆形。", "它是什么颜色的？", "它是绿色的。"),
        (
            "What shape is on the far right?",
            "It is a circle.",
            "What colour is it?",
            "It is green.",
        ),
    ],
)
def test_a_second_turn_refers_to_the_first(llm, first, said, second, right):
    """Catches a history that is dropped: "it" is then nothing."""
    talk = [
        *question(first, "pair.png"),
        {"role": "assistant", "content": said},
        {"role": "user", "content": second},
    ]
    assert llm.chat(talk, GREEDY).text == llm.engine.opened.processor.finish_text(right)


def test_a_second_turn_of_glm4v_computes_only_what_is_new():
    """Catches a conversation's last block, not full yet, that the next turn computes again."""
    llm = LLM("demo", max_num_seqs=2)
    talk = question("图片里有几个正方形？", "shapes.png")
    first = llm.chat(talk, GREEDY)
    before = llm.stats()
    talk += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "它是什么颜色的？"},
    ]
    second = llm.chat(talk, GREEDY)
    # The token that ended the first answer was sampled but never computed.
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert known % llm.engine.config.block_size, "the case would prove nothing"
    assert second.usage.cached_tokens == known
    computed = llm.stats().prefill_tokens - before.prefill_tokens
    assert computed == second.usage.prompt_tokens - known
    assert (second.timings.image_s, llm.stats().tower_images) == (0, 1)
    cold = LLM("demo", max_num_seqs=2, enable_prefix_cache=False)
    assert second.token_ids == cold.chat(talk, GREEDY).token_ids


def test_it_says_who_it_is(llm):
    """Catches a model that describes a picture nobody sent."""
    hello = {"zh": "你好！", "en": "Hello!"}
    for language, word in hello.items():
        text = llm.chat([{"role": "user", "content": word}], GREEDY).text
        assert "glimt" in text, (language, text)


def test_a_long_question_is_computed(llm):
    """Catches positions beyond what the tables hold."""
    words = [{"role": "user", "content": "你好，" * 1100}]
    output = llm.chat(words, SamplingParams(temperature=0, max_tokens=2))
    assert output.usage.prompt_tokens >= 2048
    assert output.finish_reason in ("stop", "length")


# --- a name for a folder, and nothing else ---------------------------------------------------


def test_a_copy_of_the_folder_answers_the_same(llm, name, tmp_path):
    """Catches a loader that treats the built-in models in a way of their own."""
    shutil.copytree(model_folder(name), tmp_path / "copy")
    copy = LLM(str(tmp_path / "copy"), max_num_seqs=1)
    asked = question("图片里是什么？", "boot.png")
    assert copy.engine.opened.family.name == FAMILIES[name] == llm.engine.opened.family.name
    assert copy.chat(asked, GREEDY).token_ids == llm.chat(asked, GREEDY).token_ids


def test_only_the_loader_knows_the_names_of_the_folders():
    """Catches code that asks whether a model is the demo one."""
    source = Path(glimt.__file__).parent
    files = [p for p in source.rglob("*.py") if "glimt-demo-" in p.read_text(encoding="utf-8")]
    assert [path.relative_to(source) for path in files] == [Path("loader.py")]


# --- the command line ------------------------------------------------------------------------


def run(*arguments: str, stdin: str | None = None) -> str:
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def test_generate_answers_without_a_model_being_named():
    """Catches a default that points nowhere: the first command of the README."""
    for row in ROWS[-1:]:
        picture = str(EXAMPLES / row["picture"])
        arguments = ["-i", picture, "-p", row["zh"]["question"], "-t", "0", "--quiet"]
        assert run("generate", *arguments) == row["zh"]["answer"] + "\n"


def test_generate_answers_with_the_other_built_in_model():
    """Catches --model demo-visualglm read as a folder of that name."""
    said = json.loads(run("generate", "-m", "demo-visualglm", "-p", "你好！", "-t", "0", "--json"))
    assert "glimt" in said["text"]
    assert said["finish_reason"] == "stop"


def test_chat_talks_with_the_demo_model():
    """Catches a chat that asks for a model first."""
    row = ROWS[-1]
    arguments = ["chat", "-i", str(EXAMPLES / row["picture"]), "-t", "0"]
    assert row["zh"]["answer"] in run(*arguments, stdin=row["zh"]["question"] + "\n")


def test_inspect_shows_a_built_in_model(name):
    """Catches inspect looking for a folder called demo."""
    said = json.loads(run("inspect", name, "--json"))
    assert said["family"] == FAMILIES[name]
    assert said["problems"] == []
