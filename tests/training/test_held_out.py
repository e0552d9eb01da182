"""The held-out folder: the same for a seed, in both languages, readable, and never trained on."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import typer
from PIL import Image
from training.data.mixture import held_out_questions, training_mixtures
from typer.testing import CliRunner

from glimt.evaluate.questions import FILE, Question, read_questions
from training import held_out

COUNT = 24


@pytest.fixture(scope="module", autouse=True)
def data(fashion: Path, font: Path, easy_vqa_data: Path) -> None:
    """All tasks are drawn here, so all of their data is needed."""


@pytest.fixture(scope="module")
def folder(data: None, photo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held-out")
    held_out.write(path, COUNT, photo_folder)
    return path


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[Question]:
    return read_questions(folder)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_same_seed_writes_the_same_folder(folder, photo_folder, tmp_path):
    """Catches scores of two runs that are not about the same questions."""
    held_out.write(tmp_path, COUNT, photo_folder)
    assert contents(tmp_path) == contents(folder)


def test_another_seed_writes_other_questions(folder, photo_folder, tmp_path, monkeypatch):
    """Catches a seed that is never read."""
    monkeypatch.setattr(held_out, "SEED", held_out.SEED + 1)
    held_out.write(tmp_path, COUNT, photo_folder)
    assert contents(tmp_path)[FILE] != contents(folder)[FILE]


def test_every_task_is_asked_equally_often_in_both_languages(questions):
    """Catches a task that is left out, and an accuracy of one language told as that of both."""
    counts = Counter((question.task, question.language) for question in questions)
    assert counts == {(task, each): COUNT // 2 for task in held_out.TASKS for each in ("zh", "en")}
    assert len({question.id for question in questions}) == len(questions)


def test_no_photographs_without_a_folder_of_them(tmp_path):
    """Catches pictures drawn as stand-ins that would count as photographs."""
    app = typer.Typer()
    app.command()(held_out.main)
    result = CliRunner().invoke(app, [str(tmp_path), "--count", "4"])
    assert result.exit_code == 0, result.output
    tasks = {question.task for question in read_questions(tmp_path)}
    assert tasks == set(held_out.TASKS) - {"photos"}


def test_the_file_holds_the_samples_with_their_own_pictures(questions, photo_folder):
    """Catches an answer written beside another question's picture."""
    for task in held_out.TASKS:
        drawn = held_out_questions(task, COUNT, held_out.SEED, photos=photo_folder)
        for question, sample in zip((q for q in questions if q.task == task), drawn, strict=True):
            (path,) = question.pictures
            with Image.open(path) as image:
                assert image.tobytes() == sample.image.tobytes()
            last = sample.exchanges[0].follow_up or sample.exchanges[0]
            assert question.messages[-1].text == last.question
            assert question.answer == last.answer


def test_a_second_turn_stands_on_the_right_first_answer(questions):
    """Catches a first answer that is left to the model, so that two answers are judged as one."""
    for question in questions:
        roles = [message.role for message in question.messages]
        has_two = question.task == "second_turns"
        assert roles == (["user", "assistant", "user"] if has_two else ["user"])


def test_held_out_pictures_are_none_that_are_trained_on(questions, photo_folder):
    """Catches one seed, or one part of Fashion-MNIST, for training and test alike."""
    trained = {
        sample.image.tobytes()
        for mixture in training_mixtures(photos=photo_folder)
        for sample in islice(mixture.samples(0), 400)
        if sample.image
    }
    for question in questions:
        with Image.open(question.pictures[0]) as image:
            assert image.tobytes() not in trained, question.id


def test_equal_pictures_share_a_file(folder, questions):
    """Catches a folder twice as large as it need be, and a file that nobody asks about."""
    named = {question.pictures[0] for question in questions}
    assert named == {str(path) for path in (folder / "pictures").iterdir()}
    lines = (folder / FILE).read_text(encoding="utf-8").splitlines()
    paths = {json.loads(line)["messages"][0]["content"][0]["image"] for line in lines}
    assert all(not Path(path).is_absolute() for path in paths)
