"""A family is one file: `third_family/toy.py` is put beside the real ones and must just work."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import glimt
import glimt.models
from conftest import scanned_too
from glimt.bench import synthetic
from glimt.cli import app
from glimt.demo.noise import random_weights
from glimt.kernels.limits import LimitMeter
from glimt.types import Request

GREEDY = glimt.SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)
CONFIG = {
    "model_type": "toy",
    "num_layers": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "ffn_size": 40,
    "vocab_size": 272,
    "max_positions": 256,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of the toy family, while its file stands in the scanned folder."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "specials.toy").write_text("<|user|> <|assistant|> <patch> <line>")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text('{"max_side": 24}')
    with scanned_too(glimt.models, Path(__file__).parent / "third_family"):
        weights = random_weights(CONFIG, seed=1)
        extra = {"extra_layer.weight": weights["embed.weight"].clone()}
        save_file(weights | extra, folder / "model.safetensors")
        yield folder


def make_engine(folder: Path, **options: Any) -> glimt.Engine:
    settings = {"num_blocks": 64} | options
    return glimt.Engine.load(glimt.EngineConfig(model=str(folder), **settings))


def picture(seed: int, width: int, height: int) -> dict[str, Any]:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


A, B, C = picture(1, 24, 12), picture(2, 8, 20), picture(3, 4, 4)


def say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


CONVERSATION = [
    {"role": "user", "content": [A, say("这是什么？"), B]},
    {"role": "assistant", "content": "一只猫。"},
    {"role": "user", "content": [say("那"), C, say("呢？"), A]},
]


def run(engine: glimt.Engine, requests: Sequence[Request]) -> dict[str, list[tuple[int, float]]]:
    """Tokens with their log-probabilities, by request."""
    found: dict[str, list[tuple[int, float]]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.add_request(request)
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            found[output.request_id] += [(t.token_id, t.logprob or 0.0) for t in output.logprobs]
        engine.scheduler.pool.check()
    assert engine.stats().failed_steps == 0
    return found


def same(found: list[tuple[int, float]], expected: list[tuple[int, float]]) -> bool:
    ids = [token for token, _ in found] == [token for token, _ in expected]
    return ids and np.allclose([x for _, x in found], [x for _, x in expected], atol=1e-4)


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[tuple[int, float]]:
    engine = make_engine(folder, enable_prefix_cache=False)
    request = engine.prepare_chat(CONVERSATION, GREEDY)
    return run(engine, [request])[request.request_id]


def test_positions_follow_the_grid_of_each_picture(folder: Path) -> None:
    """Catches a prompt encoder that is told what a picture costs but not how it is laid out."""
    prompt = make_engine(folder).prepare_chat(CONVERSATION[:1], GREEDY).prompt
    assert [(s.length, s.image, s.feature_start) for s in prompt.spans] == [
        *[(6, 0, 6 * row) for row in range(3)],
        *[(2, 1, 2 * row) for row in range(5)],
    ]
    first = prompt.positions[:, 1:22].reshape(3, 3, 7)
    assert first[0].tolist() == [[1] * 7] * 3
    assert first[1].tolist() == [[1 + row] * 7 for row in range(3)]
    assert first[2].tolist() == [[*range(1, 8)]] * 3
    n, start = len(prompt.token_ids), prompt.decode_start[0]
    assert prompt.positions_between(n + 3, n + 4)[:, 0].tolist() == [start + 3, start + 6, start]


@pytest.mark.parametrize("chunk", range(1, 28))
def test_any_chunk_gives_the_whole_prompts_answer_and_one_tower_run(
    folder: Path, whole: list[tuple[int, float]], chunk: int
) -> None:
    """Catches features lost while a chunk holds nothing but what divides a picture's spans."""
    engine = make_engine(
        folder, max_num_batched_tokens=chunk, feature_cache_bytes=0, enable_prefix_cache=False
    )
    request = engine.prepare_chat(CONVERSATION, GREEDY)
    assert same(run(engine, [request])[request.request_id], whole)
    # Without a cache the last picture, which is the first again, may go through once more.
    assert engine.stats().tower_images in (3, 4)
    assert engine.stats().decode_tokens == 9
    cached = make_engine(folder, max_num_batched_tokens=chunk)
    run(cached, [request])
    assert cached.stats().tower_images == 3
    assert cached.stats().feature_hits <= 1


def requests_of(engine: glimt.Engine) -> list[Request]:
    rng = random.Random(2)
    found = []
    for number in range(16):
        shown = [picture(rng.randint(0, 3), *rng.choice([(24, 12), (8, 20), (4, 4), (30, 30)]))]
        parts = [*shown * rng.randint(0, 2), say("图" * rng.randint(1, 20))]
        sampling = replace(GREEDY, max_tokens=rng.randint(1, 24))
        options = glimt.RequestOptions(request_id=str(number))
        content = [{"role": "user", "content": rng.sample(parts, len(parts))}]
        found.append(engine.prepare_chat(content, sampling, options))
    return found


@pytest.mark.parametrize("budget", [6, 2048])
def test_a_crowd_in_a_tiny_cache_repeats_every_single_run(folder: Path, budget: int) -> None:
    """Catches positions counted from the cache after preemption, and mixed-up pictures."""
    engine = make_engine(folder, enable_prefix_cache=False)
    requests = requests_of(engine)
    alone = {r.request_id: run(engine, [r])[r.request_id] for r in requests}
    longest = max(len(r.prompt.token_ids) + r.max_tokens for r in requests)
    crowd = make_engine(
        folder, block_size=4, num_blocks=longest // 4 + 3, max_num_batched_tokens=budget
    )
    found = run(crowd, requests)
    assert crowd.stats().preemptions > 0
    assert all(same(found[name], alone[name]) for name in alone)


def test_a_second_turn_prefills_only_what_is_new(
    folder: Path, whole: list[tuple[int, float]]
) -> None:
    """Catches a prefix hash that several spans of one picture confuse."""
    engine = make_engine(folder, block_size=4)
    first = engine.prepare_chat(CONVERSATION[:1], GREEDY)
    run(engine, [first])
    second = engine.prepare_chat(CONVERSATION, GREEDY)
    before = engine.stats().prefill_tokens
    assert same(run(engine, [second])[second.request_id], whole)
    shared = len(first.prompt.token_ids) // 4 * 4
    assert engine.stats().prefill_tokens - before == len(second.prompt.token_ids) - shared
    assert engine.stats().tower_images == 3


# --- what an engine may be told ----------------------------------------------------------------


def repeated(engine: glimt.Engine) -> Request:
    """A prompt and an answer that say everything several times, so that there is much to guess."""
    content = [A, say("一二三一二三一二三" * 3), A]
    sampling = replace(GREEDY, max_tokens=60)
    return engine.prepare_chat([{"role": "user", "content": content}], sampling)


def test_drafts_change_no_token(folder: Path) -> None:
    """Catches positions of guesses that are counted in steps of one in every channel."""
    plain, drafting = make_engine(folder), make_engine(folder, num_draft_tokens=4)
    request = repeated(plain)
    expected = run(plain, [request])[request.request_id]
    assert same(run(drafting, [request])[request.request_id], expected)
    assert drafting.stats().drafted_tokens > 0


@pytest.mark.parametrize("chunk", [5, 16])
@pytest.mark.parametrize("options", [{"kv_dtype": "int8"}, {"dtype": "bfloat16"}], ids=str)
def test_fewer_bits_leave_chunks_what_a_whole_prompt_is(
    folder: Path, whole: list[tuple[int, float]], options: dict[str, str], chunk: int
) -> None:
    """Catches a cache in int8, or the kernels, that take a family of other sizes otherwise."""
    request = make_engine(folder).prepare_chat(CONVERSATION, replace(GREEDY, max_tokens=1))
    found = []
    for budget in (2048, chunk):
        engine = make_engine(folder, max_num_batched_tokens=budget, **options)
        found += run(engine, [request])[request.request_id]
    # Steps of 2^-8 of about 1 through two layers; log-probabilities are about -4.
    assert [token for token, _ in found] == [whole[0][0]] * 2
    assert [x for _, x in found] == pytest.approx([whole[0][1]] * 2, abs=0.05)


def test_the_python_ways_in_give_the_engines_tokens(
    folder: Path, whole: list[tuple[int, float]]
) -> None:
    """Catches a way in that knows the families it serves."""
    expected = tuple(token for token, _ in whole)
    llm = glimt.LLM(str(folder), num_blocks=64)
    assert llm.chat(CONVERSATION, GREEDY).token_ids == expected

    engine = glimt.AsyncEngine(make_engine(folder))
    try:
        assert asyncio.run(engine.chat(CONVERSATION, GREEDY)).token_ids == expected
    finally:
        engine.close()


# --- commands ----------------------------------------------------------------------------------


def glimt_command(*arguments: object, typed: str = "") -> str:
    """What a command that succeeds writes to its standard output."""
    ran = CliRunner().invoke(app, [str(one) for one in arguments], input=typed)
    assert ran.exit_code == 0, ran.output
    return ran.stdout


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    A["image"].save(path)
    return path


SHORT = ("--temperature", 0, "--max-tokens", 6, "--ignore-eos")


@pytest.mark.parametrize(
    "options",
    [
        ("--kv-dtype", "int8", "--draft-tokens", 4, "--dtype", "bfloat16"),
        ("--quant", "int4", "--quant-tower", "int8"),
    ],
    ids=str,
)
def test_generate_answers(folder: Path, shown: Path, options: tuple[object, ...]) -> None:
    """Catches an option that only the two families take."""
    said = glimt_command(
        "generate", "-m", folder, "-i", shown, "-p", "什么?", *SHORT, *options, "--json"
    )
    usage = json.loads(said)["usage"]
    assert usage["completion_tokens"] == 6
    assert usage["image_tokens"] == 18


def test_chat_holds_a_conversation(folder: Path, shown: Path) -> None:
    """Catches a second turn that loses the picture of the first."""
    log = shown.with_name("log.json")
    glimt_command("chat", "-m", folder, "-i", shown, *SHORT, typed=f"什么?\n再说\n/save {log}\n")
    assert log.exists()


def test_inspect_tells_what_is_in_the_folder(folder: Path) -> None:
    """Catches tensors of a third family's tower counted as text, or ignored ones as wrong."""
    told = json.loads(glimt_command("inspect", folder, "--json"))
    assert (told["family"], told["problems"]) == ("toy", [])
    tensors = {group["name"]: group["num_tensors"] for group in told["groups"]}
    assert tensors == {"language": 22, "vision": 4, "other": 1}


def test_a_quantised_folder_answers_as_quantising_while_loading(
    folder: Path, shown: Path, tmp_path: Path
) -> None:
    """Catches a folder written without its tokenizer, whose file has an ending of its own."""
    question = ("-i", shown, "-p", "什么?", *SHORT, "-q")
    formats = ("--format", "none", "--head", "none", "--tower", "int8")
    glimt_command("quantize", folder, tmp_path / "int8", *formats)
    assert (tmp_path / "int8" / "specials.toy").exists()
    written = glimt_command("generate", "-m", tmp_path / "int8", *question)
    assert written == glimt_command("generate", "-m", folder, "--quant-tower", "int8", *question)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("quantize", "blocks.0.gate.weight is converted while loading; quantise such a family"),
        ("convert", "holds no mp_rank_00_model_states.pt"),
    ],
)
def test_what_is_not_for_this_family_is_refused(
    folder: Path, tmp_path: Path, command: str, said: str
) -> None:
    """Catches a traceback, and a folder that is written all the same."""
    ran = CliRunner().invoke(app, [command, str(folder), str(tmp_path / "out")])
    assert ran.exit_code == 2
    assert said in ran.output
    assert not (tmp_path / "out").exists()


def test_bench_times_random_weights_of_its_shapes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches special ids, a processor's settings or layers that only two families have."""
    meter = LimitMeter(1, num_bytes=2**20)  # its figures do not matter here
    monkeypatch.setattr(synthetic, "LimitMeter", lambda threads, num_bytes: meter)
    short = ("--layers", 1, "--batch", "1,2", "--output-len", 4, "--repeats", 1)
    data = json.loads(glimt_command("bench", "synthetic", folder, *short, "--json"))
    assert (data["model"]["family"], data["model"]["layers"]) == ("toy", 1)
    assert data["settings"]["image_tokens"] == 36
    ran = CliRunner().invoke(app, ["bench", "synthetic", str(folder), "--vision-layers", "1"])
    assert ran.exit_code == 2
    assert "config.json does not say how many there are (num_hidden_layers)" in ran.output
