"""MindIE's management routes, served on a port of their own that is bound to loopback.

Source: Ascend/MindIE-LLM, src/server/endpoint and docs/zh/user_guide; what belongs to separated
prefill and decode is not offered.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from glimt.errors import GlimtError
from glimt.server.app import Context, Protocol
from glimt.server.bodies import StrictRoute
from glimt.server.failures import Failure, HttpFailure
from glimt.server.health import live_status, ready_status
from glimt.server.replying import json_reply
from glimt.types import SamplingParams

_PROBE_S = 10
_MOST_PROBE_S = 600


class Management:
    """Answers what an operator asks."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._service = context.service

    def config(self) -> dict[str, Any]:
        """`GET /v1/config`."""
        engine = self._service.host.engine.engine
        limit = engine.inputs.limits.max_model_len
        return {
            "modelName": self._context.model_name,
            "maxSeqLen": limit,
            "npuMemSize": round(engine.memory.kv / 2**30, 3),
            "cpuMemSize": 0,
            "worldSize": 1,
            "maxOutputLen": self._context.config.max_output_tokens or limit,
            "cacheBlockSize": engine.config.block_size,
        }

    def status(self) -> dict[str, Any]:
        """`GET /v1/status`. A slot is a sequence that can run."""
        engine, stats = self._service.host.engine, self._service.host.engine.stats()
        return {
            "service": {"roleStatus": "RoleReady", "currentRole": "none"},
            "resource": {
                "availSlotsNum": max(0, engine.max_num_seqs - stats.num_running),
                "availBlockNum": stats.num_free_blocks,
                "waitingRequestNum": stats.num_waiting,
                "runningRequestNum": stats.num_running,
                "swappedRequestNum": 0,
                "freeNpuBlockNums": stats.num_free_blocks,
                "freeCpuBlockNums": 0,
                "totalNpuBlockNums": stats.num_blocks,
                "totalCpuBlockNums": 0,
            },
            "linkStatus": {"peers": []},
        }

    def more_status(self) -> dict[str, Any]:
        """`GET /v2/status`."""
        status = self.status()
        resource = status["resource"]
        more = {
            "totalAvailNpuSlotsNum": resource["availSlotsNum"],
            "totalAvailNpuBlockNum": resource["availBlockNum"],
            "maxAvailNpuBlockNum": resource["availBlockNum"],
        }
        return {**status, "resource": {**resource, **more}, "dpInstMap": {}}

    def slots(self) -> dict[str, int]:
        """`GET /v2/models/{m}/getSlotCount`."""
        engine, stats = self._service.host.engine, self._service.host.engine.stats()
        return {
            "total_slots": engine.max_num_seqs,
            "free_slots": max(0, engine.max_num_seqs - stats.num_running),
            "available_tokens_length": stats.num_free_blocks * engine.engine.config.block_size,
        }

    def metrics(self) -> dict[str, Any]:
        """`GET /metrics-json`: means in ms, and what is going on."""
        stats, total = self._service.host.engine.stats(), self._context.metrics.total

        def mean_ms(name: str) -> float:
            count = total(f"vllm:{name}_count")
            return round(1000 * total(f"vllm:{name}_sum") / count, 3) if count else 0.0

        values = {
            "TTFT": mean_ms("time_to_first_token_seconds"),
            "TBT": mean_ms("inter_token_latency_seconds"),
            "waitingInferRequestNum": stats.num_waiting,
            "processingInferRequestNum": stats.num_running,
            "remainBlocks": stats.num_free_blocks,
        }
        result = [
            {"metric": [{"__name__": name, "job": "node"}], "value": value}
            for name, value in values.items()
        ]
        return {"resultType": "vector", "result": result}

    async def probe(self, seconds: int) -> int:
        """The status of a one-token answer within a time."""
        sampling = SamplingParams(temperature=0, max_tokens=1)
        try:
            async with asyncio.timeout(seconds):
                await self._service.host.engine.chat([{"role": "user", "content": "1"}], sampling)
        except (TimeoutError, GlimtError):
            return 500 if self._service.host.is_ready else 503
        return 200


def routes(context: Context) -> APIRouter:
    """All of them."""
    router = APIRouter(route_class=StrictRoute)
    management = Management(context)
    _add_health(router, context, management)

    @router.get("/v1/config", summary="MindIE: what is served, and how")
    async def config() -> Response:
        return json_reply(management.config())

    @router.get("/v1/status", summary="MindIE: slots and blocks")
    async def status() -> Response:
        return json_reply(management.status())

    @router.get("/v2/status", summary="MindIE: the same, and more")
    async def more_status() -> Response:
        return json_reply(management.more_status())

    @router.get("/v1/engine-server/running-status", summary="MindIE: whether it runs")
    async def running() -> Response:
        return json_reply({"status": context.service.host.state})

    @router.get("/v2/models/{model}/getSlotCount", summary="MindIE: slots of a model")
    async def slots(model: str) -> Response:
        context.check_model(model)
        return json_reply(management.slots())

    @router.get("/metrics-json", summary="MindIE: a few metrics as JSON")
    async def metrics() -> Response:
        return json_reply(management.metrics())

    @router.get("/stopService", summary="MindIE: end the server; mode=Force: at once")
    async def stop(request: Request) -> Response:
        mode = request.query_params.get("mode", "")
        if mode not in ("", "Force", "force"):
            raise HttpFailure(Failure("invalid", "mode: must be Force, or left out", "mode"))
        context.service.host.drain()
        context.stopping.ask(is_forced=bool(mode))
        return json_reply({"message": "the server is ending"})

    return router


def _add_health(router: APIRouter, context: Context, management: Management) -> None:
    @router.get("/v2/health/live", summary="MindIE: 200 if it lives")
    async def live() -> Response:
        return Response(status_code=live_status(context))

    @router.get("/v2/health/ready", summary="MindIE: 200 if requests are answered")
    async def ready() -> Response:
        return Response(status_code=ready_status(context))

    @router.get("/v2/models/{model}/ready", summary="MindIE: 200 if the model answers")
    async def model_ready(model: str) -> Response:
        context.check_model(model)
        return Response(status_code=ready_status(context))

    @router.get("/health/timed", summary="MindIE: whether an answer comes within 10 s")
    async def timed() -> Response:
        return Response(status_code=await management.probe(_PROBE_S))

    @router.get("/health/timed-{seconds}", summary="MindIE: the same within so many seconds")
    async def timed_for(seconds: str) -> Response:
        if not (
            seconds.isascii() and seconds.isdecimal() and 1 <= int(seconds[:9]) <= _MOST_PROBE_S
        ):
            raise HttpFailure(Failure("unknown_route", f"seconds must be 1 to {_MOST_PROBE_S}"))
        return Response(status_code=await management.probe(int(seconds)))


MANAGEMENT = Protocol("mindie management", routes, is_management=True)
