"""A static batch: which step counts for what, and what ends it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from glimt.bench import batch_run
from glimt.bench.batch_run import BatchRun, lack_of_room, run_batch, static_engine
from glimt.bench.workload import RANDOM, Workload
from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.errors import EngineError
from glimt.loader import open_model


def opened(folder, **options):
    config = EngineConfig(model=str(folder), **options)
    model = open_model(config)
    model.load()
    return model, config


def static(folder, num_tokens, **options) -> Engine:
    return static_engine(*opened(folder, **options), num_tokens)[0]


@pytest.fixture
def clock(monkeypatch):
    """Each look at the clock is one second later than the one before."""
    now = iter(range(10_000))
    mine = SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(batch_run, "time", mine)  # the tower goes on with its own


@pytest.mark.parametrize("image", [None, RANDOM])
def test_all_prompts_run_in_one_step_and_every_other_step_decodes(folder, clock, image):
    """Catches a prefill in several steps, and a decode that is counted as the first token."""
    engine = static(folder, 4 * 200, num_blocks=64, max_num_seqs=4)
    workload = Workload(engine, 0, image)
    run = run_batch(engine, [workload.request(100, 6) for _ in range(4)])
    assert run.prefill_s == (1.0,)
    assert run.decode_s == (1.0,) * 5
    assert (run.first_token_s, run.mean_step_s) == (1.0, 1.0)


def test_where_prompts_need_several_steps_the_first_token_is_the_last_rows(folders, clock):
    """Catches a first token that is only the first row's, and decodes that are fewer than out-1."""
    engine = static(
        folders["glm4v_9b"], 1, num_blocks=64, max_num_seqs=4, max_num_batched_tokens=100
    )
    workload = Workload(engine, 0)
    run = run_batch(engine, [workload.request(90, 6) for _ in range(3)])
    assert len(run.prefill_s) > 1
    assert len(run.decode_s) == 5


def test_pictures_of_a_batch_are_all_in_the_tower_and_in_the_first_token(folder):
    """Catches features from a cache: the same picture in every row would be encoded once."""
    engine = static(folder, 4 * 200, num_blocks=64, max_num_seqs=4)
    workload = Workload(engine, 0, RANDOM)
    run = run_batch(engine, [workload.request(60, 2) for _ in range(3)])
    assert engine.stats().tower_images == 3
    assert engine.stats().feature_hits == 0
    assert 0 < run.tower_s <= run.first_token_s


def test_the_prefix_cache_is_off(folder):
    """Catches a second run of the same prompts that computes nothing."""
    engine = static(folder, 400, num_blocks=64)
    workload = Workload(engine, 0)
    for _ in range(2):
        workload.begin("the same")
        run_batch(engine, [workload.request(100, 2)])
    assert engine.stats().prefix_hit_tokens == 0


def test_a_step_that_the_memory_limit_refuses_is_made_smaller_and_told(folders):
    """Catches a bench that cannot run where the engine itself can."""
    model, config = opened(folders["glm4v_9b"], memory_limit_bytes=2**30, max_num_seqs=8)
    engine, remark = static_engine(model, config, 2_000_000)
    assert engine.config.max_num_batched_tokens == config.max_num_batched_tokens
    assert "2,000,000 tokens in one step" in remark
    assert "several of 2,048" in remark
    engine, remark = static_engine(model, config, 3000)
    assert (engine.config.max_num_batched_tokens, remark) == (3000, "")


def test_a_request_that_fails_ends_the_batch_and_leaves_nothing_behind(folder, monkeypatch):
    """Catches rows of a failed batch that run on inside the next one."""
    engine = static(folder, 400, num_blocks=64, max_num_seqs=2)
    workload = Workload(engine, 0)
    requests = [workload.request(40, 4) for _ in range(2)]
    healthy = engine.opened.model.logits
    monkeypatch.setattr(engine.opened.model, "logits", lambda hidden: healthy(hidden) * torch.nan)
    with pytest.raises(EngineError, match="NaN"):
        run_batch(engine, requests)
    assert not engine.has_work
    monkeypatch.setattr(engine.opened.model, "logits", healthy)
    assert len(run_batch(engine, [workload.request(40, 4)]).decode_s) == 3


def test_rows_that_had_to_be_computed_again_are_no_measure(folders):
    """Catches a time of preempted rows that looks like decoding."""
    engine = static(folders["glm4v_9b"], 400, num_blocks=4, max_num_seqs=3)
    workload = Workload(engine, 0)
    requests = [workload.request(31, 30) for _ in range(3)]
    with pytest.raises(EngineError, match="computed again; raise --kv-bytes"):
        run_batch(engine, requests)


def test_what_does_not_fit_is_said_with_the_numbers(folders):
    """Catches a row that waits for room that never comes."""
    engine = static(folders["glm4v_9b"], 400, num_blocks=10, max_num_seqs=8)
    assert lack_of_room(engine, 2, 160) == ""
    assert "3 x 160 tokens exceed the KV cache of 320 tokens" in lack_of_room(engine, 3, 160)
    assert lack_of_room(engine, 1, 1025) == "1025 tokens exceed the context of 1024"


def test_a_single_token_has_no_decoding():
    """Catches a division by nothing."""
    assert BatchRun(prefill_s=(0.5,), decode_s=(), tower_s=0.0).mean_step_s == 0.0
