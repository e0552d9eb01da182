"""What MindIE's `run_pa.sh --run` prints: question, answer and token count of each picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from glimt.bench.throughput import PROMPT
from glimt.commands.console import count_bar, printable, warn
from glimt.commands.running import load_engine
from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.errors import RequestError
from glimt.evaluate.pictures import list_pictures
from glimt.outputs.assembler import OutputAssembler
from glimt.types import Request, RequestOutput, SamplingParams


def pictures_of(images: Path) -> list[Path]:
    """A folder's pictures by name, or the one file that was named. Raises ConfigError for none."""
    if images.is_file():
        return [images]
    return [Path(picture) for picture in list_pictures(str(images)).pictures]


def print_captions(config: EngineConfig, images: Path, output_len: int) -> bool:
    """Describe every picture, config.max_num_seqs at a time; tells whether all could be described.

    A picture that fails is told of on stderr, and the others go on.
    Raises ConfigError or CheckpointError for what cannot be run at all.
    """
    paths = pictures_of(images)
    engine = load_engine(config)
    sampling = SamplingParams(temperature=0, max_tokens=output_len)
    num_answered, batch = 0, config.max_num_seqs
    with count_bar("describing", len(paths)) as on_done:
        for start in range(0, len(paths), batch):
            group = dict(enumerate(paths[start : start + batch], start))
            num_answered += _describe(engine, group, sampling)
            if on_done:
                on_done(len(group))
    return num_answered == len(paths)


def _describe(engine: Engine, group: Mapping[int, Path], sampling: SamplingParams) -> int:
    """Describe pictures together, by their numbers, and print; tells how many had an answer."""
    requests = {}
    for number, path in group.items():
        try:
            requests[number] = _request(engine, path, sampling)
        except RequestError as error:
            warn(f"{path} is left out: {error}")
    answers = _run(engine, list(requests.values()))
    num_answered = 0
    for number, request in requests.items():
        answer = answers[request.request_id]
        if answer.finish_reason == "error":
            warn(f"{group[number]} has no answer: {answer.completions[0].error}")
        else:
            _print(number, answer)
            num_answered += 1
    return num_answered


def _request(engine: Engine, path: Path, sampling: SamplingParams) -> Request:
    content = [{"type": "image", "image": path}, {"type": "text", "text": PROMPT}]
    return engine.prepare_chat([{"role": "user", "content": content}], sampling)


def _run(engine: Engine, requests: Sequence[Request]) -> dict[str, RequestOutput]:
    assemblers = {request.request_id: OutputAssembler(request) for request in requests}
    for request in requests:
        engine.add_request(request)
    finished = {}
    while engine.has_work:
        for output in engine.step():
            if whole := assemblers[output.request_id].add(output):
                finished[output.request_id] = whole
    return finished


def _print(number: int, answer: RequestOutput) -> None:
    print(f"Question[{number}]: {PROMPT}")
    print(f"Answer[{number}]: {printable(answer.text)}")
    print(f"Generate[{number}] token num: {answer.usage.completion_tokens}", flush=True)
