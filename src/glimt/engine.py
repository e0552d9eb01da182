"""Engine: the one place where the stages meet. Synchronous; not to be shared between threads.

    request -> inputs -> scheduler -> runner -> sampling -> outputs -> text

`prepare_chat` and `prepare_text` only read and may be called from any thread; everything else
belongs to the thread that calls `step`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from glimt.config import EngineConfig
from glimt.devices.memory import saying_what_fits
from glimt.errors import ConfigError, RankError, RequestError
from glimt.inputs.request import RequestFactory, RequestLimits, RequestOptions
from glimt.loader import OpenedModel
from glimt.memory_plan import plan_memory
from glimt.models.base import Model
from glimt.outputs.collector import OutputCollector
from glimt.pace import Pace
from glimt.ranks import open_on_ranks
from glimt.runner.feature_cache import FeatureCache
from glimt.runner.kv_cache import KVCaches, allocate_kv, cache_dtype
from glimt.runner.lead import LeadingModel, LedCaches
from glimt.runner.model_runner import ModelRunner
from glimt.runner.vision import VisionRunner
from glimt.sampling import Sampler, verify
from glimt.scheduler.scheduler import Scheduler
from glimt.types import (
    FinishReason,
    Messages,
    Request,
    SampledToken,
    SamplingParams,
    StepOutput,
    StepPlan,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start and the state now; tokens, events, blocks and seconds."""

    prefill_tokens: int
    decode_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    failed_steps: int
    tower_images: int
    tower_slices: int
    feature_hits: int
    tower_s: float
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int

    def as_dict(self) -> dict[str, float]:
        """All figures by name."""
        return asdict(self)


class Engine:
    """Runs requests on one loaded model."""

    def __init__(self, opened: OpenedModel, config: EngineConfig) -> None:
        """Build every stage around a model whose weights are loaded.

        Raises ConfigError if the KV cache that is asked for does not fit.
        """
        self.config = _fitted_config(config, opened)
        self.opened = opened
        num_blocks, self.memory = plan_memory(
            self.config, opened.model, opened.device, opened.dtype, opened.max_model_len
        )
        ranks = opened.ranks
        num_blocks = ranks.agree(num_blocks) if ranks else num_blocks
        limits = _request_limits(opened, num_blocks * self.config.block_size)
        self.inputs = RequestFactory(opened.processor, limits, config.image_limits)
        self.scheduler = Scheduler(self.config, num_blocks)
        model = LeadingModel(opened.model, ranks.group, ranks) if ranks else opened.model
        self.vision = _build_vision(self.config, opened, model)
        caches = _build_caches(self.config, opened, num_blocks)
        self.runner = ModelRunner(
            model, LedCaches(caches, ranks) if ranks else caches, self.vision, opened.device
        )
        self.sampler = Sampler(opened.config.vocab_size)
        self.outputs = OutputCollector(opened.processor, time.monotonic)
        # A bidirectional prompt runs whole or not at all: no step may have less room than one.
        paces = opened.family.prompt_attention == "causal"
        self.pace = Pace(self.config.max_stretch if paces else None)
        self._failed_steps = 0

    @classmethod
    def load(cls, config: EngineConfig, on_tensor: Callable[[int], None] | None = None) -> Engine:
        """Open a model folder, load it and build the engine.

        on_tensor: called with the bytes of each tensor loaded
        Raises ConfigError or CheckpointError, each listing everything that is wrong; EngineError
        where one of several ranks does not come.
        """
        opened = open_on_ranks(config)
        try:
            opened.load(on_tensor)
            return cls(opened, config)
        except BaseException:
            opened.close()
            raise

    def close(self) -> None:
        """End the other ranks, if there are any; no step can follow."""
        self.opened.close()

    @property
    def failure(self) -> str:
        """Why no step can follow; "" while the engine is sound."""
        return self.opened.ranks.failure if self.opened.ranks else ""

    # --- requests ---

    def prepare_chat(
        self,
        messages: Messages,
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Request:
        """Encode a conversation. Raises RequestError naming the field. Any thread."""
        return self.inputs.from_chat(messages, sampling, options)

    def prepare_text(
        self,
        text: str,
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Request:
        """Encode a bare text to be continued. Raises RequestError. Any thread."""
        return self.inputs.from_text(text, sampling, options)

    def prepare_tokens(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
    ) -> Request:
        """Take a prompt that is given as ids. Raises RequestError. Any thread."""
        return self.inputs.from_tokens(token_ids, sampling, options)

    def add_request(self, request: Request) -> None:
        """Queue a prepared request. Raises RequestError when its id is in use."""
        if self.is_open(request.request_id):
            raise RequestError(
                "request_id", f"{request.request_id!r} is already running; choose another"
            )
        self.outputs.add(request)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> list[StepOutput]:
        """End a request now and free its blocks; its unfinished choices finish as "abort".

        An id that is not open gives no output.
        """
        return [
            self._end(sequence.id, "abort") for sequence in self.scheduler.sequences_of(request_id)
        ]

    def is_open(self, request_id: str) -> bool:
        """Whether the request is known and has unfinished choices."""
        return request_id in self.outputs

    @property
    def has_work(self) -> bool:
        """Some request is not finished."""
        return self.scheduler.has_work

    # --- one step ---

    def step(self) -> list[StepOutput]:
        """Run one step: every running sequence goes on by a chunk or a token.

        With drafts a sequence may go on by several tokens; they come in one output. Pictures that
        others wait for go a bounded part further through the tower meanwhile, if there is time.
        """
        began_s = time.monotonic()
        plan = self.scheduler.plan_step(self.vision.ready_images, self.pace.prefill_tokens)
        outputs = self._run(plan) if plan.rows else []
        spent_s = time.monotonic() - began_s
        if self.pace.max_stretch is not None:  # counting a plan's rows is not for every step
            num_decodes = plan.num_decodes
            self.pace.saw(num_decodes, plan.num_tokens - num_decodes, spent_s)
        if not plan.waits or (plan.rows and self.pace.lets_tower_wait(spent_s)):
            return outputs
        return [*outputs, *self._encode(plan, self.pace.tower_s(spent_s) if plan.rows else None)]

    def _encode(self, plan: StepPlan, patience_s: float | None) -> list[StepOutput]:
        """Run the step's slice of the tower; who waits for a picture that failed ends with it."""
        began_s = time.monotonic()
        progress = self.vision.encode_slice(plan, patience_s)
        self.outputs.note_tower(progress.image_s, began_s)
        if progress.error is None:
            return []
        self._failed_steps += 1
        if not progress.failed:
            log.warning("pictures failed together; each is tried alone: %r", progress.error)
        return [
            self._fail_sequence(wait.sequence_id, progress.error)
            for wait in plan.waits
            if any(image.digest in progress.failed for image in wait.images)
        ]

    def _run(self, plan: StepPlan) -> list[StepOutput]:
        began_s = time.monotonic()
        try:
            logits = self.runner.run(plan)
            tokens = verify(self.sampler.sample(logits.logits, plan), plan)
            scores = self.sampler.score(logits.scored, plan)
        except RankError:
            raise  # there is no other request that could go on
        except Exception as error:  # whatever it is, the other requests must go on
            self._failed_steps += 1
            return self._isolate(plan, error)
        if _drafts_broke(plan, tokens):
            self.outputs.note_tower(logits.image_s, began_s)
            return self._run(plan.without_drafts)
        self.vision.finish_step(plan)
        self.outputs.note_step(plan, logits.image_s, began_s)
        self.outputs.note_scores(plan, scores)
        outcomes = self.scheduler.commit(plan, tokens)
        outputs = self.outputs.collect(outcomes)
        self._settle(plan, outputs)
        return outputs

    def _isolate(self, plan: StepPlan, error: Exception) -> list[StepOutput]:
        """Run the rows of a failed step one by one, so that only the one at fault ends.

        Safe because a step writes the same cache slots with the same values every time.
        """
        if len(plan.rows) == 1:
            return self._fail(plan, error)
        log.warning("a step of %d sequences failed; each is tried alone: %r", len(plan.rows), error)
        pictures = (row.images_by_digest.keys() for row in plan.rows)
        plan = replace(plan, open_images=plan.open_images.union(*pictures))
        return [output for row in plan.rows for output in self._run(replace(plan, rows=(row,)))]

    def _settle(self, plan: StepPlan, outputs: Sequence[StepOutput]) -> None:
        """Tell the scheduler what only the text showed: stop strings."""
        sampled = (row for row in plan.rows if row.samples)
        for row, output in zip(sampled, outputs, strict=True):
            if output.finish_reason and self.scheduler.is_open(row.sequence_id):
                self.scheduler.finish(row.sequence_id)

    def _fail(self, plan: StepPlan, error: Exception) -> list[StepOutput]:
        """The step itself failed: its request ends with an error, the others go on."""
        return [self._fail_sequence(row.sequence_id, error) for row in plan.rows]

    def _fail_sequence(self, sequence_id: int, error: Exception) -> StepOutput:
        log.error("a step failed", exc_info=error)
        said = f"the engine failed: {type(error).__name__}: {error}"
        return self._end(sequence_id, "error", said)

    def _end(self, sequence_id: int, reason: FinishReason, error: str | None = None) -> StepOutput:
        sequence = self.scheduler.finish(sequence_id, is_poisoned=reason == "error")
        self.vision.keep(self.scheduler.open_images())  # now: the next step may be far away
        request_id = sequence.request.request_id
        return self.outputs.finish(request_id, sequence.index, reason, error=error)

    # --- what it is doing ---

    def stats(self) -> EngineStats:
        """Counters and state, for timings, tests and metrics."""
        scheduler = self.scheduler
        return EngineStats(
            **asdict(scheduler.counters),
            **asdict(self.vision.counters),
            failed_steps=self._failed_steps,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.pool.num_blocks,
            num_free_blocks=scheduler.pool.num_free,
        )


def _drafts_broke(plan: StepPlan, tokens: Sequence[SampledToken]) -> bool:
    """Whether a row with drafts has an error, which may come from a draft that nobody ever says.

    Attention masks what comes later, but NaN under a mask is NaN. The step is then run again
    without any draft; it writes the same values to the same slots.
    """
    drafted = {row.sequence_id for row in plan.rows if row.drafts}
    return any(token.error is not None and token.sequence_id in drafted for token in tokens)


def _fitted_config(config: EngineConfig, opened: OpenedModel) -> EngineConfig:
    """With blocks that suit the device, and a budget that holds the longest bidirectional prompt.

    Such a prompt runs in one step.
    """
    config = replace(config, block_size=opened.device.block_size(config.block_size))
    least = opened.max_model_len + config.max_num_seqs
    if opened.family.prompt_attention == "causal" or config.max_num_batched_tokens >= least:
        return config
    log.info("max_num_batched_tokens raised to %d: prompts of this family run whole", least)
    return replace(config, max_num_batched_tokens=least)


def _request_limits(opened: OpenedModel, cache_tokens: int) -> RequestLimits:
    return RequestLimits(
        context_tokens=opened.max_model_len,
        cache_tokens=cache_tokens,
        max_positions=opened.config.max_positions,
        vocab_size=opened.config.vocab_size,
    )


def _build_vision(config: EngineConfig, opened: OpenedModel, model: Model) -> VisionRunner:
    token = torch.zeros(1, dtype=torch.int64, device=opened.device.torch_device)
    features = FeatureCache(config.feature_cache_bytes // model.embed(token).nbytes)
    sizes = config.tower_patches, config.tower_slice_patches
    return VisionRunner(opened.tower.loaded if opened.tower else model, features, *sizes)


def _build_caches(config: EngineConfig, opened: OpenedModel, num_blocks: int) -> KVCaches:
    stored = cache_dtype(config.kv_dtype, opened.dtype)
    num_blocks += opened.device.num_scratch_blocks
    with saying_what_fits(_cache_too_large):
        return allocate_kv(opened.model, num_blocks, config.block_size, stored, opened.device)


def _cache_too_large(said: str) -> ConfigError:
    advice = "lower --kv-bytes, --max-num-seqs or --max-model-len, or use --kv-dtype int8"
    return ConfigError("kv_bytes", [f"the KV cache does not fit: {said}; {advice}"])
