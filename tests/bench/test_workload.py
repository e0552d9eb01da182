"""Workload: prompts of an exact length and pictures that nobody has seen, from a seed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from glimt.bench.workload import RANDOM, Workload, single_token_pieces
from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.errors import ConfigError, ImageError
from glimt.loader import BUILT_IN


@pytest.fixture(scope="module", params=BUILT_IN)
def engine(request: pytest.FixtureRequest) -> Engine:
    """The demo models: their tokenizers merge, as real ones do."""
    return Engine.load(EngineConfig(model=request.param, num_blocks=96))


def num_text(workload: Workload, num_tokens: int) -> int:
    request = workload.request(num_tokens, 3)
    return len(request.prompt.token_ids) - sum(span.length for span in request.prompt.spans)


@pytest.mark.parametrize("image", [None, RANDOM])
@pytest.mark.parametrize("num_tokens", [32, 33, 64, 257])
def test_a_prompt_has_exactly_as_many_tokens(engine, image, num_tokens):
    """Catches a length that is off by the template, or by pieces that merge where they meet."""
    assert num_text(Workload(engine, 7, image), num_tokens) == num_tokens


def test_the_least_length_can_be_made_and_one_less_is_refused(engine):
    """Catches a prompt that is silently longer than asked for, and an error without the number."""
    workload = Workload(engine, 0)
    least = workload.least_tokens
    assert num_text(workload, least) == least
    with pytest.raises(
        ConfigError, match=rf"input: is {least - 1}, .* take {least}; ask for {least}"
    ):
        workload.text(least - 1)


def test_the_answer_has_exactly_the_length_asked_for(engine):
    """Catches a run that a stop id shortens."""
    request = Workload(engine, 0).request(32, 5)
    assert request.max_tokens == 5
    assert request.stop_token_ids == frozenset()


def test_the_same_seed_and_name_ask_the_same_whatever_was_asked_before(engine):
    """Catches rows after a stop that ask something else than they would have without."""
    one, other = Workload(engine, 3, RANDOM), Workload(engine, 3, RANDOM)
    one.request(40, 2)
    one.begin("row 5")
    other.begin("row 5")
    first, second = one.request(32, 2), other.request(32, 2)
    assert first.prompt.token_ids == second.prompt.token_ids
    assert [i.digest for i in first.images] == [i.digest for i in second.images]
    another = Workload(engine, 4, RANDOM)
    another.begin("row 5")
    assert another.request(32, 2).prompt.token_ids != first.prompt.token_ids


def test_no_two_prompts_of_a_batch_are_alike(engine):
    """Catches a batch whose rows a prefix cache could share."""
    workload = Workload(engine, 0)
    prompts = {workload.request(48, 2).prompt.token_ids for _ in range(8)}
    assert len(prompts) == 8


def test_a_picture_file_is_new_each_time_and_nearly_the_same(engine, tmp_path):
    """Catches features that come from a cache, and a picture that is no longer the one named."""
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30), "red").save(path)
    workload = Workload(engine, 0, str(path))
    images = [workload.request(48, 2).images[0] for _ in range(4)]
    assert len({image.digest for image in images}) == 4
    shown = workload.picture()
    changed = ImageChops.difference(shown, Image.open(path)).getbbox()
    assert changed is not None
    assert (changed[2] - changed[0], changed[3] - changed[1]) == (1, 1)


def test_a_file_that_is_no_picture_is_named(engine, tmp_path):
    """Catches a traceback out of Pillow."""
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ImageError, match="image"):
        Workload(engine, 0, str(tmp_path / "a.png"))


class PairsTokenizer:
    """Two letters a token: nothing is one token alone and beside itself two, but double letters."""

    num_ids = 3

    def encode(self, text: str) -> list[int]:
        return list(range(0, len(text), 2))

    def decode(self, token_ids: list[int]) -> str:
        return ["aa", "\n", "\ufffd"][token_ids[0]]


def test_pieces_are_texts_that_stay_one_token_beside_another():
    """Catches blanks, halves of characters, and pieces that merge with their neighbours."""
    assert single_token_pieces(PairsTokenizer(), random.Random(0)) == ["aa"]


def test_an_absent_file_is_told_as_such(engine):
    """Catches a path that is read as base64."""
    with pytest.raises(ImageError, match="No such file"):
        Workload(engine, 0, str(Path("nowhere.png")))
