"""A family is one file: `third_family/toy.py` is put beside the real ones and must just work."""

from __future__ import annotations

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

import glimt
import glimt.models
from glimt.demo.noise import random_weights
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
    place = str(Path(__file__).parent / "third_family")
    glimt.models.__path__.append(place)
    (folder / "specials.txt").write_text("<|user|> <|assistant|> <patch> <line>")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text('{"max_side": 24}')
    weights = random_weights(CONFIG, seed=1)
    extra = {"extra_layer.weight": weights["embed.weight"].clone()}
    save_file(weights | extra, folder / "model.safetensors")
    yield folder
    glimt.models.__path__.remove(place)


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
