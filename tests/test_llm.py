"""The synchronous Python API on small random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import glimt

GREEDY = glimt.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> glimt.LLM:
    return glimt.LLM(str(folder), num_blocks=64)


def ask(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def test_one_conversation_gives_one_output_and_a_list_gives_a_list(llm: glimt.LLM) -> None:
    """Catches a batch of one that is unpacked, or a conversation taken for a batch."""
    one = llm.chat(ask("你好"), GREEDY)
    assert isinstance(one, glimt.RequestOutput)
    batch = llm.chat([ask("你好"), ask("abc")], GREEDY)
    assert [len(output.token_ids) for output in batch] == [6, 6]
    assert batch[0].token_ids == one.token_ids
    assert llm.chat([ask("你好")], GREEDY)[0].token_ids == one.token_ids


def test_a_batch_keeps_its_order_and_its_own_sampling(llm: glimt.LLM) -> None:
    """Catches outputs returned as they finish, and one SamplingParams used for all."""
    lengths = [9, 1, 5]
    sampling = [glimt.SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = llm.chat([ask("a"), ask("b"), ask("c")], sampling)
    assert [output.usage.completion_tokens for output in outputs] == lengths
    with pytest.raises(glimt.RequestError, match="has 3 entries for 2 prompts"):
        llm.chat([ask("a"), ask("b")], sampling)


def test_generate_continues_a_bare_text(llm: glimt.LLM) -> None:
    """Catches a chat template around a completion prompt."""
    output = llm.generate("once upon", GREEDY)
    chat = llm.chat(ask("once upon"), GREEDY)
    assert len(output.prompt_token_ids) < len(chat.prompt_token_ids)
    assert [o.token_ids for o in llm.generate(["once upon"] * 2, GREEDY)] == [output.token_ids] * 2


def test_every_kind_of_picture_source_gives_the_same_answer(llm: glimt.LLM, tmp_path: Path) -> None:
    """Catches a source whose bytes are decoded or hashed in another way."""
    import base64

    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    path = tmp_path / "p.png"
    image.save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    sources = [image, path, str(path), path.read_bytes(), text, f"data:image/png;base64,{text}"]
    answers = set()
    for source in sources:
        parts = [{"type": "image", "image": source}, {"type": "text", "text": "这是什么？"}]
        answers.add(llm.chat([{"role": "user", "content": parts}], GREEDY).token_ids)
    assert len(answers) == 1
    assert llm.stats().tower_images == 1


def test_a_stream_adds_up_to_the_whole_and_can_be_left(llm: glimt.LLM) -> None:
    """Catches lost deltas, and a request that runs on after its reader has gone."""
    whole = llm.chat(ask("你好"), GREEDY)
    pieces = list(llm.stream_chat(ask("你好"), GREEDY))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
    stream = llm.stream_chat(ask("你好"), glimt.SamplingParams(ignore_eos=True))
    next(stream)
    stream.close()
    stats = llm.stats()
    assert (stats.num_running, stats.num_free_blocks) == (0, stats.num_blocks)


def test_two_open_streams_get_their_own_text(llm: glimt.LLM) -> None:
    """Catches a stream that yields, or throws away, what another stream is waiting for."""
    texts = ["你好", "abc"]
    alone = [llm.chat(ask(text), GREEDY).text for text in texts]
    streams = [llm.stream_chat(ask(text), GREEDY) for text in texts]
    told = ["", ""]
    for pieces in zip(*streams, strict=True):
        told = [text + piece.text for text, piece in zip(told, pieces, strict=True)]
    assert told == alone


def test_a_refused_id_does_not_abort_its_owner(llm: glimt.LLM) -> None:
    """Catches a clean-up that ends somebody else's request."""
    options = glimt.RequestOptions(request_id="mine")
    stream = llm.stream_chat(ask("你好"), GREEDY, options=options)
    first = next(stream)
    with pytest.raises(glimt.RequestError, match="already running"):
        llm.chat(ask("别的"), GREEDY, options=options)
    rest = list(stream)
    assert rest[-1].finish_reason == "length"
    assert first.text + "".join(p.text for p in rest) == llm.chat(ask("你好"), GREEDY).text


def test_an_invalid_conversation_of_a_batch_is_told_before_anything_runs(llm: glimt.LLM) -> None:
    """Catches a batch that half runs, and an error without the field."""
    before = llm.stats().prefill_tokens
    bad = [{"role": "user", "content": [{"type": "image", "image": "/no/such/file.png"}]}]
    with pytest.raises(glimt.ImageError) as caught:
        llm.chat([ask("a"), bad], GREEDY)
    assert caught.value.field == "messages[0].content[0]"
    assert llm.stats().prefill_tokens == before


@pytest.mark.parametrize("wrong", [None, {"role": "user"}, iter([]), b"x", 5])
def test_arguments_of_the_wrong_kind_are_refused_by_name(llm: glimt.LLM, wrong: Any) -> None:
    """Catches a KeyError or a TypeError from somewhere inside."""
    with pytest.raises(glimt.RequestError, match="messages"):
        llm.chat(wrong, GREEDY)
    with pytest.raises(glimt.RequestError, match="prompt"):
        llm.generate(wrong, GREEDY)
    with pytest.raises(glimt.RequestError, match="prompt"):
        llm.generate([wrong], GREEDY)


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (glimt.Message("bot", ()), "messages[0].role"),  # type: ignore[arg-type]
        (glimt.Message("user", "abc"), "messages[0].parts"),  # type: ignore[arg-type]
        (glimt.Message("user", ("abc",)), "messages[0].parts[0]"),  # type: ignore[arg-type]
    ],
)
def test_a_message_object_is_checked_as_a_dictionary_is(
    llm: glimt.LLM, message: glimt.Message, field: str
) -> None:
    """Catches a KeyError, and text that is dropped because its part is no TextPart."""
    with pytest.raises(glimt.RequestError) as caught:
        llm.chat([message], GREEDY)
    assert caught.value.field == field


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {}, 5])
def test_sampling_and_options_must_be_what_they_are_called(llm: glimt.LLM, wrong: Any) -> None:
    """Catches a dictionary that is taken for the defaults."""
    with pytest.raises(glimt.RequestError, match="sampling"):
        llm.chat(ask("a"), wrong)
    with pytest.raises(glimt.RequestError, match="sampling"):
        llm.chat([ask("a")], wrong)
    with pytest.raises(glimt.RequestError, match="sampling"):
        llm.chat([ask("a")], [wrong])
    with pytest.raises(glimt.RequestError, match="options"):
        llm.chat(ask("a"), GREEDY, options=wrong)


def test_every_engine_setting_of_the_wrong_kind_is_listed() -> None:
    """Catches a TypeError from a comparison, and a setting that fails only while running."""
    wrong: dict[str, Any] = {
        "max_num_seqs": "4",
        "num_blocks": True,
        "kv_bytes": 1.5,
        "feature_cache_bytes": -1,
        "enable_prefix_cache": "no",
        "image_limits": None,
    }
    with pytest.raises(glimt.ConfigError) as caught:
        glimt.EngineConfig(model="anywhere", **wrong)
    assert [problem.split()[0] for problem in caught.value.problems] == [*wrong]


def test_an_unknown_option_is_an_error() -> None:
    """Catches a typo in an engine option that is swallowed."""
    with pytest.raises(TypeError, match="max_model_length"):
        glimt.LLM("anywhere", max_model_length=5)
    with pytest.raises(glimt.ConfigError, match="does not exist"):
        glimt.LLM("no/such/folder")
    with pytest.raises(glimt.ConfigError) as caught:
        glimt.LLM("anywhere", dtype="int3", kv_dtype="int4", block_size=-1)
    assert len(caught.value.problems) == 3
    assert "kv_dtype 'int4' is unknown; choose one of auto, int8" in caught.value.problems
