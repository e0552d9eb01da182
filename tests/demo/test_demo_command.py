"""`python -m glimt.demo`: what is asked, how answers are marked, and the exit code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glimt.commands.console import printable
from glimt.demo import __main__ as demo
from glimt.demo.questions import FILE, examples_of
from glimt.errors import ConfigError
from glimt.llm import LLM


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> list[str]:
    return [str(folder) for folder in folders.values()]


@pytest.fixture
def noise(models: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The demo with noise models in the place of the trained ones."""
    monkeypatch.setattr(demo, "BUILT_IN", dict.fromkeys(models))
    return models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, and a question about one of them."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (32, 32), "red").save(tmp_path / name)
    write(tmp_path, "A?")
    return tmp_path


def write(folder: Path, *answers: str) -> None:
    asked = [{"question": "什么？", "answer": answer} for answer in answers]
    rows = [{"picture": "a.png", "zh": each, "en": each | {"question": "What?"}} for each in asked]
    (folder / FILE).write_text(json.dumps(rows), encoding="utf-8")


# --- what is asked ---------------------------------------------------------------------------


def test_a_folder_is_asked_about_as_its_file_says(folder):
    """Catches pictures that nobody wrote a question for, or answers of the wrong language."""
    (example,) = examples_of([folder])
    assert example.picture == folder / "a.png"
    assert [(a.question, a.answer) for a in example.asked] == [("什么？", "A?"), ("What?", "A?")]


def test_a_picture_has_its_own_questions_or_the_common_ones(folder):
    """Catches the right answer to one picture held against another."""
    known, unknown = examples_of([folder / "a.png", folder / "b.png"])
    assert known.asked == examples_of([folder])[0].asked
    assert [a.answer for a in unknown.asked] == [None, None]
    assert [a.question for a in unknown.asked] == ["图片里是什么？", "What is in the picture?"]
    (folder / FILE).unlink()
    assert examples_of([folder / "a.png"])[0].asked == unknown.asked


def test_without_a_path_a_picture_is_drawn():
    """Catches a demo that only works in a checkout."""
    (example,) = examples_of([])
    assert isinstance(example.picture, Image.Image)
    assert [asked.answer for asked in example.asked] == [
        "有一个红色的圆形。",
        "There is a red circle.",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        ("[", "is not JSON"),
        ('[{"picture": "a.png"}]', "are needed in every entry"),
        ("5", "are needed in every entry"),
        ("[5]", "are needed in every entry"),
        ('[{"picture": 5, "zh": 5, "en": 5}]', "are needed in every entry"),
    ],
)
def test_a_bad_file_is_a_plain_error(tmp_path, content, said):
    """Catches a traceback for a mistyped folder or a hand-edited file."""
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError, match=said):
        examples_of([tmp_path])


# --- what is shown ---------------------------------------------------------------------------


def said_by(model: str, picture: Path) -> list[str]:
    llm = LLM(model, max_num_seqs=1)
    parts: list[dict[str, Any]] = [{"type": "image", "image": picture}]
    texts = ("什么？", "What?")
    asked = [[*parts, {"type": "text", "text": text}] for text in texts]
    return [llm.chat([{"role": "user", "content": c}], demo._GREEDY).text for c in asked]


def test_wrong_answers_are_marked_and_end_in_1(noise, folder, capsys):
    """Catches a `make demo` that passes whatever the models say."""
    assert demo.main([str(folder)]) == 1
    said = capsys.readouterr().out
    assert said.count("(WRONG: A?)") == 4
    assert said.count("0 of 2 answers are right") == 2
    for model in noise:
        for text in said_by(model, folder / "a.png"):
            assert printable(" ".join(text.split())) in said
    assert len(re.findall(r"picture process time .* tokens/s", said)) == 4


def test_the_answers_of_the_model_itself_are_right(noise, folder, capsys, monkeypatch):
    """Catches a comparison that can never hold, and one that forgets what VisualGLM mends."""
    monkeypatch.setattr(demo, "BUILT_IN", {noise[0]: ""})
    chinese, english = said_by(noise[0], folder / "a.png")
    zh, en = {"question": "什么？", "answer": chinese}, {"question": "What?", "answer": english}
    rows = [{"picture": "a.png", "zh": zh, "en": en}]
    (folder / FILE).write_text(json.dumps(rows), encoding="utf-8")
    assert demo.main([str(folder)]) == 0
    assert "2 of 2 answers are right" in capsys.readouterr().out


def test_pictures_without_known_answers_are_not_marked(noise, folder, capsys):
    """Catches an exit code that blames the model for a picture of the user's own."""
    assert demo.main([str(folder / "b.png")]) == 0
    said = capsys.readouterr().out
    assert "WRONG" not in said
    assert "answers are right" not in said
    assert "toy models" in said
    assert "玩具模型" in said


def test_what_cannot_be_used_is_said_and_ends_in_2(noise, folder, capsys):
    """Catches a traceback for a picture that is none."""
    (folder / "c.png").write_bytes(b"no picture")
    assert demo.main([str(folder / "c.png")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert demo.main([str(folder / "missing")]) == 2
