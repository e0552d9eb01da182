"""`glimt bench performance` end to end on tiny models: files, resuming, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from glimt.cli import app
from glimt.commands import performance, reporting, static_batch
from glimt.commands.lock import only_run
from glimt.kernels.limits import LimitMeter

HEADER = (
    "Batch,MaxSeqLen,InputSeqLen(Encoding),OutputSeqLen(Decoding),ResponseTime(ms),"
    "FirstTokenTime(ms),TimePerTokens(ms),TokensPerSecond(ms)"
)
SMALL = ("--batch", "1,2", "--input", "32,40", "--output-len", "2,4")


@pytest.fixture(autouse=True)
def small_meter(monkeypatch):
    """The limits' values do not matter here; 768 MiB of memory for them would."""
    meter = LimitMeter(1, num_bytes=2**20)
    monkeypatch.setattr(meter, "warm_up", lambda: None)
    monkeypatch.setattr(static_batch, "LimitMeter", lambda threads: meter)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "performance", *map(str, arguments)])


def cells(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text(encoding="utf-8").splitlines()]


def record(folder: Path) -> dict:
    return json.loads((folder / "performance.json").read_text(encoding="utf-8"))


def test_each_batch_has_its_file_with_the_originals_columns(folder, tmp_path):
    """Catches a file under another name, a missing row, and figures that do not belong together."""
    ran = run("-m", folder, *SMALL, "--out", tmp_path, "--json")
    assert ran.exit_code == 0, ran.stderr
    data = json.loads(ran.stdout)
    family = data["settings"]["family"]
    context = {"glm4v_9b": "1024", "visualglm": "512"}[family]
    for batch in ("1", "2"):
        path = tmp_path / f"{batch}_batch_performance_{family}.csv"
        assert path.read_text(encoding="utf-8").splitlines()[0] == HEADER
        rows = cells(path)[1:]
        expected = [[batch, context, i, o] for i in ("32", "40") for o in ("2", "4")]
        assert [row[:4] for row in rows] == expected
        for row in rows:
            response, first, step, rate = map(float, row[4:])
            assert response == pytest.approx(first + step * int(row[3]), abs=0.03)
            assert rate == pytest.approx(1000 / step, rel=0.02)
    averages = cells(tmp_path / f"performance_averages_{family}.csv")
    assert [row[0] for row in averages] == ["Batch", "1", "2"]
    assert [row["batch"] for row in data["averages"]] == [1, 2]
    assert data["memory"]["host_bytes"] > 2**20
    assert data["memory"]["device_bytes"] is None
    assert data["pictures"]["first_s"] > 0
    assert len(data["pictures"]["later_s"]) == 5
    assert data["is_whole"] is True


def test_a_picture_is_in_every_prompt_and_not_in_its_length(folder, tmp_path):
    """Catches a picture that shortens the text, and one that only the first row pays for."""
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "a.png")
    given = ("--batch", "2", "--input", "48", "--output-len", "2", "--repeats", 2)
    for image in ("random", str(tmp_path / "a.png")):
        ran = run(
            "-m", folder, *given, "--image", image, "--out", tmp_path / "o", "--json", "--restart"
        )
        assert ran.exit_code == 0, ran.stderr
        (row,) = json.loads(ran.stdout)["rows"]
        assert row["case"] == {"batch": 2, "input_len": 48, "output_len": 2}
        assert row["image_tokens"] > 2
        assert len(row["runs"]) == 2
        assert all(0 < one["tower_s"] < one["first_token_s"] for one in row["runs"])


def test_rows_that_do_not_fit_have_four_cells_and_a_reason(folders, tmp_path):
    """Catches rows that are dropped in silence, or that stop the sweep."""
    given = ("--batch", "1", "--input", "32,1024", "--output-len", "4", "--out", tmp_path)
    ran = run("-m", folders["glm4v_9b"], *given)
    assert ran.exit_code == 0, ran.stderr
    rows = cells(tmp_path / "1_batch_performance_glm4v_9b.csv")
    assert rows[2] == ["1", "1024", "1024", "4", "", "", "", ""]
    assert rows[1][4] != ""
    said = "batch 1, input 1024, output 4: no measure: 1028 tokens exceed the context of 1024"
    assert said in " ".join(ran.stderr.split())


def test_rows_beyond_the_cache_are_left_out(folders, tmp_path):
    """Catches preempted rows that are timed as if they were decoding."""
    given = ("--batch", "1,8", "--input", "64", "--output-len", "4", "--kv-bytes", "100K")
    ran = run("-m", folders["visualglm"], *given, "--out", tmp_path, "--json")
    assert ran.exit_code == 0, ran.stderr
    one, eight = json.loads(ran.stdout)["rows"]
    assert one["left_out"] == ""
    assert "8 x 68 tokens exceed the KV cache" in eight["left_out"]


def test_a_stopped_sweep_goes_on_where_it_was(folders, tmp_path, monkeypatch):
    """Catches rows that are measured twice, lost, or written differently after a stop."""
    given = ("-m", folders["glm4v_9b"], *SMALL, "--out", tmp_path)
    keep, kept = performance._keep, []

    def stop_after_three(row, *more):
        keep(row, *more)
        kept.append(row.case)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(performance, "_keep", stop_after_three)
    stopped = run(*given)
    assert stopped.exit_code == 130
    assert "the same command goes on from there" in " ".join(stopped.stderr.split())
    before = cells(tmp_path / "1_batch_performance_glm4v_9b.csv")
    assert len(before) == 1 + 3
    pictures = record(tmp_path)["extra"]["pictures"]
    kept.clear()
    monkeypatch.setattr(
        performance, "_keep", lambda row, *more: (keep(row, *more), kept.append(row))
    )
    went_on = run(*given, "--json")
    assert went_on.exit_code == 0, went_on.stderr
    assert len(kept) == 5
    assert cells(tmp_path / "1_batch_performance_glm4v_9b.csv")[:4] == before
    data = json.loads(went_on.stdout)
    assert (data["runs"], len(data["rows"])) == (2, 8)
    assert data["pictures"] == pictures, "the first picture is the first run's"


def test_a_second_run_into_the_same_folder_is_refused(folders, tmp_path):
    """Catches two runs that time each other and write over each other's rows."""
    small = ("-m", folders["visualglm"], "--batch", 1, "--input", 32, "--output-len", 2)
    with only_run(tmp_path / "performance.json", "out"):
        ran = run(*small, "--out", tmp_path, "--json")
    assert ran.exit_code == 2
    said = f"is being written by another run (process {os.getpid()}); wait for its end"
    assert said in json.loads(ran.stdout)["error"]["message"]
    assert list(tmp_path.iterdir()) == []
    assert run(*small, "--out", tmp_path).exit_code == 0


def test_weights_are_hashed_once(folders, tmp_path, monkeypatch):
    """Catches minutes of reading twice where a checkpoint has tens of gigabytes."""
    hashed = []
    plain = reporting.files_digest
    monkeypatch.setattr(
        reporting, "files_digest", lambda files: hashed.append(1) or plain([*files])
    )
    small = ("-m", folders["visualglm"], "--batch", 1, "--input", 32, "--output-len", 2)
    assert run(*small, "--out", tmp_path / "a", "--report", tmp_path / "b").exit_code == 0
    assert hashed == [1]
    digest = json.loads((tmp_path / "a" / "performance.json").read_text())["settings"]["model"]
    assert digest in (tmp_path / "b" / "performance.md").read_text(encoding="utf-8")


def test_a_killed_sweep_goes_on_where_it_was(folders, tmp_path):
    """Catches a record that is only written at the end, or half written by a kill."""
    lengths = ("--batch", "1", "--input", "32,48,64,80", "--output-len", "100,110,120,130")
    given = ["-m", str(folders["glm4v_9b"]), *lengths, "--out", str(tmp_path)]
    program = "from glimt.cli import main; main()"
    command = [sys.executable, "-c", program, "bench", "performance", *given]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "1_batch_performance_glm4v_9b.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    measured = record(tmp_path)["rows"]
    assert 1 <= len(measured) < 16
    ran = run(*given, "--json")
    assert ran.exit_code == 0, ran.stderr
    data = json.loads(ran.stdout)
    assert data["rows"][: len(measured)] == measured
    assert len(cells(tmp_path / "1_batch_performance_glm4v_9b.csv")) == 1 + 16


def test_a_larger_grid_adds_to_the_same_folder(folders, tmp_path):
    """Catches a folder that only takes the very same command."""
    given = ("-m", folders["glm4v_9b"], "--out", tmp_path, "--input", "32", "--output-len", "2")
    assert run(*given, "--batch", "1").exit_code == 0
    first = record(tmp_path)["rows"]
    assert run(*given, "--batch", "1,2").exit_code == 0
    assert record(tmp_path)["rows"][:1] == first
    assert [row["case"]["batch"] for row in record(tmp_path)["rows"]] == [1, 2]


def test_other_settings_are_refused_until_told_to_restart(folders, tmp_path):
    """Catches figures of two settings in one table."""
    given = ("-m", folders["glm4v_9b"], *SMALL, "--out", tmp_path)
    assert run(*given).exit_code == 0
    refused = run(*given, "--seed", 1, "--dtype", "bfloat16", "--json")
    assert refused.exit_code == 2
    message = json.loads(refused.stdout)["error"]["message"]
    assert "dtype was float32 and is now bfloat16; seed was 0 and is now 1" in message
    assert message.endswith("name another --out, or begin anew with --restart")
    assert run(*given, "--seed", 1, "--batch", 2, "--restart").exit_code == 0
    assert {row["case"]["batch"] for row in record(tmp_path)["rows"]} == {2}
    assert not (tmp_path / "1_batch_performance_glm4v_9b.csv").exists()


def test_files_of_the_original_program_are_not_overwritten(folders, tmp_path):
    """Catches the figures of another machine lost, which one wanted to compare with."""
    theirs = tmp_path / "4_batch_performance_visualglm.csv"
    theirs.write_text("mine", encoding="utf-8")
    ran = run("-m", folders["visualglm"], *SMALL, "--out", tmp_path)
    assert ran.exit_code == 2
    assert "and no performance.json that it belongs to" in " ".join(ran.stderr.split())
    assert theirs.read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 2}'])
def test_a_damaged_record_is_refused(folders, tmp_path, damage):
    """Catches a traceback, and a record of a later version that is read as ours."""
    (tmp_path / "performance.json").write_text(damage, encoding="utf-8")
    ran = run("-m", folders["glm4v_9b"], *SMALL, "--out", tmp_path)
    assert ran.exit_code == 2
    assert "cannot be read as a record" in " ".join(ran.stderr.split())
    assert isinstance(ran.exception, SystemExit)


def test_a_damaged_row_is_refused(folders, tmp_path):
    """Catches a traceback out of the middle of a record."""
    given = ("-m", folders["glm4v_9b"], *SMALL, "--out", tmp_path)
    assert run(*given).exit_code == 0
    damaged = record(tmp_path)
    del damaged["rows"][0]["case"]
    (tmp_path / "performance.json").write_text(json.dumps(damaged), encoding="utf-8")
    ran = run(*given)
    assert (ran.exit_code, isinstance(ran.exception, SystemExit)) == (2, True)


def test_rows_that_fail_are_told_and_tried_again(folders, tmp_path, monkeypatch):
    """Catches a sweep that a failing request ends, and a failure that looks like a success."""
    given = ("-m", folders["glm4v_9b"], *SMALL, "--out", tmp_path, "--json")
    measured = performance.measure

    def with_broken_logits(workload, cases, repeats):
        model = workload.engine.opened.model
        healthy = model.logits
        model.logits = lambda hidden: healthy(hidden) * (torch.nan if len(hidden) > 1 else 1)
        return measured(workload, cases, repeats)

    with monkeypatch.context() as patch:
        patch.setattr(performance, "measure", with_broken_logits)
        ran = run(*given)
    assert ran.exit_code == 1
    data = json.loads(ran.stdout)
    assert data["is_whole"] is False
    assert [row["is_error"] for row in data["rows"]] == [False] * 4 + [True] * 4
    assert "rows that failed, as told above: 4" in ran.stderr
    assert "NaN" in data["rows"][4]["left_out"]
    assert cells(tmp_path / "2_batch_performance_glm4v_9b.csv")[1][4:] == [""] * 4
    again = run(*given)
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["is_whole"] is True


def test_the_report_shows_lengths_against_the_limit_and_what_is_left_out(folders, tmp_path):
    """Catches a report without its plots, its limit, its facts, or the rows that are missing."""
    given = ("--batch", "1", "--input", "32,1024", "--output-len", "2", "--out", tmp_path)
    ran = run("-m", folders["glm4v_9b"], *given, "--report", tmp_path / "r")
    assert ran.exit_code == 0, ran.stderr
    text = (tmp_path / "r" / "performance.md").read_text(encoding="utf-8")
    assert text.startswith("**Whole: 1 of 2 rows measured; 1 do not fit the context or the cache.")
    for said in (
        "Averages",
        "MBU",
        "picture process time, first",
        "sha256:",
        "Dashed",
        "1026 tokens",
    ):
        assert said in text
    for plot in ("performance-decode", "performance-first-token"):
        Image.open(tmp_path / "r" / f"{plot}.png").verify()
    assert (tmp_path / "r" / "performance.html").stat().st_size > 10_000


REFUSED = [
    (("--batch", "0"), "batch: is '0'"),
    (("--input", "a"), "input: is 'a'"),
    (("--input", "4"), "the prompt template and one token of text take"),
    (("--output-len", "1"), "output_len is 1; at least 2 is needed"),
    (("--repeats", "0"), "repeats is 0"),
    (("--image", "nowhere.png"), "No such file"),
    (("--dtype", "int3"), "dtype 'int3' is unknown"),
    (("-m", "nowhere"), "does not exist"),
    (("--out", "/proc/nowhere"), "cannot be made"),
    (("--report", "/proc/nowhere"), "cannot be made"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_cannot_be_run_is_refused_in_plain_words(folders, tmp_path, arguments, said):
    """Catches a traceback, and nothing on stdout for a script."""
    ran = run("-m", folders["glm4v_9b"], "--out", tmp_path, *SMALL, *arguments, "--json")
    assert ran.exit_code == 2
    assert said in json.loads(ran.stdout)["error"]["message"]
    assert "Traceback" not in ran.stderr


def test_drafts_are_not_offered():
    """Catches steps of several tokens that are told as if they had one."""
    ran = run("--draft-tokens", 4)
    assert ran.exit_code == 2
    assert "No such option" in ran.stderr
