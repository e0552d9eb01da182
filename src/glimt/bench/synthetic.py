"""What `glimt bench synthetic` runs: pictures, first tokens, and decoding at several batch sizes.

Through the engine as any request goes; only the weights, texts and pictures are random. Knows
nothing of tables and files.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from PIL import Image

from glimt.bench.batch_run import checked
from glimt.bench.roofline import ModelCosts, engine_costs
from glimt.bench.samples import Sample, Summary, summarise
from glimt.bench.workload import LANGUAGE, RANDOM, Workload
from glimt.config import EngineConfig
from glimt.devices.host import peak_bytes, plan_threads
from glimt.engine import Engine
from glimt.errors import ConfigError, EngineError
from glimt.kernels.limits import BUFFER_BYTES, LimitMeter, Limits, MathKind
from glimt.memory_plan import MemoryPlan
from glimt.quant.base import find_format
from glimt.synthetic import SyntheticName, published_config
from glimt.types import Request

_TEXT_TOKENS = 32  # of a prompt, besides its picture; the template is among them
_GROUP_S = 0.2  # decoding steps that are timed together, between two limits
_MAX_TRIES = 2  # times the samples asked for, where the machine does not keep still


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticJob:
    """What was asked for.

    output_len: tokens of each answer
    repeats: steady samples of each first token
    num_threads: None: as many as this process may run on
    """

    name: SyntheticName
    dtype: str = "auto"
    kv_dtype: str = "auto"
    quant: str = "none"
    quant_head: str = "auto"
    quant_tower: str = "none"
    batches: tuple[int, ...] = (1, 2, 4, 8, 10)
    output_len: int = 64
    repeats: int = 5
    device: str = "cpu"
    num_threads: int | None = None
    memory_limit_bytes: int | None = None
    meter_bytes: int = BUFFER_BYTES

    def __post_init__(self) -> None:
        problems = []
        if not self.batches or min(self.batches) < 1:
            problems.append(f"batch is {list(self.batches)}; whole numbers >= 1 are needed")
        for name, least in (("output_len", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                problems.append(f"{name} is {getattr(self, name)}; at least {least} is needed")
        if problems:
            raise ConfigError("bench", problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """Until the first token of one request alone; ttft includes opening and resizing the picture.

    image: tower and adapter; prefill: the language model's step, picture excluded
    """

    ttft: Summary
    image: Summary
    prefill: Summary
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """Steps of so many rows; step: its share is of the weights' bytes alone (MBU).

    share_with_kv: the same with the keys and values that the rows read
    """

    batch: int
    step: Summary
    share_with_kv: float | None
    context_tokens: float

    @property
    def tokens_per_s(self) -> float | None:
        """Of all rows together."""
        return self.batch / self.step.median_s if self.step.median_s else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """All that was measured, and what it was measured on.

    limits:        the machine's, once at the start and once at the end
    peak_rss:      bytes that the process held at most, without the meter's buffer
    math:          which of the limits pictures and prefill are held against
    """

    job: SyntheticJob
    family: str
    dtype: str
    threads: int
    is_limit_native: bool
    math: MathKind
    limits: tuple[Limits, Limits]
    costs: ModelCosts
    prompt_tokens: int
    image_tokens: int
    load_s: float
    memory: MemoryPlan
    peak_rss: int
    meter_bytes: int
    fresh: FirstToken
    again: FirstToken
    decoding: tuple[Decoding, ...]


def run(job: SyntheticJob, on_stage: Callable[[str], None] = lambda stage: None) -> Measurements:
    """Make the model, run everything. on_stage: told what begins.

    Raises ConfigError for what cannot be run, EngineError if a request ends with an error.
    """
    published_config(job.name)  # before anything large is made, and so are the settings checked
    config = _engine_config(job)
    threads = plan_threads(config.num_threads).count
    meter = LimitMeter(threads, num_bytes=job.meter_bytes)
    on_stage("making the weights")
    began = time.perf_counter()
    engine = Engine.load(replace(config, num_threads=threads))
    load_s = time.perf_counter() - began
    opened = engine.opened
    costs = engine_costs(engine)
    bench = _Bench(engine, meter, job, costs)
    bench.check_room()
    meter.warm_up()
    first = meter.measure()
    bench.warm_up()
    on_stage("first tokens")
    fresh, again = bench.first_tokens()
    decoding = []
    for batch in job.batches:
        on_stage(f"decoding {batch} at a time")
        decoding.append(bench.decode(batch))
    return Measurements(
        job=job,
        family=opened.family.name,
        dtype=str(opened.dtype).removeprefix("torch."),
        threads=threads,
        is_limit_native=meter.is_native,
        math=bench.math,
        limits=(first, meter.measure()),
        costs=costs,
        prompt_tokens=bench.prompt_tokens,
        image_tokens=bench.image_tokens,
        load_s=load_s,
        memory=engine.memory,
        peak_rss=peak_bytes() - meter.buffer.numel(),
        meter_bytes=meter.buffer.numel(),
        fresh=fresh,
        again=again,
        decoding=tuple(decoding),
    )


def _engine_config(job: SyntheticJob) -> EngineConfig:
    return EngineConfig(
        model=str(job.name),
        dtype=job.dtype,
        kv_dtype=job.kv_dtype,
        quant=job.quant,
        quant_head=job.quant_head,
        quant_tower=job.quant_tower,
        device=job.device,
        num_threads=job.num_threads,
        max_num_seqs=max(job.batches),
        memory_limit_bytes=job.memory_limit_bytes,
    )


class _Bench:
    """One engine and its limits."""

    def __init__(
        self, engine: Engine, meter: LimitMeter, job: SyntheticJob, costs: ModelCosts
    ) -> None:
        self.engine, self.meter, self.job, self.costs = engine, meter, job, costs
        chosen = find_format(job.quant)
        is_int8 = chosen is not None and chosen.quantises_x and meter.is_native
        self.math: MathKind = "int8" if is_int8 else "bf16"
        self._workload = Workload(engine, job.name.seed, RANDOM)
        self.image_tokens = self._workload.image_tokens
        self.prompt_tokens = self.image_tokens + _TEXT_TOKENS

    # --- requests ---

    def _text(self) -> str:
        return self._workload.text(_TEXT_TOKENS)

    def check_room(self) -> None:
        """Raise ConfigError if the largest batch does not fit the context or the cache."""
        row = self.prompt_tokens + self.job.output_len
        limits, batch = self.engine.inputs.limits, max(self.job.batches)
        if row > limits.context_tokens:
            said = f"a prompt of {self.prompt_tokens} tokens and {self.job.output_len} more"
            raise ConfigError(
                "output_len", [f"{said} exceed the context of {limits.context_tokens}"]
            )
        blocks = -(-row // self.engine.config.block_size) * batch
        if blocks > self.engine.stats().num_blocks:
            said = f"{batch} rows of {row} tokens need more than the cache's {limits.cache_tokens}"
            raise ConfigError("batch", [f"{said}; ask for fewer, or raise the memory limit"])

    def warm_up(self) -> None:
        """A short text, so that no figure pays for what happens once."""
        request = self._workload.ask("中", 4, None)
        self.engine.add_request(request)
        while self.engine.is_open(request.request_id):
            checked(self.engine.step())

    # --- first tokens ---

    def first_tokens(self) -> tuple[FirstToken, FirstToken]:
        """Of requests never seen, and of one that was seen before."""
        pictures = [self._workload.picture() for _ in range(self.job.repeats * _MAX_TRIES)]
        self._seen = pictures[0]
        text = self._text()
        fresh = self._first_tokens(lambda i: (pictures[i], text), self.costs.image_ops)
        again = self._first_tokens(lambda i: (pictures[0], text), 0)
        return fresh, again

    def _first_tokens(
        self, ask: Callable[[int], tuple[Image.Image | None, str]], image_ops: int
    ) -> FirstToken:
        ttft: list[Sample] = []
        image: list[Sample] = []
        prefill: list[Sample] = []
        cached = 0
        before = self._math_limit()
        while not self._is_enough(ttft):
            began = time.perf_counter()
            picture, text = ask(len(ttft))
            request = self._workload.ask(text, 2, picture, LANGUAGE)
            image_s, step_s, cached = self._until_first(request)
            total = time.perf_counter() - began
            after = self._math_limit()
            ttft.append(Sample(total, before, after))
            image.append(Sample(image_s, before, after))
            prefill.append(Sample(step_s - image_s, before, after))
            before = after
        prefill_ops = self.costs.prefill_ops(self.prompt_tokens) if image_ops else 0
        return FirstToken(
            ttft=summarise(ttft, image_ops + prefill_ops),
            image=summarise(image, image_ops),
            prefill=summarise(prefill, prefill_ops),
            cached_tokens=cached,
        )

    def _math_limit(self) -> float:
        """Of three bursts the middle one: a single one is too short for seconds of work."""
        return median(self.meter.math(self.math) for _ in range(3))

    def _is_enough(self, samples: Sequence[Sample]) -> bool:
        num_steady = sum(sample.is_steady for sample in samples)
        return num_steady >= self.job.repeats or len(samples) >= _MAX_TRIES * self.job.repeats

    def _until_first(self, request: Request) -> tuple[float, float, int]:
        """Seconds in the tower, seconds in all steps, and prompt tokens found in the cache."""
        before, began = self.engine.stats(), time.perf_counter()
        self.engine.add_request(request)
        while not any(output.token_ids for output in checked(self.engine.step())):
            pass
        step_s, after = time.perf_counter() - began, self.engine.stats()
        self.engine.abort(request.request_id)
        cached = after.prefix_hit_tokens - before.prefix_hit_tokens
        return after.tower_s - before.tower_s, step_s, cached

    # --- decoding ---

    def decode(self, batch: int) -> Decoding:
        """Rows with one picture and a text each; their prompts are computed before the clock."""
        longest = self._start_rows(batch)
        first, samples = longest, []
        before = self.meter.read()
        while (room := self.job.output_len - longest) > 0:
            seconds, count = self._timed_steps(batch, room)
            longest += count
            after = self.meter.read()
            samples.append(Sample(seconds / count, before, after))
            before = after
        while self.engine.has_work:
            checked(self.engine.step())
        context = self.prompt_tokens + (first + longest) / 2
        step = summarise(samples, self.costs.step_bytes)
        with_kv = summarise(samples, self.costs.decode_bytes(batch, context)).share
        return Decoding(batch=batch, step=step, share_with_kv=with_kv, context_tokens=context)

    def _start_rows(self, batch: int) -> int:
        """Run until every row has a first token; tells how many the longest has."""
        counts: dict[str, int] = {}
        requests = [
            self._workload.ask(self._text(), self.job.output_len, self._seen, LANGUAGE)
            for _ in range(batch)
        ]
        for request in requests:
            self.engine.add_request(request)
        while len(counts) < batch:
            for output in checked(self.engine.step()):
                found = counts.get(output.request_id, 0)
                counts[output.request_id] = found + len(output.token_ids)
        return max(counts.values())

    def _timed_steps(self, batch: int, room: int) -> tuple[float, int]:
        """Seconds and number of steps, about _GROUP_S long; each gives every row a token."""
        began, count = time.perf_counter(), 0
        while count < room and (not count or time.perf_counter() - began < _GROUP_S):
            outputs = checked(self.engine.step())
            count += 1
            if sum(len(output.token_ids) for output in outputs) < batch:
                raise EngineError("a row of the batch got no token: the cache was too small")
        return time.perf_counter() - began, count
