"""What a cluster is asked for: checked before Ray starts, and the same behind the crossing."""

from __future__ import annotations

import json

import pytest

from glimt.cluster.plan import ClusterPlan, read_server, replica_parts, replica_range
from glimt.config import EngineConfig, ImageLimits
from glimt.errors import ConfigError
from glimt.server.config import ServerConfig


def plan(**fields):
    server = ServerConfig(**fields.pop("server", {}))
    engine = EngineConfig(**{"model": "demo", **fields.pop("engine", {})})
    return ClusterPlan(engine=engine, server=server, model_name="demo", **fields)


@pytest.mark.parametrize(("text", "found"), [("3", (3, 3)), (" 2..8 ", (2, 8)), ("0..1", (0, 1))])
def test_a_range_is_read(text, found):
    assert replica_range(text) == found


@pytest.mark.parametrize("text", ["", "many", "1..", "..4", "1...4", "-1", "1,4", "9999999"])
def test_what_is_no_range_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match=r"such as 1\.\.8"):
        replica_range(text)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"min_replicas": 0}, "min_replicas is 0; a whole number of at least 1"),
        ({"min_replicas": 3, "max_replicas": 2}, "3..2; the second number must not be less"),
        ({"replica_cpus": 0}, "replica_cpus is 0"),
        ({"target_ongoing": 0}, "target_ongoing is 0"),
        ({"scale_up_after_s": -1.0}, "scale_up_after_s is -1.0; seconds from 0 to 3600"),
        ({"scale_up_after_s": float("nan")}, "scale_up_after_s is nan"),
        ({"full_at": 0}, "full_at is 0"),
        ({"num_ingresses": 0}, "num_ingresses is 0"),
        ({"server": {"management_port": 9000}}, "management_port is of one server"),
        ({"server": {"max_connections": 9}}, "Ray Serve's proxy takes as many as come"),
    ],
)
def test_what_cannot_be_is_told(fields, said):
    """Would catch an option that is taken and then ignored."""
    with pytest.raises(ConfigError, match=said):
        plan(**fields)


def test_client_certificates_are_refused(tmp_path):
    """Would catch a port that is thought to check certificates and does not."""
    for name in ("cert", "key", "ca"):
        (tmp_path / name).write_text("x")
    tls = {f"tls_{name}": tmp_path / name for name in ("cert", "key", "ca")}
    with pytest.raises(ConfigError, match="tls_ca: Ray Serve asks clients for no certificate"):
        plan(server=tls)


def test_settings_are_the_same_behind_the_crossing(tmp_path):
    """Would catch a field that a replica does not get, or gets in another type."""
    fields = {
        "api_keys": ("sk-1", "sk-2"),
        "allowed_origins": ("https://chat.example.org",),
        "allowed_media_networks": ("10.0.0.0/8",),
        "media_path": tmp_path,
        "max_waiting": 3,
        "token_timeout_s": 1.5,
    }
    limits = ImageLimits(max_images=3)
    given = plan(server=fields, engine={"num_threads": 2, "image_limits": limits})
    assert read_server(given.server_text()) == ServerConfig(**fields)
    engine, server, name = replica_parts(given.replica_text())
    assert (engine, name) == (given.engine, "demo")
    assert server == ServerConfig(**{**fields, "api_keys": ()})


def test_keys_stay_at_the_door():
    """Would catch a key in what every replica is sent."""
    given = plan(server={"api_keys": ("sk-secret",)})
    assert "sk-secret" not in given.replica_text()
    assert "sk-secret" in given.server_text()


@pytest.mark.parametrize(
    ("fields", "bundle", "threads"),
    [
        ({}, {"CPU": 1}, 1),
        ({"engine": {"num_threads": 4}}, {"CPU": 4}, 4),
        ({"replica_cpus": 6}, {"CPU": 6}, 6),
        ({"replica_cpus": 6, "engine": {"num_threads": 4}}, {"CPU": 6}, 4),
        ({"engine": {"device": "cuda"}}, {"CPU": 1, "GPU": 1}, 1),
        ({"engine": {"device": "cuda:0"}}, {"CPU": 1, "GPU": 1}, 1),
        ({"engine": {"device": "npu"}}, {"CPU": 1, "NPU": 1}, 1),
        ({"engine": {"tp_size": 2}}, {"CPU": 2}, 1),
        ({"engine": {"tp_size": 2}, "replica_cpus": 6}, {"CPU": 6}, 3),
        ({"engine": {"device": "cuda", "tp_size": 4}}, {"CPU": 4, "GPU": 4}, 1),
    ],
)
def test_a_replica_computes_on_what_it_reserves(fields, bundle, threads):
    """Would catch two replicas that each start a thread for every core of the machine."""
    given = plan(**fields)
    assert given.bundle == bundle
    assert json.loads(given.replica_text())["engine"]["num_threads"] == threads
