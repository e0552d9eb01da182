"""The built-in models answer right in bfloat16, with every instruction set."""

from __future__ import annotations

import pytest
from test_demo_models import GREEDY, ROWS, question

from glimt import LLM
from glimt.loader import BUILT_IN

PICTURES = ("boot.png", "shapes.png", "year.png")


def both_languages(llm):
    """A question about each picture in Chinese and in English, and the answers that are right."""
    rows = [row for row in ROWS if row["picture"] in PICTURES]
    asked = [(row[lang], row["picture"]) for row in rows for lang in ("zh", "en")]
    right = [llm.engine.opened.processor.finish_text(one["answer"]) for one, _ in asked]
    return [question(one["question"], picture) for one, picture in asked], right


@pytest.mark.parametrize("name", BUILT_IN)
def test_examples_are_answered_right_with_all_kernels(name, isa):
    """Catches kernels that agree with each other on random numbers and not on a real model.

    All at once: a picture, a prompt, and decoding several rows; then one alone.
    """
    llm = LLM(name, dtype="bfloat16", max_num_seqs=8)
    talks, right = both_languages(llm)
    assert len(talks) == 2 * len(PICTURES)
    assert [output.text for output in llm.chat(talks, GREEDY)] == right
    assert llm.chat(talks[0], GREEDY).text == right[0]


@pytest.mark.parametrize("name", BUILT_IN)
def test_examples_are_answered_as_well_from_a_cache_in_int8(name, isa):
    """Catches int8 that is close on random numbers and not where a model's values lie.

    All at once, one of them alone, and in chunks as far as the family's prompts can be cut.
    """
    llm = LLM(name, dtype="bfloat16", kv_dtype="int8", max_num_seqs=8)
    talks, right = both_languages(llm)
    assert [output.text for output in llm.chat(talks, GREEDY)] == right
    assert llm.chat(talks[0], GREEDY).text == right[0]
    chunked = LLM(name, dtype="bfloat16", kv_dtype="int8", max_num_batched_tokens=40)
    assert chunked.chat(talks[0], GREEDY).text == right[0]


@pytest.mark.parametrize("quant", ["int8", "w8a8", "int4"])
def test_an_example_is_answered_right_in_few_bits(quant, isa):
    """Catches packed weights in few bits that a model is not given as they were quantised."""
    llm = LLM("demo", dtype="bfloat16", quant=quant, max_num_seqs=1)
    row = next(row for row in ROWS if row["picture"] == "shapes.png")
    output = llm.chat(question(row["en"]["question"], row["picture"]), GREEDY)
    assert output.text == llm.engine.opened.processor.finish_text(row["en"]["answer"])
