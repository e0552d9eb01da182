"""`glimt predict`: the file, what is asked again, what is refused, and the drawn pictures."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from glimt.cli import app
from glimt.commands import answer_file
from glimt.commands import predict as command
from glimt.commands.lock import only_run
from glimt.commands.predict_job import sampling_of
from glimt.demo.noise import write_noise_model
from glimt.errors import ConfigError
from glimt.evaluate.predict import Prediction


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glm4v")
    write_noise_model(path, "glm4v_9b")
    return path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with three pictures in pics/."""
    (tmp_path / "pics").mkdir()
    for i, name in enumerate("cab"):
        Image.new("RGB", (16, 16), (80 * i, 40, 200)).save(tmp_path / "pics" / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(model: Path, *arguments: str | Path) -> Result:
    short = ("-m", str(model), "--max-tokens", "4")
    return CliRunner().invoke(app, ["predict", *short, *map(str, arguments)])


def on_pictures(model: Path, *arguments: str | Path) -> Result:
    return run(model, "--images", "pics", *arguments)


def summary(result: Result) -> dict[str, Any]:
    return json.loads(result.stdout)


def read(name: str = "predict_result.json") -> dict[str, str]:
    return json.loads(Path(name).read_text(encoding="utf-8"))


KEYS = ["pics/a.png", "pics/b.png", "pics/c.png"]


def test_the_file_is_flat_sorted_and_named_as_the_originals(model, folder):
    """Catches a form that other programs do not read, and escaped Chinese."""
    result = on_pictures(model)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "predict_result.json: Whole run: 3 pictures answered\n"
    assert list(read()) == KEYS
    assert all(isinstance(answer, str) for answer in read().values())
    text = Path("predict_result.json").read_text(encoding="utf-8")
    assert text == json.dumps(read(), ensure_ascii=False, indent=4) + "\n"


def test_keys_begin_with_the_folder_as_it_was_typed(model, folder):
    """Catches a path that is tidied up, so that the judge and the baseline do not find it."""
    run(model, "--images", "./pics/", "--out", "gpu_coco_predict.json")
    assert list(read("gpu_coco_predict.json")) == [f"./{key}" for key in KEYS]


def test_a_second_run_asks_nothing(model, folder, monkeypatch):
    """Catches hours of work done again, and a model that is loaded for nothing."""
    on_pictures(model)
    monkeypatch.setattr(command, "load_engine", None)
    said = summary(on_pictures(model, "--json"))
    assert (said["answered"], said["skipped"], said["failed"]) == (0, 3, [])


def test_a_report_of_nothing_asked_is_not_passed_over_in_silence(model, folder):
    """Catches --report that is taken and leaves no file and no word."""
    on_pictures(model)
    result = on_pictures(model, "--report", "out")
    assert result.exit_code == 0
    assert "no report is written: nothing was asked; --restart" in result.stderr


def test_a_report_that_cannot_be_written_does_not_take_the_answers(model, folder, monkeypatch):
    """Catches an hour's summary that is lost with the report."""

    def full(*given: Any) -> None:
        raise ConfigError("report", ["out cannot be written: No space left on device"])

    monkeypatch.setattr(command, "write_report", full)
    result = run(model, "--json", "--report", "out")
    assert result.exit_code == 2
    assert len(summary(result)["answers"]) == 3


def test_two_runs_do_not_share_a_file(model, folder):
    """Catches a run that writes over the answers of another."""
    with only_run(Path("predict_result.json"), "out"):
        result = on_pictures(model, "--json")
    assert result.exit_code == 2
    assert "predict_result.json is being written by another run" in result.stderr
    assert on_pictures(model).exit_code == 0


def test_new_pictures_are_asked_and_other_answers_stay(model, folder):
    """Catches a merge that loses what another run or program wrote."""
    Path("predict_result.json").write_text('{"elsewhere/z.jpg": "kept"}')
    on_pictures(model)
    Image.new("RGB", (16, 16)).save(folder / "pics" / "d.png")
    said = summary(on_pictures(model, "--json"))
    assert (said["answered"], said["skipped"]) == (1, 3)
    assert list(read()) == ["elsewhere/z.jpg", *KEYS, "pics/d.png"]
    assert read()["elsewhere/z.jpg"] == "kept"


def test_other_settings_are_not_mixed_in(model, folder):
    """Catches a file whose answers belong to two prompts, or to another program."""
    on_pictures(model)
    result = on_pictures(model, "--prompt", "What is this?")
    assert result.exit_code == 2
    assert "prompt was '描述这张图片' and is 'What is this?' now" in result.stderr
    assert "--restart" in result.stderr
    assert on_pictures(model, "--dtype", "bfloat16").exit_code == 2
    Path("predict_result.settings.json").unlink()
    alone = on_pictures(model)
    assert alone.exit_code == 2
    assert "no predict_result.settings.json says how" in alone.stderr


def test_restart_asks_this_folder_anew_and_keeps_others(model, folder):
    """Catches old answers that survive beside new settings, and a file that is emptied."""
    Path("predict_result.json").write_text('{"other/z.jpg": "kept", "pics/a.png": "old"}')
    said = summary(on_pictures(model, "--restart", "--json", "-p", "Hm?"))
    assert (said["answered"], said["skipped"]) == (3, 0)
    assert read()["other/z.jpg"] == "kept"
    assert read()["pics/a.png"] != "old"
    assert on_pictures(model, "-p", "Hm?").exit_code == 0


def test_a_bad_picture_is_told_counted_and_left_out(model, folder):
    """Catches a run that ends at it, an empty answer in its place, and an exit status of 0."""
    (folder / "pics" / "b.png").write_bytes(b"no picture")
    (folder / "pics" / "notes.txt").write_text("x")
    result = on_pictures(model, "--json")
    assert result.exit_code == 1
    said = summary(result)
    assert (said["answered"], said["not_pictures"]) == (2, ["notes.txt"])
    assert [each["picture"] for each in said["failed"]] == ["pics/b.png"]
    assert "is no JPEG" in said["failed"][0]["reason"]
    assert list(read()) == ["pics/a.png", "pics/c.png"]
    assert "pics/b.png has no answer: " in result.stderr
    assert "1 entry is no picture, and skipped: notes.txt" in result.stderr
    again = on_pictures(model)
    assert again.exit_code == 1
    assert "Errors: 1 of 1 pictures failed; 2 had an answer already" in again.stdout


def test_what_is_answered_before_an_interruption_is_kept(model, folder, monkeypatch):
    """Catches answers of an unfinished batch that Ctrl-C throws away."""

    def interrupted(engine, pictures, asking, batch):
        yield Prediction(pictures[0], "first")
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "predict", interrupted)
    assert on_pictures(model).exit_code == 130
    assert read() == {"pics/a.png": "first"}
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert summary(on_pictures(model, "--json"))["skipped"] == 1


def test_the_file_is_written_after_each_batch(tmp_path, monkeypatch):
    """Catches a file that is written only at the end, and one for each answer."""
    written: list[str] = []
    monkeypatch.setattr(
        answer_file, "write_output", lambda path, content, field: written.append(path.name)
    )
    file = answer_file.AnswerFile(tmp_path / "p.json", {}, 2, {}, {})
    for i in range(5):
        file.add(str(i), "x")
    assert written == ["p.json", "p.settings.json"] * 2
    file.save()
    file.save()
    assert len(written) == 6


def test_it_is_greedy_unless_sampling_is_asked_for():
    """Catches answers that differ from run to run, and options that do nothing."""
    assert sampling_of({}).temperature == 0
    assert sampling_of({"repetition_penalty": 1.2}).temperature == 0
    assert sampling_of({"top_p": 0.5}).temperature is None
    assert sampling_of({"temperature": 0.3}).temperature == 0.3
    assert sampling_of({"seed": 1}).temperature is None
    assert (sampling_of({}).max_tokens, sampling_of({"max_tokens": 9}).max_tokens) == (256, 9)


def test_the_report_is_written(model, folder):
    """Catches a report without its facts."""
    assert on_pictures(model, "--report", "out").exit_code == 0
    page = Path("out/predict.html").read_text(encoding="utf-8")
    assert "Whole run: 3 pictures answered" in page
    assert "model digest" in page
    assert page.count("data:image/jpeg") == 3
    assert Path("out/predict_lengths.png").read_bytes().startswith(b"\x89PNG")


def test_names_that_are_no_utf8_are_asked_about_and_reported(model, folder):
    """Catches hours of work that end in a UnicodeEncodeError."""
    name = os.fsdecode(b"\xff\xfe.png")
    try:
        Image.new("RGB", (16, 16)).save(folder / "pics" / name)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert on_pictures(model, "--report", "out").exit_code == 0
    assert f"pics/{name}" in read()
    assert "pics/??.png" in Path("out/predict.html").read_text(encoding="utf-8")
    assert summary(on_pictures(model, "--json"))["skipped"] == 4


# --- the drawn pictures ----------------------------------------------------------------------


def test_without_a_folder_three_questions_are_asked(model, folder):
    """Catches the demo that needs files, and a picture's time that is not told."""
    result = run(model)
    assert result.exit_code == 0, result.stderr
    assert [result.stdout.count(mark) for mark in ("  Q  ", "  A  ")] == [3, 3]
    assert "最左边是什么图形？" in result.stdout
    assert "picture process time: first " in result.stdout
    assert not Path("predict_result.json").exists()
    asked = summary(run(model, "--json"))["settings"]["prompt"]
    assert asked == ["图片里有什么？", "最左边是什么图形？", "描述这张图片。"]


def test_the_drawn_answers_go_to_out(model, folder):
    """Catches questions that are not asked in the words that were given."""
    result = run(model, "--out", "drawn.json", "--json", "-p", "什么？", "--report", "out")
    said = summary(result)
    assert list(read("drawn.json")) == sorted(said["answers"])
    assert read("drawn.json") == said["answers"]
    assert said["image_s_first"] > 0
    assert said["image_s_later"] > 0
    assert result.stderr.count("  Q  什么？") == 3
    assert Path("out/predict.html").read_text(encoding="utf-8").count("data:image/jpeg") == 3


# --- what is refused -------------------------------------------------------------------------

BAD = [
    (("--images", "nowhere"), "images: nowhere cannot be read"),
    (("--images", "empty"), "images: empty holds no picture"),
    (("--images", "pics", "--batch", "0"), "batch: is 0"),
    (("--images", "pics", "--out", "pics"), "out: pics is a folder"),
    (("--images", "pics", "--out", "file/x.json"), "out: file cannot be made"),
    (("--images", "pics", "--report", "file"), "report: file cannot be made"),
    (("--images", "pics", "--out", "list.json"), "out: list.json holds a list"),
    (("--images", "pics", "--out", "file"), "out: file is not JSON"),
    (("--images", "pics", "--out", "pipe"), "out: pipe is no ordinary file"),
    (("--images", "pics", "-p", " "), "prompt: is empty"),
    (("--images", "pics", "--max-tokens", "0"), "max_tokens"),
    (("--images", "pics", "--lang", "fr"), "lang: is 'fr'"),
    (("--images", "pics", "-t", "-1"), "temperature"),
    (("--images", "pics", "--dtype", "int3"), "dtype 'int3' is unknown"),
    (("--images", "pics", "-m", "nowhere"), "model"),
    (("--images", "pics", "--max-tokens", "1000000"), "only 994 fit"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_options_are_refused_in_words_and_in_json(model, folder, arguments, said):
    """Catches a traceback, and a script that finds nothing on stdout."""
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "list.json").write_text("[]")
    os.mkfifo(folder / "pipe")
    result = run(model, *arguments, "--json")
    assert result.exit_code == 2
    assert said in json.loads(result.stdout)["error"]["message"] or said in result.stderr
    assert result.stderr.rpartition("error: ")[2].strip()
    assert "Traceback" not in result.stderr
    assert not Path("predict_result.json").exists()


def test_a_damaged_settings_file_is_told(model, folder):
    """Catches a traceback for a file that somebody edited."""
    on_pictures(model)
    for text in ("[]", "{}", '{"runs": [{"settings": 1, "pictures": ["a"]}]}', "{"):
        Path("predict_result.settings.json").write_text(text)
        opened = answer_file.open_answers(Path("predict_result.json"), KEYS, {}, 8, False)
        with pytest.raises(ConfigError, match=r"out: predict_result\.settings\.json"), opened:
            pass
