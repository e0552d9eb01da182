"""From an `Ask`, whatever protocol it came by, to a request of the engine: what can be refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np

from glimt.async_engine import AsyncEngine
from glimt.errors import PromptTooLong, RequestError
from glimt.inputs.request import RequestOptions
from glimt.server.config import ServerConfig
from glimt.server.markers import marked_ids
from glimt.server.pictures import PictureReader
from glimt.server.tools import Offer, check_is_enabled
from glimt.types import EncodedPrompt, Message, Request, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request, whatever protocol it came by.

    messages:  a conversation; or
    prompt:    a bare text to be continued; or
    token_ids: the same as ids
    request_id: checked already; the engine's own may get a suffix
    prompt_end, is_exact: as RequestOptions says
    timeout_s: from arrival; None: the server's limit
    has_markers: the prompt's role markers are special tokens (`markers`)
    takes_room: a max_tokens beyond the context is cut to what fits, as MindIE does, not refused
    keep_last:  tokens of the prompt, the last ones; None: all
    total_tokens: least and most tokens of prompt and answer, in place of the sampling's own
    offer:      functions that the model may call, in a conversation
    scores_prompt: prompt_logprobs are wanted of a model that can give them
    """

    protocol: str
    request_id: str
    sampling: SamplingParams
    messages: Sequence[Message] | None = None
    prompt: str | None = None
    token_ids: Sequence[int] | None = None
    language: str = "auto"
    cache_salt: str = ""
    prompt_end: str = "answer"
    is_exact: bool = False
    timeout_s: float | None = None
    has_markers: bool = False
    takes_room: bool = False
    keep_last: int | None = None
    total_tokens: tuple[int, int] | None = None
    offer: Offer | None = None
    scores_prompt: bool = False


class Preparation:
    """Encodes requests within one server's limits."""

    def __init__(self, config: ServerConfig, pictures: PictureReader) -> None:
        self._config = config
        self._pictures = pictures

    @asynccontextmanager
    async def gathered(self, engine: AsyncEngine, ask: Ask) -> AsyncGenerator[Ask, None]:
        """The request with its pictures here until the block ends: what takes time and no work.

        Refused before, if its own words suffice for that. Raises RequestError or CapacityError.
        """
        self._check(engine, ask)
        if ask.messages is None:
            yield ask
            return
        async with self._pictures.fetched(ask.messages) as messages:
            yield replace(ask, messages=messages)

    def _check(self, engine: AsyncEngine, ask: Ask) -> None:
        if ask.sampling.n > self._config.max_choices:
            said = f"is {ask.sampling.n}; at most {self._config.max_choices} are made here"
            raise RequestError("n", said)
        if ask.messages is None:
            return
        processor, is_enabled = engine.engine.inputs.processor, self._config.enable_tools
        check_is_enabled(ask.offer, ask.messages, processor, is_enabled)
        num_images = sum(message.num_images for message in ask.messages)
        if num_images > self._config.limit_images:
            most = f"at most {self._config.limit_images} are taken (--limit-images)"
            raise RequestError("messages", f"holds {num_images} pictures; {most}")

    async def prepare(self, engine: AsyncEngine, ask: Ask, request_id: str) -> Request:
        """The work, on a request that was gathered. Raises RequestError for all else."""
        wanted, sampling = ask.sampling.max_tokens, ask.sampling
        if ask.takes_room or ask.total_tokens:
            sampling = replace(sampling, max_tokens=None)
        is_causal = engine.engine.opened.family.prompt_attention == "causal"
        if ask.scores_prompt and is_causal:
            sampling = replace(sampling, prompt_logprobs=0)
        ask = replace(ask, sampling=sampling)
        request = await self._encoded(engine, ask, request_id)
        if ask.keep_last is not None and len(request.prompt.token_ids) > ask.keep_last:
            request = await self._last_tokens(engine, request, ask, request_id)
        if ask.takes_room and wanted is not None:
            request = _bounded(request, 0, wanted)
        if ask.total_tokens is not None:
            least, most = ask.total_tokens
            num_prompt = len(request.prompt.original_token_ids)
            request = _bounded(request, least - num_prompt, most - num_prompt)
        return self._within(request)

    def _within(self, request: Request) -> Request:
        """Hold a request to the server's own limits. Raises PromptTooLong."""
        most, num_prompt = self._config.max_prompt_tokens, len(request.prompt.token_ids)
        if most is not None and num_prompt > most:
            raise PromptTooLong("prompt", f"is {num_prompt} tokens; at most {most} are taken here")
        if self._config.max_output_tokens is None:
            return request
        return _bounded(request, 0, self._config.max_output_tokens)

    async def _last_tokens(
        self, engine: AsyncEngine, request: Request, ask: Ask, request_id: str
    ) -> Request:
        """The same with the prompt's last tokens only. Raises RequestError for a cut picture."""
        assert ask.keep_last is not None
        if request.images:
            raise RequestError("truncate", "would cut a prompt with pictures; leave it out")
        kept = request.prompt.original_token_ids[-ask.keep_last :]
        short = replace(ask, messages=None, prompt=None, token_ids=kept)
        return await self._encoded(engine, short, request_id)

    async def _encoded(self, engine: AsyncEngine, ask: Ask, request_id: str) -> Request:
        options = RequestOptions(
            request_id=request_id,
            language=ask.language,
            cache_salt=ask.cache_salt,
            allow_files=False,
            prompt_end=ask.prompt_end,
            is_exact=ask.is_exact,
            tools=ask.offer.tools if ask.offer else (),
        )
        if ask.messages is not None:
            messages = await self._pictures.read(ask.messages)
            return await engine.prepare_chat(messages, ask.sampling, options)
        if ask.token_ids is not None:
            return await engine.prepare_tokens(ask.token_ids, ask.sampling, options)
        if not ask.prompt:
            raise RequestError("prompt", "is empty")
        if ask.has_markers:
            processor = engine.engine.opened.processor
            ids = await asyncio.to_thread(marked_ids, ask.prompt, processor)
            if ids is not None:
                return await engine.prepare_tokens(ids, ask.sampling, options)
        return await engine.prepare_text(ask.prompt, ask.sampling, options)


def _bounded(request: Request, least: int, most: int) -> Request:
    """The same with its answer's length between the two, as far as its context lets it."""
    max_tokens = max(1, min(request.max_tokens, most))
    min_tokens = min(max(least, request.sampling.min_tokens or 0), max_tokens)
    sampling = replace(request.sampling, max_tokens=max_tokens, min_tokens=min_tokens)
    return replace(request, max_tokens=max_tokens, sampling=sampling)


_NO_PROMPT = EncodedPrompt((), (), (), np.empty((1, 0), np.int64), (0,), (1,))


def unprepared(engine: AsyncEngine, ask: Ask, request_id: str) -> Request:
    """What stands for a request that ended before its prompt was known; never to be run."""
    defaults = engine.engine.opened.processor.sampling_defaults
    seed = ask.sampling.seed or 0
    return Request(
        request_id=request_id,
        prompt=_NO_PROMPT,
        images=(),
        sampling=ask.sampling.with_defaults(defaults, 0),
        stop_token_ids=frozenset(ask.sampling.stop_token_ids),
        seeds=tuple((seed + index) % 2**64 for index in range(ask.sampling.n)),
        max_tokens=ask.sampling.max_tokens or 1,
        arrival_s=time.monotonic(),
    )
