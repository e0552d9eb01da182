"""What `glimt bench throughput` measures: one picture and one prompt, in batches of growing size.

As MindIE's examples do for GLM-4v with `--performance`. Knows nothing of files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from glimt.bench.batch_run import lack_of_room, run_batch
from glimt.bench.performance import warm_up
from glimt.bench.sweep import SweepResult
from glimt.bench.workload import RANDOM, Workload
from glimt.errors import ConfigError, EngineError, RequestError

PROMPT = "描述这张图片"  # the original's


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputJob:
    """What was asked for.

    image: RANDOM or the path of a picture
    Raises ConfigError listing every impossible value.
    """

    batches: tuple[int, ...] = tuple(range(1, 11))
    output_len: int = 256
    prompt: str = PROMPT
    image: str = RANDOM
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if self.output_len < 2:
            said = f"output_len is {self.output_len}; at least 2 is needed"
            problems.append(f"{said}: with one token nothing is decoded")
        if not self.prompt.strip():
            problems.append("prompt is empty; give a text such as the default")
        if problems:
            raise ConfigError("bench", problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputRow:
    """A batch with what was measured, or why it was not.

    input_len:     tokens of the prompt's text alone
    embedding_len: of the whole prompt: template, text and picture
    prefill_s, decode_s, tower_s: as in BatchRun
    wall_s:        from the pictures, decoded, to the last token: with resizing and tokenizing
    left_out:      why there is no measure; "" where there is one
    is_error:      it was begun and failed: worth another try
    """

    batch: int
    input_len: int
    output_len: int
    embedding_len: int = 0
    prefill_s: tuple[float, ...] = ()
    decode_s: tuple[float, ...] = ()
    tower_s: float = 0.0
    wall_s: float = 0.0
    left_out: str = ""
    is_error: bool = False

    @property
    def step_s(self) -> float:
        """All decoding over output_len - 1."""
        return sum(self.decode_s) / (self.output_len - 1)

    @property
    def tokens_per_s(self) -> float:
        """Of all rows together, over all of the time."""
        return self.batch * self.output_len / self.wall_s

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ThroughputRow:
        """The row of which this is `as_dict`. Raises TypeError or KeyError for anything else."""
        times = {name: tuple(raw[name]) for name in ("prefill_s", "decode_s")}
        return cls(**{**raw, **times})


class ThroughputResult(SweepResult[ThroughputRow]):
    """A sweep of batch sizes."""

    __slots__ = ()


def measure(
    workload: Workload, batches: Sequence[int], output_len: int, prompt: str
) -> Iterator[ThroughputRow]:
    """Each batch's row as soon as it is known; one that cannot run or fails says why."""
    for batch in batches:
        yield _row(workload, batch, output_len, prompt)


def _row(workload: Workload, batch: int, output_len: int, prompt: str) -> ThroughputRow:
    known: dict[str, Any] = {
        "batch": batch,
        "input_len": workload.num_text_tokens(prompt),
        "output_len": output_len,
    }
    workload.begin(f"batch {batch}")
    try:
        return _measured(workload, known, prompt)
    except RequestError as error:
        return ThroughputRow(**known, left_out=str(error))
    except EngineError as error:
        return ThroughputRow(**known, left_out=str(error), is_error=True)


def _measured(workload: Workload, known: dict[str, Any], prompt: str) -> ThroughputRow:
    """Raises RequestError for what does not fit, EngineError for a run that fails."""
    batch, output_len = known["batch"], known["output_len"]
    warm_up(workload, batch)
    pictures = [workload.picture() for _ in range(batch)]
    began = time.perf_counter()
    requests = [workload.ask(prompt, output_len, picture) for picture in pictures]
    length = len(requests[0].prompt.token_ids)
    if why := lack_of_room(workload.engine, batch, length + output_len):
        return ThroughputRow(**known, embedding_len=length, left_out=why)
    run = run_batch(workload.engine, requests)
    return ThroughputRow(
        **known,
        embedding_len=length,
        prefill_s=run.prefill_s,
        decode_s=run.decode_s,
        tower_s=run.tower_s,
        wall_s=time.perf_counter() - began,
    )
