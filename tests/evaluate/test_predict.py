"""predict: answers, bad pictures, and how many are in the engine at a time."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.engine import Engine
from glimt.errors import ConfigError, RequestError
from glimt.evaluate.pictures import card, list_pictures, thumbnail
from glimt.evaluate.predict import Asking, predict
from glimt.evaluate.predict_report import Predictions, predict_document
from glimt.evaluate.scenes import scenes
from glimt.llm import LLM
from glimt.reports.document import Cards, Table
from glimt.types import SamplingParams

ASKING = Asking("什么？", SamplingParams(temperature=0, max_tokens=4))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_noise_model(path, request.param)
    return path


@pytest.fixture
def engine(model: Path) -> Engine:
    return Engine.load(EngineConfig(model=str(model), num_blocks=64, max_num_seqs=2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate(("e.png", "a.jpg", "c.png", "b.png", "d.png")):
        Image.new("RGB", (16, 16), (50 * i, 90, 200 - 30 * i)).save(tmp_path / name)
    return tmp_path


def test_answers_are_those_of_each_picture_alone(engine, model, folder):
    """Catches answers that get another picture's name."""
    pictures = list_pictures(str(folder)).pictures
    found = {each.picture: each for each in predict(engine, pictures, ASKING, 2)}
    assert sorted(found) == list(pictures)
    llm = LLM(str(model), num_blocks=64)
    for picture in pictures:
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": ASKING.prompt}]
        alone = llm.chat([{"role": "user", "content": parts}], ASKING.sampling)
        assert found[picture].answer == alone.text
        assert found[picture].num_tokens == alone.usage.completion_tokens
        assert found[picture].is_cut == (alone.finish_reason == "length")


def test_one_bad_picture_stops_nothing(engine, folder):
    """Catches a run of hours that ends at one damaged file."""
    (folder / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    pictures = [*list_pictures(str(folder)).pictures, str(folder / "gone.png")]
    found = {Path(each.picture).name: each for each in predict(engine, pictures, ASKING, 2)}
    assert {name for name, each in found.items() if each.answer is None} == {"b.png", "gone.png"}
    assert "cannot be read as a picture" in str(found["b.png"].error)
    assert found["e.png"].answer is not None
    assert not engine.has_work


def test_no_more_than_a_batch_is_read_ahead(engine, folder):
    """Catches a folder of thousands of pictures that is read into memory at once."""
    taken: list[str] = []

    def watched():
        for picture in list_pictures(str(folder)).pictures:
            taken.append(picture)
            yield picture

    for num_done, _ in enumerate(predict(engine, watched(), ASKING, 2)):
        assert len(taken) <= num_done + 3
    assert len(taken) == 5


def test_leaving_early_leaves_nothing_in_the_engine(engine, folder):
    """Catches requests that go on after Ctrl-C and hold their blocks."""
    running = predict(engine, [str(folder / "a.jpg"), str(folder / "gone.png")], ASKING, 2)
    assert next(running).answer is None
    assert engine.has_work
    running.close()
    assert not engine.has_work


def test_what_suits_no_picture_is_an_error(engine, folder):
    """Catches a thousand warnings in the place of one error."""
    long = replace(ASKING, sampling=SamplingParams(temperature=0, max_tokens=10**6))
    with pytest.raises(RequestError):
        list(predict(engine, list_pictures(str(folder)).pictures, long, 2))


# --- folders and pictures --------------------------------------------------------------------


def test_pictures_are_told_from_other_files(folder):
    """Catches a note or a folder that is asked about, and a damaged picture that is not."""
    (folder / "notes.txt").write_text("x")
    (folder / "broken.JPG").write_bytes(b"")
    (folder / "deep.png").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "nameless", "PNG")
    found = list_pictures(f"{folder}/")
    names = [picture.removeprefix(f"{folder}/") for picture in found.pictures]
    assert names == ["a.jpg", "b.png", "broken.JPG", "c.png", "d.png", "e.png", "nameless"]
    assert found.others == ("deep.png", "notes.txt")


def test_folders_without_pictures_are_told(tmp_path):
    """Catches an empty file of predictions for a mistyped folder."""
    with pytest.raises(ConfigError, match="holds no picture"):
        list_pictures(str(tmp_path))
    with pytest.raises(ConfigError, match="No such file"):
        list_pictures(str(tmp_path / "nowhere"))


def test_thumbnails_are_small_jpegs(tmp_path):
    """Catches whole pictures in a report, and a palette that JPEG does not have."""
    made = thumbnail(Image.new("P", (1000, 400)))
    with Image.open(io.BytesIO(made)) as small:
        assert (small.format, small.size) == ("JPEG", (320, 128))
    assert card("gone", tmp_path / "gone.png", [("a", "b")]) is None


def test_scenes_are_three_different_pictures():
    """Catches one drawing under three names, which the feature cache would make instant."""
    drawn = scenes()
    assert len({scene.picture.tobytes() for scene in drawn}) == 3
    assert len({scene.name for scene in drawn}) == 3
    assert all(scene.question for scene in drawn)


# --- the report ------------------------------------------------------------------------------


def test_the_report_shows_answers_and_failures(engine, folder):
    """Catches a report that says nothing of what failed."""
    pictures = [*list_pictures(str(folder)).pictures, "gone.png"]
    done = tuple(predict(engine, pictures, ASKING, 2))
    document = predict_document(Predictions("什么？", done, 4, (), 2.0, 2), {"model": "m"})
    assert document.status == "Errors: 1 of 6 pictures failed; 4 had an answer already"
    assert not document.is_whole
    cards = next(each for each in document.sections if isinstance(each, Cards))
    assert [each.name for each in cards.cards] == pictures[:5]
    answers = {each.picture: each.answer or "(empty)" for each in done}
    assert [each.lines for each in cards.cards] == [(("answer", answers[p]),) for p in pictures[:5]]
    tables = [each for each in document.sections if isinstance(each, Table)]
    assert ("pictures per second", "2.50") in tables[0].rows
    assert tables[-1].rows[0][0] == "gone.png"
