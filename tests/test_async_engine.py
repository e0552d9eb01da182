"""AsyncEngine: many callers, one engine thread."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import glimt

GREEDY = glimt.SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
ENDLESS = glimt.SamplingParams(temperature=0, ignore_eos=True)
FAR_FROM_ITS_END = 900  # tokens; ENDLESS ends by itself after about 1,000


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["glm4v_9b"]


@pytest.fixture
def engine(folder: Path) -> Iterator[glimt.AsyncEngine]:
    engine = glimt.AsyncEngine.load(glimt.EngineConfig(model=str(folder), num_blocks=64))
    yield engine
    engine.close()


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


async def until_quiet(engine: glimt.AsyncEngine) -> None:
    """Wait, bounded, until every block is free again."""
    for _ in range(2000):
        stats = engine.stats()
        if stats.num_free_blocks == stats.num_blocks and not stats.num_waiting:
            return
        await asyncio.sleep(0.005)
    raise AssertionError(f"blocks are still held: {engine.stats()}")


def test_concurrent_callers_get_what_they_would_get_alone(
    engine: glimt.AsyncEngine, folder: Path
) -> None:
    """Catches outputs delivered to another caller."""
    texts = ["你好", "abc", "这是什么？", "图"]
    llm = glimt.LLM(str(folder), num_blocks=64)
    alone = {text: llm.chat(ask(text), GREEDY).token_ids for text in texts}

    async def main() -> list[glimt.RequestOutput]:
        return await asyncio.gather(*(engine.chat(ask(text), GREEDY) for text in texts * 4))

    outputs = asyncio.run(main())
    assert [output.token_ids for output in outputs] == [alone[text] for text in texts * 4]


def test_a_stream_adds_up_to_the_whole(engine: glimt.AsyncEngine) -> None:
    """Catches deltas lost or reordered between the threads."""

    async def main() -> tuple[str, str]:
        whole = await engine.chat(ask("你好"), GREEDY)
        pieces = [piece.text async for piece in engine.stream_chat(ask("你好"), GREEDY)]
        return whole.text, "".join(pieces)

    whole, streamed = asyncio.run(main())
    assert streamed == whole


def test_leaving_a_stream_aborts_its_request(engine: glimt.AsyncEngine) -> None:
    """Catches a client that disconnects and leaves its request running."""

    async def main() -> None:
        async for _ in engine.stream_chat(ask("你好"), ENDLESS):
            break
        await until_quiet(engine)

    asyncio.run(main())
    assert engine.stats().decode_tokens < FAR_FROM_ITS_END


def test_a_cancelled_caller_aborts_its_request(engine: glimt.AsyncEngine) -> None:
    """Catches a cancellation that is swallowed or leaves blocks behind."""

    async def main() -> None:
        task = asyncio.create_task(engine.chat(ask("你好"), ENDLESS))
        while not engine.stats().num_running:
            await asyncio.sleep(0.002)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_quiet(engine)

    asyncio.run(main())
    assert engine.stats().decode_tokens < FAR_FROM_ITS_END


def test_an_abort_by_id_ends_the_stream_with_that_reason(engine: glimt.AsyncEngine) -> None:
    """Catches an abort that leaves the caller waiting for ever."""

    async def main() -> list[glimt.StepOutput]:
        options = glimt.RequestOptions(request_id="mine")
        outputs = []
        async for output in engine.stream_chat(ask("你好"), ENDLESS, options):
            outputs.append(output)
            engine.abort("mine")
            engine.abort("nobody's")
        return outputs

    outputs = asyncio.run(main())
    assert [o.finish_reason for o in outputs if o.finish_reason] == ["abort"]
    assert outputs[-1].finish_reason == "abort"


def test_an_invalid_request_is_told_to_its_caller_alone(engine: glimt.AsyncEngine) -> None:
    """Catches an input error that reaches the engine thread and stops it."""

    async def main() -> glimt.RequestOutput:
        with pytest.raises(glimt.RequestError, match="messages"):
            await engine.chat([], GREEDY)
        with pytest.raises(glimt.PromptTooLong):
            await engine.chat(ask("图" * 5000), GREEDY)
        return await engine.chat(ask("你好"), GREEDY)

    assert asyncio.run(main()).finish_reason == "length"


def test_an_id_in_use_is_refused_and_the_first_goes_on(engine: glimt.AsyncEngine) -> None:
    """Catches a second subscriber that takes over the first one's outputs."""
    options = glimt.RequestOptions(request_id="same")

    async def main() -> glimt.RequestOutput:
        first = asyncio.create_task(engine.chat(ask("你好"), ENDLESS, options))
        while not engine.stats().num_running:
            await asyncio.sleep(0.002)
        with pytest.raises(glimt.RequestError, match="already running"):
            await engine.chat(ask("别的"), GREEDY, options)
        return await first

    assert asyncio.run(main()).finish_reason == "length"


def test_a_refused_caller_who_leaves_does_not_end_the_first(engine: glimt.AsyncEngine) -> None:
    """Catches an abort by id from one whose request never ran, because the id was taken."""
    options = glimt.RequestOptions(request_id="same")

    async def main() -> glimt.RequestOutput:
        first = asyncio.create_task(engine.chat(ask("你好"), ENDLESS, options))
        while not engine.stats().num_running:
            await asyncio.sleep(0.002)
        second = engine.stream(await engine.prepare_chat(ask("别的"), GREEDY, options))
        waiting = asyncio.ensure_future(anext(second))
        await asyncio.sleep(0)  # asked, and gone before the engine has answered
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return await first

    assert asyncio.run(main()).finish_reason == "length"


def test_closing_a_stream_has_aborted_its_request_on_return(engine: glimt.AsyncEngine) -> None:
    """Catches an abort that waits for the garbage collector."""
    aborted: list[str] = []
    abort = engine._engine.abort
    engine._engine.abort = lambda name: aborted.append(name) or abort(name)  # type: ignore

    async def main() -> None:
        options = glimt.RequestOptions(request_id="mine")
        stream = engine.stream_chat(ask("你好"), ENDLESS, options)
        await anext(stream)
        await stream.aclose()
        engine._command(lambda: aborted.append("later"))
        await until_quiet(engine)

    asyncio.run(main())
    assert aborted[0] == "mine"


def test_a_bare_text_can_be_streamed(engine: glimt.AsyncEngine) -> None:
    """Catches a completion that only comes whole."""

    async def main() -> tuple[str, str]:
        whole = await engine.generate("once upon", GREEDY)
        request = await engine.prepare_text("once upon", GREEDY)
        return whole.text, "".join([piece.text async for piece in engine.stream(request)])

    whole, streamed = asyncio.run(main())
    assert streamed == whole


def test_a_request_the_engine_cannot_take_is_told_to_its_caller_alone(
    engine: glimt.AsyncEngine,
) -> None:
    """Catches an exception while queueing that stops the thread and strands its caller."""
    add = engine._engine.add_request

    def explode(request: Any) -> None:
        raise RuntimeError("no place for it")

    async def main() -> glimt.RequestOutput:
        engine._engine.add_request = explode  # type: ignore[method-assign]
        with pytest.raises(glimt.EngineError, match="no place for it"):
            await engine.chat(ask("你好"), GREEDY)
        engine._engine.add_request = add  # type: ignore[method-assign]
        return await engine.chat(ask("你好"), GREEDY)

    assert asyncio.run(main()).finish_reason == "length"


def test_a_dead_engine_tells_everyone(engine: glimt.AsyncEngine) -> None:
    """Catches callers that wait for ever on an engine whose thread has gone."""

    def explode() -> list[glimt.StepOutput]:
        raise RuntimeError("the lights went out")

    async def main() -> None:
        first = asyncio.create_task(engine.chat(ask("你好"), ENDLESS))
        while not engine.stats().num_running:
            await asyncio.sleep(0.002)
        engine._engine.step = explode  # type: ignore[method-assign]
        with pytest.raises(glimt.EngineError, match="the lights went out"):
            await first
        with pytest.raises(glimt.EngineError, match="has stopped"):
            await engine.chat(ask("你好"), GREEDY)
        assert not engine.is_alive

    asyncio.run(main())


def test_closing_ends_running_requests_and_refuses_new_ones(folder: Path) -> None:
    """Catches a close() that hangs or strands its callers."""
    engine = glimt.AsyncEngine.load(glimt.EngineConfig(model=str(folder), num_blocks=64))

    async def main() -> None:
        task = asyncio.create_task(engine.chat(ask("你好"), ENDLESS))
        while not engine.stats().num_running:
            await asyncio.sleep(0.002)
        await asyncio.to_thread(engine.close)
        with pytest.raises(glimt.EngineError, match="has stopped"):
            await task
        with pytest.raises(glimt.EngineError, match="has stopped"):
            await engine.chat(ask("你好"), GREEDY)

    asyncio.run(main())
