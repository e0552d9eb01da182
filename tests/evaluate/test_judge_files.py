"""Predictions files -> pictures: where each key's picture is, and what cannot be judged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glimt.errors import ConfigError
from glimt.evaluate.judge_files import locate, read_pairs


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pics/ and other/ with empty files; the working folder is theirs."""
    for name in ("pics/a.jpg", "pics/b.jpg", "pics/sub/c.jpg", "other/a.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("key", "images", "found"),
    [
        ("a.jpg", "pics", "pics/a.jpg"),
        ("sub/c.jpg", "pics", "pics/sub/c.jpg"),
        ("{}/other/a.jpg", "pics", "other/a.jpg"),
        ("pics/a.jpg", "pics", "pics/a.jpg"),
        ("./pics/a.jpg", "pics/", "pics/a.jpg"),
        ("/data/coco/b.jpg", "pics", "pics/b.jpg"),
        ("elsewhere/b.jpg", "pics", "pics/b.jpg"),
        ("gone.jpg", "pics", "pics/gone.jpg"),
        ("pics/a.jpg", None, "pics/a.jpg"),
    ],
)
def test_where_a_picture_is(folder, key, images, found):
    """Catches a key that is joined with a folder that it already begins with, and an absolute
    path of another machine.
    """
    assert locate(key.format(folder), images) == str(folder / found)


def test_without_a_file_a_key_goes_by_its_name(folder):
    """Catches captions that cannot be compared where the pictures are not."""
    assert locate("/data/coco/x.jpg", None) == "x.jpg"


def write(path: Path, answers: object) -> Path:
    path.write_text(json.dumps(answers), encoding="utf-8")
    return path


def test_two_files_are_paired_by_picture(folder):
    """Catches files of two machines that have no key in common."""
    first = write(folder / "1.json", {"pics/a.jpg": "one", "pics/b.jpg": "two", "pics/x.jpg": "-"})
    second = write(folder / "2.json", {"/d/b.jpg": "zwei", "/d/a.jpg": "eins"})
    paired = read_pairs([first, second], "pics")
    assert [(p.key, p.answers) for p in paired.pictures] == [
        ("pics/a.jpg", ("one", "eins")),
        ("pics/b.jpg", ("two", "zwei")),
    ]
    assert paired.only_in == (1, 0)
    assert paired.pictures[0].name == "a.jpg"


def test_by_name_the_folders_do_not_matter(folder):
    """Catches one file whose pictures are here and another whose are not."""
    first = write(folder / "1.json", {"pics/a.jpg": "one"})
    second = write(folder / "2.json", {"/gone/a.jpg": "eins", "/gone/deep/a.jpg": "noch"})
    paired = read_pairs([first, second], None, by_name=True)
    assert [picture.answers for picture in paired.pictures] == [("one", "eins")]
    assert [key for key, _ in paired.refused] == ["/gone/deep/a.jpg"]


def test_what_is_no_text_and_what_is_there_twice_is_refused(folder):
    """Catches a number that is judged as text, and a picture that counts twice."""
    answers = {"a.jpg": 7, "b.jpg": "two", "pics/b.jpg": "again", "sub/c.jpg": None}
    paired = read_pairs([write(folder / "1.json", answers)], "pics")
    assert [picture.key for picture in paired.pictures] == ["b.jpg"]
    assert dict(paired.refused) == {
        "a.jpg": "its answer is a int, not a text",
        "pics/b.jpg": "is the same picture as b.jpg",
        "sub/c.jpg": "its answer is a NoneType, not a text",
    }


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (['{"a.jpg": "x"}', '{"b.jpg": "x"}'], "no picture in common"),
        (['{"a.jpg": 1}'], "no answer that is a text"),
        (["{}"], "no answer that is a text"),
        (["[]"], "holds a list"),
        (["{"], "is not JSON"),
    ],
)
def test_files_without_anything_to_judge_are_told(folder, texts, said):
    """Catches a mean of nothing."""
    files = []
    for i, text in enumerate(texts):
        files.append(folder / f"{i}.json")
        files[-1].write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_pairs(files, "pics")


def test_a_missing_file_is_told(folder):
    """Catches a mistyped name that is an empty file."""
    with pytest.raises(ConfigError, match="does not exist; glimt predict writes"):
        read_pairs([folder / "nowhere.json"], None)
