"""What is sent, and when: texts, pictures, shares and arrivals."""

from __future__ import annotations

import base64
import io
import json
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from glimt.bench.load.arrivals import arrival_times
from glimt.bench.load.pictures import Size, draw_picture, find_pictures, parse_size
from glimt.bench.load.texts import text_of_length, words
from glimt.bench.load.workload import Workload, is_text_only
from glimt.errors import ConfigError
from glimt.loader import read_folder


def workload(**given: Any) -> Workload:
    plain = {
        "model": "m",
        "is_chat": True,
        "input_len": 5,
        "output_len": 3,
        "ignore_eos": True,
        "temperature": 0.0,
        "seed": 1,
    }
    return Workload(**plain | given)


def body_of(work: Workload, number: int) -> dict[str, Any]:
    return json.loads(work.ask(number).body)


def test_a_chat_body_has_what_load_generators_send():
    """Catches a field that servers know by another name."""
    body = body_of(workload(), 0)
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": words(5, "1 text 0")}],
        "max_tokens": 3,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    assert "ignore_eos" not in body_of(workload(ignore_eos=False), 0)


def test_a_completion_body_has_a_prompt():
    """Catches messages sent to an endpoint that takes a text."""
    body = body_of(workload(is_chat=False), 0)
    assert body["prompt"] == words(5, "1 text 0")
    assert "messages" not in body


def test_requests_depend_on_seed_and_number_alone():
    """Catches a run that cannot be repeated, and texts that share a cached beginning."""
    work = workload(image_sizes=(Size(8, 6),))
    assert work.ask(3).body == work.ask(3).body
    bodies = {work.ask(number).body for number in range(-3, 20)}
    assert len(bodies) == 23
    assert workload(seed=2).ask(3).body != workload().ask(3).body


@pytest.mark.parametrize("family", ["glm4v_9b", "visualglm"])
@pytest.mark.parametrize("length", [1, 2, 17, 100])
def test_texts_have_the_wanted_number_of_tokens(folders, family, length):
    """Catches words counted as tokens, and a last word that is one too long."""
    processor = read_folder(folders[family]).processor
    assert processor is not None

    def count(text: str) -> int:
        return len(processor.tokenizer.encode(text))

    for seed in ("a", "b", "c"):
        text = text_of_length(length, seed, count)
        assert count(text) == length, text
    work = workload(input_len=length, count_tokens=count)
    assert work.ask(0).own_tokens == length


def test_what_no_text_can_reach_is_left_shorter():
    """Catches an endless loop over a tokenizer that counts by twos."""
    text = text_of_length(5, "a", lambda text: 2 * len(text.split()))
    assert len(text.split()) == 2


# --- pictures --------------------------------------------------------------------------------


def opened(url: str) -> Image.Image:
    header, _, text = url.partition(",")
    assert header.startswith("data:image/")
    return Image.open(io.BytesIO(base64.b64decode(text)))


def urls(work: Workload, number: int) -> list[str]:
    content = body_of(work, number)["messages"][0]["content"]
    parts = [part for part in content if isinstance(part, dict) and part["type"] == "image_url"]
    return [part["image_url"]["url"] for part in parts]


def test_sizes_are_taken_by_turns():
    """Catches pictures that are all of the first size, and height for width."""
    work = workload(image_sizes=(Size(8, 6), Size(10, 20)), images_per_request=3)
    sizes = [opened(url).size for number in range(2) for url in urls(work, number)]
    assert sizes == [(8, 6), (10, 20), (8, 6), (10, 20), (8, 6), (10, 20)]


def test_drawn_pictures_all_differ():
    """Catches a feature cache that is measured in the place of the tower."""
    work = workload(image_sizes=(Size(40, 40),), images_per_request=2)
    pixels = {opened(url).tobytes() for number in range(10) for url in urls(work, number)}
    assert len(pixels) == 20
    assert draw_picture(Size(1, 1), "s")


def test_own_pictures_are_sent_byte_for_byte(tmp_path):
    """Catches pictures that are compressed again, and a type that does not fit."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "b.png")
    Image.new("RGB", (5, 4), "blue").save(tmp_path / "a.JPG", "JPEG")
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    work = workload(image_files=find_pictures(tmp_path))
    assert [urls(work, n)[0].partition(",")[0] for n in range(3)] == [
        "data:image/jpeg;base64",
        "data:image/png;base64",
        "data:image/jpeg;base64",
    ]
    sent = base64.b64decode(urls(work, 1)[0].partition(",")[2])
    assert sent == (tmp_path / "b.png").read_bytes()


def test_a_folder_without_pictures_is_refused(tmp_path):
    """Catches a run that shows nothing and does not say so."""
    with pytest.raises(ConfigError, match="holds no"):
        find_pictures(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        find_pictures(tmp_path / "nowhere")
    lost = workload(image_files=(tmp_path / "lost.png",))
    with pytest.raises(ConfigError, match="cannot be read"):
        lost.ask(0)


@pytest.mark.parametrize(
    "text", ["", "12", "x", "3x", "0x4", "4x0", "-1x4", "1.5x2", "99999x99999"]
)
def test_a_size_that_is_none_is_refused(text):
    """Catches a picture without pixels, or of a hundred gigabytes."""
    with pytest.raises(ConfigError, match="image_size"):
        parse_size(text)


def test_a_size_is_width_by_height():
    """Catches them the other way round."""
    assert parse_size("1120X560") == Size(1120, 560)
    assert str(Size(3, 4)) == "3x4"


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 0), (0.25, 25), (0.1, 10), (0.5, 50), (1.0, 100)]
)
def test_the_share_without_pictures_is_exact(share, count):
    """Catches a share by chance, or one that rounding eats."""
    is_text = [is_text_only(number, share) for number in range(100)]
    assert sum(is_text) == count
    assert all(sum(is_text[:n]) == pytest.approx(n * share, abs=1) for n in range(100))


# --- arrivals --------------------------------------------------------------------------------


def test_arrivals_come_from_the_seed_at_the_wanted_rate():
    """Catches a rate that is off, and a run that cannot be repeated."""
    times = list(islice(arrival_times(5.0, 1.0, seed=3), 4000))
    assert times == list(islice(arrival_times(5.0, 1.0, seed=3), 4000))
    assert times != list(islice(arrival_times(5.0, 1.0, seed=4), 4000))
    assert times[-1] == pytest.approx(800, rel=0.05)
    assert all(later > earlier for earlier, later in pairwise(times))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_is_the_gaps_squared_mean_over_variance(burstiness):
    """Catches bursts that spread requests out, the wrong way round, or change how many come."""
    times = list(islice(arrival_times(2.0, burstiness, seed=0), 20_000))
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.5, rel=0.05)
    assert mean**2 / variance == pytest.approx(burstiness, rel=0.1)


def test_settings_are_told_with_their_unit():
    """Catches words that pass for tokens in a report."""
    assert workload().as_dict()["input_len_unit"] == "words"
    assert workload(count_tokens=len).as_dict()["input_len_unit"] == "tokens"
    assert Path("x") not in workload().as_dict().values()
