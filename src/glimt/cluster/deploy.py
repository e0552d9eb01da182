"""The application on Ray Serve: Ray started or found, replicas and door deployed, and ended."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

from glimt.cluster.plan import HEALTH_S, ClusterPlan
from glimt.cluster.silence import silence_s
from glimt.errors import EngineError, MissingDependency

log = logging.getLogger("glimt.cluster")

APP = "glimt"
REPLICA, DOOR = "replica", "ingress"
_LOOPBACK = "127.0.0.1"
_SICK_S = 60.0  # for a replica to answer a look: it may be in the middle of a long step
_TOLD_S = 10.0  # for callers to hear that they were given up, Serve to notice, the engine to end
_LOOK_S = 0.5  # between two looks at what still runs
_ANSWER_S = 10.0  # for all replicas to answer one


OWN = "own"
"""In the place of a Ray's address: the one that was started here."""


def join_ray(address: str | None, num_cpus: int | None, store_bytes: int | None) -> None:
    """Connect to a Ray cluster, or start one on this machine that listens to loopback alone.

    address:     of a running one, or "auto"; OWN: of the one started here; None: start one
    num_cpus, store_bytes: of a started one; None: what the machine has, and Ray's own choice
    Raises MissingDependency, or EngineError if there is no such cluster.
    """
    # All are read when Ray is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its maker of each start
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # or who reaches its ports runs what they like
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # or a request's line stands for many
    if address in (None, OWN):
        # Ray's word for: this machine alone. All its ports are then on loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.serve
    except ImportError as error:
        raise MissingDependency("ray[serve]", "cluster") from error
    local: dict[str, Any] = {
        "include_dashboard": False,
        "_node_ip_address": _LOOPBACK,
        "num_cpus": num_cpus,
        "object_store_memory": store_bytes,
    }
    try:
        joined = {"address": "auto" if address == OWN else address}
        ray.init(**(joined if address else local), logging_level="warning")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise EngineError(
            f"Ray cannot be reached at {address or 'this machine'}: {error}"
        ) from error


def deploy(plan: ClusterPlan) -> None:
    """Put the application in place and wait until every replica is ready.

    Of an application that runs already, every process is replaced, one after the other, each with
    its running answers finished first. Raises EngineError if it cannot become ready.
    """
    from ray import serve

    quiet = {"log_level": "WARNING", "enable_access_log": False}  # ours has a line for each request
    serve.start(proxy_location="EveryNode", http_options=_http_options(plan), logging_config=quiet)
    try:
        serve.run(_application(plan), name=APP, route_prefix="/", logging_config=quiet)
    except RuntimeError as error:
        raise EngineError(f"the cluster did not become ready: {error}") from error


def is_deployed() -> bool:
    """Whether the Ray that was joined runs the application."""
    from ray import serve

    return APP in serve.status().applications


def drain(limit_s: float, is_hurried: Callable[[float], bool]) -> None:
    """Take no more requests and let running answers end; what is left at the limit is given up.

    is_hurried: waits so many seconds at most, and tells whether to give it up now
    """
    until_s = time.monotonic() + limit_s
    while sum(_of_all_replicas("drain")) and time.monotonic() < until_s:
        if is_hurried(_LOOK_S):
            break
    _of_all_replicas("give_up")


def _of_all_replicas(method: str) -> list[Any]:
    """What the replicas say that are there."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        response = serve.get_deployment_handle(REPLICA, APP).broadcast(method)
        said = response.results(timeout_s=_ANSWER_S, return_exceptions=True)
    except (RayError, RayServeException, TimeoutError) as error:
        log.warning("the replicas cannot be asked to %s: %s", method, error)
        return []
    return [each for each in said if not isinstance(each, BaseException)]


def retire() -> None:
    """End every process, and stop Serve."""
    import ray
    from ray import serve

    serve.delete(APP)
    serve.shutdown()
    ray.shutdown()


def _http_options(plan: ClusterPlan) -> dict[str, Any]:
    server = plan.server
    options: dict[str, Any] = {
        "host": server.host,
        "port": server.port,
        "keep_alive_timeout_s": int(server.idle_timeout_s),
    }
    if server.tls_cert is not None:
        options |= {"ssl_certfile": str(server.tls_cert), "ssl_keyfile": str(server.tls_key)}
    return options


def _application(plan: ClusterPlan) -> Any:
    """Door and replicas, bound together."""
    from ray import serve

    from glimt.cluster.ingress import Ingress
    from glimt.cluster.replica import Replica

    # A replica that Serve ends by itself gives its requests up after so long.
    ended_s = silence_s(plan.server.drain_timeout_s, HEALTH_S) + _TOLD_S
    replicas: Any = serve.deployment(
        Replica, name=REPLICA, graceful_shutdown_timeout_s=ended_s, **replica_options(plan)
    )
    door: Any = serve.deployment(
        Ingress,
        name=DOOR,
        num_replicas=plan.num_ingresses,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=plan.max_ongoing * plan.max_replicas + 64,
        graceful_shutdown_timeout_s=ended_s + _TOLD_S,  # it passes the replicas' last words on
    )
    logs = (plan.log_level, plan.log_format)
    return door.bind(replicas.bind(plan.replica_text(), *logs), plan.server_text(), *logs)


def replica_options(plan: ClusterPlan) -> dict[str, Any]:
    """What Serve is told of a replica: its place, its number, how it is asked and watched."""
    from ray.serve.config import RequestRouterConfig

    bundle = plan.bundle
    others = {name: count for name, count in bundle.items() if name not in ("CPU", "GPU")}
    options: dict[str, Any] = {
        # One bundle, so that all ranks of a divided model are on one machine, and its cards are
        # shown to the replica, whose processes they then are.
        "placement_group_bundles": [bundle],
        "placement_group_strategy": "STRICT_PACK",
        "ray_actor_options": {
            "num_cpus": bundle["CPU"],
            "num_gpus": bundle.get("GPU", 0),
            "resources": others,
        },
        "max_ongoing_requests": plan.max_ongoing,
        "max_queued_requests": max(1, plan.server.max_waiting),
        "health_check_period_s": HEALTH_S,
        "health_check_timeout_s": _SICK_S,
        "request_router_config": RequestRouterConfig(
            request_router_class="glimt.cluster.router.AffinityRouter",
            request_router_kwargs={"full_at": plan.full_at},
        ),
    }
    if not plan.scales:
        return options | {"num_replicas": plan.min_replicas}
    return options | {"autoscaling_config": _scaling(plan)}


def _scaling(plan: ClusterPlan) -> dict[str, Any]:
    half = max(1, plan.engine.max_num_seqs // 2)
    return {
        "min_replicas": plan.min_replicas,
        "max_replicas": plan.max_replicas,
        "target_ongoing_requests": plan.target_ongoing or half,
        "upscale_delay_s": plan.scale_up_after_s,
    }
