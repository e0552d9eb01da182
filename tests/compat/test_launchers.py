"""The originals' command lines: what each becomes, and what is said to be ignored."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from glimt.cli import app
from glimt.compat import launch, mindie, visualglm
from glimt.compat.captions import pictures_of
from glimt.errors import ConfigError

RUN_PA = Path(__file__).parents[2] / "scripts" / "run_pa.sh"


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Collects the arguments of `glimt` in the place of running it."""
    argvs: list[list[str]] = []
    for module in (visualglm, mindie):
        monkeypatch.setattr(module, "run_glimt", lambda argv: argvs.append(list(argv)))
    for name in launch.IGNORED:
        monkeypatch.delenv(name, raising=False)
    return argvs


@pytest.fixture
def images(tmp_path) -> Path:
    """Two pictures, one that is broken, and a file that is none."""
    for name, colour in (("b.jpg", "red"), ("a.PNG", "blue")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / name)
    (tmp_path / "c.png").write_bytes(b"broken")
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


# --- VisualGLM -------------------------------------------------------------------------------

MODES = [
    ("run", "chat -m P"),
    ("performance", "bench performance -m P --out ."),
    ("precision", "precision -m P --report precision"),
    ("predict", "predict -m P --out predict_result.json"),
]


@pytest.mark.parametrize(("mode", "argv"), MODES)
def test_each_mode_of_main_py_is_a_command(started, mode, argv):
    """Catches a mode that does another's work, and files in another folder than the original's."""
    visualglm.main(["--mode", mode, "--model_path", "P"])
    assert started == [argv.split()]


def test_without_a_mode_it_is_performance(started):
    """Catches another default than the original's."""
    visualglm.main(["--model_path", "P"])
    assert started[0][:2] == ["bench", "performance"]


def test_a_card_is_said_to_be_ignored_also_by_its_short_name(started, capsys):
    """Catches the spelling of the original's own README refused, and a card ignored in silence."""
    visualglm.main(["--model_path", "P", "--device", "3"])
    said = " ".join(capsys.readouterr().err.split())
    assert said == "ignored, because it means nothing on this machine: --device_id 3"
    visualglm.main(["--model_path", "P"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", [["--mode", "talk", "--model_path", "P"], []])
def test_what_main_py_does_not_know_is_refused(arguments, capsys):
    """Catches a traceback."""
    with pytest.raises(SystemExit, match="2"):
        visualglm.main(arguments)
    assert "usage: python -m glimt.compat.visualglm" in capsys.readouterr().err


# --- MindIE ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "--performance -trust_remote_code W I 4 2048 64",
        "--performance --trust_remote_code W I 4 2048 64",
        "--performance W I 4 2048 64 -trust_remote_code",
        "-trust_remote_code --performance W I 4 2048 64",
        "--performance W -trust_remote_code I 4 2048 64",
    ],
)
def test_the_flag_may_stand_anywhere(arguments):
    """Catches the older script's fault, which took the flag for the weights."""
    given = mindie.parse(arguments.split())
    assert given == mindie.Arguments(
        "performance", "W", "I", 4, 2048, 64, ignored=("--trust_remote_code",)
    )


def test_performance_is_a_throughput_run_of_the_first_picture(started, images):
    """Catches lengths that are dropped, and files elsewhere than in the working folder."""
    mindie.main(["--performance", "W", str(images), "4", "2048", "64"])
    first = str(images / "a.PNG")
    assert started == [
        [
            "bench", "throughput", "-m", "W", "--image", first, "--prompt", "描述这张图片",
            "--batch", "4", "--output-len", "64", "--max-model-len", "2112", "--out", ".",
        ]
    ]  # fmt: skip


def test_without_a_batch_performance_loops_as_the_older_script(started, images):
    """Catches a context that nobody asked for, and a single batch."""
    mindie.main(["--performance", "W", str(images)])
    argv = started[0]
    assert argv[argv.index("--batch") + 1] == "1,2,3,4,5,6,7,8,9,10"
    assert argv[argv.index("--output-len") + 1] == "256"
    assert "--max-model-len" not in argv


def test_precision_writes_the_predictions_of_the_likeliest_tokens(started):
    """Catches sampled answers, which differ from run to run."""
    mindie.main(["--precision", "W", "I", "2"])
    assert started == [
        [
            "predict", "-m", "W", "--images", "I", "--prompt", "描述这张图片", "--batch", "2",
            "--max-tokens", "256", "--temperature", "0", "--out", "predict_result.json",
        ]
    ]  # fmt: skip


BAD = [
    "W I",
    "--run --performance W I",
    "--run W",
    "--run W I 0",
    "--run W I x",
    "--run W I 1 2 3 4",
    "--sprint W I",
]


@pytest.mark.parametrize("arguments", BAD)
def test_what_the_script_does_not_know_is_refused(arguments, capsys):
    """Catches a traceback, and an argument that is dropped in silence."""
    with pytest.raises(SystemExit, match="2"):
        mindie.main(arguments.split())
    assert "usage: run_pa.sh" in capsys.readouterr().err


def test_a_folder_without_pictures_is_refused(started, tmp_path, capsys):
    """Catches an index error."""
    for images in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SystemExit, match="2"):
            mindie.main(["--performance", "W", str(images)])
    said = capsys.readouterr().err
    assert "holds no picture" in said
    assert "cannot be read: No such file" in said
    assert started == []


def test_pictures_are_taken_by_name_whatever_the_case_of_their_ending(images):
    """Catches the order of the file system, and a text file that is captioned."""
    assert [path.name for path in pictures_of(images)] == ["a.PNG", "b.jpg", "c.png"]
    assert pictures_of(images / "b.jpg") == [images / "b.jpg"]
    with pytest.raises(ConfigError):
        pictures_of(images / "d")


def test_run_prints_each_pictures_answer_and_names_those_that_fail(folder, images, capsys):
    """Catches one broken picture that ends the run, and numbers that then shift."""
    with pytest.raises(SystemExit, match="1"):
        mindie.main(["--run", str(folder), str(images), "2", "200", "5"])
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    for number in (0, 1):
        assert f"Question[{number}]: 描述这张图片" in lines
        assert any(line.startswith(f"Answer[{number}]: ") for line in lines)
    assert sum(line.startswith("Generate[") for line in lines) == 2
    assert "Generate[0] token num: 5" in lines
    assert f"{images / 'c.png'} is left out" in " ".join(captured.err.split())


def test_run_of_a_model_that_is_not_there_is_refused(images, capsys):
    """Catches a traceback where the command line of glimt would end with a message."""
    with pytest.raises(SystemExit, match="2"):
        mindie.main(["--run", "nowhere", str(images)])
    assert "error: model: 'nowhere' does not exist" in capsys.readouterr().err


# --- both ------------------------------------------------------------------------------------


def test_variables_that_do_nothing_here_are_named_in_one_line(started, monkeypatch, images, capsys):
    """Catches eight ranks asked for and one run without a word, and words about one that is."""
    for name, value in (
        ("TP_WORLD_SIZE", "8"),
        ("MASTER_PORT", "20036"),
        ("ATB_LLM_BENCHMARK_ENABLE", "1"),
        ("INF_NAN_MODE_ENABLE", ""),
    ):
        monkeypatch.setenv(name, value)
    mindie.main(["--performance", "W", str(images), "-trust_remote_code"])
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "ignored, because it means nothing on this machine: --trust_remote_code, "
        "TP_WORLD_SIZE=8, MASTER_PORT=20036"
    ]


def test_glimt_runs_as_if_its_arguments_had_been_typed(monkeypatch, capsys):
    """Catches a report that names the launcher's arguments as those of glimt."""
    monkeypatch.setattr(sys, "argv", ["mindie", "--run"])
    with pytest.raises(SystemExit, match="0"):
        launch.run_glimt(["bench", "throughput", "--help"])
    assert sys.argv == ["glimt", "bench", "throughput", "--help"]
    assert "--output-len" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        *(visualglm.translated(mode, "P") for mode in visualglm.MODES),
        mindie.performance_argv(mindie.Arguments("performance", "W", __file__, 2, 100, 8)),
        mindie.precision_argv(mindie.Arguments("precision", "W", "I", 2, 100, 8)),
    ],
    ids=lambda argv: " ".join(argv[:2]),
)
def test_every_option_is_one_that_its_command_has(argv):
    """Catches a translation into an option that was renamed."""
    command: Any = typer.main.get_command(app)
    for word in takewhile(lambda word: not word.startswith("-"), argv):
        command = command.commands[word]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in argv if word.startswith("-")} <= known


def test_the_script_hands_everything_on(images):
    """Catches a script that loses its arguments, their blanks, or the exit code."""
    environment = {**os.environ, "PYTHON": sys.executable}
    ran = subprocess.run(
        ["sh", str(RUN_PA), "--performance", "no such weights", str(images), "-trust_remote_code"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=images,
    )
    assert ran.returncode == 2
    assert "'no such weights' does not exist" in " ".join(ran.stderr.split())
    assert os.access(RUN_PA, os.X_OK)
