"""`glimt generate`: what reaches stdout, what the engine is asked, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from glimt import LLM, SamplingParams
from glimt.cli import app
from glimt.commands import generate
from glimt.demo.noise import write_noise_model

GREEDY = ("--temperature", "0", "--max-tokens", "12", "--ignore-eos")


@pytest.fixture(scope="module")
def glm4v(folders: dict[str, Path]) -> Path:
    return folders["glm4v_9b"]


@pytest.fixture(scope="module")
def broken(glm4v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model all of whose logits are NaN."""
    path = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(glm4v, path)
    tensors = load_file(path / "model.safetensors")
    tensors["transformer.encoder.final_layernorm.weight"][:] = float("nan")
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    where = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = random.integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{name}.png")
    return [str(where / "a.png"), str(where / "b.png")]


def run(model: Path, *arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    words = ["generate", "--model", str(model), *map(str, arguments)]
    return CliRunner().invoke(app, words, input=stdin)


def run_json(model: Path, *arguments: str | Path, stdin: str | None = None) -> dict[str, Any]:
    """The one JSON object on stdout; json.loads refuses a second one."""
    return json.loads(run(model, *arguments, "--json", stdin=stdin).stdout)


def expected(model: Path, messages: list[dict[str, Any]], **sampling: Any) -> Any:
    params = {"temperature": 0, "max_tokens": 12, "ignore_eos": True} | sampling
    return LLM(str(model), num_blocks=64).chat(messages, SamplingParams(**params))


def ask(text: str, *pictures: str) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": path} for path in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


# --- the answer ------------------------------------------------------------------------------


def test_json_is_all_of_stdout_and_holds_what_the_engine_said(folder, pictures):
    """Catches a log line or a bar on stdout, and ids or counts of another request."""
    command = [sys.executable, "-c", "from glimt.cli import main; main()", "--debug", "generate"]
    command += ["--model", str(folder), "-p", "这是什么？", "-i", pictures[0], *GREEDY, "--json"]
    environment = os.environ | {"FORCE_COLOR": "1"}  # makes rich take stderr for a terminal
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    said, truth = json.loads(ran.stdout), expected(folder, ask("这是什么？", pictures[0]))
    assert said["text"] == truth.text
    assert said["token_ids"] == list(truth.token_ids)
    assert said["prompt_token_ids"] == list(truth.prompt_token_ids)
    assert said["finish_reason"] == truth.finish_reason == "length"
    assert said["stop_reason"] is None
    assert said["usage"] == {
        "prompt_tokens": truth.usage.prompt_tokens,
        "completion_tokens": 12,
        "total_tokens": truth.usage.prompt_tokens + 12,
        "cached_tokens": 0,
        "image_tokens": truth.usage.image_tokens,
        "drafted_tokens": 0,
        "accepted_tokens": 0,
    }
    assert set(said["timings"]) == {"image_s", "prefill_s", "decode_s", "ttft_s"}
    assert all(seconds > 0 for seconds in said["timings"].values())
    assert said["dtype"] == "float32"
    assert "choices" not in said
    assert "logprobs" not in said


def test_the_text_is_streamed_to_stdout_and_the_facts_go_to_stderr(folder):
    """Catches pieces that are lost or doubled, and figures in the middle of an answer."""
    result = run(folder, "-p", "Hello", *GREEDY)
    assert result.exit_code == 0
    assert result.stdout == expected(folder, ask("Hello")).text + "\n"
    assert "12 tokens · " in result.stderr
    assert "ended by length" in result.stderr
    assert "picture" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_picture_time_is_told_when_there_is_a_picture(folder, pictures):
    """Catches the figure that the originals show first going missing."""
    result = run(folder, "-p", "Hello", "-i", pictures[0], *GREEDY)
    assert result.stderr.startswith("picture process time ")


def test_drafts_are_counted_and_change_no_token(glm4v):
    """Catches an option that never reaches the engine, or a rate that is not told."""
    asked = ("-p", "hello hello hello hello", "-t", "0", "--max-tokens", "40", "--ignore-eos")
    plain, drafted = run_json(glm4v, *asked), run_json(glm4v, *asked, "--draft-tokens", "4")
    assert drafted["token_ids"] == plain["token_ids"]
    counts = drafted["usage"]["drafted_tokens"], drafted["usage"]["accepted_tokens"]
    assert counts[0] > 0
    told = run(glm4v, *asked, "--draft-tokens", "4").stderr
    assert f" · {counts[1] / counts[0]:.0%} of {counts[0]} drafts accepted · " in told
    assert "drafts" not in run(glm4v, *asked).stderr
    refused = run_json(glm4v, *asked, "--draft-tokens", "17")
    assert "num_draft_tokens is 17" in refused["error"]["message"]


def test_quiet_leaves_the_answer_alone(folder):
    """Catches a facts line that --quiet forgets."""
    result = run(folder, "-p", "Hello", *GREEDY, "--quiet")
    assert result.stderr == ""
    assert result.stdout == run(folder, "-p", "Hello", *GREEDY).stdout


def test_the_family_and_the_sampling_that_was_used_are_told(folder):
    """Catches the None of the command line in place of the family's own settings."""
    said = run_json(folder, "-p", "Hello", "--max-tokens", "2")
    is_glm4v = said["model"] == "glm4v_9b"
    assert said["sampling"]["top_p"] == (0.8 if is_glm4v else 0.4)
    assert said["sampling"]["repetition_penalty"] == (1.0 if is_glm4v else 1.2)
    assert said["max_tokens"] == 2


def test_several_choices_are_listed_and_the_first_stands_on_top(glm4v):
    """Catches choices that are dropped, or counted once."""
    said = run_json(glm4v, "-p", "Hello", "--n", "3", "--seed", "5", "--max-tokens", "6")
    assert [choice["index"] for choice in said["choices"]] == [0, 1, 2]
    assert said["text"] == said["choices"][0]["text"]
    lengths = [len(choice["token_ids"]) for choice in said["choices"]]
    assert said["usage"]["completion_tokens"] == sum(lengths)
    assert len({tuple(choice["token_ids"]) for choice in said["choices"]}) == 3
    shown = run(glm4v, "-p", "Hello", "--n", "3", "--seed", "5", "--max-tokens", "6").stdout
    parts = [f"--- answer {c['index'] + 1} of 3 ---\n{c['text']}\n" for c in said["choices"]]
    assert shown == "".join(parts)


def test_logprobs_name_every_token_and_the_likeliest(glm4v):
    """Catches ids without texts and a list that is one short."""
    said = run_json(glm4v, "-p", "Hello", *GREEDY, "--logprobs", "3")
    assert [entry["token_id"] for entry in said["logprobs"]] == said["token_ids"]
    for entry in said["logprobs"]:
        top = [each["logprob"] for each in entry["top"]]
        assert len(top) == 3
        assert entry["logprob"] == max(top) <= 0
        assert isinstance(entry["token"], str)


def test_prompt_logprobs_name_every_token_of_the_prompt(glm4v):
    """Catches a list that leaves out a token, or tells of the answer's."""
    said = run_json(glm4v, "-p", "Hello", *GREEDY, "--prompt-logprobs", "2")
    assert [each["token_id"] for each in said["prompt_logprobs"]] == said["prompt_token_ids"]
    first, *others = said["prompt_logprobs"]
    assert (first["logprob"], first["rank"], first["top"]) == (None, None, [])
    for each in others:
        best = max(top["logprob"] for top in each["top"])
        assert (len(each["top"]), each["logprob"] <= best <= 0) == (2, True)
        assert (each["rank"] == 1) == (each["logprob"] == best)
    assert "prompt_logprobs" not in run_json(glm4v, "-p", "Hello", *GREEDY)


def test_the_same_seed_gives_the_same_answer_and_another_another(glm4v):
    """Catches a seed that is accepted and dropped."""
    ids = [run_json(glm4v, "-p", "x", "--seed", s, "--max-tokens", "8") for s in ("1", "1", "2")]
    assert ids[0]["token_ids"] == ids[1]["token_ids"] != ids[2]["token_ids"]


STOPS = [
    ("--stop-token-id", "stop_token_ids", lambda truth: truth.token_ids[3]),
    ("--stop", "stop", lambda truth: truth.text[2:4]),
]


@pytest.mark.parametrize(("option", "name", "pick"), STOPS, ids=["token id", "text"])
def test_a_stop_ends_the_answer(glm4v, option, name, pick):
    """Catches stops that the command line takes and the engine never sees."""
    truth = expected(glm4v, ask("Hello"), ignore_eos=False)
    stop = pick(truth)
    greedy = ("--temperature", "0", "--max-tokens", "12")
    said = run_json(glm4v, "-p", "Hello", *greedy, option, str(stop))
    same = expected(glm4v, ask("Hello"), ignore_eos=False, **{name: (stop,)})
    assert said["finish_reason"] == "stop"
    assert said["stop_reason"] == stop
    assert said["text"] == same.text != truth.text


# --- the request -----------------------------------------------------------------------------


def test_pictures_and_system_turn_stand_where_a_chat_has_them(folder, pictures):
    """Catches pictures after the text, in another order, or a system turn that is dropped."""
    arguments = ("-p", "Hello", "-i", pictures[0], "-i", pictures[1], "-s", "Be brief.")
    said = run_json(folder, *arguments, *GREEDY)
    messages = [{"role": "system", "content": "Be brief."}, *ask("Hello", *pictures)]
    truth = expected(folder, messages)
    assert said["prompt_token_ids"] == list(truth.prompt_token_ids)
    assert said["token_ids"] == list(truth.token_ids)
    assert said["usage"]["image_tokens"] == truth.usage.image_tokens > 0


def test_the_prompt_can_come_from_standard_input(folder):
    """Catches the line feed of `echo` becoming part of the question."""
    piped = run_json(folder, "-p", "-", *GREEDY, stdin="你好\n第二行\n")
    assert piped["prompt_token_ids"] == list(expected(folder, ask("你好\n第二行")).prompt_token_ids)


def test_a_messages_file_is_the_conversation(folder, pictures, tmp_path):
    """Catches a file whose history or pictures are lost."""
    past = [*ask("What?", pictures[0]), {"role": "assistant", "content": "A cat."}]
    messages = [*past, {"role": "user", "content": "Where?"}]
    (tmp_path / "talk.json").write_text(json.dumps(messages), encoding="utf-8")
    said = run_json(folder, "--messages", tmp_path / "talk.json", *GREEDY)
    assert said["prompt_token_ids"] == list(expected(folder, messages).prompt_token_ids)


def test_the_template_language_is_passed_on(tmp_path_factory):
    """Catches --lang that is accepted and never read."""
    path = tmp_path_factory.mktemp("visualglm")
    write_noise_model(path, "visualglm")
    prompts = {
        language: run_json(path, "-p", "Hello", *GREEDY, "--lang", language)["prompt_token_ids"]
        for language in ("auto", "en", "zh")
    }
    assert prompts["auto"] == prompts["en"] != prompts["zh"]


def test_the_cache_is_as_large_as_one_request_needs(glm4v, monkeypatch):
    """Catches a cache for 64 conversations: gigabytes for a program that holds one."""
    engines = []
    real = generate.load_engine
    monkeypatch.setattr(generate, "load_engine", lambda *a: engines.append(real(*a)) or engines[0])
    run(glm4v, "-p", "Hello", *GREEDY, "--n", "2", "--max-model-len", "320")
    assert engines[0].stats().num_blocks == 2 * 320 // 32


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--prompt", "--image", "--system"])
def test_a_messages_file_and_other_words_are_refused_by_name(glm4v, tmp_path, option):
    """Catches one of two contradicting inputs being dropped in silence."""
    result = run(glm4v, "--messages", tmp_path / "talk.json", option, "x")
    assert result.exit_code == 2
    assert f"messages: cannot be combined with {option};" in result.stderr


REFUSED = [
    ((), "RequestError", "prompt", "is missing; give --prompt TEXT"),
    (("-p", " \n"), "RequestError", "prompt", "is empty"),
    (("-p", "x", "--temperature", "-1"), "RequestError", "temperature", "is -1.0"),
    (("-p", "x", "--lang", "fr"), "RequestError", "lang", "choose one of auto, zh, en"),
    (("-p", "x", "--max-tokens", "9999"), "PromptTooLong", "max_tokens", "only 1018 fit"),
    (("-p", "x", "-i", "no.png"), "ImageError", "image 'no.png'", "No such file"),
    (("-p", "x", "-i", "http://a/b.png"), "ImageError", "image 'http://a/b.png'", "is a URL"),
    (("--messages", "no.json"), "RequestError", "no.json", "cannot be read"),
    (("-p", "x", "--dtype", "int3"), "ConfigError", None, "dtype 'int3' is unknown"),
    (("-p", "x", "--device", "abacus"), "ConfigError", None, "'abacus' is unknown"),
]


@pytest.mark.parametrize(("arguments", "kind", "field", "said"), REFUSED, ids=lambda v: str(v)[:30])
def test_a_refusal_in_json_is_one_object_and_exit_2(glm4v, arguments, kind, field, said):
    """Catches a script that parses stdout and finds nothing, or two objects."""
    result = run(glm4v, *arguments, "--json")
    error = json.loads(result.stdout)["error"]
    assert result.exit_code == 2
    assert (error["type"], error["field"]) == (kind, field)
    assert said in error["message"]
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_logprobs_without_json_are_refused(glm4v, name):
    """Catches an option that is accepted and shows nothing."""
    result = run(glm4v, "-p", "x", f"--{name.replace('_', '-')}", "3")
    assert result.exit_code == 2
    assert f"error: {name}: are told in JSON only; add --json" in result.stderr


def test_without_json_a_refusal_leaves_stdout_empty(glm4v):
    """Catches an error message that a pipe takes for the answer."""
    result = run(glm4v, "-p", "x", "--temperature", "-1")
    assert (result.stdout, result.exit_code) == ("", 2)


def test_standard_input_that_is_no_text_is_refused(glm4v):
    """Catches a traceback for a picture piped in as the prompt."""
    result = run(glm4v, "-p", "-", stdin=b"\xff\xfe\x00")
    assert result.exit_code == 2
    assert "prompt: standard input is not UTF-8" in result.stderr


def test_a_bad_picture_is_refused_before_the_model_is_loaded(
    glm4v, pictures, tmp_path, monkeypatch
):
    """Catches a minute of loading for a mistyped path, or for a file that was cut off."""

    def loads(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(generate, "load_engine", loads)
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(pictures[0]).read_bytes()[:2000])
    (tmp_path / "talk.json").write_text(json.dumps(ask("x", "absent.png")), encoding="utf-8")
    for arguments in (("-p", "x", "-i", cut), ("--messages", tmp_path / "talk.json")):
        result = run(glm4v, *arguments)
        assert result.exit_code == 2
        assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_request_that_fails_exits_with_1_and_says_why(broken):
    """Catches NaN logits reported as an empty answer and success."""
    result = run(broken, "-p", "x", "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 1
    assert said["finish_reason"] == "error"
    assert "NaN" in said["error"]
    assert f"error: {said['error']}" in result.stderr
    plain = run(broken, "-p", "x")
    assert plain.exit_code == 1
    assert plain.stdout == "\n"
