"""Reading a folder of questions: what is taken, and how everything wrong is told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glimt.errors import ConfigError
from glimt.evaluate.questions import FILE, read_questions
from glimt.types import ImagePart, TextPart


def row(**changes: Any) -> dict[str, Any]:
    parts = [{"type": "image", "image": "pictures/a.png"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}]
    words = {"id": "x-1", "task": "x", "language": "en", "answer": "A cat."}
    return {**words, "messages": messages} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "a.png")
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / FILE).write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return folder


def problems(folder: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_questions(folder)
    return list(caught.value.problems)


def test_a_question_is_read_with_its_picture_as_seen_from_here(folder):
    """Catches a picture looked for in the current folder instead of the questions' own."""
    (question,) = read_questions(write(folder, row()))
    assert (question.id, question.task, question.language) == ("x-1", "x", "en")
    assert question.answer == "A cat."
    (message,) = question.messages
    assert message.parts == (ImagePart(str(folder / "pictures" / "a.png")), TextPart("What?"))


def test_earlier_turns_and_bare_texts_are_kept(folder):
    """Catches a second turn without its first."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    talk.append({"role": "user", "content": "And now?"})
    (question,) = read_questions(write(folder, row(messages=talk)))
    assert [m.role for m in question.messages] == ["user", "assistant", "user"]
    assert question.messages[-1].text == "And now?"


def test_a_line_separator_inside_a_text_is_no_end_of_line(folder):
    """Catches str.splitlines, which cuts JSON at U+2028 and U+0085."""
    text = json.dumps(row(answer="one\u2028two\x85three"), ensure_ascii=False)
    first, _ = read_questions(write(folder, text, row()))
    assert first.answer == "one\u2028two\x85three"


def test_a_missing_file_is_named_with_what_to_do(tmp_path):
    """Catches a bare FileNotFoundError."""
    (said,) = problems(tmp_path)
    assert str(tmp_path / FILE) in said
    assert f"name a folder that holds {FILE}" in said


def test_a_file_that_is_no_text_is_refused(tmp_path):
    """Catches a UnicodeDecodeError."""
    (tmp_path / FILE).write_bytes(b"\xff\xfe")
    (said,) = problems(tmp_path)
    assert "is not UTF-8" in said


@pytest.mark.parametrize("content", ["", "\n", "  \n\n"])
def test_an_empty_file_is_refused(tmp_path, content):
    """Catches an evaluation of nothing."""
    (tmp_path / FILE).write_text(content)
    (said,) = problems(tmp_path)
    assert "holds no question" in said


WRONG = [
    ("{", "is not JSON: "),
    ("", "is not JSON: "),
    ("[" * 100_000, "is not JSON: "),
    ("5", "is a int, not an object"),
    ({}, "id, task, language, answer, messages are missing"),
    ({k: v for k, v in row().items() if k != "answer"}, "answer is missing"),
    (row(answer=5), "answer is 5, not a text"),
    (row(messages=[]), "messages: is empty"),
    (row(messages="What?"), "messages: is "),
    (row(messages=[{"role": "user"}]), "messages[0]"),
    (row(messages=[{"role": "nobody", "content": "x"}]), "messages[0].role: is 'nobody'"),
    (row(messages=[{"role": "user", "content": [{"type": "image"}]}]), "messages[0].content[0]"),
    (
        row(messages=[{"role": "user", "content": [{"type": "image", "image": "b.png"}]}]),
        "b.png is missing",
    ),
]


@pytest.mark.parametrize(("line", "said"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_a_bad_line_is_told_by_its_number(folder, line, said):
    """Catches a traceback, or a question that is dropped in silence."""
    (problem,) = problems(write(folder, row(), line, row()))
    assert problem.startswith(f"line 2 of {FILE}: ")
    assert said in problem


def test_all_bad_lines_are_told_at_once(folder):
    """Catches an error that shows one line at a time, run after run."""
    found = problems(write(folder, *(line for line, _ in WRONG)))
    assert len(found) == len(WRONG)
    for number, (problem, (_, said)) in enumerate(zip(found, WRONG, strict=True), 1):
        assert problem.startswith(f"line {number} of")
        assert said in problem
