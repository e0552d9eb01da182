"""judge: figures from cosines that are known, and what happens to pictures that are not there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from glimt.evaluate.clip_tokenizer import Tokens
from glimt.evaluate.judge import PREFIX, Judgement, judge
from glimt.evaluate.judge_files import Answered
from glimt.evaluate.judge_words import Told, labels_of, line_result, remarks, winner_text

COSINES = {"good": 0.4, "bad": -0.2, PREFIX + "good": 0.3, PREFIX + "bad": 0.1}


class FakeClip:
    """Every picture is (1, 0); a text stands at the angle whose cosine is in COSINES."""

    def encode(self, text: str) -> Tokens:
        self.texts = [*getattr(self, "texts", []), text]
        return Tokens((len(self.texts) - 1,), is_cut=len(text) > 50)

    def embed_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        assert all(picture.mode == "RGB" for picture in pictures)
        return torch.tensor([[1.0, 0.0]] * len(pictures))

    def embed_tokens(self, tokens: Sequence[Tokens]) -> Tensor:
        cosines = [COSINES.get(self.texts[each.ids[0]], 0.0) for each in tokens]
        return torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines])


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.new("L", (8, 8)).save(path)
    return paths


def judged(paths: Sequence[Path], *answers: Sequence[str], **options: Any) -> Judgement:
    rows = zip(paths, zip(*answers, strict=True), strict=True)
    asked = [Answered(path.name, path, each) for path, each in rows]
    settings = {"clip": FakeClip(), "captions": None, "batch": 2, "seed": 0}
    return judge(asked, **settings | options)


def figures(found: Judgement, name: str, file: int = 0) -> list[float]:
    return found.verdicts[file].figures[name].tolist()


def test_the_three_forms_of_the_cosine(pictures):
    """Catches the prefix in the wrong form, a factor of the wrong one, and a mean that is clipped
    before it is taken.
    """
    found = judged(pictures, ["good", "bad", "good"])
    assert figures(found, "cosine") == pytest.approx([0.4, -0.2, 0.4])
    assert figures(found, "clip_score") == pytest.approx([0.75, 0.25, 0.75])
    assert figures(found, "clip_score_100") == pytest.approx([40, 0, 40])
    assert found.verdicts[0].mean("cosine") == pytest.approx(0.2)
    assert [each.name for each in found.figures] == ["cosine", "clip_score", "clip_score_100"]


def test_ref_clip_score_is_the_harmonic_mean_with_the_nearest_caption(pictures):
    """Catches the mean over the captions, the cosine without its factor, a missing prefix."""
    captions = {"a.png": ("bad", "good"), "b.png": ("bad",)}
    found = judged(pictures, ["good", "good", "good"], captions=captions)
    near = 0.3 * 0.1 + math.sqrt(1 - 0.09) * math.sqrt(1 - 0.01)
    ours = figures(found, "ref_clip_score")
    assert ours[0] == pytest.approx(2 * 0.75 / 1.75)
    assert ours[1] == pytest.approx(2 * 0.75 * near / (0.75 + near))
    assert math.isnan(ours[2])
    assert math.isnan(figures(found, "cider_d")[2])
    assert found.num_captioned == 2
    assert found.verdicts[0].mean("exact_match") == 0.5


def test_captions_alone_need_no_picture(tmp_path):
    """Catches a CLIP, or a picture file, that is needed for a text's comparison."""
    captions = {"a.png": ("a red cat",), "b.png": ("two dogs",)}
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    found = judged(paths, ["A red cat.", "no"], captions=captions, clip=None)
    assert figures(found, "exact_match") == [1, 0]
    assert found.verdicts[0].num_cut is None
    assert [each.name for each in found.figures] == ["cider_d", "rouge_l", "exact_match"]


def test_a_picture_that_cannot_be_read_is_left_out_of_both(pictures):
    """Catches answers that slip by one place after a bad picture."""
    pictures[1].write_bytes(b"no picture")
    done: list[int] = []
    answers = (["good", "bad", "bad"], ["bad", "good", "good"])
    found = judged(pictures, *answers, on_done=done.append)
    assert [each.key for each in found.pictures] == ["a.png", "c.png"]
    assert figures(found, "cosine") == pytest.approx([0.4, -0.2])
    assert figures(found, "cosine", 1) == pytest.approx([-0.2, 0.4])
    assert [name for name, _ in found.failed] == ["b.png"]
    assert "is no JPEG" in found.failed[0][1]
    assert done == [2, 1]


def test_without_any_picture_there_is_nothing(tmp_path):
    """Catches a mean of an empty list."""
    found = judged([tmp_path / "gone.png"], ["good"])
    assert (found.pictures, found.verdicts, found.figures) == ((), (), [])


# --- in words --------------------------------------------------------------------------------


def many(pictures: Sequence[Path], count: int, *answers: str) -> Told:
    paths = [pictures[0]] * count
    return Told(("a", "b"), judged(paths, *([answer] * count for answer in answers)))


def test_the_winner_is_named(pictures):
    """Catches the loser's name, and a winner where there is none."""
    assert many(pictures, 10, "bad", "good").winner == "b"
    assert winner_text(many(pictures, 10, "good", "bad")).startswith("Winner by mean cosine: a,")
    same = many(pictures, 12, "good", "good")
    assert same.winner is None
    assert winner_text(same).endswith("no difference that 12 pictures show.")
    assert "too few" in winner_text(many(pictures, 3, "bad", "good"))


def test_the_pass_line_needs_a_hundred_pictures(pictures):
    """Catches a pass over a handful of pictures."""
    compared = [many(pictures, n, "good", "good").found.comparisons["cosine"] for n in (99, 100)]
    assert [line_result(each) for each in compared] == ["too few pictures", "passed"]
    failed = many(pictures, 100, "good", "bad").found.comparisons["cosine"]
    assert line_result(failed) == "failed"


def test_what_limits_the_figures_is_told(pictures):
    """Catches tails that nobody judged and nobody heard of."""
    found = judged(
        pictures, ["good", " ", "x" * 60], ["good", "y", "z"], captions={"a.png": ("a",)}
    )
    said = "\n".join(remarks(Told(("A", "B"), found)))
    assert "A: 1 of 3 answers are longer than CLIP's context" in said
    assert "A: 1 of 3 answers are empty" in said
    assert "B:" not in said
    assert "1 of 3 pictures have captions" in said
    assert "same text in both files: 33.3%" in said


def test_labels_tell_files_apart():
    """Catches two columns of the same name."""
    assert labels_of(["x/a.json", "x/b.json"]) == ("a.json", "b.json")
    assert labels_of(["x/p.json", "y/p.json"]) == ("x/p.json", "y/p.json")
    assert labels_of(["p.json", "p.json"]) == ("1: p.json", "2: p.json")
