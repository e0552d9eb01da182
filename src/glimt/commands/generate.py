"""`glimt generate`: one request, its answer on stdout as text or as one JSON object."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glimt.commands.console import note, print_json, told_as_json, write_answer
from glimt.commands.memory import note_plan
from glimt.commands.pictures import read_picture
from glimt.commands.running import answer_request, check_language, facts, load_engine
from glimt.config import EngineConfig, ImageLimits
from glimt.engine import Engine
from glimt.errors import EngineError, RequestError
from glimt.inputs.chat import load_messages_file, parse_messages
from glimt.inputs.image import open_image
from glimt.inputs.request import RequestOptions
from glimt.types import (
    Completion,
    ImagePart,
    PromptLogprob,
    Request,
    RequestOutput,
    SampledToken,
    SamplingParams,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateJob:
    """What the command line asked for.

    engine:   fields of EngineConfig
    sampling: fields of SamplingParams
    prompt:   "-" reads stdin
    """

    engine: Mapping[str, Any]
    sampling: Mapping[str, Any]
    prompt: str | None = None
    messages: Path | None = None
    images: Sequence[str] = ()
    system: str | None = None
    language: str = "auto"
    as_json: bool = False
    is_quiet: bool = False
    is_verbose: bool = False


def generate(job: GenerateJob) -> None:
    """Run one request and print its answer.

    With as_json, stdout gets exactly one JSON object, whatever happens.
    Raises RequestError, SetupError, or EngineError when the request ended with an error.
    """
    with told_as_json(job.as_json):
        sampling = SamplingParams(**job.sampling)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(sampling, name) is not None and not job.as_json:
                raise RequestError(name, "are told in JSON only; add --json")
        config = EngineConfig(**job.engine, max_num_seqs=sampling.n)
        check_language(job.language)
        messages = _messages(job, config.image_limits)
        engine = load_engine(config, job.is_quiet)
        if job.is_verbose:
            note_plan(engine)
        options = RequestOptions(language=job.language)
        request = engine.prepare_chat(messages, sampling, options)
    if job.as_json or sampling.n > 1:
        output = answer_request(engine, request)
    else:
        output = answer_request(engine, request, write_answer)
    if job.as_json:
        print_json(_as_dict(engine, request, output))
    else:
        _print_rest(output, job.is_quiet)
    _raise_failure(output)


# --- the request -----------------------------------------------------------------------------


def _messages(job: GenerateJob, limits: ImageLimits) -> Sequence[Any]:
    """The conversation, every picture of it tried: loading a large model only to refuse is slow."""
    if job.messages is not None:
        _refuse_mixture(job)
        return _checked_file(job.messages, limits)
    if job.prompt is None:
        advice = "give --prompt TEXT, --prompt - to read standard input, or --messages FILE"
        raise RequestError("prompt", f"is missing; {advice}")
    return _one_question(job, job.prompt, limits)


def _refuse_mixture(job: GenerateJob) -> None:
    given = {"--prompt": job.prompt, "--image": job.images, "--system": job.system}
    names = [name for name, value in given.items() if value not in (None, ())]
    if names:
        said = f"cannot be combined with {' and '.join(names)}; put all of it into the file"
        raise RequestError("messages", said)


def _checked_file(path: Path, limits: ImageLimits) -> list[Any]:
    raw = load_messages_file(path)
    for m, message in enumerate(parse_messages(raw, limits)):
        for p, part in enumerate(message.parts):
            if isinstance(part, ImagePart):
                field = f"messages[{m}].content[{p}]"
                open_image(part.source, limits, allow_files=True, field=field)
    return raw


def _one_question(job: GenerateJob, prompt: str, limits: ImageLimits) -> list[dict[str, Any]]:
    text = _read_stdin() if prompt == "-" else prompt
    if not text.strip() and not job.images:
        raise RequestError("prompt", "is empty; ask something, or give a picture with --image")
    pictures = [read_picture(given, limits) for given in job.images]
    content: list[dict[str, Any]] = [{"type": "image", "image": p.content} for p in pictures]
    system = [{"role": "system", "content": job.system}] if job.system else []
    return [*system, {"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _read_stdin() -> str:
    if sys.stdin.isatty():
        note("reading the prompt; end it with Ctrl-D on a line of its own")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RequestError("prompt", f"standard input is not UTF-8: {error}") from error
    return text.removesuffix("\n").removesuffix("\r")  # what echo adds is not part of the question


# --- the answer ------------------------------------------------------------------------------


def _print_rest(output: RequestOutput, is_quiet: bool) -> None:
    """What streaming left out: the final line feed, several answers, the facts."""
    if len(output.completions) == 1:
        write_answer("\n")
    for choice in output.completions if len(output.completions) > 1 else ():
        write_answer(f"--- answer {choice.index + 1} of {len(output.completions)} ---\n")
        write_answer(f"{choice.text}\n")
    if not is_quiet:
        reasons = ", ".join(choice.finish_reason for choice in output.completions)
        line = facts(output.usage, output.timings, len(output.completions))
        note(f"{line} · ended by {reasons}")


def _raise_failure(output: RequestOutput) -> None:
    for choice in output.completions:
        if choice.finish_reason == "error":
            raise EngineError(choice.error or "the answer ended with an error")


def _as_dict(engine: Engine, request: Request, output: RequestOutput) -> dict[str, Any]:
    """The answer as plain data; the first choice's fields stand at the top."""
    choices = [_choice(engine, choice) for choice in output.completions]
    several = {"choices": choices} if len(choices) > 1 else {}
    first = {name: value for name, value in choices[0].items() if name != "index"}
    return {
        **first,
        **several,
        "prompt_token_ids": list(output.prompt_token_ids),
        **_prompt(engine, output),
        "usage": asdict(output.usage) | {"total_tokens": output.usage.total_tokens},
        "timings": output.timings.as_dict(),
        "model": engine.opened.family.name,
        "dtype": str(engine.opened.dtype).removeprefix("torch."),
        "device": engine.opened.device.name,
        "max_tokens": request.max_tokens,
        "sampling": _sampling(request.sampling),
    }


def _prompt(engine: Engine, output: RequestOutput) -> dict[str, Any]:
    """What was asked to be told of the prompt's tokens, its pictures at their full length."""
    if output.prompt_logprobs is None:
        return {}
    told = [{**_logprobs(engine, each), "rank": each.rank} for each in output.prompt_logprobs]
    return {"prompt_logprobs": told}


def _choice(engine: Engine, choice: Completion) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "index": choice.index,
        "text": choice.text,
        "token_ids": list(choice.token_ids),
        "finish_reason": choice.finish_reason,
        "stop_reason": choice.stop_reason,
    }
    if choice.error is not None:
        fields["error"] = choice.error
    if choice.logprobs is not None:
        fields["logprobs"] = [_logprobs(engine, token) for token in choice.logprobs]
    return fields


def _logprobs(engine: Engine, token: SampledToken | PromptLogprob) -> dict[str, Any]:
    top = [_logprob(engine, entry.token_id, entry.logprob) for entry in token.top_logprobs]
    return {**_logprob(engine, token.token_id, token.logprob), "top": top}


def _logprob(engine: Engine, token_id: int, logprob: float | None) -> dict[str, Any]:
    """token: its text alone, in which a part of a character is U+FFFD."""
    is_number = logprob is not None and math.isfinite(logprob)  # JSON has no infinity
    return {
        "token_id": token_id,
        "token": engine.opened.processor.tokenizer.decode([token_id]),
        "logprob": logprob if is_number else None,
    }


_SHOWN_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_tokens")


def _sampling(sampling: SamplingParams) -> dict[str, Any]:
    """What was sampled with once the family's defaults were filled in."""
    names = (*_SHOWN_SAMPLING, "presence_penalty", "frequency_penalty", "n")
    return {name: getattr(sampling, name) for name in names}
