"""AffinityRouter: `affinity.preferred` as a request router of Ray Serve, within an ingress.

A replica is known by its rank among the replicas, which the one that takes its place gets: so the
keys of a replica that died come back to it, whatever Serve calls it.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from glimt.cluster.affinity import preferred

RANK = "rank"  # in a replica's metadata


class AffinityRouter(RequestRouter):
    """Ranks the replicas for each request; Serve takes the first that has room.

    A request's first argument is its key, the second the replica that it must not go to again.
    """

    def initialize_state(self, full_at: int = 8, **_unused: Any) -> None:
        """Take what `deploy` says. full_at: as `preferred` has it."""
        self._full_at = full_at

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One rank of preference for each replica."""
        key, avoided = ("", "") if pending_request is None else pending_request.args[:2]
        named = named_by_rank(candidate_replicas)
        others = {
            name: each for name, each in named.items() if each.replica_id.unique_id != avoided
        }
        loads = {name: self._load(each) for name, each in (others or named).items()}
        return [[named[name]] for name in preferred(key, loads, self._full_at)]

    def _load(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def named_by_rank(replicas: list[RunningReplica]) -> dict[str, RunningReplica]:
    """Each replica by its rank; while two claim one, the second is called by its own id too."""
    named: dict[str, RunningReplica] = {}
    for each in sorted(replicas, key=lambda replica: replica.replica_id.unique_id):
        name = str(each.replica_metadata.get(RANK, ""))
        named[f"{name}/{each.replica_id.unique_id}" if name in named else name] = each
    return named
