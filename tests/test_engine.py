"""The engine as a whole: whatever the batch, the cache or the preemption, the same tokens."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.engine import Engine
from glimt.errors import PromptTooLong, RequestError
from glimt.inputs.request import RequestOptions
from glimt.loader import open_model
from glimt.outputs.assembler import OutputAssembler
from glimt.types import (
    EncodedPrompt,
    ImageSpan,
    Request,
    RequestOutput,
    SamplingParams,
    StepPlan,
)

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def make_engine(folder: Path, **options: Any) -> Engine:
    settings = {"num_blocks": 64} | options
    return Engine.load(EngineConfig(model=str(folder), **settings))


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(text: str, *images: Image.Image) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def run(
    engine: Engine, requests: Sequence[Request], failed_steps: int = 0
) -> dict[str, RequestOutput]:
    """Run requests to their end, checking the pool's invariants after each step.

    failed_steps: how many are expected; one that is retried in silence would hide a bug
    """
    assemblers = {request.request_id: OutputAssembler(request) for request in requests}
    for request in requests:
        engine.add_request(request)
    finished = {}
    while engine.has_work:
        for output in engine.step():
            whole = assemblers[output.request_id].add(output)
            if whole:
                finished[output.request_id] = whole
        engine.scheduler.pool.check()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert engine.stats().failed_steps == failed_steps
    return finished


def run_one(engine: Engine, request: Request) -> RequestOutput:
    return run(engine, [request])[request.request_id]


def mixed_requests(engine: Engine, count: int = 32) -> list[Request]:
    """Texts of many lengths, no, one or several pictures, greedy and sampled rows."""
    rng = random.Random(7)
    requests = []
    for i in range(count):
        text = "".join(rng.choices("图片里有什么颜色的圆形 abc?", k=rng.randint(1, 60)))
        images = [picture(rng.randint(0, 5)) for _ in range(rng.choice([0, 0, 1, 1, 2, 3]))]
        sampling = GREEDY if i % 3 else replace(GREEDY, temperature=0.9, top_p=0.8, seed=i)
        sampling = replace(sampling, max_tokens=rng.randint(1, 20))
        options = RequestOptions(request_id=f"r{i}")
        requests.append(engine.prepare_chat(ask(text, *images), sampling, options))
    return requests


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tokens of the mixed requests, each alone in a fresh cache."""
    engine = make_engine(folder, enable_prefix_cache=False, feature_cache_bytes=0)
    requests = mixed_requests(engine)
    return {r.request_id: run_one(engine, r).token_ids for r in requests}


@pytest.mark.parametrize(("order", "num_draft_tokens"), [(0, 0), (1, 0), (1, 4)])
def test_a_crowd_in_a_tiny_cache_repeats_every_single_run(
    folder: Path, undisturbed: dict[str, tuple[int, ...]], order: int, num_draft_tokens: int
) -> None:
    """Catches rows that leak into each other, and recomputation that differs after preemption."""
    requests = mixed_requests(make_engine(folder))
    longest = max(len(r.prompt.token_ids) + r.max_tokens for r in requests)
    sizes = {"block_size": 8, "num_blocks": longest // 8 + 4, "max_num_seqs": 32}
    engine = make_engine(folder, num_draft_tokens=num_draft_tokens, **sizes)
    random.Random(order).shuffle(requests)
    finished = run(engine, requests)
    assert {name: output.token_ids for name, output in finished.items()} == undisturbed
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 33}, {"num_draft_tokens": 4}, {"enable_prefix_cache": False}],
)
def test_a_crowd_over_int8_repeats_every_single_run(folder: Path, options: dict[str, Any]) -> None:
    """Catches scales that do not follow their blocks: into a shared prefix, a block that another
    sequence takes over half full, a slot that a refused draft had, a recomputed sequence.
    """
    single = make_engine(folder, kv_dtype="int8", enable_prefix_cache=False)
    requests = mixed_requests(single)
    alone = {r.request_id: run_one(single, r).token_ids for r in requests}
    longest = max(len(r.prompt.token_ids) + r.max_tokens for r in requests)
    sizes = {"block_size": 8, "num_blocks": longest // 8 + 4, "max_num_seqs": 32}
    crowd = make_engine(folder, kv_dtype="int8", **sizes, **options)
    found = run(crowd, mixed_requests(crowd))
    assert {name: output.token_ids for name, output in found.items()} == alone
    assert crowd.stats().preemptions > 0
    assert all(cache.key.dtype == torch.int8 for cache in crowd.runner.caches)


@pytest.mark.parametrize("chunk", [7, 33, 64])
def test_chunked_prompts_repeat_whole_ones(
    folder: Path, undisturbed: dict[str, tuple[int, ...]], chunk: int
) -> None:
    """Catches a chunk edge inside a picture, and a bidirectional prompt that gets split."""
    engine = make_engine(folder, max_num_batched_tokens=chunk)
    requests = mixed_requests(engine)[:16]
    finished = run(engine, requests)
    assert {n: o.token_ids for n, o in finished.items()} == {
        r.request_id: undisturbed[r.request_id] for r in requests
    }


def test_requests_that_arrive_while_others_run_change_nothing(
    folder: Path, undisturbed: dict[str, tuple[int, ...]]
) -> None:
    """Catches state of a step that survives into the next."""
    engine = make_engine(folder, max_num_seqs=5)
    waiting = mixed_requests(engine)
    tokens: dict[str, list[int]] = {r.request_id: [] for r in waiting}
    while waiting or engine.has_work:
        if waiting:
            engine.add_request(waiting.pop())
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    assert {name: tuple(ids) for name, ids in tokens.items()} == undisturbed


def test_a_picture_asked_about_twice_runs_the_tower_once(folder: Path) -> None:
    """Catches a feature cache keyed on the request, or one that is never asked."""
    engine = make_engine(folder)
    first = run_one(engine, engine.prepare_chat(ask("这是什么？", picture(1)), GREEDY))
    again = run_one(engine, engine.prepare_chat(ask("它是什么颜色的？", picture(1)), GREEDY))
    assert engine.stats().tower_images == 1
    assert first.timings.image_s > 0
    assert again.timings.image_s == 0
    cold = make_engine(folder, enable_prefix_cache=False, feature_cache_bytes=0)
    alone = run_one(cold, cold.prepare_chat(ask("它是什么颜色的？", picture(1)), GREEDY))
    assert again.token_ids == alone.token_ids


def test_features_are_kept_in_the_bytes_that_were_given(folder: Path) -> None:
    """Catches a budget of another unit: room for one picture that holds several."""
    model = make_engine(folder).opened.model
    row_bytes = model.embed(torch.zeros(1, dtype=torch.int64)).nbytes
    cost = make_engine(folder).opened.processor.image_cost(40, 30)
    engine = make_engine(folder, feature_cache_bytes=cost * row_bytes, enable_prefix_cache=False)
    for seed, runs in ((1, 1), (1, 1), (2, 2), (1, 3)):
        run_one(engine, engine.prepare_chat(ask("?", picture(seed)), GREEDY))
        assert engine.stats().tower_images == runs


def test_the_time_of_a_picture_is_no_part_of_the_prompts(folder, monkeypatch):
    """Catches tower seconds that are told twice: as the picture's, and in the prefill's as well."""
    engine = make_engine(folder)
    tower = engine.runner.model.image_features
    monkeypatch.setattr(
        engine.runner.model, "image_features", lambda images: time.sleep(0.3) or tower(images)
    )
    times = run_one(engine, engine.prepare_chat(ask("?", picture(1)), GREEDY)).timings
    assert times.image_s >= 0.3
    assert times.image_s + times.prefill_s <= times.ttft_s + 1e-6


def test_a_picture_cut_by_chunks_runs_the_tower_once_without_any_cache(
    folders: dict[str, Path],
) -> None:
    """Catches a tower that runs again for every chunk when the feature budget is too small."""
    engine = make_engine(folders["glm4v_9b"], max_num_batched_tokens=5, feature_cache_bytes=0)
    whole = make_engine(folders["glm4v_9b"])
    request = engine.prepare_chat(ask("这是什么？", picture(1)), GREEDY)
    assert run_one(engine, request).token_ids == run_one(whole, request).token_ids
    assert engine.stats().tower_images == 1


def test_different_pictures_under_equal_ids_are_not_confused(folder: Path) -> None:
    """Catches a prefix hash of token ids alone: every picture has the same placeholder ids."""
    engine = make_engine(folder)
    outputs = [
        run_one(engine, engine.prepare_chat(ask("这是什么？", image), GREEDY))
        for image in (picture(1), picture(2), picture(2, 30, 40), picture(1))
    ]
    assert engine.stats().tower_images == 3
    cold = make_engine(folder, enable_prefix_cache=False, feature_cache_bytes=0)
    for output, seed in zip(outputs[:2], (1, 2), strict=True):
        request = cold.prepare_chat(ask("这是什么？", picture(seed)), GREEDY)
        assert output.token_ids == run_one(cold, request).token_ids
    assert outputs[0].token_ids == outputs[3].token_ids


def second_turn(engine: Engine) -> tuple[RequestOutput, RequestOutput, list[dict[str, Any]]]:
    messages = ask("图片里有什么？图片里有什么？图片里有什么？", picture(3))
    first = run_one(engine, engine.prepare_chat(messages, replace(GREEDY, max_tokens=40)))
    messages.append({"role": "assistant", "content": first.text})
    messages.append({"role": "user", "content": "它是什么颜色的？"})
    return first, run_one(engine, engine.prepare_chat(messages, GREEDY)), messages


def test_a_second_turn_of_glm4v_prefills_only_what_is_new(folders: dict[str, Path]) -> None:
    """Catches a prefix cache that misses pictures or forgets the first turn's blocks."""
    engine = make_engine(folders["glm4v_9b"], block_size=8)
    first, second, messages = second_turn(engine)
    assert engine.stats().tower_images == 1
    assert second.timings.image_s == 0
    shared = first.usage.prompt_tokens // 8 * 8
    assert second.usage.cached_tokens == shared
    new = second.usage.prompt_tokens - shared
    assert engine.stats().prefill_tokens == first.usage.prompt_tokens + new
    cold = make_engine(folders["glm4v_9b"], enable_prefix_cache=False)
    alone = run_one(cold, cold.prepare_chat(messages, GREEDY))
    assert second.token_ids == alone.token_ids


def test_visualglm_shares_identical_contexts_only(folders: dict[str, Path]) -> None:
    """Catches a prefix shared between prompts whose tokens saw different contexts."""
    engine = make_engine(folders["visualglm"], block_size=8)
    _, second, messages = second_turn(engine)
    assert second.usage.cached_tokens == 0
    again = run_one(engine, engine.prepare_chat(messages, GREEDY))
    assert again.usage.cached_tokens == (again.usage.prompt_tokens - 1) // 8 * 8
    assert again.token_ids == second.token_ids
    cold = make_engine(folders["visualglm"], enable_prefix_cache=False)
    assert second.token_ids == run_one(cold, cold.prepare_chat(messages, GREEDY)).token_ids


def test_a_salt_keeps_cached_prompts_apart(folder: Path) -> None:
    """Catches a cache_salt that is accepted and dropped on its way to the scheduler."""
    engine = make_engine(folder, block_size=8)
    found = []
    for salt in ("a", "b", "a"):
        options = RequestOptions(cache_salt=salt)
        request = engine.prepare_chat(ask("one and the same question"), GREEDY, options)
        found.append(run_one(engine, request).usage.cached_tokens)
    assert found[:2] == [0, 0]
    assert found[2] > 0


def test_the_longest_prompt_fits_a_step_beside_all_others(folders: dict[str, Path]) -> None:
    """Catches a budget under which a long VisualGLM prompt waits until the others are done."""
    folder, text = folders["visualglm"], "a long question " * 8
    longest = len(make_engine(folder).prepare_text(text).prompt.token_ids)
    engine = make_engine(
        folder, max_num_seqs=4, max_num_batched_tokens=1, max_model_len=longest + 1
    )
    for _ in range(3):
        engine.add_request(engine.prepare_text("short", replace(GREEDY, max_tokens=20)))
    engine.step()
    engine.add_request(engine.prepare_text(text, replace(GREEDY, max_tokens=1)))
    outputs = engine.step()
    assert len(outputs) == 4, "one of each, at once"


def test_running_and_waiting_are_counted_apart(folders: dict[str, Path]) -> None:
    """Catches one list told for the other, on which a server would turn callers away."""
    engine = make_engine(folders["glm4v_9b"], max_num_seqs=1)
    for _ in range(3):
        engine.add_request(engine.prepare_chat(ask("abc"), GREEDY))
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (1, 2)


def test_several_pictures_cost_their_places_and_change_the_answer(folder: Path) -> None:
    """Catches a second picture that is dropped, or pictures in the wrong order."""
    engine = make_engine(folder)
    a, b = picture(1), picture(2)
    sampling = replace(GREEDY, logprobs=0)
    outputs = [
        run_one(engine, engine.prepare_chat(ask("比较一下。", *images), sampling))
        for images in ((a,), (a, b), (b, a))
    ]
    cost = engine.opened.processor.image_cost(40, 30)
    assert [o.usage.image_tokens for o in outputs] == [cost, 2 * cost, 2 * cost]
    # Random weights may choose equal tokens, but never with equal probabilities.
    first = sorted(o.completions[0].logprobs[0].logprob for o in outputs)
    assert first[1] - first[0] > 1e-4
    assert first[2] - first[1] > 1e-4


def test_a_picture_of_a_later_turn_stands_where_its_family_wants_it(
    folders: dict[str, Path],
) -> None:
    """Catches a picture attached to the wrong turn (GLM-4v) or not moved to the front."""
    messages = [
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好"},
        *ask("这是什么？", picture(1)),
    ]
    starts = {}
    for family in FAMILIES:
        prompt = make_engine(folders[family]).prepare_chat(messages, GREEDY).prompt
        starts[family] = prompt.spans[0].start
    glm = make_engine(folders["glm4v_9b"])
    first_turns = glm.prepare_chat(messages[:2], GREEDY).prompt.token_ids[:-1]
    assert starts["glm4v_9b"] == len(first_turns) + 2
    begin = make_engine(folders["visualglm"]).opened.processor.tokenizer.encode("<img>")
    assert starts["visualglm"] == len(begin)


def test_an_abort_at_any_moment_frees_every_block(folder: Path) -> None:
    """Catches blocks that leak when a request dies while queued, prefilling or decoding."""
    for steps in range(12):
        engine = make_engine(folder, max_num_batched_tokens=40, num_blocks=16)
        for request in mixed_requests(engine, 6):
            engine.add_request(request)
        for _ in range(steps):
            engine.step()
        aborted = [o for i in range(6) for o in engine.abort(f"r{i}")]
        assert all(output.finish_reason == "abort" for output in aborted)
        assert not engine.has_work
        engine.scheduler.pool.check()
        assert engine.stats().num_free_blocks == 16
        assert engine.abort("r0") == []


def test_an_abort_does_not_change_the_others(
    folder: Path, undisturbed: dict[str, tuple[int, ...]]
) -> None:
    """Catches an abort that frees shared blocks under another request."""
    engine = make_engine(folder)
    requests = mixed_requests(engine, 9)
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    for request in requests:
        engine.add_request(request)
    for step in range(200):
        if step % 3 == 0 and step < 9:
            engine.abort(f"r{step}")
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    kept = [f"r{i}" for i in range(9) if i % 3]
    assert {name: tuple(tokens[name]) for name in kept} == {n: undisturbed[n] for n in kept}


def everything_requests(engine: Engine, count: int = 24) -> list[Request]:
    """Rows that differ in every sampling parameter, in the number of choices and in pictures."""
    rng = random.Random(3)
    requests = []
    for i in range(count):
        text = "".join(rng.choices("图片里有什么颜色的圆形 abc?,!", k=rng.randint(1, 60)))
        images = [picture(rng.randint(0, 5)) for _ in range(rng.choice([0, 1, 1, 2]))]
        sampling = SamplingParams(
            temperature=rng.choice([0, 0.7, 1.3]),
            top_k=rng.choice([None, 0, 1, 5]),
            top_p=rng.choice([None, 1.0, 0.5]),
            min_p=rng.choice([None, 0.1]),
            repetition_penalty=rng.choice([None, 1.3]),
            presence_penalty=rng.choice([None, 0.5]),
            frequency_penalty=rng.choice([None, 0.4]),
            logit_bias=rng.choice([{}, {5: 2.0, 77: -5.0}]),
            seed=i,
            max_tokens=rng.randint(1, 24),
            min_tokens=rng.choice([None, 0, 1]),
            stop=rng.choice([(), ("a",), ("的", "e")]),
            stop_token_ids=rng.choice([(), (65, 70, 90)]),
            ignore_eos=rng.choice([True, False]),
            logprobs=rng.choice([None, 2]),
            n=rng.choice([1, 2, 3]),
        )
        options = RequestOptions(request_id=f"e{i}")
        requests.append(engine.prepare_chat(ask(text, *images), sampling, options))
    return requests


def choices_of(output: RequestOutput) -> list[Any]:
    return [(c.text, c.token_ids, c.finish_reason, c.stop_reason) for c in output.completions]


def logprobs_of(output: RequestOutput) -> list[float]:
    tokens = [token for c in output.completions for token in c.logprobs or ()]
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    return [x for t in tokens for x in (t.logprob or 0.0, *(p.logprob for p in t.top_logprobs))]


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 9, "feature_cache_bytes": 0}])
def test_rows_that_differ_in_everything_repeat_their_single_runs(
    folder: Path, options: dict[str, Any]
) -> None:
    """Catches penalties, stop strings, seeds or logprobs that preemption or neighbours change."""
    single = make_engine(folder, enable_prefix_cache=False)
    alone = {r.request_id: run_one(single, r) for r in everything_requests(single)}
    longest = max(o.usage.prompt_tokens for o in alone.values()) + 24
    crowd = make_engine(folder, block_size=4, num_blocks=longest // 4 + 4, **options)
    found = run(crowd, everything_requests(crowd))
    assert crowd.stats().preemptions > 0
    for name, output in found.items():
        assert choices_of(output) == choices_of(alone[name])
        np.testing.assert_allclose(logprobs_of(output), logprobs_of(alone[name]), atol=1e-4)


# --- drafts ----------------------------------------------------------------------------------


class KnowingDrafter:
    """Guesses the answers that prompts got before, with a wrong token now and then.

    answers: (prompt ids, output ids); one that begins like the output so far is taken
    wrong:   what stands for a wrong token; None: the right one's neighbour
    """

    answers: Sequence[tuple[tuple[int, ...], tuple[int, ...]]] = ()
    wrong: int | None = None

    def __init__(self, prompt: EncodedPrompt, stop_token_ids: frozenset[int]) -> None:
        self.known = [output for ids, output in self.answers if ids == prompt.token_ids]

    def draft(self, output_ids: Sequence[int], count: int) -> tuple[int, ...]:
        place = len(output_ids)
        right = next((o for o in self.known if o[:place] == tuple(output_ids)), ())
        guess = [*right[place:], 5, 6, 7, 8][: max(count, 0)]
        for k in range(len(guess)):
            if (place + k) % 5 == 3:
                guess[k] = (guess[k] + 1) % 500 if self.wrong is None else self.wrong
        return tuple(guess)


@pytest.fixture
def drafter(monkeypatch: pytest.MonkeyPatch) -> type[KnowingDrafter]:
    class Ours(KnowingDrafter):
        pass

    monkeypatch.setattr("glimt.scheduler.sequence.Drafter", Ours)
    return Ours


def teach(
    drafter: type[KnowingDrafter], requests: Sequence[Request], found: dict[str, RequestOutput]
) -> None:
    drafter.answers = [
        (request.prompt.token_ids, choice.token_ids)
        for request in requests
        for choice in found[request.request_id].completions
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"num_draft_tokens": 4},
        {"num_draft_tokens": 3, "max_num_batched_tokens": 9, "feature_cache_bytes": 0},
        {"num_draft_tokens": 16, "enable_prefix_cache": False},
    ],
)
@pytest.mark.parametrize("is_tiny", [False, True])
def test_drafts_change_nothing_but_the_number_of_steps(
    folder: Path, drafter: type[KnowingDrafter], options: dict[str, Any], is_tiny: bool
) -> None:
    """Catches penalties, bans, seeds, stop strings, stop ids, lengths or logprobs that do not see
    accepted drafts one by one, refused drafts that leave a trace, and tokens behind the end.
    """
    plain = make_engine(folder, enable_prefix_cache=False)
    requests = everything_requests(plain)
    wanted = {r.request_id: run_one(plain, r) for r in requests}
    teach(drafter, requests, wanted)
    longest = max(o.usage.prompt_tokens for o in wanted.values()) + 24
    sizes = {"block_size": 4, "num_blocks": longest // 4 + 4 if is_tiny else 600}
    engine = make_engine(folder, **sizes, **options)
    found = run(engine, requests)
    for name, output in found.items():
        assert choices_of(output) == choices_of(wanted[name])
        assert output.usage.completion_tokens == wanted[name].usage.completion_tokens
        np.testing.assert_allclose(logprobs_of(output), logprobs_of(wanted[name]), atol=1e-4)
    stats = engine.stats()
    assert (stats.preemptions > 0) == is_tiny
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    usages = [output.usage for output in found.values()]
    assert stats.drafted_tokens == sum(usage.drafted_tokens for usage in usages)
    assert stats.accepted_tokens == sum(usage.accepted_tokens for usage in usages)


def repeating(engine: Engine, **more: Any) -> Request:
    """A model that can say only one token, the letter a, has to repeat it."""
    only = engine.opened.processor.tokenizer.encode("a")[-1]
    params = {"temperature": 0, "max_tokens": 20, "ignore_eos": True} | more
    return engine.prepare_chat(ask("abc"), SamplingParams(logit_bias={only: 100.0}, **params))


def test_a_text_that_repeats_itself_takes_fewer_steps(folder: Path) -> None:
    """Catches drafts that are never made or never accepted, and a wrong count of them."""
    engine = make_engine(folder, num_draft_tokens=4)
    request = repeating(engine)
    engine.add_request(request)
    gained = []
    while engine.has_work:
        gained += engine.step()
    # Three tokens until two of them have an earlier place; three more steps of five, and the rest.
    assert [len(output.token_ids) for output in gained] == [1, 1, 1, 5, 5, 5, 2]
    assert len({token for output in gained for token in output.token_ids}) == 1
    assert gained[-1].usage is not None
    assert (gained[-1].usage.drafted_tokens, gained[-1].usage.accepted_tokens) == (13, 13)
    assert (engine.stats().drafted_tokens, engine.stats().accepted_tokens) == (13, 13)
    off = make_engine(folder)
    plain = run_one(off, repeating(off))
    assert plain.text == "".join(output.text for output in gained)
    assert (plain.usage.drafted_tokens, off.stats().drafted_tokens) == (0, 0)


def test_a_stop_string_amid_accepted_drafts_drops_the_rest(folder: Path) -> None:
    """Catches text, tokens or counts of what was accepted behind a stop string."""
    free = make_engine(folder)
    text = run_one(free, repeating(free)).text
    assert len(text) >= 20
    for num_characters in range(1, 9):
        outputs = []
        for num_draft_tokens in (0, 4):
            engine = make_engine(folder, num_draft_tokens=num_draft_tokens)
            request = repeating(engine, stop=text[:num_characters], logprobs=0)
            outputs.append(run_one(engine, request))
        plain, drafted = outputs
        assert plain.finish_reason == "stop"
        assert choices_of(drafted) == choices_of(plain)
        assert drafted.usage.completion_tokens == plain.usage.completion_tokens < 20
        assert len(drafted.completions[0].logprobs or ()) == drafted.usage.completion_tokens


def test_a_refused_draft_that_is_not_finite_harms_nobody(
    folder: Path, drafter: type[KnowingDrafter]
) -> None:
    """Catches NaN of a draft that reaches the tokens before it under a mask, in this step or from
    behind the sequence's end in the next.
    """
    plain = make_engine(folder)
    requests = mixed_requests(plain, 12)
    wanted = run(plain, requests)
    teach(drafter, requests, wanted)
    said = {token for output in wanted.values() for token in output.token_ids}
    known = said.union(*(r.prompt.token_ids for r in requests))
    drafter.wrong = next(i for i in range(100, 500) if i not in known)
    # Two drafts: with more, hardly a step of so many rows is without a wrong one, which takes all
    # drafts out of its step.
    engine = make_engine(folder, num_draft_tokens=2, block_size=8, num_blocks=100)
    embed = engine.runner.model.embed
    num_spoilt: list[int] = []

    def spoilt(token_ids: torch.Tensor) -> torch.Tensor:
        is_wrong = token_ids == drafter.wrong
        num_spoilt.extend([1] * int(is_wrong.sum()))
        return embed(token_ids).masked_fill(is_wrong[:, None], float("nan"))

    engine.runner.model.embed = spoilt  # type: ignore[method-assign]
    found = run(engine, requests)
    assert {n: o.token_ids for n, o in found.items()} == {n: o.token_ids for n, o in wanted.items()}
    assert num_spoilt
    assert engine.stats().accepted_tokens > 0
    assert all(cache.key.isfinite().all() for cache in engine.runner.caches)


def spoil_sixth_token(engine: Engine) -> None:
    """Of the only request, the logits that choose its sixth token are NaN."""
    logits = engine.runner.model.logits

    def spoilt(hidden: torch.Tensor) -> torch.Tensor:
        out = logits(hidden)
        place = 5 - len(engine.scheduler.running[0].output_ids)
        if 0 <= place < len(out):
            out[place] = float("nan")
        return out

    engine.runner.model.logits = spoilt  # type: ignore[method-assign]


def test_an_accepted_draft_that_is_not_finite_ends_its_request(
    folder: Path, drafter: type[KnowingDrafter]
) -> None:
    """Catches an error that is lost with a draft, or tokens before it that are."""
    plain = make_engine(folder)
    request = plain.prepare_chat(ask("坏"), replace(GREEDY, logit_bias={70: 100.0}))
    teach(drafter, [request], {request.request_id: run_one(plain, request)})
    results = []
    for num_draft_tokens in (0, 4):
        engine = make_engine(folder, num_draft_tokens=num_draft_tokens)
        spoil_sixth_token(engine)
        results.append(run_one(engine, request))
        assert engine.scheduler.pool.num_cached == 0
    assert choices_of(results[1]) == choices_of(results[0])
    assert results[1].finish_reason == "error"
    assert results[1].token_ids == (70,) * 5


def test_steps_that_fail_with_drafts_are_repeated_row_by_row(
    folder: Path, drafter: type[KnowingDrafter]
) -> None:
    """Catches drafts counted or appended twice when a step is tried again."""
    plain = make_engine(folder)
    requests = mixed_requests(plain, 8)
    wanted = run(plain, requests)
    teach(drafter, requests, wanted)
    engine = make_engine(folder, num_draft_tokens=4)
    compute = engine.runner.run

    def failing(plan: StepPlan) -> Any:
        if len(plan.rows) > 1:
            raise MemoryError("only one at a time")
        return compute(plan)

    engine.runner.run = failing  # type: ignore[method-assign]
    for request in requests:
        engine.add_request(request)
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    assert {n: tuple(ids) for n, ids in tokens.items()} == {
        n: o.token_ids for n, o in wanted.items()
    }
    assert engine.stats().failed_steps > 0
    assert engine.stats().accepted_tokens > 0


def test_following_the_advice_makes_a_refused_request_fit(folder: Path) -> None:
    """Catches advice that names one limit where two stand in the way, or a number too small."""
    small = {"num_blocks": 8, "max_model_len": 300}
    sampling = replace(GREEDY, max_tokens=40)
    for length, raised in ((220, ("num_blocks",)), (310, ("num_blocks", "max_model_len"))):
        with pytest.raises(PromptTooLong) as caught:
            make_engine(folder, **small).prepare_text("图" * length, sampling)
        assert [name for name in small if name in caught.value.message] == [*sorted(raised)[::-1]]
        needed = int(caught.value.message.split()[-1])
        bigger = small | {"num_blocks": -(-needed // 32)}
        if "max_model_len" in raised:
            bigger["max_model_len"] = needed
        engine = make_engine(folder, **bigger)
        assert engine.prepare_text("图" * length, sampling).max_tokens == 40
        with pytest.raises(PromptTooLong):
            engine.prepare_text("图" * length, replace(sampling, max_tokens=40 + 32))
    with pytest.raises(PromptTooLong, match="min_tokens: is 5000 but only") as caught:
        make_engine(folder).prepare_text("图", SamplingParams(min_tokens=5000))
    assert caught.value.field == "min_tokens"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("request_id", 5),
        ("request_id", ""),
        ("language", "fr"),
        ("language", None),
        ("cache_salt", 5),
        ("allow_files", "no"),
    ],
)
def test_request_options_of_the_wrong_kind_are_refused_by_name(field: str, value: Any) -> None:
    """Catches a salt that is no text, which would stop the engine when the prompt is hashed."""
    with pytest.raises(RequestError) as caught:
        RequestOptions(**{field: value})
    assert caught.value.field == field


def test_what_can_never_fit_is_refused_with_the_numbers(folder: Path) -> None:
    """Catches a request that waits for ever, or one that is cut in silence."""
    engine = make_engine(folder, num_blocks=4)
    with pytest.raises(PromptTooLong, match=r"of them 1 picture\).* holds 128 .* raise kv_bytes"):
        engine.prepare_chat(ask("图" * 200, picture(1)), GREEDY)
    with pytest.raises(PromptTooLong, match=r"max_tokens: is 500 but only \d+ fit") as caught:
        engine.prepare_chat(ask("图"), replace(GREEDY, max_tokens=500))
    assert caught.value.field == "max_tokens"
    rest = engine.prepare_chat(ask("图"), SamplingParams(temperature=0, ignore_eos=True))
    output = run_one(engine, rest)
    assert output.usage.total_tokens == 128
    assert output.finish_reason == "length"


def test_positions_run_out_separately_from_the_cache(folders: dict[str, Path]) -> None:
    """Catches a limit on expanded tokens where the original's limit is on positions."""
    engine = make_engine(folders["glm4v_9b"], max_model_len=4096, num_blocks=200)
    pictures = [picture(i) for i in range(60)]
    for count in (1200, 5000):  # with and without room in the cache
        with pytest.raises(PromptTooLong, match="knows no more positions"):
            engine.prepare_text("图 " * count, SamplingParams(max_tokens=1))
    request = engine.prepare_chat(ask("图", *pictures), SamplingParams())
    assert len(request.prompt.token_ids) > 1024 > int(request.prompt.positions.max())
    assert request.max_tokens == 1024 - request.prompt.decode_start[0]
    with pytest.raises(PromptTooLong, match="knows no more positions"):
        engine.prepare_chat(ask("图", *pictures), SamplingParams(max_tokens=1000))


def test_nan_logits_end_one_request_with_an_error(folder: Path) -> None:
    """Catches NaN that spreads through a shared step, the caches or reused blocks."""
    engine = make_engine(folder, num_blocks=24)
    healthy = mixed_requests(engine, 4)
    expected = {r.request_id: o.token_ids for r in healthy for o in [run_one(engine, r)]}
    engine = make_engine(folder, num_blocks=24)
    tower = engine.runner.model.image_features
    bad = engine.prepare_chat(ask("坏", picture(99)), GREEDY, RequestOptions(request_id="bad"))

    def poisoned(images: Sequence[Any]) -> list[torch.Tensor]:
        features = tower(images)
        return [
            f * float("nan") if image.digest == bad.images[0].digest else f
            for image, f in zip(images, features, strict=True)
        ]

    engine.runner.model.image_features = poisoned  # type: ignore[method-assign]
    finished = run(engine, [healthy[0], bad, *healthy[1:]])
    assert finished["bad"].finish_reason == "error"
    assert "NaN" in (finished["bad"].completions[0].error or "")
    assert {n: finished[n].token_ids for n in expected} == expected
    engine.runner.model.image_features = tower  # type: ignore[method-assign]
    assert run_one(engine, replace(bad, request_id="mended")).finish_reason == "length"


def test_a_step_that_fails_ends_only_the_request_at_fault(folder: Path) -> None:
    """Catches an exception in one picture's tower that takes the whole batch down."""
    engine = make_engine(folder)
    healthy = mixed_requests(engine, 4)
    expected = {r.request_id: run_one(engine, r).token_ids for r in healthy}
    bad = engine.prepare_chat(ask("坏", picture(99)), GREEDY, RequestOptions(request_id="bad"))
    tower = engine.runner.model.image_features

    def failing(images: Sequence[Any]) -> list[torch.Tensor]:
        if any(image.digest == bad.images[0].digest for image in images):
            raise MemoryError("no room for this picture")
        return tower(images)

    engine.runner.model.image_features = failing  # type: ignore[method-assign]
    finished = run(engine, [*healthy[:2], bad, *healthy[2:]], failed_steps=2)
    assert finished["bad"].finish_reason == "error"
    assert "no room for this picture" in (finished["bad"].completions[0].error or "")
    assert {name: finished[name].token_ids for name in expected} == expected


def test_choices_share_the_prompt_and_differ(folder: Path) -> None:
    """Catches n choices with one seed, or a prompt computed n times."""
    engine = make_engine(folder, block_size=8)
    sampling = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, seed=5, n=3, max_tokens=8)
    request = engine.prepare_chat(ask("说点什么，什么都可以。", picture(4)), sampling)
    output = run_one(engine, request)
    assert [c.index for c in output.completions] == [0, 1, 2]
    assert len({c.token_ids for c in output.completions}) == 3
    assert engine.stats().tower_images == 1
    prompt = output.usage.prompt_tokens
    assert engine.stats().prefix_hit_tokens == 2 * ((prompt - 1) // 8 * 8)
    alone = engine.prepare_chat(
        ask("说点什么，什么都可以。", picture(4)), replace(sampling, seed=6, n=1)
    )
    assert run_one(engine, alone).token_ids == output.completions[1].token_ids


def test_stop_strings_stop_ids_and_lengths_end_a_request_once(folder: Path) -> None:
    """Catches stop controls that are accepted and never read."""
    engine = make_engine(folder)
    free = run_one(engine, engine.prepare_chat(ask("abc"), replace(GREEDY, max_tokens=40)))
    text = free.text
    middle = text[len(text) // 2 :][:3]
    stopped = run_one(
        engine, engine.prepare_chat(ask("abc"), replace(GREEDY, max_tokens=40, stop=(middle,)))
    )
    assert stopped.text == text[: text.index(middle)]
    assert (stopped.finish_reason, stopped.completions[0].stop_reason) == ("stop", middle)
    stop_id = free.token_ids[5]
    at_id = run_one(
        engine,
        engine.prepare_chat(
            ask("abc"), replace(GREEDY, max_tokens=40, ignore_eos=False, stop_token_ids=(stop_id,))
        ),
    )
    cut = free.token_ids.index(stop_id) + 1
    assert at_id.token_ids == free.token_ids[:cut]
    assert (at_id.finish_reason, at_id.completions[0].stop_reason) == ("stop", stop_id)
    assert free.finish_reason == "length"


def test_a_stop_string_that_only_the_end_completes_is_a_stop(folders: dict[str, Path]) -> None:
    """Catches "length" for a text that ended with its stop string, held back to the last token."""
    engine = make_engine(folders["visualglm"])
    comma = engine.opened.processor.tokenizer.encode("a,")[-1]
    sampling = replace(GREEDY, max_tokens=2, stop=(",,",), logit_bias={comma: 100.0})
    output = run_one(engine, engine.prepare_chat(ask("abc"), sampling))
    assert (output.finish_reason, output.completions[0].stop_reason) == ("stop", ",,")
    assert output.text == ""


def test_ignore_eos_drops_the_familys_stop_ids_alone(folder: Path) -> None:
    """Catches load tests that end early, and a stop id asked for that is ignored with the rest."""
    engine = make_engine(folder)
    own = engine.opened.processor.stop_token_ids
    assert own
    for ignore, expected in ((True, {3}), (False, own | {3})):
        sampling = SamplingParams(stop_token_ids=(3,), ignore_eos=ignore)
        assert engine.prepare_chat(ask("abc"), sampling).stop_token_ids == expected
    stop = min(own)
    sampling = SamplingParams(
        temperature=0, max_tokens=3, min_tokens=3, logit_bias={stop: 100.0}, ignore_eos=True
    )
    output = run_one(engine, engine.prepare_chat(ask("abc"), sampling))
    assert output.token_ids == (stop, stop, stop)
    assert output.finish_reason == "length"


def test_defaults_of_each_family_apply_only_when_sampling(folders: dict[str, Path]) -> None:
    """Catches a repetition penalty or a minimum length that changes a plain argmax."""
    visual = make_engine(folders["visualglm"])
    sampled = visual.prepare_chat(ask("你好"), SamplingParams()).sampling
    prompt = len(visual.prepare_chat(ask("你好")).prompt.token_ids)
    assert (sampled.temperature, sampled.top_k, sampled.top_p) == (0.8, 100, 0.4)
    assert (sampled.repetition_penalty, sampled.min_tokens) == (1.2, 100 - prompt)
    greedy = visual.prepare_chat(ask("你好"), SamplingParams(temperature=0)).sampling
    assert (greedy.repetition_penalty, greedy.min_tokens, greedy.top_k) == (1.0, 0, 0)
    asked = SamplingParams(temperature=0, repetition_penalty=1.1)
    assert visual.prepare_chat(ask("你好"), asked).sampling.repetition_penalty == 1.1
    glm = make_engine(folders["glm4v_9b"]).prepare_chat(ask("你好")).sampling
    assert (glm.temperature, glm.top_p, glm.repetition_penalty) == (0.8, 0.8, 1.0)


def test_generation_config_sets_the_defaults_of_glm4v(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Catches a generation_config.json that is not read."""
    for file in folders["glm4v_9b"].iterdir():
        (tmp_path / file.name).symlink_to(file)
    text = '{"temperature": 0.5, "top_p": 0.9, "top_k": 7, "max_length": 8192, "do_sample": true}'
    (tmp_path / "generation_config.json").write_text(text)
    sampling = make_engine(tmp_path).prepare_chat(ask("你好")).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    (tmp_path / "generation_config.json").write_text(text.replace("true", "false"))
    assert make_engine(tmp_path).prepare_chat(ask("你好")).sampling.temperature == 0


def test_ids_outside_the_vocabulary_are_refused(folder: Path) -> None:
    """Catches an id that would write into another row's logits."""
    engine = make_engine(folder)
    for sampling in (
        SamplingParams(logit_bias={-1: 1.0}),
        SamplingParams(logit_bias={10**6: 1.0}),
        SamplingParams(stop_token_ids=(10**6,)),
    ):
        with pytest.raises(RequestError, match="is not between 0 and"):
            engine.prepare_chat(ask("a"), sampling)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", 5),
        ("stop", [b"x"]),
        ("stop", [""]),
        ("stop", ["x"] * 1025),
        ("stop", "x" * 1025),
        ("stop", ["x" * 1024] * 33),
        ("stop_token_ids", "12"),
        ("stop_token_ids", [True]),
        ("logit_bias", [1]),
        ("logit_bias", {65: None}),
        ("logit_bias", {"65": 1.0}),
        ("logit_bias", {True: 1.0}),
        ("n", None),
        ("logit_bias", {65: float("nan")}),
        ("ignore_eos", "no"),
        ("temperature", "1"),
        ("top_k", 1.5),
    ],
)
def test_sampling_values_of_the_wrong_kind_are_refused_by_name(field: str, value: Any) -> None:
    """Catches a TypeError, or a value that fails only once the request runs."""
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field.startswith(field)


def test_what_the_caller_does_to_its_bias_later_changes_nothing() -> None:
    """Catches a mapping kept as it was given, whose later values nobody checks."""
    bias = {5: 1.0}
    sampling = SamplingParams(logit_bias=bias)
    bias[-7] = 1e9
    assert sampling.logit_bias == {5: 1.0}


def test_an_abort_is_not_blamed_on_a_stop_string(folders: dict[str, Path]) -> None:
    """Catches a stop string in the text that the abort released, named as the reason."""
    engine = make_engine(folders["visualglm"])
    comma = engine.opened.processor.tokenizer.encode("a,")[-1]
    sampling = replace(GREEDY, logit_bias={comma: 100.0}, stop=",")
    options = RequestOptions(request_id="held")
    engine.add_request(engine.prepare_chat(ask("abc"), sampling, options))
    for _ in range(4):  # the mark waits for its right neighbour, so it is not text yet
        assert [output.finish_reason for output in engine.step()] == [None]
    (output,) = engine.abort("held")
    assert (output.finish_reason, output.stop_reason, output.text) == ("abort", None, "")


def test_one_stop_string_is_one_and_none_is_none() -> None:
    """Catches stop="END" read as three stop strings of one letter, in silence."""
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3]).stop_token_ids == (3,)
    empty: Any = None
    sampling = SamplingParams(stop=empty, stop_token_ids=empty, logit_bias=empty)
    assert (sampling.stop, sampling.stop_token_ids, sampling.logit_bias) == ((), (), {})


@pytest.mark.parametrize("chunk", [3, 7, 2048])
def test_a_picture_spread_over_several_spans_is_whole(folders: dict[str, Path], chunk: int) -> None:
    """Catches a second span that repeats the first one's rows, or shares its cached blocks."""
    engine = make_engine(folders["glm4v_9b"], max_num_batched_tokens=chunk, block_size=4)
    request = engine.prepare_chat(ask("这是什么？", picture(1)), GREEDY)
    (span,) = request.prompt.spans
    halves = (
        ImageSpan(span.start, 7, 0),
        ImageSpan(span.start + 7, span.length - 7, 0, feature_start=7),
    )
    split = replace(request, request_id="split", prompt=replace(request.prompt, spans=halves))
    swapped = (
        ImageSpan(span.start, 7, 0, feature_start=11),
        ImageSpan(span.start + 7, span.length - 7, 0, feature_start=0),
    )
    other = replace(request, request_id="other", prompt=replace(request.prompt, spans=swapped))
    asked = [replace(r, sampling=replace(r.sampling, logprobs=0)) for r in (request, split, other)]
    outputs = [run_one(engine, r) for r in asked]
    assert outputs[1].token_ids == outputs[0].token_ids
    assert engine.stats().tower_images == 1
    cold = make_engine(folders["glm4v_9b"], enable_prefix_cache=False)
    alone = run_one(cold, asked[2])
    assert outputs[2].token_ids == alone.token_ids
    first = [o.completions[0].logprobs[0].logprob for o in (outputs[0], outputs[2])]
    assert abs(first[0] - first[1]) > 1e-4


def test_an_id_in_use_is_refused(folder: Path) -> None:
    """Catches two requests that would receive each other's text."""
    engine = make_engine(folder)
    request = engine.prepare_chat(ask("a"), GREEDY, RequestOptions(request_id="same"))
    engine.add_request(request)
    with pytest.raises(RequestError, match="already running"):
        engine.add_request(request)


def test_a_text_checkpoint_of_glm4_loads_and_refuses_pictures(tmp_path: Path) -> None:
    """Catches a family that needs vision_config, and a picture silently dropped."""
    import json

    from safetensors.torch import save_file

    from glimt.demo.noise import random_weights

    write_noise_model(tmp_path, "glm4v_9b")
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("vision_config", "boi_token_id", "eoi_token_id"):
        del config[key]
    config |= {"padded_vocab_size": 151552, "hidden_size": 16, "rope_ratio": 500}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(random_weights(config, 0), tmp_path / "model.safetensors")
    engine = make_engine(tmp_path)
    assert run_one(engine, engine.prepare_chat(ask("hi"), GREEDY)).usage.completion_tokens == 12
    with pytest.raises(RequestError, match="text model"):
        engine.prepare_chat(ask("hi", picture(1)), GREEDY)


def test_opening_a_model_reads_no_weights(folder: Path) -> None:
    """Catches checks that come only after minutes of loading."""
    opened = open_model(EngineConfig(model=str(folder)))
    assert all(p.is_meta for p in opened.model.parameters())
