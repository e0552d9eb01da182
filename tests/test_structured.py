"""Grammars: whatever a model of random weights says, its text is what was asked for."""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

import glimt
from glimt.demo.noise import write_noise_model
from glimt.errors import MissingDependency, RequestError
from glimt.models.base import Tokenizer
from glimt.structured import GrammarCompiler
from glimt.types import Function, Grammar, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "名字": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["猫", "dog, cat .", None]}, "maxItems": 2},
    },
    "required": ["名字", "age", "tags"],
    "additionalProperties": False,
}
TEXTS = ["猫", "dog\n", ' "x" \\ y', "doghouse"]
ASK = [{"role": "user", "content": "hi"}]
WILD = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module", params=["glm4v_9b", "visualglm"])
def llm(request, tmp_path_factory) -> glimt.LLM:
    folder = tmp_path_factory.mktemp("structured") / request.param
    write_noise_model(folder, request.param)
    return glimt.LLM(str(folder), num_threads=1)


def answers(llm: glimt.LLM, grammar: Grammar, **sampling: Any) -> Iterator[glimt.Completion]:
    params = SamplingParams(grammar=grammar, **{**WILD, "max_tokens": 120, "n": 8, **sampling})
    yield from llm.chat(ASK, params).completions


def test_every_answer_under_a_schema_is_valid(llm):
    """Catches a mask that is off by a token, and text that is mended after it was checked."""
    num_complete = 0
    for seed in (1, 2):
        for done in answers(llm, Grammar.of_schema(SCHEMA), seed=seed):
            assert done.finish_reason in ("stop", "length"), done.error
            if done.finish_reason == "stop":
                jsonschema.validate(json.loads(done.text), SCHEMA)
                num_complete += 1
    assert num_complete > 6


def test_an_answer_matches_its_expression_from_end_to_end(llm):
    """Catches an end that comes before the text is complete."""
    pattern = r"[a-c]{3}-[0-9]{2,4}(猫|\.)"
    found = [
        done.text
        for seed in (4, 5)
        for done in answers(llm, Grammar.of_regex(pattern), seed=seed)
        if done.finish_reason == "stop"
    ]
    assert len(found) == 16
    assert all(re.fullmatch(pattern, text) for text in found)
    assert len(set(found)) > 4


def test_an_answer_is_one_of_the_choices(llm):
    """Catches blanks that are stripped from a choice, and quotes that are not escaped."""
    found = {d.text for s in range(4) for d in answers(llm, Grammar.of_choice(TEXTS), seed=s)}
    assert found <= set(TEXTS)
    assert len(found) > 1


def test_a_call_is_a_name_and_its_arguments(llm):
    """Catches a name with another function's arguments, or with blanks before them."""
    schemas = {"f": SCHEMA, "ff": {"type": "object", "additionalProperties": False}}
    functions = [Function(name, {}, schema) for name, schema in schemas.items()]
    found = [
        done.text.partition("\n")
        for seed in (1, 2)
        for done in answers(llm, Grammar.of_calls(functions), seed=seed)
        if done.finish_reason == "stop"
    ]
    assert {name for name, _, _ in found} == {"f", "ff"}
    for name, _, arguments in found:
        assert arguments.startswith("{")
        jsonschema.validate(json.loads(arguments), schemas[name])


def test_the_end_is_forbidden_until_the_text_is_complete(llm):
    """Catches a stop id that is allowed in the middle, however likely it is."""
    bias = dict.fromkeys(llm.engine.inputs.processor.stop_token_ids, 100.0)
    for done in answers(llm, Grammar.of_choice(["abcabcabc"]), logit_bias=bias, n=1):
        assert (done.text, done.finish_reason) == ("abcabcabc", "stop")


def test_greedy_answers_are_held_to_it_too(llm):
    """Catches a mask that only the draw sees."""
    grammar = Grammar.of_regex("[0-9]{5}")
    (done,) = answers(llm, grammar, temperature=0, n=1)
    assert re.fullmatch("[0-9]{5}", done.text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("structured") / "glm4v"
    write_noise_model(path, "glm4v_9b")
    return str(path)


def test_drafts_and_preemption_change_nothing(folder):
    """Catches a grammar's state that goes ahead with a refused draft, or starts anew."""
    grammar = Grammar.of_regex("(the cat sat on the mat[.,] ){3}[a-f]{20}")
    sampling = SamplingParams(grammar=grammar, seed=3, max_tokens=150, n=4, **WILD)
    plain = glimt.LLM(folder, num_threads=1, num_draft_tokens=0)
    texts = [done.text for done in plain.chat(ASK, sampling).completions]
    assert all(re.fullmatch(grammar.text, text) for text in texts)
    drafting = glimt.LLM(folder, num_threads=1, num_draft_tokens=6)
    assert [done.text for done in drafting.chat(ASK, sampling).completions] == texts
    stats = drafting.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    crowded = glimt.LLM(folder, num_threads=1, num_draft_tokens=0, num_blocks=11, block_size=16)
    assert [done.text for done in crowded.chat(ASK, sampling).completions] == texts
    assert crowded.stats().preemptions > 0


def test_a_filter_follows_any_output_as_a_new_one_would(llm):
    """Catches a filter that does not find back after it was asked about something else."""
    compiled = llm.engine.inputs._grammars.compile(Grammar.of_schema(SCHEMA))
    rng = np.random.default_rng(0)
    output: list[int] = []
    stops = llm.engine.inputs.processor.stop_token_ids
    filter_ = compiled.start()
    for _ in range(60):
        output = output[: rng.integers(0, len(output) + 1)] if rng.random() < 0.3 else output
        allowed = filter_.allowed(output)
        fresh = compiled.start().allowed(output)
        assert allowed is not None
        assert np.array_equal(allowed, fresh)
        impossible = int(np.flatnonzero(~allowed)[rng.integers(0, (~allowed).sum())])
        assert filter_.allowed([*output, impossible, 5]) is None
        choices = [int(i) for i in np.flatnonzero(allowed) if i not in stops]
        if not choices:
            break
        output = [*output, choices[rng.integers(0, len(choices))]]


BAD = [
    lambda: Grammar.of_regex("("),
    lambda: Grammar.of_regex(""),
    lambda: Grammar.of_regex(3),
    lambda: Grammar.of_schema({"type": "king"}),
    lambda: Grammar.of_schema({"$ref": "http://example.com/schema"}),
    lambda: Grammar.of_schema("{"),
    lambda: Grammar.of_schema([1]),
    lambda: Grammar.of_schema({"a": object()}),
    lambda: Grammar.of_schema({"const": "a" * 70000}),
    lambda: Grammar.of_calls([Function("f", {}, {"type": "king"})]),
    lambda: Grammar.of_calls([Function("f", {}, {"const": "a" * 70000})]),
    lambda: Grammar.of_schema(json.loads('{"not":' * 25 + "{}" + "}" * 25)),
    lambda: Grammar.of_choice([]),
    lambda: Grammar.of_choice("ab"),
    lambda: Grammar.of_choice(["a", ""]),
    lambda: Grammar.of_choice(["a"] * 1025),
]


@pytest.mark.parametrize("make", BAD)
def test_a_bad_grammar_is_the_callers_mistake(llm, make):
    """Catches a grammar that ends its request, or the engine, once it runs."""
    with pytest.raises(RequestError) as refused:
        llm.chat(ASK, SamplingParams(grammar=make()))
    assert refused.value.field == "grammar"
    assert "\n" not in str(refused.value)


def test_a_grammar_beyond_all_bounds_is_refused_before_it_runs(llm):
    """Catches 20 characters that keep the engine busy for seconds."""
    with pytest.raises(RequestError, match="too many"):
        llm.chat(ASK, SamplingParams(grammar=Grammar.of_regex("a{1000}{1000}{1000}")))


def test_a_grammar_that_fails_later_ends_its_own_request_alone(llm, monkeypatch):
    """Catches an exception in the middle of a step, which all of the step's requests pay for."""
    hard = SamplingParams(grammar=Grammar.of_regex("[a-c]{30}"), max_tokens=9)
    begun: Any = llm.engine.inputs._grammars.compile(Grammar.of_regex("[a-c]{30}"))
    real = begun.start

    def start() -> Any:
        filter_ = real()
        allowed = filter_.allowed
        filter_.allowed = lambda ids: allowed(ids) & (len(ids) < 3)
        return filter_

    monkeypatch.setattr(begun, "start", start)
    ended, fine = llm.chat([ASK, ASK], [hard, SamplingParams(max_tokens=9)])
    assert ended.finish_reason == "error"
    assert "grammar" in (ended.completions[0].error or "")
    assert fine.finish_reason in ("stop", "length")
    assert llm.stats().failed_steps == 0


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 3}, {"grammar": "a"}])
def test_what_forbids_the_end_cannot_go_with_a_grammar(fields):
    """Catches a complete text that must not end: no token would be left."""
    with pytest.raises(RequestError):
        SamplingParams(**{"grammar": Grammar.of_choice(["a"]), **fields})


def test_a_grammar_is_compiled_once(llm):
    """Catches a schema that costs its time again with every request."""
    compiler = llm.engine.inputs._grammars
    first = compiler.compile(Grammar.of_schema(SCHEMA))
    assert compiler.compile(Grammar.of_schema(json.dumps(SCHEMA))) is first
    for number in range(70):
        compiler.compile(Grammar.of_regex(f"a{number}"))
    assert compiler.compile(Grammar.of_schema(SCHEMA)) is not first


class Letters:
    """A tokenizer that cannot write a brace."""

    def __init__(self) -> None:
        self.special_ids = {"<end>": 3}
        self.num_ids = 4

    def token_bytes(self, token_id: int) -> bytes:
        return [b"a", b"b", b"c", b""][token_id]

    def encode(self, text: str) -> list[int]:
        return []


def test_a_tokenizer_that_cannot_write_everything_is_refused():
    """Catches random weights without a tokenizer, which would be left with no token to choose."""
    letters: Any = Letters()
    tokenizer: Tokenizer = letters
    compiler = GrammarCompiler(tokenizer, 4, frozenset({3}))
    compiler.warm_up()  # which is no mistake of anybody's
    with pytest.raises(RequestError, match="every character"):
        compiler.compile(Grammar.of_schema({}))


def test_without_the_package_the_error_says_how_to_install_it(llm, monkeypatch):
    """Catches a traceback where the extra is not installed."""
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "llguidance":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    llm.engine.inputs.warm_up()
    with pytest.raises(MissingDependency, match=r"glimt\[structured\]"):
        llm.chat(ASK, SamplingParams(grammar=Grammar.of_regex("a")))
