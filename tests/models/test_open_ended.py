"""Prompts that end elsewhere than where the assistant begins to speak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import glimt
from glimt.demo.noise import write_noise_model
from glimt.errors import RequestError
from glimt.inputs.request import RequestOptions
from glimt.types import SamplingParams

ASK = [{"role": "user", "content": "看 the cat"}]


@pytest.fixture(scope="module", params=["glm4v_9b", "visualglm"])
def llm(request, tmp_path_factory) -> glimt.LLM:
    folder: Path = tmp_path_factory.mktemp("open") / request.param
    write_noise_model(folder, request.param)
    return glimt.LLM(str(folder), num_threads=1)


def test_a_begun_answer_stands_where_it_would_have_been_generated(llm):
    """Catches wrong positions: the same ids elsewhere give other answers."""
    engine = llm.engine
    begun = [*ASK, {"role": "assistant", "content": "只猫 is"}]
    options = RequestOptions(prompt_end="continue")
    whole = engine.prepare_chat(ASK).prompt
    prompt = engine.prepare_chat(begun, options=options).prompt
    said = prompt.token_ids[len(whole.token_ids) :]
    assert prompt.token_ids[: len(whole.token_ids)] == whole.token_ids
    tokenizer = engine.inputs.processor.tokenizer
    expected = tokenizer.encode("只猫 is")
    assert list(said[-len(expected) :]) == expected
    generated = whole.positions_between(0, len(prompt.token_ids))
    assert np.array_equal(prompt.positions, generated)
    assert np.array_equal(prompt.positions_between(0, 60), whole.positions_between(0, 60))
    assert prompt.bidirectional_len == whole.bidirectional_len


def test_nobodys_turn_may_be_begun_where_the_template_can(llm):
    """Catches an assistant's turn that was not asked for."""
    options = RequestOptions(prompt_end="none")
    whole = llm.engine.prepare_chat(ASK).prompt.token_ids
    if llm.engine.inputs.processor.stop_token_ids == {8}:  # VisualGLM
        with pytest.raises(RequestError, match="always ends"):
            llm.engine.prepare_chat(ASK, options=options)
    else:
        assert llm.engine.prepare_chat(ASK, options=options).prompt.token_ids == whole[:-1]


@pytest.mark.parametrize(
    "messages", [ASK, [*ASK, {"role": "assistant", "content": ""}]], ids=["question", "nothing"]
)
def test_there_must_be_something_to_go_on_with(llm, messages):
    """Catches a question that the model is made to go on with as its own words."""
    with pytest.raises(RequestError) as refused:
        llm.chat(messages, options=RequestOptions(prompt_end="continue"))
    assert refused.value.field == "messages"


def test_exact_text_is_what_the_tokens_stand_for(llm):
    """Catches text that is stripped or mended where the bytes were asked for."""
    sampling = SamplingParams(seed=4, max_tokens=60, temperature=1.2, top_p=1.0, ignore_eos=True)
    exact = llm.chat(ASK, sampling, options=RequestOptions(is_exact=True))
    plain = llm.chat(ASK, sampling)
    assert exact.token_ids == plain.token_ids
    tokenizer = llm.engine.inputs.processor.tokenizer
    content = b"".join(map(tokenizer.token_bytes, exact.token_ids))
    assert exact.text == content.decode("utf-8", "replace")


def test_a_bad_option_is_named():
    """Catches an end that nobody knows, read as the usual one."""
    for name, value in (("prompt_end", "later"), ("is_exact", 1)):
        with pytest.raises(RequestError) as refused:
            RequestOptions(**{name: value})
        assert refused.value.field == name
