"""The command line as a whole: laziness, exit codes, what is printed where."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import glimt
from glimt.cli import app
from glimt.commands import show
from glimt.commands.convert import ConvertReport
from glimt.errors import CapacityError, ConfigError, EngineError, ImageError, MissingDependency

COMMANDS = ("generate", "chat", "inspect", "convert", "doctor", "bench")
HEAVY = ("torch", "transformers", "tiktoken", "numpy", "PIL", "sentencepiece")


@pytest.fixture(scope="module")
def glm4v(folders: dict[str, Path]) -> Path:
    return folders["glm4v_9b"]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from glimt.cli import main; main()"]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *map(str, arguments)], stdout=pipe, stderr=pipe, text=True)


# --- help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], *([command] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    """Catches an import at the top of cli/ that makes every --help take seconds."""
    script = (
        "import sys\n"
        "from glimt.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as leaving:\n    assert leaving.code == 0, leaving.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    command = [sys.executable, "-c", script, *arguments, "--help"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Usage: glimt" in ran.stdout


def test_every_command_is_listed_with_what_it_does():
    """Catches a command that lost its docstring or its registration."""
    shown = invoke("--help").stdout
    assert all(f"│ {command}" in shown for command in COMMANDS)
    assert "Answer one question about pictures or text." in shown


def test_version_is_that_of_the_package():
    """Catches a second version number that goes stale."""
    result = invoke("--version")
    assert result.stdout == f"glimt {glimt.__version__}\n"
    assert result.exit_code == 0


# --- errors ----------------------------------------------------------------------------------

FAILURES = [
    (ImageError("image 'a.png'", "is empty"), 2, "error: image 'a.png': is empty\n"),
    (ConfigError("model", ["is [bold]odd[/bold]"]), 2, "error: model: is [bold]odd[/bold]\n"),
    (MissingDependency("ray", "cluster"), 2, "error: this needs the package 'ray'"),
    (EngineError("no luck"), 1, "error: no luck\n"),
    (CapacityError("full [/red]"), 1, "error: full [/red]\n"),
]


@pytest.mark.parametrize(("error", "code", "said"), FAILURES, ids=lambda v: type(v).__name__)
def test_an_error_is_one_plain_message_and_an_exit_code(monkeypatch, error, code, said):
    """Catches rich reading an error as markup, and codes that scripts cannot tell apart."""

    def fail(*options: bool) -> bool:
        raise error

    monkeypatch.setattr("glimt.commands.doctor.doctor", fail)
    result = invoke("doctor")
    assert result.exit_code == code
    assert result.stderr.startswith(said)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--model", "x", "--json", "--max-tokens", "many"),
        ("inspect", "--json"),
        ("generate", "--model", "x", "--nonsense", "--json"),
        ("generate", "--model", "x", "--prompt", "hi", "--top-p", "2", "--json"),
        ("generate", "--model", "/no/such/folder", "--prompt", "hi", "--json"),
        ("inspect", "--json", "/no/such/folder"),
        ("bench", "performance", "--repeats", "x", "--json"),
    ],
    ids=" ".join,
)
def test_with_json_stdout_is_one_object_also_for_a_wrong_option(arguments):
    """Catches a script that reads stdout and gets nothing, because an option was mistyped."""
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"]["message"]
    assert "Traceback" not in result.stderr


def test_a_folder_that_is_not_there_is_one_problem():
    """Catches its files reported missing one by one."""
    said = "'/no/such/folder' does not exist; give the folder that holds"
    for command in (("inspect",), ("generate", "--prompt", "hi", "--model")):
        assert invoke(*command, "/no/such/folder").stderr.startswith(f"error: model: {said}")


def test_debug_shows_the_traceback_too(tmp_path):
    """Catches --debug that is accepted and never read."""
    result = invoke("--debug", "inspect", tmp_path)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "config.json is missing" in result.stderr.rpartition("Traceback")[2]


def test_an_unexpected_error_is_not_swallowed(monkeypatch):
    """Catches a handler so wide that a bug looks like the user's mistake."""

    def fail(*options: bool) -> bool:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("glimt.commands.doctor.doctor", fail)
    assert isinstance(invoke("doctor").exception, ZeroDivisionError)


def test_an_error_cannot_steer_the_terminal(tmp_path):
    """Catches escape sequences of a file name that reach the terminal."""
    folder = tmp_path / "a\x1b[2Jb"
    folder.mkdir()
    result = invoke("inspect", folder)
    assert "\x1b" not in result.stderr
    assert "a\ufffd[2Jb" in result.stderr


ENDLESS = ("-p", "hi", "--ignore-eos", "--max-tokens", "900")


def test_ctrl_c_ends_with_130_and_no_traceback(glm4v):
    """Catches the traceback that Python prints for KeyboardInterrupt."""
    running = start("generate", "--model", glm4v, *ENDLESS)
    assert running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate()
    assert running.returncode == 130
    assert said == ""


def test_a_reader_that_leaves_is_no_error_message(glm4v):
    """Catches BrokenPipeError printed under `glimt generate … | head`."""
    running = start("generate", "--model", glm4v, *ENDLESS)
    assert running.stdout.read(1)
    running.stdout.close()
    said = running.stderr.read()
    running.stderr.close()
    assert running.wait() == 1
    assert said == ""


@pytest.mark.parametrize(
    ("shell", "code", "said"),
    [(">&-", 0, ""), ("<&- 2>&1", 0, ""), ("> /dev/full", 1, "error: [Errno 28] No space left")],
)
def test_a_stream_that_is_closed_or_full_is_no_traceback(glm4v, shell, code, said):
    """Catches None as sys.stdout, and OSError from a full disk behind a redirection."""
    answer = f"generate --model {glm4v} -p hi --max-tokens 2 --quiet {shell}"
    python = f"{sys.executable} -c 'from glimt.cli import main; main()'"
    ran = subprocess.run(f"{python} {answer}", shell=True, capture_output=True, text=True)
    assert ran.returncode == code
    assert ran.stderr.startswith(said)
    assert "Traceback" not in ran.stderr


def test_a_terminal_without_utf8_gets_an_answer_and_no_traceback(glm4v):
    """Catches UnicodeEncodeError where stdout is Latin-1, and JSON with question marks there."""
    command = [sys.executable, "-c", "from glimt.cli import main; main()", "generate"]
    command += ["--model", str(glm4v), "-p", "hi", "--seed", "1", "--max-tokens", "40"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    plain = subprocess.run(command, capture_output=True, env=environment)
    data = subprocess.run([*command, "--json"], capture_output=True, env=environment)
    text = json.loads(data.stdout)["text"]
    assert any(ord(letter) > 255 for letter in text), "the test needs an answer beyond Latin-1"
    assert plain.returncode == 0
    assert plain.stdout == text.encode("latin-1", "replace") + b"\n"


# --- inspect ---------------------------------------------------------------------------------


def test_inspect_prints_the_numbers_of_the_checkpoint(glm4v):
    """Catches a table that shows another dtype's bytes."""
    result = invoke("inspect", glm4v)
    data = json.loads(invoke("inspect", glm4v, "--json").stdout)
    assert result.exit_code == 0
    assert f"{data['num_parameters']:,}" in result.stdout
    assert "glm4v_9b" in result.stdout
    assert f"{data['kv_bytes_per_token']['bfloat16']} bytes" in result.stdout
    assert data["weight_bytes"]["float32"] == 4 * data["num_parameters"]


def test_inspect_of_a_damaged_checkpoint_exits_with_1(glm4v, tmp_path):
    """Catches problems that are printed while a script is told that all is well."""
    (tmp_path / "config.json").write_bytes((glm4v / "config.json").read_bytes())
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 1
    assert "problem: holds no weights" in result.stderr
    found = invoke("inspect", tmp_path, "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["problems"]


# --- options ---------------------------------------------------------------------------------

MODEL_OPTIONS = {
    "--model": ("model", "folder"),
    "--dtype": ("dtype", "bfloat16"),
    "--device": ("device", "npu"),
    "--tp": ("tp_size", 4),
    "--threads": ("num_threads", 3),
    "--max-model-len": ("max_model_len", 99),
    "--kv-bytes": ("kv_bytes", 12345),
    "--kv-dtype": ("kv_dtype", "int8"),
    "--memory-limit": ("memory_limit_bytes", 67890),
    "--draft-tokens": ("num_draft_tokens", 4),
    "--rotary-table": ("rotary_table", "hub_fp16"),
    "--quant": ("quant", "int4"),
    "--quant-head": ("quant_head", "w8a8"),
    "--quant-tower": ("quant_tower", "int8"),
    "--vision-runtime": ("vision_runtime", "om"),
    "--vision-model": ("vision_model", "tower.om"),
}
SAMPLING_OPTIONS = {
    "--max-tokens": ("max_tokens", 7),
    "--min-tokens": ("min_tokens", 2),
    "--temperature": ("temperature", 0.5),
    "--top-p": ("top_p", 0.25),
    "--top-k": ("top_k", 9),
    "--min-p": ("min_p", 0.125),
    "--repetition-penalty": ("repetition_penalty", 1.5),
    "--presence-penalty": ("presence_penalty", 0.75),
    "--frequency-penalty": ("frequency_penalty", -0.5),
    "--seed": ("seed", 11),
    "--stop": ("stop", ("end",)),
    "--stop-token-id": ("stop_token_ids", (13,)),
    "--ignore-eos": ("ignore_eos", True),
}


def words(options):
    """What is typed for these options."""
    for option, (_, value) in options.items():
        yield option
        if value is not True:
            yield value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("command", ["generate", "chat", "evaluate"])
def test_every_option_reaches_the_job(monkeypatch, command):
    """Catches an option that is accepted and dropped, or taken for its neighbour."""
    jobs = []
    function = "run" if command == "evaluate" else command
    monkeypatch.setattr(f"glimt.commands.{command}.{function}", jobs.append)
    samples = {} if command == "evaluate" else SAMPLING_OPTIONS
    folder = ["questions"] if command == "evaluate" else []
    result = invoke(command, *folder, *words(MODEL_OPTIONS | samples))
    assert result.exit_code == 0, result.stderr
    assert jobs[0].engine == dict(MODEL_OPTIONS.values())
    if samples:
        given = {name: jobs[0].sampling[name] for name, _ in samples.values()}
        assert given == dict(samples.values())


# --- convert ---------------------------------------------------------------------------------


def test_convert_passes_its_options_on_and_tells_the_notes(monkeypatch, tmp_path):
    """Catches an option that is accepted and dropped, and a guess that nobody hears of."""
    given = {}

    def fake(source, target, **options):
        given.update(source=source, target=target, **options)
        return ConvertReport(target, ("a", "b"), 7, 3 * 2**20, "blocks", True, ("x.[y]",), None)

    monkeypatch.setattr(show, "convert_sat", fake)
    options = ("--qkv-layout", "blocks", "--tokenizer", tmp_path / "t")
    result = invoke("convert", tmp_path, tmp_path / "out", *options)
    assert result.exit_code == 0
    as_data = json.loads(invoke("convert", tmp_path, tmp_path / "out", *options, "--json").stdout)
    assert as_data["dropped"] == ["x.[y]"]
    assert as_data["num_tensors"] == 7
    assert given == {
        "source": tmp_path,
        "target": tmp_path / "out",
        "qkv_layout": "blocks",
        "tokenizer": tmp_path / "t",
        "on_tensor": None,
    }
    told = "7 tensors, 3.0 MiB in 2 files, QKV layout blocks"
    assert result.stdout == f"{tmp_path / 'out'}: {told}\n"
    assert "x.[y]" in result.stderr
    assert "the QKV layout 'blocks' is a guess" in result.stderr
    assert "no tokenizer was found" in result.stderr


def test_convert_of_nothing_is_an_error(tmp_path):
    """Catches a bar's size lookup that fails before the real check can speak."""
    result = invoke("convert", tmp_path / "absent", tmp_path / "out")
    assert result.exit_code == 2
    assert "absent: does not exist; give VisualGLM's SAT folder" in result.stderr
