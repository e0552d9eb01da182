"""One engine and one request at a time: what `generate` and `chat` have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

from glimt.commands.console import byte_bar, note
from glimt.commands.memory import plan_line
from glimt.config import EngineConfig
from glimt.engine import Engine
from glimt.errors import EngineError, RequestError
from glimt.inputs.request import LANGUAGES
from glimt.llm import LLM
from glimt.loader import OpenedModel
from glimt.outputs.assembler import OutputAssembler
from glimt.ranks import open_on_ranks
from glimt.types import Request, RequestOutput, StepOutput, Timings, Usage

_LARGE_BYTES = 256 * 2**20  # what is smaller loads at once and fits anywhere


def check_language(language: str) -> None:
    """Raise RequestError for a language no template knows, before any model is loaded."""
    if language not in LANGUAGES:
        raise RequestError("lang", f"is {language!r}; choose one of {', '.join(LANGUAGES)}")


def load_engine(config: EngineConfig, is_quiet: bool = False) -> Engine:
    """Load a model folder; of a large one, show progress and the memory plan.

    Raises ConfigError or CheckpointError, each listing everything that is wrong.
    """
    opened = open_on_ranks(config)
    is_told = load_weights(opened, is_quiet)
    engine = Engine(opened, config)
    if is_told:
        note(plan_line(engine.memory))
    return engine


def load_llm(config: EngineConfig) -> LLM:
    """The same, as what answers whole conversations."""
    return LLM.around(load_engine(config))


def load_weights(opened: OpenedModel, is_quiet: bool = False) -> bool:
    """Load an opened model's weights, with a progress bar if they are many; tells if they were.

    Raises CheckpointError, or ConfigError for a compiled tower that is damaged.
    """
    total = opened.load_bytes
    is_told = total >= _LARGE_BYTES and not is_quiet
    label = f"checking {opened.tower.path.name}, loading" if opened.tower else "loading"
    with byte_bar(label, total) if is_told else nullcontext() as on_tensor:
        opened.load(on_tensor)
    return is_told


def run_request(
    engine: Engine, request: Request, is_stopped: Callable[[], bool] = lambda: False
) -> Iterator[StepOutput]:
    """Run a prepared request, alone, to its end or until is_stopped() says so between two steps.

    A stopped request still gives its last outputs, with reason "abort", its counts and times.
    """
    engine.add_request(request)
    while engine.is_open(request.request_id) and not is_stopped():
        yield from engine.step()
    yield from engine.abort(request.request_id)


def answer_request(
    engine: Engine, request: Request, on_text: Callable[[str], None] = lambda text: None
) -> RequestOutput:
    """Run a prepared request, alone, to its end; on_text: given each piece of its answer."""
    assembler = OutputAssembler(request)
    for output in run_request(engine, request):
        on_text(output.text)
        if (whole := assembler.add(output)) is not None:
            return whole
    raise EngineError(f"request {request.request_id} ended without its last output")


def facts(usage: Usage, timings: Timings, num_choices: int = 1) -> str:
    """One line: picture process time, first token, tokens, tokens per second, drafts accepted.

    The rate is of the tokens after the first, which decode_s is the time of.
    """
    parts = [f"picture process time {timings.image_s:.2f} s"] if usage.image_tokens else []
    if usage.completion_tokens:
        parts.append(f"first token {timings.ttft_s:.2f} s")
    count = usage.completion_tokens
    parts.append("1 token" if count == 1 else f"{count} tokens")
    num_timed = count - num_choices
    if num_timed > 0 and timings.decode_s > 0:
        parts.append(f"{num_timed / timings.decode_s:.1f} tokens/s")
    if usage.drafted_tokens:
        share = usage.accepted_tokens / usage.drafted_tokens
        parts.append(f"{share:.0%} of {usage.drafted_tokens} drafts accepted")
    return " · ".join(parts)
