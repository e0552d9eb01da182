"""One request through admission, preparation and its end, whatever the protocol."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import glimt
from glimt.errors import CapacityError, RequestError
from glimt.inputs.chat import parse_messages
from glimt.server.service import DeadlinePassed, Service, checked_id
from glimt.types import SamplingParams
from services import NUM_BLOCKS, ask, conversation, picture, run, settled


def test_an_answer_is_the_engines_own(folder):
    """Catches pictures that change on their way through the server's decoders."""
    llm = glimt.LLM(str(folder), num_blocks=NUM_BLOCKS)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    expected = [llm.chat(conversation(n), sampling).token_ids for n in (0, 1, 2)]

    async def scene(opened: Service) -> list[Any]:
        found = []
        for n in (0, 1, 2):
            async with opened.answer(ask(n)) as answer:
                found.append((await answer.whole()).token_ids)
        assert opened.num_open == 0
        return found

    assert run(folder, scene) == expected


def test_token_ids_and_bare_texts_are_answered_too(folder):
    """Catches a prompt of ids that gets a template, or loses its first token."""
    llm = glimt.LLM(str(folder), num_blocks=NUM_BLOCKS)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    whole = llm.generate("你好", sampling)

    async def scene(opened: Service) -> None:
        async with opened.answer(ask(messages=None, prompt="你好")) as answer:
            assert (await answer.whole()).token_ids == whole.token_ids
        ids = whole.prompt_token_ids
        async with opened.answer(ask(messages=None, token_ids=ids)) as answer:
            assert answer.request.prompt.original_token_ids == tuple(ids)
            assert (await answer.whole()).token_ids == whole.token_ids

    run(folder, scene)


def test_leaving_early_frees_every_block(folder):
    """Catches a client whose leaving is noticed by nobody but itself."""

    async def scene(opened: Service) -> None:
        engine, steps = opened.host.engine.engine, []
        step = engine.step
        engine.step = lambda: steps.append(1) or step()  # type: ignore[method-assign]
        long = ask(1, sampling={"max_tokens": 300})
        async with opened.answer(long) as answer:
            async for output in answer.stream():
                if output.token_ids:
                    break
        num_steps = len(steps)
        await settled(opened)
        assert len(steps) - num_steps <= 1, "within one step"
        assert opened.num_open == 0

    run(folder, scene)


def test_too_many_are_refused_and_those_before_are_unharmed(folder):
    """Catches a queue without an end, and one whose place is never given back."""

    async def one(opened: Service, number: int) -> str:
        try:
            async with opened.answer(ask(request_id=f"r{number}")) as answer:
                return str((await answer.whole()).token_ids)
        except CapacityError as error:
            return str(error)

    async def scene(opened: Service) -> list[str]:
        return await asyncio.gather(*(one(opened, i) for i in range(8)))

    found = run(folder, scene, max_waiting=2)  # and two run
    assert len({answer for answer in found if answer.startswith("(")}) == 1
    assert sum(answer.startswith("(") for answer in found) == 4
    assert sum("at most 4 may" in answer for answer in found) == 4


def test_choices_count_as_places(folder):
    """Catches n that takes one place and runs many."""

    async def scene(opened: Service) -> None:
        async with opened.answer(ask(sampling={"n": 3, "temperature": 1.0})):
            assert opened.num_open == 3
            with pytest.raises(CapacityError):
                async with opened.answer(
                    ask(request_id="s", sampling={"n": 2, "temperature": 1.0})
                ):
                    pass

    run(folder, scene, max_waiting=2)


def test_a_request_that_takes_too_long_is_aborted(folder):
    """Catches a deadline that is only looked at between requests."""

    async def scene(opened: Service) -> None:
        slow = ask(timeout_s=0.05, sampling={"max_tokens": 450})
        with pytest.raises(DeadlinePassed, match=r"longer than 0\.05 s"):
            async with opened.answer(slow) as answer:
                await answer.whole()
        await settled(opened)

    run(folder, scene)


def test_an_id_in_use_gets_a_suffix(folder):
    """Catches two clients of one id, of which one gets the other's answer or an error."""

    async def scene(opened: Service) -> None:
        async with opened.answer(ask()) as first, opened.answer(ask()) as second:
            assert first.request.request_id == "r"
            assert second.request.request_id.startswith("r-")
            await asyncio.gather(first.whole(), second.whole())

    run(folder, scene)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: ask(3), "holds 3 pictures; at most 2 are taken"),
        (lambda: ask(sampling={"max_tokens": 99_999}), "max_tokens: is 99999 but only"),
        (lambda: ask(messages=None, token_ids=[10**9]), "prompt: token id 1000000000 is not"),
        (lambda: ask(messages=None, prompt=""), "prompt: is empty"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(folder, made, said):
    """Catches a refusal that leaves its place taken."""

    async def scene(opened: Service) -> None:
        for _ in range(5):
            with pytest.raises(RequestError) as caught:
                async with opened.answer(made()):
                    pass
            assert said in str(caught.value)
        assert opened.num_open == 0

    run(folder, scene, limit_images=2, max_waiting=0)


def test_files_are_never_read_for_a_client(folder, tmp_path):
    """Catches a path in a message that shows a file of the server."""
    (tmp_path / "a.png").write_bytes(picture())
    raw = [
        {"role": "user", "content": [{"type": "image_url", "image_url": str(tmp_path / "a.png")}]}
    ]
    given = parse_messages(raw, glimt.ImageLimits())

    async def scene(opened: Service) -> None:
        with pytest.raises(RequestError, match="not a file, which are not read here"):
            async with opened.answer(ask(messages=given)):
                pass

    run(folder, scene)


def test_counts_say_what_happened(folder):
    """Catches a dashboard that shows tokens nobody got, or a request twice."""

    async def scene(opened: Service) -> str:
        async with opened.answer(ask(1)) as answer:
            await answer.whole()
        async with opened.answer(ask(request_id="s")):
            pass  # leaves at once
        return opened.metrics.text().decode()

    text = run(folder, scene)
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = 'model_name="m"'
    assert float(lines[f"vllm:generation_tokens_total{{{label}}}"]) == 4
    assert float(lines[f'vllm:request_success_total{{finished_reason="length",{label}}}']) == 1
    assert float(lines[f"vllm:time_to_first_token_seconds_count{{{label}}}"]) == 1
    assert float(lines[f"vllm:inter_token_latency_seconds_count{{{label}}}"]) == 3
    assert float(lines[f"vllm:e2e_request_latency_seconds_count{{{label}}}"]) == 1
    assert float(lines[f'glimt:images_total{{{label},result="read"}}']) == 1
    assert float(lines[f'glimt:requests_total{{{label},protocol="openai"}}']) == 2


def test_ids_are_checked():
    """Catches an id that breaks a log line or a path."""
    assert checked_id("a-B_9") == "a-B_9"
    assert len(checked_id(None)) == len(checked_id("")) == 32
    for bad in ("a b", "ü", "a/b", "x" * 257, "a\n"):
        with pytest.raises(RequestError, match="1 to 256 letters"):
            checked_id(bad)
