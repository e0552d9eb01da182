"""`glimt cluster`: many engines on Ray Serve, from their settings to their last running request."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from glimt.cluster.deploy import OWN, deploy, drain, is_deployed, join_ray, retire
from glimt.cluster.plan import ClusterPlan
from glimt.commands.console import note
from glimt.commands.serve import ServeJob, check_tls, listen, model_name
from glimt.config import EngineConfig
from glimt.errors import ConfigError
from glimt.loader import BUILT_IN, open_model
from glimt.server.config import ServerConfig
from glimt.server.logs import start_logging
from glimt.synthetic import is_synthetic


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterJob:
    """What was asked for. plan: fields of ClusterPlan beside the server's own.

    ray_address: of a running Ray; None: start one with ray_cpus and ray_store_bytes
    is_restart:  replace what runs, and return
    """

    serve: ServeJob
    plan: Mapping[str, Any]
    ray_address: str | None = None
    ray_cpus: int | None = None
    ray_store_bytes: int | None = None
    is_restart: bool = False


def cluster(job: ClusterJob) -> None:
    """Serve until a signal ends it; with is_restart, replace what runs and return.

    Raises ConfigError or CheckpointError for what can be told before Ray is started,
    MissingDependency without Ray, and EngineError if the cluster cannot become ready.
    """
    plan = _plan(job)
    start_logging(job.serve.log_level, job.serve.log_format)
    join_ray(_address(job), job.ray_cpus, job.ray_store_bytes)
    signals = _signals()
    if job.is_restart:
        _restart(plan)
        return
    scheme = "http" if plan.server.tls_cert is None else "https"
    where = f"{scheme}://{plan.server.host}:{plan.server.port}"
    note(f"starting {_counted(plan)} of {plan.model_name}")
    deploy(plan)
    note(f"serving {plan.model_name} at {where}")
    signals.get()
    limit_s = plan.server.drain_timeout_s
    note(f"ending: running answers may go on for {limit_s:g} s; a second signal ends them at once")
    drain(limit_s, partial(_came, signals))
    retire()


def _address(job: ClusterJob) -> str | None:
    """A restart is of what the command has started here, unless another Ray is named."""
    return job.ray_address or (OWN if job.is_restart else None)


def _restart(plan: ClusterPlan) -> None:
    if not is_deployed():
        said = "no glimt cluster runs there; start one without --rolling-restart"
        raise ConfigError("rolling_restart", [said])
    note(f"replacing {_counted(plan)} of {plan.model_name}, one after the other")
    deploy(plan)
    note("every replica is new")


def _counted(plan: ClusterPlan) -> str:
    count = f"{plan.min_replicas}..{plan.max_replicas}" if plan.scales else str(plan.min_replicas)
    return f"{count} replica{'s' if plan.max_replicas > 1 else ''}"


def _plan(job: ClusterJob) -> ClusterPlan:
    """Everything checked that can be without Ray."""
    config = EngineConfig(**job.serve.engine)
    plan = ClusterPlan(
        engine=replace(config, model=_absolute(config.model)),
        server=job.serve.server,
        model_name=model_name(config.model),
        log_level=job.serve.log_level,
        log_format=job.serve.log_format,
        **job.plan,
    )
    check_tls(plan.server)
    open_model(config)
    if _address(job) is None:
        _check_port(plan.server)
    return plan


def _check_port(server: ServerConfig) -> None:
    """Raise ConfigError if Serve's proxy could not open it: Serve would only log that."""
    if not server.port:
        said = "is 0; a cluster's port must be named, since Serve does not tell which it has taken"
        raise ConfigError("port", [said])
    listen(server.host, server.port).close()


def _absolute(model: str) -> str:
    """A folder as every process finds it, wherever it was started."""
    if model in BUILT_IN or is_synthetic(model):
        return model
    return str(Path(model).expanduser().resolve())


def _signals() -> SimpleQueue[int]:
    """Of SIGTERM and SIGINT, as they come. Called after Ray is joined, which takes SIGTERM."""
    # Of all that can be waited for, what a signal may put into while somebody waits.
    signals: SimpleQueue[int] = SimpleQueue()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: signals.put(number))
    return signals


def _came(signals: SimpleQueue[int], within_s: float) -> bool:
    """Whether there is one, waiting for it for a while."""
    try:
        signals.get(timeout=within_s)
    except Empty:
        return False
    return True
