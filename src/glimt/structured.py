"""Structured output: a grammar becomes a mask over the vocabulary, one for each token.

Owns the calls of llguidance, which parses the text so far and knows what may follow; the rest of
the engine knows `Constraint` and `TokenFilter` of types. Everything here is about bytes: a token
is allowed if its bytes are.
"""

from __future__ import annotations

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from glimt.errors import MissingDependency, RequestError
from glimt.types import Grammar

if TYPE_CHECKING:
    from glimt.models.base import Tokenizer

log = logging.getLogger(__name__)

_MAX_COMPILED = 64  # kept; one holds about 1 MB
_NEEDED_BYTES = (*range(0xC0), *range(0xC2, 0xF5))  # all of UTF-8's
# Less than llguidance's own, with which an expression of 20 characters takes seconds.
_LIMITS = {"initial_lexer_fuel": 200_000, "max_lexer_states": 50_000}
# One space, or a line end and the next line's indent, as JSON is written. llguidance's own pattern
# has no bound, and a model that likes blanks would never end.
_BLANKS = r"( |\n[ \t]{0,24})?"
_JSON = {"whitespace_pattern": _BLANKS, "whitespace_flexible": True}


class GrammarCompiler:
    """Grammars of one tokenizer, compiled once each. Thread-safe; not for the engine's thread."""

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, stop_token_ids: frozenset[int]
    ) -> None:
        """vocab_size: of the logits; stop_token_ids: any of them may end a complete text."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_token_ids = stop_token_ids
        self._vocabulary: Any = None  # llguidance's form, made when it is first needed
        self._compiled: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Raises RequestError for a grammar that is wrong or too complex.

        Raises MissingDependency without llguidance.
        """
        guidance = _guidance()
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
            if self._vocabulary is None:
                self._vocabulary = self._build_vocabulary(guidance, grammar)
        limits = guidance.LLParserLimits(**_LIMITS)
        text = _text(guidance, grammar)
        matcher = guidance.LLMatcher(self._vocabulary, text, log_level=0, limits=limits)
        for _ in range(2):  # what is too complex to begin is found out by trying, often the second
            begun = matcher.deep_copy()
            begun.compute_bitmask()
            if begun.is_error():
                said = f"cannot be used: {_first_line(begun.get_error())}"
                raise RequestError(grammar.field, said)
        compiled = CompiledGrammar(matcher, self._vocab_size)
        with self._lock:
            self._compiled[grammar] = compiled
            while len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return compiled

    def warm_up(self) -> None:
        """Make the vocabulary's form now, where there is one: no thread runs for half a second."""
        with suppress(MissingDependency, RequestError):
            self.compile(Grammar.of_choice(["a"]))

    def _build_vocabulary(self, guidance: Any, grammar: Grammar) -> Any:
        """Raises RequestError for a tokenizer that cannot write every text."""
        tokens = [self._tokenizer.token_bytes(i) for i in range(self._tokenizer.num_ids)]
        known = set(tokens)
        if any(bytes([byte]) not in known for byte in _NEEDED_BYTES):
            said = "needs a tokenizer that can write every character; this model's cannot"
            raise RequestError(grammar.field, said)
        tokens += [b""] * (self._vocab_size - len(tokens))
        words = _Words(self._tokenizer, tokens[: self._vocab_size], min(self._stop_token_ids))
        stops = sorted(self._stop_token_ids)
        return guidance.LLTokenizer(words, n_vocab=self._vocab_size, eos_token=stops)


class _Words:
    """A tokenizer as llguidance wants it; it goes by the names."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], eos_token_id: int) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_token_id
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self._encode = tokenizer.encode
        self._id_of = {token: i for i, token in enumerate(tokens) if token}
        self._longest = max(map(len, tokens))

    def __call__(self, text: str | bytes) -> list[int]:
        """Ids that stand for exactly these bytes: the tokenizer's own, if they do.

        SentencePiece's begin with a blank that is not there.
        """
        content = text.encode() if isinstance(text, str) else text
        ids = self._encode(content.decode("utf-8", "replace"))
        is_exact = b"".join(self.tokens[i] for i in ids) == content
        return ids if is_exact else list(self._longest_first(content))

    def _longest_first(self, content: bytes) -> Iterator[int]:
        at = 0
        while at < len(content):
            ends = range(min(at + self._longest, len(content)), at, -1)
            end = next((e for e in ends if content[at:e] in self._id_of), 0)
            if not end:  # a byte that UTF-8 does not have
                return
            yield self._id_of[content[at:end]]
            at = end


class CompiledGrammar:
    """A grammar at its beginning; every sequence gets a copy."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def start(self) -> GrammarFilter:
        """A filter for one sequence."""
        return GrammarFilter(self._matcher.deep_copy(), self._vocab_size)


class GrammarFilter:
    """How far one sequence's text is in its grammar.

    Goes back and forth to whatever output it is asked about, token by token.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._taken: list[int] = []

    def allowed(self, output_ids: Sequence[int]) -> np.ndarray | None:
        """[vocab_size] bool, as `types.TokenFilter` says; nothing beyond llguidance's limits."""
        if not self._go_to(output_ids):
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            log.warning("a grammar failed: %s", _first_line(self._matcher.get_error()))
            return np.zeros(self._vocab_size, dtype=bool)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def _go_to(self, output_ids: Sequence[int]) -> bool:
        """Take back what is not in this output and take what is new; could it be taken?"""
        num_same = _num_same(self._taken, output_ids)
        if num_same < len(self._taken):
            self._matcher.rollback(len(self._taken) - num_same)
            del self._taken[num_same:]
        new = list(output_ids[num_same:])
        if new and self._matcher.validate_tokens(new) < len(new):
            return False
        if new:
            self._matcher.consume_tokens(new)
        self._taken += new
        return True


def _num_same(taken: Sequence[int], output_ids: Sequence[int]) -> int:
    """How many of the first ids are the same in both."""
    most = min(len(taken), len(output_ids))
    if list(output_ids[:most]) == taken[:most]:  # nearly always
        return most
    return next(i for i in range(most) if taken[i] != output_ids[i])


def _text(guidance: Any, grammar: Grammar) -> str:
    """A grammar in llguidance's own form. Raises RequestError if there is none."""
    try:
        if grammar.kind == "json_schema":
            return guidance.LLMatcher.grammar_from_json_schema(grammar.text, overrides=_JSON)
        if grammar.kind == "regex":
            return guidance.LLMatcher.grammar_from_regex(grammar.text)
        if grammar.kind == "call":
            return _calls(guidance, json.loads(grammar.text))
        texts = json.loads(grammar.text)
        return guidance.LLMatcher.grammar_from_lark(f"start: {' | '.join(map(_quoted, texts))}")
    except ValueError as error:
        raise RequestError(grammar.field, f"cannot be used: {_first_line(str(error))}") from error


def _calls(guidance: Any, schemas: Mapping[str, Any]) -> str:
    """A name, a line feed and what its schema allows. Raises ValueError naming the function."""
    calls = {
        name: f"{_quoted(name + chr(10))} %json {json.dumps({**schema, 'x-guidance': _JSON})}"
        for name, schema in schemas.items()
    }
    for name, call in calls.items():
        lark = guidance.LLMatcher.grammar_from_lark(f"start: {call}")
        if problem := guidance.LLMatcher.validate_grammar(lark):
            said = _first_line(problem).partition(": ")[2]
            raise ValueError(f"the parameters of {name}: {said}")
    return guidance.LLMatcher.grammar_from_lark(f"start: {' | '.join(calls.values())}")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0][:160]


def _guidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise MissingDependency("llguidance", "structured") from error
    return llguidance
