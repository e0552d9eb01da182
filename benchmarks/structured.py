"""What structured output costs: a grammar's compilation, and the mask of each token.

    python benchmarks/structured.py --tokenizer FOLDER [--vocab-size 151552] [--tokens 400]

FOLDER holds the tokenizer.model of GLM-4v-9B; no weights are needed. A text that fits the schema is
taken token by token, as an answer would be. "stall" is by how much a compilation in another thread
holds up a loop that does nothing else: what running answers notice of a request that begins. Ends
in one line of JSON. Never imported; passes and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from glimt.inputs.tokenizer import load_tokenizer
from glimt.models.glm4v_9b import TOKENIZER
from glimt.structured import GrammarCompiler
from glimt.types import Grammar

TEXT = {"type": "string", "maxLength": 80}
THING = {
    "type": "object",
    "properties": {
        "name": TEXT,
        "colour": {"enum": ["red", "green", "blue", "black", "white", "other"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 100},
        "box": {"type": "array", "items": {"type": "number"}, "minItems": 4, "maxItems": 4},
        "parts": {"type": "array", "items": TEXT, "maxItems": 6},
    },
    "required": ["name", "colour", "count", "box"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "title": TEXT,
        "scene": {"enum": ["indoor", "outdoor", "document", "unknown"]},
        "things": {"type": "array", "items": THING, "maxItems": 20},
        "text": {"anyOf": [TEXT, {"type": "null"}]},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
    },
    "required": ["title", "scene", "things", "text", "confidence"],
    "additionalProperties": False,
}
CUP = {
    "name": "a cup with a long handle 杯子",
    "colour": "red",
    "count": 2,
    "box": [1.5, 20, 33.25, 4],
}
ANSWER = {
    "title": "A table in a kitchen, 厨房里的一张桌子",
    "scene": "indoor",
    "things": [CUP | {"parts": ["handle", "rim"]}, CUP, CUP | {"colour": "blue", "parts": []}] * 3,
    "text": None,
    "confidence": 0.875,
}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of a call, and its result."""
    began = time.perf_counter()
    result = function()
    return 1e3 * (time.perf_counter() - began), result


def grammars(count: int) -> list[Grammar]:
    """As many schemas of the same size that are not equal, so that none is found compiled."""
    return [Grammar.of_schema({**SCHEMA, "title": f"number {i}"}) for i in range(count)]


def spread(samples: list[float], digits: int = 3) -> dict[str, float]:
    """Median, 99th percentile and largest."""
    high = float(np.percentile(samples, 99))
    figures = {"median": statistics.median(samples), "p99": high, "max": max(samples)}
    return {name: round(value, digits) for name, value in figures.items()}


def bar(scores: np.ndarray, mask: np.ndarray) -> None:
    """Forbid what the mask does not allow, as the sampler does."""
    scores[~mask] = -np.inf


def masks(compiled: Any, ids: list[int], vocab_size: int, most: int) -> dict[str, Any]:
    """Milliseconds of each mask along a text, by itself and with the edit of the logits."""
    alone, edited, allowed = [], [], []
    scores = np.zeros(vocab_size, np.float32)
    state = compiled.start()
    for end in range(min(most, len(ids)) + 1):
        took, mask = timed(lambda end=end: state.allowed(ids[:end]))
        alone.append(took)
        edited.append(took + timed(lambda mask=mask: bar(scores, mask))[0])
        allowed.append(int(mask.sum()))
    return {
        "mask_ms": spread(alone),
        "mask_and_edit_ms": spread(edited),
        "allowed_ids": [min(allowed), int(statistics.median(allowed)), max(allowed)],
    }


def crowds(compiled: Any, ids: list[int], rows: int, most: int) -> dict[str, float]:
    """Milliseconds of the masks of one step, of so many answers at different places of a text."""
    states = [compiled.start() for _ in range(rows)]
    starts = [7 * row % len(ids) for row in range(rows)]
    found = []
    for step in range(most):
        ends = [min(len(ids), start + step) for start in starts]
        work = zip(states, ends, strict=True)
        found.append(timed(lambda work=work: [state.allowed(ids[:end]) for state, end in work])[0])
    return spread(found[1:])  # the first step takes each text up to its place


def stalls(compiler: GrammarCompiler, wanted: list[Grammar]) -> dict[str, float]:
    """Longest gaps in ms of a loop of short steps, alone and while another thread compiles."""

    def longest(until: Callable[[], bool]) -> float:
        most, last = 0.0, time.perf_counter()
        while not until():
            sum(range(200))
            now = time.perf_counter()
            most, last = max(most, now - last), now
        return 1e3 * most

    found = []
    for grammar in wanted:
        thread = threading.Thread(target=compiler.compile, args=(grammar,))
        thread.start()
        found.append(longest(lambda thread=thread: not thread.is_alive()))
    end = time.perf_counter() + 0.2
    return spread(found) | {"alone": round(longest(lambda: time.perf_counter() > end), 3)}


def main() -> None:
    """Print a few lines and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=151552)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rows", type=int, default=64)
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer, TOKENIZER)
    stops = frozenset(tokenizer.special_ids[name] for name in ("<|endoftext|>", "<|user|>"))
    compiler = GrammarCompiler(tokenizer, args.vocab_size, stops)
    first, *others = grammars(2 * args.repeats)
    began = time.perf_counter()
    first_stall = stalls(compiler, [first])["max"]
    first_ms, compiled = 1e3 * (time.perf_counter() - began), compiler.compile(first)
    took = [timed(lambda g=g: compiler.compile(g))[0] for g in others[: args.repeats - 1]]
    ids = tokenizer.encode(json.dumps(ANSWER, ensure_ascii=False))
    results = {
        "vocab_size": args.vocab_size,
        "schema_bytes": len(first.text),
        "answer_tokens": len(ids),
        "first_compile_ms": round(first_ms, 1),
        "compile_ms": spread(took),
        **masks(compiled, ids, args.vocab_size, args.tokens),
        f"masks_of_{args.rows}_ms": crowds(compiled, ids, args.rows, 60),
        "first_stall_ms": first_stall,
        "stall_ms": stalls(compiler, others[args.repeats :]),
    }
    for name, value in results.items():
        print(f"{name:20} {value}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
