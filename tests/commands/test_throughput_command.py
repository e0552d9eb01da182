"""`glimt bench throughput` end to end on tiny models: both files, variables, resuming."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from glimt.cli import app
from glimt.commands import static_batch, throughput
from glimt.kernels.limits import LimitMeter

SMALL = ("--batch", "1,3", "--output-len", "4")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """No variables of the caller's, no large buffer, and a folder of its own to work in."""
    for name in (throughput.ENABLE, throughput.FILEPATH):
        monkeypatch.delenv(name, raising=False)
    meter = LimitMeter(1, num_bytes=2**20)
    monkeypatch.setattr(meter, "warm_up", lambda: None)
    monkeypatch.setattr(static_batch, "LimitMeter", lambda threads: meter)
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "throughput", *map(str, arguments)])


def table(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return [[cell.strip() for cell in row] for row in csv.reader(stream)]


def test_both_files_are_written_and_belong_together(folder, tmp_path):
    """Catches a benchmark file that is not of the last batch, and two files that disagree."""
    ran = run("-m", folder, *SMALL, "--out", "o", "--json")
    assert ran.exit_code == 0, ran.stderr
    one, three = json.loads(ran.stdout)["rows"]
    assert (one["batch"], three["batch"]) == (1, 3)
    assert len(three["decode_s"]) == 3
    assert 0 < three["tower_s"] < sum(three["prefill_s"]) < three["wall_s"]
    benchmark = table(Path("o/benchmark.csv"))
    assert len(benchmark) == 2
    cells = dict(zip(*benchmark, strict=True))
    lengths = [cells[name] for name in ("batch_size", "input_seq_len", "output_seq_len")]
    assert lengths == ["3", str(three["embedding_len"]), "4"]
    assert cells["prefill_count"] == "1"
    assert [float(each) for each in cells["decode_token_times"].split(",")] == three["decode_s"]
    performance = table(Path("o/glm4v_performance.csv"))
    assert performance[0][4] == "fisrt_token_time(ms)"
    assert [row[0] for row in performance[1:]] == ["1", "3"]
    last = performance[2]
    assert last[1] == str(three["input_len"])
    assert last[3] == cells["input_seq_len"]
    assert float(last[4]) == float(cells["prefill_time(ms)"])
    assert float(last[5]) == float(cells["decoder_token_time(ms)"])
    assert float(last[7]) == pytest.approx(3 * 4 / (float(last[6]) / 1000))


def test_the_originals_variables_say_where_the_benchmark_file_goes_besides(folders, tmp_path):
    """Catches a variable that is read without the one that switches it on, or not at all."""
    given = ("-m", folders["glm4v_9b"], "--batch", "1", "--output-len", "2")
    environment = {throughput.FILEPATH: "there/b.csv"}
    runner = CliRunner()
    off = runner.invoke(app, ["bench", "throughput", *map(str, given)], env=environment)
    assert off.exit_code == 0, off.stderr
    assert not Path("there").exists()
    assert f"{throughput.FILEPATH} is set, but not {throughput.ENABLE}=1" in off.stderr
    environment[throughput.ENABLE] = "1"
    on = runner.invoke(app, ["bench", "throughput", *map(str, given)], env=environment)
    assert on.exit_code == 0, on.stderr
    assert Path("there/b.csv").read_bytes() == Path("throughput/benchmark.csv").read_bytes()


def test_the_originals_default_path_is_kept():
    """Catches a script that finds no file where the original has always put it."""
    assert throughput.benchmark_path({}) is None
    assert throughput.benchmark_path({throughput.ENABLE: "0"}) is None
    found = throughput.benchmark_path({throughput.ENABLE: "1"})
    assert found == Path("benchmark_result/benchmark.csv")


def test_a_stopped_run_goes_on_and_other_settings_are_refused(folders, tmp_path):
    """Catches batches that are measured twice, and two prompts in one table."""
    given = ("-m", folders["visualglm"], "--output-len", "3", "--out", "o")
    assert run(*given, "--batch", "1").exit_code == 0
    before = Path("o/glm4v_performance.csv").read_text(encoding="utf-8")
    went_on = run(*given, "--batch", "1,2", "--json")
    assert went_on.exit_code == 0, went_on.stderr
    assert json.loads(went_on.stdout)["runs"] == 2
    assert Path("o/glm4v_performance.csv").read_text(encoding="utf-8").startswith(before)
    refused = run(*given, "--batch", "1", "--prompt", "hello")
    assert refused.exit_code == 2
    assert "prompt was 描述这张图片 and is now hello" in refused.stderr
    assert run(*given, "--batch", "1", "--prompt", "hello", "--restart").exit_code == 0


def test_batches_beyond_the_cache_are_reported(folders, tmp_path):
    """Catches a batch that is dropped in silence."""
    given = (
        "-m",
        folders["visualglm"],
        "--batch",
        "1,9",
        "--output-len",
        "4",
        "--kv-bytes",
        "100K",
    )
    ran = run(*given, "--out", "o", "--report", "r")
    assert ran.exit_code == 0, ran.stderr
    assert "batch 9: no measure: 9 x" in " ".join(ran.stderr.split())
    assert (
        Path("o/glm4v_performance.csv")
        .read_text(encoding="utf-8")
        .splitlines()[2]
        .endswith(",,,,,")
    )
    text = Path("r/throughput.md").read_text(encoding="utf-8")
    assert text.startswith("**Whole: 1 of 2 batch sizes measured; 1 do not fit the context or the")
    for plot in ("throughput-rate", "throughput-first-token"):
        Image.open(f"r/{plot}.png").verify()


def test_a_picture_file_goes_through_the_tower_for_each_request(folders, tmp_path):
    """Catches a batch whose one picture is encoded once, as no two users' are."""
    Image.new("RGB", (30, 20), "green").save("a.png")
    ran = run("-m", folders["glm4v_9b"], *SMALL, "--image", "a.png", "--out", "o", "--json")
    assert ran.exit_code == 0, ran.stderr
    assert json.loads(ran.stdout)["settings"]["image"].startswith("sha256:")


REFUSED = [
    (("--batch", "1,,2"), "batch: is '1,,2'"),
    (("--output-len", "1"), "output_len is 1; at least 2 is needed"),
    (("--prompt", " "), "prompt is empty"),
    (("--image", "nowhere.png"), "No such file"),
    (("-m", "nowhere"), "does not exist"),
    (("--out", "/proc/nowhere"), "cannot be made"),
]


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=lambda value: str(value)[:24])
def test_what_cannot_be_run_is_refused_in_plain_words(folders, arguments, said):
    """Catches a traceback, and nothing on stdout for a script."""
    ran = run("-m", folders["glm4v_9b"], *SMALL, *arguments, "--json")
    assert ran.exit_code == 2
    assert said in json.loads(ran.stdout)["error"]["message"]


def test_a_folder_in_the_place_of_the_benchmark_file_is_refused_at_once(folders, tmp_path):
    """Catches a run of an hour whose last write fails."""
    (tmp_path / "b.csv").mkdir()
    environment = {throughput.ENABLE: "1", throughput.FILEPATH: "b.csv"}
    command = ["bench", "throughput", "-m", str(folders["glm4v_9b"])]
    ran = CliRunner().invoke(app, command, env=environment)
    assert ran.exit_code == 2
    assert "b.csv is a folder; name a file" in ran.stderr
