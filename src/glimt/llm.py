"""LLM: the synchronous Python API. One call answers one conversation or a batch of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard, cast, overload

from glimt.config import EngineConfig
from glimt.engine import Engine, EngineStats
from glimt.errors import RequestError
from glimt.inputs.request import RequestOptions
from glimt.outputs.assembler import OutputAssembler
from glimt.types import Message, Messages, Request, RequestOutput, SamplingParams, StepOutput

Sampling: TypeAlias = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """A loaded model that answers.

    >>> llm = LLM("path/to/glm-4v-9b", dtype="bfloat16")
    >>> output = llm.chat([{"role": "user", "content": [
    ...     {"type": "image", "image": "cat.jpg"}, {"type": "text", "text": "What is this?"}]}])
    >>> output.text
    """

    def __init__(
        self, model: str, *, on_tensor: Callable[[int], None] | None = None, **options: Any
    ) -> None:
        """Load a model folder.

        on_tensor: called with the bytes of each tensor loaded, for a progress bar
        options:   the fields of EngineConfig; an unknown one is a TypeError
        Raises ConfigError or CheckpointError, each listing everything that is wrong.
        """
        self.engine = Engine.load(EngineConfig(model=model, **options), on_tensor)
        self._inboxes: dict[str, deque[StepOutput]] = {}

    def close(self) -> None:
        """End the other ranks of a divided model; nothing can be asked afterwards."""
        self.engine.close()

    @classmethod
    def around(cls, engine: Engine) -> LLM:
        """The same of an engine that is loaded already."""
        llm = cls.__new__(cls)
        llm.engine, llm._inboxes = engine, {}
        return llm

    @overload
    def chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        options: RequestOptions | None = None,
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Sequence[Messages],
        sampling: Sampling = None,
        *,
        options: RequestOptions | None = None,
    ) -> list[RequestOutput]: ...

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling: Sampling = None,
        *,
        options: RequestOptions | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Answer a conversation of OpenAI-style messages, or a list of conversations as a batch.

        sampling: one for all, or one per conversation
        Raises RequestError, naming the field, before anything runs if any conversation is
        invalid. A request that fails while running finishes with reason "error" instead.
        """
        _check_sequence("messages", messages, "messages, or of conversations")
        if _is_conversation(messages):
            one = _one(sampling)
            return self._run([self.engine.prepare_chat(messages, one, options)])[0]
        params = _spread(sampling, len(messages))
        pairs = zip(cast("Sequence[Messages]", messages), params, strict=True)
        return self._run([self.engine.prepare_chat(m, s, options) for m, s in pairs])

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is also a sequence of str
        self,
        prompts: str,
        sampling: SamplingParams | None = None,
        *,
        options: RequestOptions | None = None,
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: Sequence[str],
        sampling: Sampling = None,
        *,
        options: RequestOptions | None = None,
    ) -> list[RequestOutput]: ...

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling = None,
        *,
        options: RequestOptions | None = None,
    ) -> RequestOutput | list[RequestOutput]:
        """Continue a bare text without a chat template, or a list of texts as a batch.

        Raises RequestError as `chat` does.
        """
        _check_sequence("prompt", prompts, "texts")
        if isinstance(prompts, str):
            return self._run([self.engine.prepare_text(prompts, _one(sampling), options)])[0]
        pairs = zip(prompts, _spread(sampling, len(prompts)), strict=True)
        return self._run([self.engine.prepare_text(p, s, options) for p, s in pairs])

    def stream_chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        *,
        options: RequestOptions | None = None,
    ) -> Iterator[StepOutput]:
        """Answer a conversation piece by piece. Closing the iterator aborts the request.

        Raises RequestError as `chat` does.
        """
        request = self.engine.prepare_chat(messages, sampling, options)
        return self._stream([request])

    def stats(self) -> EngineStats:
        """Counters since start: tokens, cache hits, pictures encoded, blocks."""
        return self.engine.stats()

    def _run(self, requests: Sequence[Request]) -> list[RequestOutput]:
        assemblers = {request.request_id: OutputAssembler(request) for request in requests}
        if len(assemblers) < len(requests):
            raise RequestError("request_id", "is the same for several requests of the batch")
        finished: dict[str, RequestOutput] = {}
        for output in self._stream(requests):
            whole = assemblers[output.request_id].add(output)
            if whole is not None:
                finished[output.request_id] = whole
        return [finished[request.request_id] for request in requests]

    def _stream(self, requests: Sequence[Request]) -> Iterator[StepOutput]:
        """Run requests to their end; whatever stops the caller aborts what is left of them."""
        inbox: deque[StepOutput] = deque()
        added: list[str] = []
        try:
            for request in requests:
                self.engine.add_request(request)
                self._inboxes[request.request_id] = inbox
                added.append(request.request_id)
            num_open = sum(request.sampling.n for request in requests)
            while num_open:
                output = self._next(inbox)
                num_open -= output.finish_reason is not None
                yield output
        finally:
            for request_id in added:
                del self._inboxes[request_id]
                self.engine.abort(request_id)

    def _next(self, inbox: deque[StepOutput]) -> StepOutput:
        """The next output of one stream; a step may also bring those of another open stream."""
        while not inbox:
            for output in self.engine.step():
                self._inboxes[output.request_id].append(output)
        return inbox.popleft()


def _check_sequence(field: str, value: Any, what: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        raise RequestError(field, f"must be a list of {what}, not a {type(value).__name__}")


def _is_conversation(messages: Messages | Sequence[Messages]) -> TypeGuard[Messages]:
    """One conversation is a sequence of messages; a batch is a sequence of sequences."""
    return not messages or isinstance(messages[0], (Mapping, Message))


def _one(sampling: Sampling) -> SamplingParams | None:
    if sampling is None or isinstance(sampling, SamplingParams):
        return sampling
    raise RequestError("sampling", "must be one SamplingParams for one prompt")


def _spread(sampling: Sampling, count: int) -> Sequence[SamplingParams | None]:
    if sampling is None or isinstance(sampling, SamplingParams):
        return [sampling] * count
    if not isinstance(sampling, Sequence):
        raise RequestError("sampling", f"must be SamplingParams, not a {type(sampling).__name__}")
    if len(sampling) != count:
        raise RequestError("sampling", f"has {len(sampling)} entries for {count} prompts")
    return sampling
