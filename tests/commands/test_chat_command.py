"""`glimt chat`: reading, commands, history, and what Ctrl-C does, in a pipe and in a terminal."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from glimt import LLM, SamplingParams
from glimt.cli import app
from glimt.commands.chat import InterruptFlag
from glimt.commands.chat_commands import COMMANDS, ChatState, as_command, run_command
from glimt.commands.chat_input import Entry, Reader, completions
from glimt.commands.conversation import Conversation, Turn, default_question
from glimt.commands.pictures import Picture
from glimt.config import ImageLimits
from glimt.demo.noise import write_noise_model
from glimt.engine import EngineStats
from glimt.errors import RequestError
from glimt.inputs.chat import parse_messages
from glimt.inputs.request import RequestOptions
from glimt.types import SamplingDefaults

GREEDY = ("--temperature", "0", "--max-tokens", "8", "--ignore-eos")


@pytest.fixture(scope="module")
def glm4v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose context is so long that an answer goes on until it is stopped."""
    path = tmp_path_factory.mktemp("glm4v")
    write_noise_model(path, "glm4v_9b")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["seq_length"] = 16384
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "my cat.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def talk(model: Path, *lines: str, options: tuple[str, ...] = ()) -> Result:
    words = ["chat", "--model", str(model), *GREEDY, *options]
    return CliRunner().invoke(app, words, input="".join(f"{line}\n" for line in lines))


def truth(model: Path, *questions: Any, language: str = "auto") -> list[str]:
    """The answers of a greedy conversation whose history is kept, by the Python API."""
    llm = LLM(str(model), num_blocks=64)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    messages: list[dict[str, Any]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = llm.chat(messages, sampling, options=RequestOptions(language=language)).text
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages[1::2]]


def with_picture(path: str, text: str) -> list[dict[str, Any]]:
    return [{"type": "image", "image": path}, {"type": "text", "text": text}]


# --- reading ---------------------------------------------------------------------------------


def entries(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> list[Entry]:
    raw = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
    reader = Reader()
    return list(iter(reader.read, None))


def test_each_line_of_a_pipe_is_an_entry(monkeypatch):
    """Catches a last line without its line feed being lost, and line ends of Windows."""
    assert entries(monkeypatch, "one\r\n\n二") == [Entry("one"), Entry(""), Entry("二")]


def test_a_backslash_goes_on_in_the_next_line(monkeypatch):
    """Catches the backslash staying in the question, also at the end of input."""
    assert entries(monkeypatch, "a\\\nb\\\nc\nd\\") == [Entry("a\nb\nc"), Entry("d")]


def test_three_quotes_make_a_block_that_is_no_command(monkeypatch):
    """Catches pasted text whose first line begins with a slash being run as a command."""
    found = entries(monkeypatch, '"""\n/quit\n\nb\\\n"""\nnext\n"""\nopen')
    assert found == [
        Entry("/quit\n\nb\\", is_quoted=True),
        Entry("next"),
        Entry("open", is_quoted=True),
    ]


def test_bytes_that_are_no_text_do_not_end_the_reading(monkeypatch):
    """Catches UnicodeDecodeError in the middle of a conversation."""
    found = entries(monkeypatch, b"\xff\xfe\nfine\n")
    assert [entry.text for entry in found] == ["\udcff\udcfe", "fine"]


def test_the_tabulator_completes_commands_and_paths(tmp_path):
    """Catches completion inside a question, and a folder that is taken for a file."""
    (tmp_path / "cat[1].png").touch()
    (tmp_path / "cats").mkdir()
    names = tuple(COMMANDS)
    start = f"{tmp_path}/cat"
    assert completions("/sa", "/sa", names) == ["/save ", "/save! "]
    assert completions(f"/image {start}", start, names) == [f"{start}[1].png", f"{start}s/"]
    assert completions(f"/image {start}[", f"{start}[", names) == [f"{start}[1].png"]
    assert completions(f"what {start}", start, names) == []


# --- commands --------------------------------------------------------------------------------

NO_STATS = EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 0))


def new_state(**sampling: Any) -> ChatState:
    defaults = SamplingDefaults(temperature=0.8, top_p=0.4)
    return ChatState(Conversation(), SamplingParams(**sampling), defaults, lambda: NO_STATS)


LINES = [
    ("/image a b.png ", ("/image", "a b.png")),
    ("/clear", ("/clear", "")),
    ("clear", ("/clear", "")),
    (" stop ", ("/quit", "")),
    ("stop it", None),
    (" /etc is what?", None),
    ("what is /quit?", None),
]


@pytest.mark.parametrize(("line", "command"), LINES)
def test_commands_are_told_from_questions(line, command):
    """Catches a question that happens to hold a command's word."""
    assert as_command(line) == command


def test_pictures_wait_for_the_next_question(picture, tmp_path, monkeypatch):
    """Catches paths with blanks, quotes, or a ~, and the second of several being lost."""
    monkeypatch.setenv("HOME", str(Path(picture).parent))
    shutil.copy(picture, tmp_path / "b.png")
    state = new_state()
    for argument in (picture, f"'{picture}' {tmp_path}/b.png", "~/my cat.png"):
        run_command(state, "/image", argument)
    names = [waiting.given for waiting in state.conversation.waiting]
    assert names == [picture, picture, f"{tmp_path}/b.png", picture]
    assert f"waiting: {picture} (60 x 40)" in run_command(state, "/image", "")
    run_command(state, "/image", "none")
    assert state.conversation.waiting == []


def test_one_bad_picture_adds_none(picture):
    """Catches the first of two pictures being attached although the command failed."""
    state = new_state()
    with pytest.raises(RequestError, match=r"image 'no\.png': cannot be read"):
        run_command(state, "/image", f"'{picture}' no.png")
    assert state.conversation.waiting == []


SETTINGS = [
    ("temperature 0.5", "temperature", 0.5),
    ("top-k 7", "top_k", 7),
    ("stop a b", "stop", ("a b",)),
    ("stop_token_ids 3, 4", "stop_token_ids", (3, 4)),
    ("ignore_eos off", "ignore_eos", False),
    ("seed default", "seed", None),
]


@pytest.mark.parametrize(("argument", "name", "value"), SETTINGS)
def test_a_setting_is_changed(argument, name, value):
    """Catches a setting that is parsed as text."""
    state = new_state(seed=1, ignore_eos=True)
    run_command(state, "/set", argument)
    assert getattr(state.sampling, name) == value


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("top_p 2", "top_p: is 2.0"),
        ("top_k 1.5", "top_k: is '1.5'; a whole number"),
        ("n 2", "'n' is unknown"),
        ("ignore_eos maybe", "true or false"),
    ],
)
def test_a_bad_setting_changes_nothing(argument, said):
    """Catches a value that is refused only when the next question is asked."""
    state = new_state(top_p=0.5)
    before = state.sampling
    with pytest.raises(RequestError, match=said):
        run_command(state, "/set", argument)
    assert state.sampling is before


def test_settings_show_the_default_that_applies():
    """Catches `None`, and a family's default that temperature 0 turns off."""
    assert "top_p = default (0.4)" in run_command(new_state(), "/set", "").split("\n")
    assert run_command(new_state(temperature=0), "/set", "top_p") == "top_p = default"
    assert run_command(new_state(top_p=0.3), "/set", "top_p") == "top_p = 0.3"


def test_the_system_prompt_is_set_shown_and_removed():
    """Catches a system prompt that only takes effect after /clear."""
    state = new_state()
    run_command(state, "/system", "Be brief.")
    assert state.conversation.messages(Turn("q", ()))[0] == {
        "role": "system",
        "content": "Be brief.",
    }
    assert "Be brief." in run_command(state, "/system", "")
    run_command(state, "/system", '""')
    assert state.conversation.messages(Turn("q", ())) == [{"role": "user", "content": "q"}]


def test_clear_keeps_the_system_prompt_and_the_settings():
    """Catches a /clear that loses what the user would have to type again."""
    state = new_state(top_p=0.5)
    state.conversation.system = "s"
    state.conversation.add(Turn("q", (), "a"))
    run_command(state, "/clear", "")
    assert state.conversation.messages(Turn("x", ())) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "x"},
    ]
    assert state.sampling.top_p == 0.5


def test_saving_writes_messages_with_paths_as_given_and_never_overwrites(picture, tmp_path):
    """Catches base64 in the file, a lost mark, and a conversation written over another."""
    state = new_state()
    with pytest.raises(RequestError, match="nothing was said"):
        run_command(state, "/save", "talk.json")
    state.conversation.system = "s"
    shown = Picture("./cat.png", Path(picture).read_bytes(), 60, 40)
    state.conversation.add(Turn("什么？", (shown,), "猫"))
    state.conversation.add(Turn("more", (), "so", is_partial=True))
    path = tmp_path / "talk.json"
    run_command(state, "/save", str(path))
    saved = json.loads(path.read_text(encoding="utf-8"))
    part = {"type": "image_url", "image_url": {"url": "./cat.png"}}
    assert saved == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [part, {"type": "text", "text": "什么？"}]},
        {"role": "assistant", "content": "猫"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "so", "partial": True},
    ]
    assert [m.role for m in parse_messages(saved, ImageLimits())] == [m["role"] for m in saved]
    path.write_text("precious", encoding="utf-8")
    with pytest.raises(RequestError, match=r"exists; /save! .* overwrites it"):
        run_command(state, "/save", str(path))
    assert path.read_text(encoding="utf-8") == "precious"
    run_command(state, "/save!", str(path))
    assert json.loads(path.read_text(encoding="utf-8")) == saved
    with pytest.raises(RequestError, match="cannot be written"):
        run_command(state, "/save", str(tmp_path / "no" / "talk.json"))


def test_an_unknown_command_says_what_to_do(picture):
    """Catches a path dragged into the terminal being answered with a bare 'unknown'."""
    with pytest.raises(RequestError, match="/foo: is no command; /help lists them"):
        run_command(new_state(), "/foo", "bar")
    name, _, rest = picture.partition(" ")
    with pytest.raises(RequestError, match=f"/image {re.escape(picture)}"):
        run_command(new_state(), name, rest)


def test_help_names_every_command():
    """Catches a command that nobody can find."""
    said = run_command(new_state(), "/help", "")
    assert all(name in said for name in COMMANDS)


QUESTIONS = [
    ("zh", {"LANG": "en_GB.UTF-8"}, "描述这张图片。"),
    ("en", {"LANG": "zh_CN.UTF-8"}, "Describe the image."),
    ("auto", {"LANG": "en_GB.UTF-8"}, "Describe the image."),
    ("auto", {"LC_ALL": "zh_CN.UTF-8", "LANG": "en_GB.UTF-8"}, "描述这张图片。"),
    ("auto", {"LC_ALL": "", "LANG": "C.UTF-8"}, "描述这张图片。"),
    ("auto", {}, "描述这张图片。"),
]


@pytest.mark.parametrize(("language", "environment", "question"), QUESTIONS)
def test_the_default_question_follows_the_language(language, environment, question):
    """Catches the locale overriding --lang."""
    assert default_question(language, environment) == question


# --- a pipe ----------------------------------------------------------------------------------


def test_answers_alone_go_to_stdout_and_history_is_kept(folder):
    """Catches prompts in a pipe, and a second question asked without the first."""
    result = talk(folder, "你好", "And then?")
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in truth(folder, "你好", "And then?"))
    assert result.stderr.count(" · 8 tokens · ") == 2


def test_a_picture_given_at_the_start_is_asked_about_by_an_empty_line(folder, picture):
    """Catches a picture that is dropped after its turn, and its time going missing."""
    result = talk(folder, "", "", "Where?", options=("--image", picture, "--lang", "zh"))
    questions = with_picture(picture, "描述这张图片。"), "Where?"
    answers = truth(folder, *questions, language="zh")
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)
    facts = [line for line in result.stderr.splitlines() if "tokens/s" in line]
    assert len(facts) == 2, "the second empty line asks nothing"
    assert facts[1].startswith("picture process time 0.00 s · first token "), (
        "its features were cached"
    )


def test_a_picture_in_a_later_turn_is_used_and_noted_once(folder, picture):
    """Catches the note at every turn, and the picture in the wrong message."""
    result = talk(folder, "Hello", f"/image {picture}", "What?", f"/image {picture}", "And?")
    assert result.stderr.count("note: the model was trained on one picture") == 1
    assert result.stdout.split("\n")[0] == truth(folder, "Hello")[0]
    seen = with_picture(picture, "What?"), with_picture(picture, "And?")
    answers = truth(folder, "Hello", *seen)
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)


def test_one_picture_with_the_first_question_is_not_noted(folder, picture):
    """Catches a warning about what the model was made for."""
    result = talk(folder, f"/image {picture}", "What?", "And?")
    assert "trained" not in result.stderr


def test_a_picture_is_kept_as_it_was_shown(folder, picture, tmp_path):
    """Catches a file that changes later breaking the conversation it is part of."""
    copy = tmp_path / "cat.png"
    shutil.copy(picture, copy)
    result = talk(folder, f"/image {copy}", "What?", f"/save! {copy}", "And?")
    assert "messages" not in result.stderr
    assert copy.read_bytes().startswith(b"["), "the picture was to be overwritten"
    answers = truth(folder, with_picture(picture, "What?"), "And?")
    assert result.stdout == "".join(f"{answer}\n" for answer in answers)


def test_a_refused_question_leaves_the_conversation_as_it_was(folder):
    """Catches a question that stays in the history unanswered, or ends the program."""
    result = talk(folder, "你好", "/set max_tokens 99999", "lost", "/set max_tokens 8", "And then?")
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{answer}\n" for answer in truth(folder, "你好", "And then?"))
    assert "error: max_tokens: is 99999" in result.stderr
    assert "/clear starts a new conversation" in result.stderr


def test_a_picture_waits_on_when_its_question_is_refused(folder, picture):
    """Catches a picture lost with a question that was too long."""
    lines = (f"/image {picture}", "/set max_tokens 99999", "lost", "/set max_tokens 8", "What?")
    result = talk(folder, *lines)
    assert result.stdout == truth(folder, with_picture(picture, "What?"))[0] + "\n"
    assert f"still waiting for the next question: {picture}" in result.stderr


def test_a_bad_picture_is_told_at_once_and_nothing_is_lost(folder, picture, tmp_path):
    """Catches a cut-off file that is only found out when the question is asked."""
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(picture).read_bytes()[:2000])
    result = talk(folder, "你好", f"/image {cut}", "/image no.png", "And then?")
    assert result.stdout == "".join(f"{answer}\n" for answer in truth(folder, "你好", "And then?"))
    assert result.stderr.count("error: image ") == 2


def test_an_answer_that_fails_is_told_and_the_chat_goes_on(glm4v, tmp_path):
    """Catches a NaN that ends the program, or an empty answer kept as history."""
    shutil.copytree(glm4v, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["transformer.encoder.final_layernorm.weight"][:] = float("nan")
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    result = talk(tmp_path / "model", "a", "b", "/stats")
    assert result.exit_code == 0
    assert result.stderr.count("NaN") == 2
    assert "turns in this conversation: 0" in result.stderr


def test_the_originals_words_clear_and_leave(folder):
    """Catches `clear` and `stop` being asked as questions."""
    result = talk(folder, "你好", "clear", "你好", "stop", "never asked")
    answer = truth(folder, "你好")[0]
    assert result.stdout == f"{answer}\n{answer}\n"


def test_what_cannot_work_at_all_ends_before_the_first_question(glm4v):
    """Catches a bad option that is noticed only once the model is loaded and asked."""
    for options in (("--image", "no.png"), ("--lang", "fr"), ("--top-p", "3")):
        result = talk(glm4v, "hi", options=options)
        assert result.exit_code == 2
        assert result.stdout == ""


# --- a terminal ------------------------------------------------------------------------------


def test_the_first_ctrl_c_raises_a_flag_and_the_second_interrupts():
    """Catches a handler that stays behind, and an answer that cannot be left at all."""
    before = signal.getsignal(signal.SIGINT)
    with InterruptFlag() as flag:
        assert not flag.is_set()
        signal.raise_signal(signal.SIGINT)
        assert flag.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """A program that believes it talks to a person."""

    def __init__(self, *arguments: str) -> None:
        self.end, inner = pty.openpty()
        command = [sys.executable, "-c", "from glimt.cli import main; main()", *arguments]
        environment = os.environ | {"TERM": "dumb", "LC_ALL": "C.UTF-8"}
        self.process = subprocess.Popen(
            command, stdin=inner, stdout=inner, stderr=inner, env=environment
        )
        os.close(inner)
        self.seen = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def wait_for(self, pattern: str) -> str:
        """What came until the pattern, which is cut off; fails after a minute of nothing."""
        while (found := re.search(pattern, self.seen)) is None:
            self._read(pattern)
        before, self.seen = self.seen[: found.start()], self.seen[found.end() :]
        return before

    def _read(self, pattern: str) -> None:
        ready, _, _ = select.select([self.end], [], [], 60)
        assert ready, f"waited for {pattern!r}, got {self.seen!r}"
        self.seen += os.read(self.end, 65536).decode(errors="replace")

    def interrupt(self, when_idle: bool = False) -> None:
        """when_idle: once the program waits for a key.

        Between showing the prompt and waiting, readline only notices a signal at the next key.
        """
        while when_idle and not self._is_idle():
            pass
        self.process.send_signal(signal.SIGINT)

    def _is_idle(self) -> bool:
        """The main thread sleeps, and does so each time that it is looked at for a while."""
        stat = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/stat")
        states = []
        for _ in range(40):
            time.sleep(0.02)
            states.append(stat.read_text(encoding="ascii").rpartition(")")[2].split()[0])
        return set(states) == {"S"}

    def leave(self) -> int:
        """Read what is left, so that the program is not held up, until it ends."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            if select.select([self.end], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.end, 65536).decode(errors="replace")
                except OSError:  # how Linux says that nobody holds the other end any more
                    break
        return self.process.wait(timeout=60)


ENDLESS = ("--seed", "1", "--ignore-eos")
PROMPT = r"(^|\n)> "


def test_ctrl_c_stops_the_answer_and_not_the_program(glm4v, tmp_path):
    """Catches a chat, and all that was said in it, lost with one key; an unmarked answer."""
    with Terminal("chat", "--model", str(glm4v), *ENDLESS) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("first\n")
        terminal.wait_for(r"first\r\n(?s:.{8})")  # some of the answer
        terminal.interrupt()
        assert "stopped" in terminal.wait_for(PROMPT)
        terminal.type("/set max_tokens 4\n")
        terminal.wait_for(PROMPT)
        terminal.type("second\n")
        assert " · 4 tokens · " in terminal.wait_for(PROMPT)
        terminal.type(f"/save {tmp_path}/talk.json\n")
        terminal.wait_for(PROMPT)
        terminal.type("\x04")  # Ctrl-D
        assert terminal.leave() == 0
        assert "Traceback" not in terminal.seen
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [message["content"] for message in saved[::2]] == ["first", "second"]
    assert saved[1]["partial"] is True
    assert saved[1]["content"]
    assert "partial" not in saved[3]


def test_ctrl_c_at_the_prompt_leaves(glm4v):
    """Catches a traceback, or a program that can only be killed."""
    with Terminal("chat", "--model", str(glm4v)) as terminal:
        terminal.wait_for(PROMPT)
        terminal.interrupt(when_idle=True)
        assert terminal.leave() == 0
        assert "Traceback" not in terminal.seen


def test_ctrl_c_in_a_block_drops_the_block_and_not_the_program(glm4v):
    """Catches half a question being asked, or the program ending over it."""
    with Terminal("chat", "--model", str(glm4v), "--max-tokens", "3", *ENDLESS) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type('"""\nhalf\n')
        terminal.wait_for(r"half\r\n\. ")
        terminal.interrupt(when_idle=True)
        assert "first token" not in terminal.wait_for(PROMPT)
        terminal.type("whole\n")
        assert " · 3 tokens · " in terminal.wait_for(PROMPT)
        terminal.type("/quit\n")
        assert terminal.leave() == 0


def test_a_person_is_greeted_and_told_what_an_empty_line_asks(glm4v, picture):
    """Catches the greeting in a pipe's place, and a picture that the user cannot see is there."""
    options = ("--image", picture, "--lang", "en", "--max-tokens", "3", *ENDLESS)
    with Terminal("chat", "--model", str(glm4v), *options) as terminal:
        greeting = terminal.wait_for(PROMPT)
        assert "glm4v_9b, float32 on cpu, 16384 tokens of context" in greeting
        assert "an empty line asks: Describe the image." in greeting
        assert "my cat.png (60 x 40)" in greeting.replace("\r\n", "")
        terminal.type("\n")
        said = terminal.wait_for(PROMPT)
        assert "Describe the image." in said
        assert re.search(
            r"picture process time \d\.\d\d s · first token \d\.\d\d s · 3 tokens", said
        )


def test_a_model_cannot_steer_the_terminal(glm4v):
    """Catches control characters of an answer, which random weights say often, passing through."""
    with Terminal("chat", "--model", str(glm4v), "--max-tokens", "150", *ENDLESS) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("first\n")
        terminal.wait_for(r"first\r\n")
        answer = terminal.wait_for(r"first token")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", answer)
    assert "\ufffd" in answer
