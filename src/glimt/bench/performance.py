"""What `glimt bench performance` measures: batch sizes x input lengths x output lengths.

As VisualGLM's Ascend port does with `--mode performance`. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import product
from statistics import median
from typing import Any

from glimt.bench.batch_run import BatchRun, lack_of_room, run_batch
from glimt.bench.sweep import SweepResult
from glimt.bench.workload import RANDOM, Workload
from glimt.engine import Engine
from glimt.errors import ConfigError, EngineError, RequestError
from glimt.models.base import Processor

POWERS = tuple(2**power for power in range(5, 11))  # the original's lengths
_WARM_UP_STEPS = 5
_LATER_PICTURES = 5


@dataclass(frozen=True, slots=True)
class Case:
    """One row: so many requests of so many prompt tokens and as long an answer each."""

    batch: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PerformanceJob:
    """What was asked for.

    input_lens: prompt tokens, template included and pictures excluded
    repeats:    runs of each row; its figures are their medians
    image:      RANDOM, the path of a picture, or None for text alone
    Raises ConfigError listing every impossible value.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8)
    input_lens: tuple[int, ...] = POWERS
    output_lens: tuple[int, ...] = POWERS
    repeats: int = 1
    seed: int = 0
    image: str | None = None

    def __post_init__(self) -> None:
        problems = []
        if min(self.output_lens) < 2:
            said = f"output_len is {min(self.output_lens)}; at least 2 is needed"
            problems.append(f"{said}: with one token nothing is decoded")
        if self.repeats < 1:
            problems.append(f"repeats is {self.repeats}; at least 1 is needed")
        if problems:
            raise ConfigError("bench", problems)

    def cases(self) -> list[Case]:
        """Every row, in the order of the original's files."""
        axes = (sorted(set(axis)) for axis in (self.batches, self.input_lens, self.output_lens))
        return [Case(*each) for each in product(*axes)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetail:
    """One run of a row in seconds; the steps are those that decode."""

    first_token_s: float
    tower_s: float
    mean_step_s: float
    least_step_s: float
    median_step_s: float
    most_step_s: float
    num_prefill_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PerformanceRow:
    """A case with what was measured, or why it was not.

    max_seq_len:  the engine's context
    image_tokens: that each prompt has besides input_len
    left_out:     why there is no measure; "" where there is one
    is_error:     it was begun and failed: worth another try
    """

    case: Case
    max_seq_len: int
    image_tokens: int = 0
    runs: tuple[RunDetail, ...] = ()
    left_out: str = ""
    is_error: bool = False

    @property
    def first_token_s(self) -> float:
        """Median over the runs."""
        return median(run.first_token_s for run in self.runs)

    @property
    def step_s(self) -> float:
        """Median over the runs of the average decoding step."""
        return median(run.mean_step_s for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PerformanceRow:
        """The row of which this is `as_dict`. Raises TypeError or KeyError for anything else."""
        runs = tuple(RunDetail(**run) for run in raw["runs"])
        return cls(**{**raw, "case": Case(**raw["case"]), "runs": runs})


@dataclass(frozen=True, slots=True)
class PictureTimes:
    """Seconds in tower and adapter: of the very first picture, and of those after it."""

    first_s: float
    later_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PerformanceResult(SweepResult[PerformanceRow]):
    """A sweep; pictures: None for a family without a tower, and where they could not be timed."""

    pictures: PictureTimes | None


# --- running ---------------------------------------------------------------------------------


def has_tower(processor: Processor) -> bool:
    """Whether the family takes pictures."""
    try:
        return processor.image_cost(64, 64) > 0
    except RequestError:
        return False


def time_pictures(engine: Engine, seed: int) -> PictureTimes | None:
    """New pictures one after another; call it first. None for a family without a tower."""
    if not has_tower(engine.inputs.processor):
        return None
    workload = Workload(engine, seed, RANDOM)
    times = []
    for _ in range(1 + _LATER_PICTURES):
        run = run_batch(engine, [workload.ask("?", 1, workload.picture())])
        times.append(run.tower_s)
    return PictureTimes(times[0], tuple(times[1:]))


def warm_tower(workload: Workload) -> None:
    """One picture through tower and adapter, if the workload has any; failures as in `warm_up`."""
    if workload.image_tokens:
        with suppress(RequestError, EngineError):
            run_batch(workload.engine, [workload.ask("?", 1, workload.picture())])


def warm_up(workload: Workload, batch: int) -> None:
    """One prefill and five decoding steps of a batch, as the original does before each row.

    Of text alone: a large tower takes as long as the row itself. What does not fit or fails is
    not told here: the row that follows tells it.
    """
    text = workload.text(workload.least_tokens + 16)
    with suppress(RequestError, EngineError):
        requests = [workload.ask(text, 1 + _WARM_UP_STEPS, None) for _ in range(batch)]
        run_batch(workload.engine, requests)


def measure(workload: Workload, cases: Sequence[Case], repeats: int) -> Iterator[PerformanceRow]:
    """Each case's row as soon as it is known; one that cannot run, or fails, says why.

    Raises ConfigError for an input length below the template's own.
    """
    for case in cases:
        yield _row(workload, case, repeats)


def _row(workload: Workload, case: Case, repeats: int) -> PerformanceRow:
    engine = workload.engine
    workload.begin(str(case))
    known: dict[str, Any] = {
        "case": case,
        "max_seq_len": engine.inputs.limits.context_tokens,
        "image_tokens": workload.image_tokens,
    }
    row_tokens = case.input_len + workload.image_tokens + case.output_len
    if why := lack_of_room(engine, case.batch, row_tokens):
        return PerformanceRow(**known, left_out=why)
    try:
        warm_up(workload, case.batch)
        runs = tuple(_detail(_run(workload, case)) for _ in range(repeats))
    except RequestError as error:  # such as positions that a model does not have
        return PerformanceRow(**known, left_out=str(error))
    except EngineError as error:
        return PerformanceRow(**known, left_out=str(error), is_error=True)
    return PerformanceRow(**known, runs=runs)


def _run(workload: Workload, case: Case) -> BatchRun:
    requests = [workload.request(case.input_len, case.output_len) for _ in range(case.batch)]
    return run_batch(workload.engine, requests)


def _detail(run: BatchRun) -> RunDetail:
    return RunDetail(
        first_token_s=run.first_token_s,
        tower_s=run.tower_s,
        mean_step_s=run.mean_step_s,
        least_step_s=min(run.decode_s),
        median_step_s=median(run.decode_s),
        most_step_s=max(run.decode_s),
        num_prefill_steps=len(run.prefill_s),
    )
