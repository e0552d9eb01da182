"""Counting answers: right, agreed and failed ones, by task and language."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from glimt.demo.noise import write_noise_model
from glimt.evaluate import tasks
from glimt.evaluate.questions import Question
from glimt.evaluate.tasks import Tally, evaluate
from glimt.llm import LLM
from glimt.types import ImagePart, Message, RequestOutput, TextPart

SIZES = {"num_blocks": 512}


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(str(folder), **SIZES)


@pytest.fixture(scope="module")
def other(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The same family with other weights."""
    path = tmp_path_factory.mktemp("other")
    write_noise_model(path, llm.engine.opened.family.name, seed=1)
    return LLM(str(path), **SIZES)


def question(number: int, task: str = "a", language: str = "en", *pictures: Path) -> Question:
    parts = [*(ImagePart(str(path)) for path in pictures), TextPart(f"Question {number}?")]
    return Question(f"{task}-{number}", task, language, (Message("user", tuple(parts)),), "?")


def outputs_of(llm: LLM, questions: list[Question]) -> list[RequestOutput]:
    return llm.chat([question.messages for question in questions], tasks._GREEDY)


def with_answers(llm: LLM, questions: list[Question]) -> list[Question]:
    """The questions with what the model says, before it is mended, as their right answers."""
    decode, outputs = llm.engine.opened.processor.tokenizer.decode, outputs_of(llm, questions)
    assert {output.finish_reason for output in outputs} == {"length"}
    texts = [decode(output.token_ids) for output in outputs]
    return [replace(q, answer=text) for q, text in zip(questions, texts, strict=True)]


def test_right_answers_are_counted_by_task_and_language(llm, monkeypatch):
    """Catches counts that run together, or a last batch that is left out."""
    monkeypatch.setattr(tasks, "BATCH", 4)
    asked = [question(n, "ab"[n % 2], ("en", "zh")[n // 2 % 2]) for n in range(10)]
    known = with_answers(llm, asked)
    known[0] = replace(known[0], answer="something else")
    known[9] = replace(known[9], answer=known[9].answer + ".")
    done: list[int] = []
    found = evaluate(llm, known, on_done=done.append)
    assert found.divergence is None
    assert found.tallies == (
        Tally("a", "en", 3, 2, None, 0),
        Tally("a", "zh", 2, 2, None, 0),
        Tally("b", "en", 3, 2, None, 0),
        Tally("b", "zh", 2, 2, None, 0),
    )
    assert found.tallies[0].accuracy == pytest.approx(2 / 3)
    assert done == [4, 4, 2]


def test_the_right_answer_is_compared_as_the_family_shows_it():
    """Catches a right answer of VisualGLM counted wrong for a comma that it makes Chinese."""

    class Processor:
        def finish_text(self, raw: str) -> str:
            return raw.replace(",", "，")

    class Stub:
        class engine:  # noqa: N801
            class opened:  # noqa: N801
                processor = Processor()

    stub: Any = Stub()
    assert tasks.finished(stub, "红,蓝") == "红，蓝"


def test_a_model_agrees_with_itself(llm):
    """Catches an agreement that is counted against the right answer."""
    found = evaluate(llm, [question(n) for n in range(3)], reference=llm)
    assert found.tallies == (Tally("a", "en", 3, 0, 3, 0),)
    assert found.divergence is not None
    assert found.divergence.top1 == 1.0
    assert found.divergence.mean_kl == pytest.approx(0, abs=1e-9)


def test_agreement_and_divergence_are_from_the_reference(llm, other):
    """Catches the two models swapped: the places are those of the reference's answers."""
    asked = [question(n) for n in range(3)]
    one, outputs = outputs_of(llm, asked), outputs_of(other, asked)
    found = evaluate(llm, with_answers(llm, asked), reference=other)
    agreed = sum(a.text == b.text for a, b in zip(one, outputs, strict=True))
    assert found.tallies == (Tally("a", "en", 3, 3, agreed, 0),)
    assert found.divergence is not None
    assert found.divergence.num_tokens == sum(len(output.token_ids) for output in outputs)
    assert found.divergence.mean_kl > 0.1
    assert found.as_dict()["divergence"]["mean_kl"] == found.divergence.mean_kl


def test_a_broken_picture_counts_as_wrong_and_the_others_go_on(llm, tmp_path):
    """Catches one bad file that ends an hour of questions, or that nobody is told of."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    asked = [
        *with_answers(llm, [question(0, "a", "en", tmp_path / "good.png"), question(1)]),
        question(2, "a", "en", tmp_path / "bad.png"),
        question(3, "b", "en", tmp_path / "bad.png"),
    ]
    failed: list[tuple[str, str]] = []
    found = evaluate(llm, asked, llm, on_failed=lambda q, why: failed.append((q.id, why)))
    assert found.tallies == (Tally("a", "en", 3, 2, 2, 1), Tally("b", "en", 1, 0, 0, 1))
    assert [name for name, _ in failed] == ["a-2", "b-3"]
    assert "is no JPEG, PNG" in failed[0][1]
    assert asked[2].pictures == (str(tmp_path / "bad.png"),)
    assert found.divergence is not None


def test_questions_that_all_fail_leave_no_divergence(llm, tmp_path):
    """Catches the mean of nothing, and a retry without end."""
    (tmp_path / "bad.png").write_bytes(b"no picture")
    found = evaluate(llm, [question(0, "a", "en", tmp_path / "bad.png")], llm)
    assert found.tallies == (Tally("a", "en", 1, 0, 0, 1),)
    assert found.divergence is None


def test_a_model_that_computes_nan_fails_every_question(tmp_path):
    """Catches NaN taken for an answer, or in a figure that JSON cannot hold."""
    write_noise_model(tmp_path, "glm4v_9b")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["transformer.encoder.final_layernorm.weight"][:] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    broken, failed = LLM(str(tmp_path), **SIZES), []
    found = evaluate(broken, [question(0)], broken, on_failed=lambda q, why: failed.append(why))
    assert found.tallies == (Tally("a", "en", 1, 0, 0, 1),)
    assert "NaN" in failed[0]
    assert found.divergence is None
