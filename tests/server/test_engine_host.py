"""The engine's life: loading, ready, started again after a failure, given up, draining."""

from __future__ import annotations

import asyncio
import logging
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import glimt
from glimt.demo.noise import write_noise_model
from glimt.errors import ConfigError, EngineError
from glimt.server import host as hosting
from glimt.server.host import EngineHost, EngineUnavailable
from glimt.structured import GrammarCompiler
from glimt.types import Grammar, SamplingParams

ASKED = [{"role": "user", "content": "你好"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_noise_model(path, "glm4v_9b")
    return path


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosting, "_WATCH_S", 0.01)


def loader(folder: Path) -> Callable[[], glimt.AsyncEngine]:
    return lambda: glimt.AsyncEngine.load(glimt.EngineConfig(model=str(folder), num_blocks=32))


def break_engine(engine: glimt.AsyncEngine) -> None:
    """The next step raises what nobody expects."""

    def step() -> Any:
        raise RuntimeError("the driver is gone")

    engine.engine.step = step  # type: ignore[method-assign]


async def break_by_a_request(host: EngineHost) -> None:
    """Its engine fails in a step, which that request is told."""
    break_engine(host.engine)
    with pytest.raises(EngineError):
        await host.engine.chat(ASKED, SamplingParams(max_tokens=2))


async def until(is_true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


def test_nothing_is_taken_before_the_model_answers(folder):
    """Catches a server that is ready before its model is, and one that never gets there."""

    async def scene() -> None:
        host = EngineHost(loader(folder), 3, 60)
        assert not host.is_ready
        assert host.is_live
        with pytest.raises(EngineUnavailable, match="still loading"):
            _ = host.engine
        await host.start()
        assert host.is_ready
        assert (await host.engine.chat(ASKED, SamplingParams(max_tokens=2))).completions
        await host.stop()

    asyncio.run(scene())


def test_the_first_grammar_finds_the_vocabulary_made(folder, monkeypatch):
    """Catches half a second in which the first schema holds up all that is being answered."""

    async def scene() -> None:
        host = EngineHost(loader(folder), 3, 60)
        await host.start()
        monkeypatch.delattr(GrammarCompiler, "_build_vocabulary")
        sampling = SamplingParams(max_tokens=8, grammar=Grammar.of_choice(["yes", "no"]))
        said = await host.engine.chat(ASKED, sampling)
        assert said.text in ("yes", "no")
        await host.stop()

    asyncio.run(scene())


def test_a_failed_engine_is_started_again_and_its_requests_are_told(folder):
    """Catches requests that wait for ever, and a server that stays broken."""

    async def scene() -> None:
        host = EngineHost(loader(folder), 3, 60)
        await host.start()
        first = host.engine
        sampling = SamplingParams(max_tokens=400, ignore_eos=True)
        running = asyncio.create_task(first.chat(ASKED, sampling))
        await asyncio.sleep(0.05)
        break_engine(first)
        with pytest.raises(EngineError, match="the driver is gone"):
            await running
        await until(lambda: host.num_restarts == 1 and host.is_ready)
        assert host.engine is not first
        assert (await host.engine.chat(ASKED, SamplingParams(max_tokens=2))).completions
        await host.stop()

    asyncio.run(scene())


def test_a_failed_engine_leaves_before_the_next_is_loaded(folder, caplog):
    """Catches a restart that needs memory for two models, by whatever still holds the first."""
    caplog.set_level(logging.CRITICAL, "glimt")  # pytest keeps what is logged, with its traceback

    async def scene() -> None:
        models: list[weakref.ref[Any]] = []
        alive: list[int] = []

        def load() -> glimt.AsyncEngine:
            alive.append(sum(model() is not None for model in models))
            engine = loader(folder)()
            models.append(weakref.ref(engine.engine.opened.model))
            return engine

        host = EngineHost(load, 3, 60)
        await host.start()

        def fail(*args: object) -> Any:
            raise RuntimeError("the driver is gone")

        host.engine.engine.scheduler.commit = fail  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="the driver is gone"):
            await host.engine.chat(ASKED, SamplingParams(max_tokens=2))
        await until(lambda: host.num_restarts == 1 and host.is_ready)
        await host.stop()
        assert alive == [0, 0]

    asyncio.run(scene())


def test_whatever_keeps_the_next_engine_from_loading_is_told(folder):
    """Catches a server that says for ever that it loads."""

    async def scene() -> None:
        engines = [loader(folder)()]

        def load() -> glimt.AsyncEngine:
            if not engines:
                raise OSError("the disk is gone")
            return engines.pop()

        host = EngineHost(load, 3, 60)
        await host.start()
        await break_by_a_request(host)
        await until(lambda: host.state == "failed")
        assert not host.is_live
        with pytest.raises(EngineUnavailable, match="not started again: the disk is gone"):
            _ = host.engine
        await host.stop()

    asyncio.run(scene())


def test_an_engine_that_fails_again_and_again_is_given_up(folder):
    """Catches a restart without end, which hides that nothing works."""

    async def scene() -> None:
        host = EngineHost(loader(folder), 1, 60)
        await host.start()
        for _ in range(2):
            await until(lambda: host.is_ready)
            await break_by_a_request(host)
            await until(lambda: not host.is_ready or host.state == "failed")
        await until(lambda: host.state == "failed")
        assert not host.is_live
        with pytest.raises(EngineUnavailable, match="not started again: RuntimeError"):
            _ = host.engine
        await host.stop()

    asyncio.run(scene())


def test_a_model_that_cannot_be_loaded_is_an_error_at_the_start():
    """Catches a server without a model that says it is loading."""

    def load() -> glimt.AsyncEngine:
        raise ConfigError("model", ["is missing"])

    with pytest.raises(ConfigError, match="is missing"):
        asyncio.run(EngineHost(load, 3, 60).start())


def test_a_draining_server_takes_nothing_and_lives(folder):
    """Catches a load balancer that goes on sending, and a probe that kills what still runs."""

    async def scene() -> None:
        host = EngineHost(loader(folder), 3, 60)
        await host.start()
        running = host.engine.chat(ASKED, SamplingParams(max_tokens=5, ignore_eos=True))
        task = asyncio.create_task(running)
        await asyncio.sleep(0)
        host.drain()
        assert not host.is_ready
        assert host.is_live
        with pytest.raises(EngineUnavailable, match="shutting down"):
            _ = host.engine
        assert len((await task).token_ids) == 5
        await host.stop()

    asyncio.run(scene())


def test_an_engine_that_makes_no_step_is_not_live(folder):
    """Catches a probe that answers as long as the process does."""

    async def scene() -> None:
        host = EngineHost(loader(folder), 3, stall_timeout_s=0.1)
        await host.start()
        engine = host.engine
        release = asyncio.Event()
        slow = engine.engine.step

        def step() -> Any:
            time.sleep(0.4)
            return slow()

        engine.engine.step = step  # type: ignore[method-assign]
        task = asyncio.create_task(engine.chat(ASKED, SamplingParams(max_tokens=1)))
        await until(lambda: not host.is_live, 5)
        await task
        assert host.is_live
        release.set()
        await host.stop()

    asyncio.run(scene())
