"""A static batch through the engine, every step timed: requests that begin and end together.

The engine runs it as any other requests. Knows nothing of tables and files.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.errors import ConfigError, EngineError
from glimt.loader import OpenedModel
from glimt.types import Request, StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRun:
    """Seconds of one batch.

    prefill_s: each step until every row has its first token; one, unless the step's token budget
        was too small for all prompts together
    decode_s:  each step after that: one less than the tokens of an answer
    tower_s:   of prefill_s, what the pictures took
    """

    prefill_s: tuple[float, ...]
    decode_s: tuple[float, ...]
    tower_s: float

    @property
    def first_token_s(self) -> float:
        """From the start of the first step until the last row has its first token."""
        return sum(self.prefill_s)

    @property
    def mean_step_s(self) -> float:
        """Of a decoding step; 0 where answers have one token."""
        return fmean(self.decode_s) if self.decode_s else 0.0


def static_engine(opened: OpenedModel, config: EngineConfig, num_tokens: int) -> tuple[Engine, str]:
    """An engine whose steps hold num_tokens, so that a batch's prompts run in one; and a remark.

    Where the memory plan refuses a step of that size, the engine has the usual one, and the remark
    says so. Prefixes and features are not cached: what is timed must be computed.
    Raises ConfigError.
    """
    config = replace(config, enable_prefix_cache=False, feature_cache_bytes=0)
    budget = max(config.max_num_batched_tokens, num_tokens)
    try:
        return Engine(opened, replace(config, max_num_batched_tokens=budget)), ""
    except ConfigError:
        engine = Engine(opened, config)
    said = f"the memory limit leaves no room for {budget:,} tokens in one step"
    usual = engine.config.max_num_batched_tokens
    return engine, f"{said}: a batch's prompts run in several of {usual:,}"


def lack_of_room(engine: Engine, batch: int, row_tokens: int) -> str:
    """Why so many rows of so many tokens, answers included, cannot run together; "" if they can."""
    limits = engine.inputs.limits
    if row_tokens > limits.context_tokens:
        return f"{row_tokens} tokens exceed the context of {limits.context_tokens}"
    blocks = -(-row_tokens // engine.config.block_size) * batch
    if blocks <= engine.stats().num_blocks:
        return ""
    said = f"{batch} x {row_tokens} tokens exceed the KV cache of {limits.cache_tokens} tokens"
    return f"{said}; raise --kv-bytes or --memory-limit"


def run_batch(engine: Engine, requests: Sequence[Request]) -> BatchRun:
    """Run requests with answers of one length, all at once, on an engine that is idle.

    Raises EngineError when one of them ends with an error, or had to give its cache blocks back.
    """
    before = engine.stats()
    for request in requests:
        engine.add_request(request)
    try:
        prefill_s, decode_s = _timed_steps(engine, {request.request_id for request in requests})
    finally:
        for request in requests:
            engine.abort(request.request_id)
    after = engine.stats()
    if after.preemptions > before.preemptions:
        raise EngineError("the KV cache was too small: rows were computed again; raise --kv-bytes")
    tower_s = after.tower_s - before.tower_s
    return BatchRun(prefill_s=prefill_s, decode_s=decode_s, tower_s=tower_s)


def _timed_steps(engine: Engine, waiting: set[str]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of each step until nobody waits for a first token, and of each after it."""
    prefill_s: list[float] = []
    decode_s: list[float] = []
    last = time.perf_counter()
    while engine.has_work:
        outputs = checked(engine.step())
        now = time.perf_counter()
        (prefill_s if waiting else decode_s).append(now - last)
        last = now
        waiting = waiting - {output.request_id for output in outputs if output.token_ids}
    return tuple(prefill_s), tuple(decode_s)


def checked(outputs: Sequence[StepOutput]) -> Sequence[StepOutput]:
    """A step's outputs. Raises EngineError if one of them ends its request with an error."""
    for output in outputs:
        if output.finish_reason == "error":
            raise EngineError(output.error or "a request ended with an error")
    return outputs
