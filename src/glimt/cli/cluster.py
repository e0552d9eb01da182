"""`glimt cluster`: options and help only."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from glimt.cli.options import Commands, option, size_option, takes
from glimt.cli.serve import serve_job

cluster_app = typer.Typer(cls=Commands)
CLUSTER = "Cluster"


@cluster_app.command()
@takes(job=serve_job)
def cluster(
    *,
    job: Any,
    replicas: Annotated[
        str,
        option("--replicas", "How many engines: N, or MIN..MAX by load.", CLUSTER, "N|MIN..MAX"),
    ] = "1",
    replica_cpus: Annotated[
        int | None,
        option(
            "--replica-cpus",
            "Cores that each replica reserves, and computes with unless --threads says otherwise. "
            "Default: --threads, else 1; for each rank of a divided model.",
            CLUSTER,
            "N",
        ),
    ] = None,
    target_ongoing: Annotated[
        int | None,
        option(
            "--target-ongoing",
            "With MIN..MAX: answers per replica to aim at. Default: half of --max-num-seqs.",
            CLUSTER,
            "N",
        ),
    ] = None,
    scale_up_after: Annotated[
        float,
        option(
            "--scale-up-after",
            "With MIN..MAX: seconds of more than that until an engine is added.",
            CLUSTER,
            "S",
        ),
    ] = 30.0,
    full_at: Annotated[
        int,
        option(
            "--full-at",
            "Answers of one replica from which others take its pictures and conversations too.",
            CLUSTER,
            "N",
        ),
    ] = 8,
    ingresses: Annotated[
        int, option("--ingresses", "Processes that take requests in.", CLUSTER, "N")
    ] = 1,
    ray_address: Annotated[
        str | None,
        option(
            "--ray-address",
            "A Ray cluster that runs: HOST:PORT, or auto for this machine's. Default: start one "
            "here.",
            CLUSTER,
            "ADDRESS",
        ),
    ] = None,
    ray_cpus: Annotated[
        int | None,
        option("--ray-cpus", "Cores of the Ray that is started. Default: all.", CLUSTER, "N"),
    ] = None,
    ray_store: Annotated[
        int | None,
        option(
            "--ray-store",
            "Its memory for large requests on their way: 200M or bytes. Default: Ray's.",
            CLUSTER,
            "SIZE",
            size_option,
        ),
    ] = None,
    rolling_restart: Annotated[
        bool,
        option(
            "--rolling-restart",
            "Replace the replicas of the cluster that runs, one after the other, by new ones with "
            "the options given now, and return.",
            CLUSTER,
        ),
    ] = False,
) -> None:
    """Serve a model by many engines on Ray Serve, with all options of glimt serve."""
    from glimt.cluster.plan import replica_range
    from glimt.commands.cluster import ClusterJob
    from glimt.commands.cluster import cluster as run

    least, most = replica_range(replicas)
    given = ClusterJob(
        serve=job,
        plan={
            "min_replicas": least,
            "max_replicas": most,
            "replica_cpus": replica_cpus,
            "target_ongoing": target_ongoing,
            "scale_up_after_s": scale_up_after,
            "full_at": full_at,
            "num_ingresses": ingresses,
        },
        ray_address=ray_address,
        ray_cpus=ray_cpus,
        ray_store_bytes=ray_store,
        is_restart=rolling_restart,
    )
    run(given)
