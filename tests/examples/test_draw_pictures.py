"""The example pictures are what their script draws, and are asked about in the taught words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training.data import garments, texts
from training.data.sample import Language
from training.data.scene import Scene
from training.data.scene_questions import KINDS, ask
from training.data.scenes import _are_apart

from examples import draw_pictures

FOLDER = Path(draw_pictures.__file__).parent
ROWS: list[dict[str, Any]] = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
MOST_BYTES = 15_000
ENCODERS_DIFFER = 2.0  # grey levels on average: releases of FreeType draw edges differently


@pytest.fixture(scope="module")
def data(fashion: Path, font: Path) -> None:
    """Garments and texts are drawn here, so what they are made of is needed."""


def test_the_files_are_what_the_script_writes(data, tmp_path):
    """Catches a picture changed by hand, or a script that changed without its pictures."""
    draw_pictures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {path.name for path in FOLDER.iterdir() if path.suffix in (".png", ".json")}
    assert json.loads((tmp_path / "questions.json").read_text(encoding="utf-8")) == ROWS
    for path in tmp_path.glob("*.png"):
        ours, theirs = (
            np.asarray(Image.open(file).convert("RGB"), dtype=float)
            for file in (path, FOLDER / path.name)
        )
        assert ours.shape == theirs.shape
        assert abs(ours - theirs).mean() < ENCODERS_DIFFER, path.name


def test_there_are_small_pictures_of_every_kind():
    """Catches a demo that lost a kind of picture, or one that makes the checkout heavy."""
    names = {row["picture"].removesuffix(".png") for row in ROWS}
    kinds = draw_pictures.SCENES, draw_pictures.TEXTS, draw_pictures.GARMENTS
    for kind, least in zip(kinds, (3, 2, 3), strict=True):
        assert len(names & set(kind)) >= least
    assert len(names) >= 8
    for path in FOLDER.glob("*.png"):
        assert path.stat().st_size < MOST_BYTES, path.name


@pytest.mark.parametrize("language", ["zh", "en"])
@pytest.mark.parametrize("name", draw_pictures.SCENES)
def test_scenes_are_asked_what_training_asks_and_answers(name, language):
    """Catches a question in words that were never taught, and a wrong answer."""
    asked = {row["picture"]: row[language] for row in ROWS}[f"{name}.png"]
    assert (asked["question"], asked["answer"]) in taught(draw_pictures.SCENES[name], language)


def taught(scene: Scene, language: Language) -> set[tuple[str, str]]:
    """Whatever training may ask about a scene, and the answers."""
    rng = random.Random(0)
    return {
        (exchange.question, exchange.answer)
        for _ in range(2000)
        for exchange in ask(scene, rng, language, 6, tuple(KINDS), 0)
    }


def test_scenes_are_as_training_draws_them():
    """Catches objects that touch, or of a size between large and small."""
    for scene in draw_pictures.SCENES.values():
        for number, thing in enumerate(scene.objects):
            assert thing.diameter in ((draw_pictures.SMALL, draw_pictures.LARGE)[thing.is_large],)
            for other in scene.objects[:number]:
                assert _are_apart(thing, other, scene.width, scene.height)


@pytest.mark.parametrize(("language", "number"), [("zh", 0), ("en", 1)])
def test_texts_and_garments_are_asked_in_taught_words(language, number):
    """Catches a question or an answer that no training sample has."""
    rows = {row["picture"].removesuffix(".png"): row[language] for row in ROWS}
    for name, text in draw_pictures.TEXTS.items():
        assert rows[name]["question"] in getattr(texts.QUESTIONS, language)
        assert rows[name]["answer"] == texts.ANSWER[number].format(text)
        assert len(text) < 3 or texts.is_held_out(text)
        assert set(text) <= set(texts.CHARACTERS)
    for name in draw_pictures.GARMENTS:
        assert rows[name]["question"] in getattr(garments.QUESTIONS, language)
        answers = [garments.answer_of(label, language) for label in range(10)]
        assert rows[name]["answer"] in answers
