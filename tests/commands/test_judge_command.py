"""`glimt judge`: the table, JSON, CSV, report, and what is refused."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.oracles import clip_oracle as oracle
from typer.testing import CliRunner, Result

from glimt.cli import app

NUM = 12


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    oracle.write_hub_folder(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: pictures, two predictions files, captions of all but one."""
    random = np.random.default_rng(0)
    (tmp_path / "pics").mkdir()
    names = [f"{i:02}.png" for i in range(NUM)]
    for name in names:
        pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pics" / name)
    first = {f"pics/{name}": f"the cat {i}" for i, name in enumerate(names)}
    second = {f"/gpu/{name}": "a red dog on " * 30 for name in names}
    texts = {name: [f"the cat {i}", "a dog"] for i, name in enumerate(names)}
    rows = [{"file": f"x/{name}", "captions": texts[name]} for name in names]
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(json.dumps(first), encoding="utf-8")
    Path("b.json").write_text(json.dumps(second), encoding="utf-8")
    lines = "\n".join(json.dumps(row) for row in rows[1:])
    Path("captions.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["judge", *map(str, arguments)])


def said(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_mean_is_that_of_the_librarys_own_similarities(hub, folder):
    """Catches answers and pictures that are paired wrongly on the way through the command."""
    from glimt.evaluate.clip import load_clip
    from glimt.evaluate.pictures import read_rgb

    found = said("--predictions", "a.json", "--weights", hub, "--batch", "5")
    clip = load_clip(hub, None, None)
    answers = json.loads(Path("a.json").read_text(encoding="utf-8"))
    cosines = [
        float(clip.embed_pictures([read_rgb(key)]) @ clip.embed_tokens([clip.encode(text)]).T)
        for key, text in answers.items()
    ]
    assert found["figures"]["cosine"]["means"] == [pytest.approx(np.mean(cosines), abs=1e-5)]
    assert found["figures"]["cosine"]["variant"].startswith("MindIE")
    assert (found["pictures"], found["judge"], found["winner"]) == (NUM, hub.name, None)


def test_two_files_are_ranked_with_an_interval(hub, folder):
    """Catches a comparison of all pictures' means in the place of each picture's difference."""
    files = ("--predictions", "a.json", "--predictions", "b.json", "--images", "pics")
    found = said(*files, "--weights", hub, "--captions", "captions.jsonl", "--seed", "1")
    cosine = found["figures"]["cosine"]
    first, second = cosine["means"]
    apart = cosine["difference"]
    assert apart["mean_difference"] == pytest.approx(second - first)
    assert apart["low"] < apart["mean_difference"] < apart["high"]
    assert apart["num_pictures"] == NUM
    assert found["winner"] in (None, "a.json", "b.json")
    assert found["pass_line"] == "too few pictures"
    assert (found["cut"], found["empty"], found["captioned"]) == ([0, NUM], [0, 0], NUM - 1)
    assert found["figures"]["exact_match"]["means"] == [1, 0]
    assert found["figures"]["exact_match"]["difference"]["num_pictures"] == NUM - 1
    assert found["bleu"][0]["bleu_1"] == 1
    again = said("--predictions", "a.json", "b.json", *files[4:], "--weights", hub, "--seed", "1")
    assert again["figures"]["cosine"] == cosine


def test_the_table_labels_every_figure(hub, folder):
    """Catches a figure without its variant, which nobody can compare with another's."""
    files = ("--predictions", "a.json", "b.json", "--images", "pics")
    result = run(*files, "--weights", hub, "--captions", "captions.jsonl")
    assert result.exit_code == 0, result.stderr
    shown = " ".join(re.findall(r"[\w.'(),*+-]+", result.stdout))
    for label in ("mean cosine", "CLIPScore", "CLIP score x100", "RefCLIPScore", "CIDEr-D"):
        assert label in shown
    assert f"judged by {hub.name}" in shown
    assert "b.json minus a.json" in shown
    assert "Pass line" in shown
    assert "b.json: 12 of 12 answers are longer than CLIP's context" in result.stderr


def test_open_clip_weights_are_judged_with(folder):
    """Catches options that do not reach the loader."""
    torch.save(oracle.random_state(), "open_clip_pytorch_model.bin")
    oracle.write_vocabulary(Path("bpe.txt.gz"))
    Path("small.json").write_text(json.dumps(oracle.config_json()), encoding="utf-8")
    options = ("--weights", "open_clip_pytorch_model.bin", "--tokenizer", "bpe.txt.gz")
    found = said("--predictions", "a.json", *options, "--architecture", "small.json")
    assert found["judge"] == "open_clip small.json (open_clip_pytorch_model.bin)"


def test_captions_alone_judge_without_pictures(folder, tmp_path):
    """Catches a CLIP that is asked for where none is needed."""
    found = said("--predictions", "a.json", "b.json", "--captions", "captions.jsonl")
    assert found["judge"] is None
    assert found["ranked_by"] == "cider_d"
    assert found["winner"] == "a.json"
    assert found["pass_line"] is None
    assert found["cut"] == [None, None]


def test_what_cannot_be_judged_is_told_and_counted(hub, folder):
    """Catches one missing picture that ends the run, and one that nobody hears of."""
    answers = json.loads(Path("a.json").read_text(encoding="utf-8"))
    answers |= {"pics/gone.png": "x", "pics/00.png": 5}
    (folder / "pics" / "01.png").write_bytes(b"no picture")
    Path("a.json").write_text(json.dumps(answers), encoding="utf-8")
    result = run("--predictions", "a.json", "--weights", hub, "--json", "--report", "out")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["pictures"] == NUM - 2
    failed = {each["picture"] for each in found["failed"]}
    assert failed == {"pics/gone.png", "pics/00.png", "pics/01.png"}
    assert result.stderr.count("is not judged: ") == 3
    page = Path("out/judge.html").read_text(encoding="utf-8")
    assert "Errors: 3 answers were not judged, 10 were" in page


def test_csv_has_a_row_for_each_picture(hub, folder):
    """Catches figures under another file's heading."""
    files = ("--predictions", "a.json", "b.json", "--images", "pics")
    found = said(*files, "--weights", hub, "--csv", "deep/er/j.csv")
    with Path("deep/er/j.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == NUM
    assert rows[3]["answer_1"] == "the cat 3"
    for i, mean in enumerate(found["figures"]["clip_score"]["means"], 1):
        assert np.mean([float(row[f"clip_score_{i}"]) for row in rows]) == pytest.approx(mean)


@pytest.mark.parametrize("read", ["a.json", "b.json", "captions.jsonl", "tokenizer.gz"])
def test_csv_is_never_written_over_what_is_read(hub, folder, read):
    """Catches a typo that costs predictions which took hours, by whichever name it names them."""
    Path("tokenizer.gz").write_bytes(b"not read before the check")
    Path("link.csv").symlink_to(read)
    content = Path(read).read_bytes()
    given = ["--predictions", "a.json", "b.json", "--captions", "captions.jsonl"]
    given += ["--weights", str(hub), "--tokenizer", "tokenizer.gz"]
    for name in (read, f"pics/../{read}", "link.csv"):
        result = run(*given, "--csv", name, "--json")
        assert result.exit_code == 2
        told = json.loads(result.stdout)["error"]["message"]
        assert f"csv: {name} would be written over {read}, which is read; name another" in told
    assert Path(read).read_bytes() == content
    assert Path("link.csv").is_symlink()


def test_the_report_shows_both_answers_and_largest_differences_first(hub, folder):
    """Catches a report that hides where the two differ."""
    files = ("--predictions", "a.json", "b.json", "--images", "pics", "--csv", "j.csv")
    assert run(*files, "--weights", hub, "--report", "out").exit_code == 0
    page = Path("out/judge.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == NUM
    assert "Whole run: 12 pictures judged." in page
    assert "judge digest" in page
    with Path("j.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    apart = {row["picture"]: abs(float(row["cosine_2"]) - float(row["cosine_1"])) for row in rows}
    shown = re.findall(r'<div class="name">([^<]+)</div>', page)
    assert shown == sorted(apart, key=lambda key: -apart[key])
    for name in ("cosine", "clip_score"):
        assert Path(f"out/judge_{name}.png").read_bytes().startswith(b"\x89PNG")


A = ("--predictions", "a.json")
BAD = [
    ((*A,), "give --weights (a CLIP), --captions"),
    ((*A, "--weights", "nowhere"), "weights: nowhere does not exist"),
    ((*A, "--weights", "a.json", "--tokenizer", "x.gz"), "could run code"),
    ((*A, "--weights", "a.json"), "tokenizer: is needed"),
    ((*A, "--weights", "pics"), "config.json is missing"),
    ((*A, "--captions", "captions.jsonl", "--tokenizer", "x"), "tokenizer belongs to --weights"),
    ((*A, "--captions", "nowhere"), "captions: nowhere cannot be read"),
    (
        (*A, "--captions", "captions.jsonl", "--images", "nowhere"),
        "nowhere is not a folder",
    ),
    ((*A, "--captions", "captions.jsonl", "--batch", "0"), "batch is 0"),
    ((*A, "--captions", "captions.jsonl", "--csv", "pics"), "csv: pics is a folder"),
    ((*A, "--captions", "captions.jsonl", "--report", "a.json"), "report: a.json cannot be made"),
    ((*A, *A, *A, "--captions", "captions.jsonl"), "predictions: 3 files are given"),
    ((*A, "nowhere.json", "--captions", "captions.jsonl"), "nowhere.json does not exist"),
    ((*A, "b.json", "--captions", "captions.jsonl", "--seed", "-1"), "seed is -1"),
    ((*A, "--captions", "others.jsonl"), "has captions of none of 12 pictures"),
    (("--predictions", "gone.json", "--weights", "HUB"), "none of 1 pictures can be read"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_options_are_refused_in_words_and_in_json(hub, folder, arguments, message):
    """Catches a traceback, and a script that finds nothing on stdout."""
    Path("others.jsonl").write_text('{"file": "z.png", "captions": ["z"]}', encoding="utf-8")
    Path("gone.json").write_text('{"pics/z.png": "z"}', encoding="utf-8")
    given = [str(hub) if each == "HUB" else each for each in arguments]
    result = run(*given, "--json")
    assert result.exit_code == 2
    assert message in json.loads(result.stdout)["error"]["message"]
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr
