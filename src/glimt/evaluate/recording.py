"""Recording: what one setting answered to probes, logits and stages, in memory or in one file.

The file is safetensors, all values float32, with the probes themselves inside: on another machine
nothing else is needed to check a port against it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from glimt.errors import ConfigError, RequestError
from glimt.evaluate.forced import Answered, answer_all, forced_request
from glimt.evaluate.gates import Setting
from glimt.evaluate.probes import Probe
from glimt.evaluate.stages import StageRows, pixel_rows, watching
from glimt.inputs.request import RequestOptions
from glimt.llm import LLM
from glimt.types import Request, SamplingParams

BATCH = 8  # probes asked together
_VERSION = 1
_KEY = "glimt_precision"  # of the file's metadata


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """One probe and what a setting gave for it.

    token_ids: of the answer, its stop token included
    logits:    [len(token_ids), vocab_size] float32, what each was chosen from
    stages:    what every stage made of it; none where only the answer was wanted
    """

    probe: Probe
    token_ids: tuple[int, ...]
    logits: Tensor
    stages: StageRows


@dataclass(frozen=True, slots=True, eq=False)
class Recording:
    """All traces of one setting, those with stages first; facts: of its run, for reports."""

    setting: Setting
    traces: tuple[Trace, ...]
    facts: Mapping[str, str]

    @property
    def num_tokens(self) -> int:
        """Tokens of all answers."""
        return sum(len(trace.token_ids) for trace in self.traces)


# --- the run ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordingSize:
    """How much a reference records: probes until there are enough of them and of tokens.

    most_probes: where there are never enough tokens; num_probes, if that is more
    max_tokens: of an answer
    num_staged: probes of which every stage is kept, each run alone
    """

    num_probes: int = 64
    num_tokens: int = 2000
    most_probes: int = 512
    max_tokens: int = 32
    num_staged: int = 4


def record(
    llm: LLM,
    probes: Iterator[Probe],
    size: RecordingSize,
    on_done: Callable[[int], None] | None = None,
) -> Iterator[Trace]:
    """The greedy answers of a reference.

    on_done: called with the tokens gained
    Raises RequestError for a probe that the model cannot be asked.
    """
    num_probes = num_tokens = 0
    while num_probes < size.num_probes or num_tokens < size.num_tokens:
        is_staged = num_probes < size.num_staged
        most = max(size.most_probes, size.num_probes)
        room = min(1 if is_staged else BATCH, most - num_probes)
        batch = list(islice(probes, room))
        if not batch:
            return
        for trace in _answer(llm, batch, None, size.max_tokens, is_staged):
            num_probes += 1
            num_tokens += len(trace.token_ids)
            if on_done:
                on_done(len(trace.token_ids))
            yield trace


def repeat(
    llm: LLM, traces: Sequence[Trace], on_done: Callable[[int], None] | None = None
) -> Iterator[Trace]:
    """The same answers under another setting, token by token, in the same batches.

    on_done: called with the tokens of a probe
    Raises RequestError for a probe that the model cannot be asked.
    """
    staged = [trace for trace in traces if trace.stages]
    rest = traces[len(staged) :]
    batches = [[trace] for trace in staged]
    batches += [list(rest[i : i + BATCH]) for i in range(0, len(rest), BATCH)]
    for batch in batches:
        answers = [trace.token_ids for trace in batch]
        probes = [trace.probe for trace in batch]
        for trace in _answer(llm, probes, answers, 0, bool(batch[0].stages)):
            if on_done:
                on_done(len(trace.token_ids))
            yield trace


def _answer(
    llm: LLM,
    probes: Sequence[Probe],
    answers: Sequence[Sequence[int]] | None,
    max_tokens: int,
    is_staged: bool,
) -> list[Trace]:
    """Run a batch, with its stages if it is a single probe of which they are wanted."""
    requests = [
        _request(llm, i, probe, None if answers is None else answers[i], max_tokens)
        for i, probe in enumerate(probes)
    ]
    by_id = {} if answers is None else {f"probe-{i}": a for i, a in enumerate(answers)}
    stages: StageRows = {}
    if is_staged:
        with watching(llm.engine.opened.model) as rows:
            answered = answer_all(llm, requests, by_id)
        stages = pixel_rows(requests[0].images) | rows
    else:
        answered = answer_all(llm, requests, by_id)
    return [_trace(probe, each, stages) for probe, each in zip(probes, answered, strict=True)]


def _trace(probe: Probe, answered: Answered, stages: StageRows) -> Trace:
    return Trace(probe, answered.token_ids, answered.logits, stages)


def _request(
    llm: LLM, number: int, probe: Probe, answer: Sequence[int] | None, max_tokens: int
) -> Request:
    """Raises RequestError naming the probe."""
    name = f"probe-{number}"
    try:
        if answer is not None:
            return forced_request(llm, name, probe.messages, answer)
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
        options = RequestOptions(request_id=name)
        return llm.engine.prepare_chat(probe.messages, sampling, options)
    except RequestError as error:
        raise RequestError(probe.name, error.message) from error


# --- the file --------------------------------------------------------------------------------


def to_bytes(recording: Recording) -> bytes:
    """The file's content."""
    tensors: dict[str, Tensor] = {}
    for i, trace in enumerate(recording.traces):
        tensors[f"{i}.token_ids"] = torch.tensor(trace.token_ids, dtype=torch.int64)
        tensors[f"{i}.logits"] = trace.logits
        for j, image in enumerate(trace.probe.images):
            tensors[f"{i}.image.{j}"] = torch.frombuffer(bytearray(image), dtype=torch.uint8)
        for name, rows in trace.stages.items():
            tensors[f"{i}.stage.{name}"] = rows.contiguous()
    said = {
        "version": _VERSION,
        "setting": asdict(recording.setting),
        "facts": dict(recording.facts),
        "probes": [
            {
                "name": trace.probe.name,
                "text": trace.probe.text,
                "num_images": len(trace.probe.images),
                "stages": list(trace.stages),
            }
            for trace in recording.traces
        ],
    }
    return save(tensors, {_KEY: json.dumps(said, ensure_ascii=False)})


def from_file(path: Path) -> Recording:
    """Read what `to_bytes` gave. Raises ConfigError if it is not such a file."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if not isinstance(said, dict) or said.get("version") != _VERSION:
                raise _wrong(path, "is no reference that glimt precision --record wrote")
            traces = [_read_trace(file, i, each) for i, each in enumerate(said["probes"])]
            return Recording(Setting(**said["setting"]), tuple(traces), said["facts"])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _wrong(path, f"is damaged or is no reference: {error}") from error
    except OSError as error:
        raise _wrong(path, f"cannot be read: {error.strerror or error}") from error


def _wrong(path: Path, said: str) -> ConfigError:
    return ConfigError("against", [f"{path} {said}"])


def _read_trace(file: Any, number: int, said: Mapping[str, Any]) -> Trace:
    images = [file.get_tensor(f"{number}.image.{j}") for j in range(said["num_images"])]
    probe = Probe(said["name"], tuple(image.numpy().tobytes() for image in images), said["text"])
    return Trace(
        probe,
        tuple(file.get_tensor(f"{number}.token_ids").tolist()),
        file.get_tensor(f"{number}.logits"),
        {name: file.get_tensor(f"{number}.stage.{name}") for name in said["stages"]},
    )
