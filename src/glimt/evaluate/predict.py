"""One question about many pictures: a bounded number of them in the engine at any time."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glimt.engine import Engine
from glimt.errors import ImageError
from glimt.inputs.request import RequestOptions
from glimt.outputs.assembler import OutputAssembler
from glimt.types import Request, RequestOutput, SamplingParams, StepOutput

PROMPT = "描述这张图片"  # as MindIE's runner asks; "describe this picture"


@dataclass(frozen=True, slots=True)
class Prediction:
    """What became of one picture.

    picture: its path, as the caller gave it
    answer:  None where there is none; error then says why
    is_cut:  the answer reached the longest that was allowed
    image_s, ttft_s: of the answer, as in Timings
    """

    picture: str
    answer: str | None
    error: str | None = None
    is_cut: bool = False
    num_tokens: int = 0
    num_image_tokens: int = 0
    image_s: float = 0.0
    ttft_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Asking:
    """How every picture is asked about."""

    prompt: str
    sampling: SamplingParams
    language: str = "auto"


def predict(
    engine: Engine, pictures: Iterable[str], asking: Asking, batch: int
) -> Generator[Prediction, None, None]:
    """Ask about each picture; predictions come in the order in which they end.

    A picture is read when one of `batch` places becomes free, so a folder of any size takes the
    memory of `batch` pictures. One that cannot be read, or whose answer fails, is told in its
    prediction. Closing the iterator aborts what is open.
    Raises RequestError for a prompt or sampling that suits no picture.
    """
    waiting = iter(pictures)
    asked: dict[str, _Open] = {}
    try:
        while True:
            yield from _fill(engine, waiting, asking, asked, batch)
            if not asked:
                return
            yield from _finished(asked, engine.step())
    finally:
        for request_id in asked:
            engine.abort(request_id)


@dataclass(frozen=True, slots=True)
class _Open:
    """A picture whose answer is being made."""

    picture: str
    assembler: OutputAssembler


def _fill(
    engine: Engine, waiting: Iterator[str], asking: Asking, asked: dict[str, _Open], batch: int
) -> Iterator[Prediction]:
    """Ask about more pictures until `batch` are open; gives those that cannot be asked about."""
    while len(asked) < batch and (picture := next(waiting, None)) is not None:
        try:
            request = _request(engine, picture, asking)
            engine.add_request(request)
        except ImageError as error:  # what else is wrong with a request, is so for every picture
            yield Prediction(picture, None, error.message)
        else:
            asked[request.request_id] = _Open(picture, OutputAssembler(request))


def _request(engine: Engine, picture: str, asking: Asking) -> Request:
    parts = [
        {"type": "image", "image": Path(picture)},  # a text might be base64 or a URL
        {"type": "text", "text": asking.prompt},
    ]
    messages = [{"role": "user", "content": parts}]
    return engine.prepare_chat(messages, asking.sampling, RequestOptions(language=asking.language))


def _finished(asked: dict[str, _Open], outputs: Iterable[StepOutput]) -> Iterator[Prediction]:
    for output in outputs:
        whole = asked[output.request_id].assembler.add(output)
        if whole is not None:
            yield prediction(asked.pop(output.request_id).picture, whole)


def prediction(picture: str, output: RequestOutput) -> Prediction:
    """What a finished request says of its picture."""
    completion = output.completions[0]
    if completion.finish_reason == "error":
        return Prediction(picture, None, completion.error or "the answer ended with an error")
    return Prediction(
        picture,
        completion.text,
        is_cut=completion.finish_reason == "length",
        num_tokens=output.usage.completion_tokens,
        num_image_tokens=output.usage.image_tokens,
        image_s=output.timings.image_s,
        ttft_s=output.timings.ttft_s,
    )
