"""What Serve is told of the replicas; nothing is started."""

from __future__ import annotations

import pytest

pytest.importorskip("ray.serve", reason="needs ray: pip install 'glimt[cluster]'")

from glimt.cluster.deploy import replica_options
from glimt.cluster.plan import ClusterPlan
from glimt.config import EngineConfig
from glimt.server.config import ServerConfig


def options(max_num_seqs: int = 6, **fields):
    engine = EngineConfig(model="demo", max_num_seqs=max_num_seqs)
    server = ServerConfig()
    return replica_options(ClusterPlan(engine=engine, server=server, model_name="demo", **fields))


def test_serve_is_told_when_to_add_a_replica():
    """Would catch a delay or a target that is taken and then ignored: Serve has its own."""
    by_load = {"min_replicas": 1, "max_replicas": 3}
    told = options(**by_load, target_ongoing=4, scale_up_after_s=2.5)
    assert told["autoscaling_config"] == by_load | {
        "target_ongoing_requests": 4,
        "upscale_delay_s": 2.5,
    }
    assert "num_replicas" not in told
    usual = options(**by_load)["autoscaling_config"]
    assert usual == by_load | {"target_ongoing_requests": 3, "upscale_delay_s": 30.0}


def test_a_fixed_number_does_not_follow_the_load():
    """Would catch two numbers of replicas, which Serve refuses."""
    told = options(min_replicas=2, max_replicas=2)
    assert told["num_replicas"] == 2
    assert "autoscaling_config" not in told
