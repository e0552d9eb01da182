"""`glimt cluster` up to where Ray would be started."""

from __future__ import annotations

import socket
import sys
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from glimt.cli import app

COMMANDS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def closed() -> socket.socket:
    """A port as if it had been opened and left."""
    with socket.socket() as found:
        return found


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["cluster", "--port", "1", *arguments])
    return done.exit_code, " ".join(done.output.split())


def test_it_has_every_option_of_glimt_serve():
    """Would catch an option that a second list of them lacks, or has with another default."""
    of_serve, of_cluster = (
        {option.name: (option.opts, option.default) for option in COMMANDS[name].params}
        for name in ("serve", "cluster")
    )
    assert of_serve.items() <= of_cluster.items()
    own = {"replicas", "rolling_restart", "ray_address", "full_at", "replica_cpus"}
    assert own <= of_cluster.keys() - of_serve.keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replicas", "some"], "replicas: is 'some'; a number such as 4, or a range such as"),
        (["--replicas", "4..2"], "replicas are 4..2; the second number must not be less"),
        (["--management-port", "9000"], "management_port is of one server"),
        (["--port", "0"], "port: is 0; a cluster's port must be named"),
        (["--model", "/nowhere"], "'/nowhere' does not exist"),
        (["--log-level", "loud"], "log_level: 'loud' is unknown"),
    ],
)
def test_what_cannot_be_is_told_before_ray_starts(arguments, said, monkeypatch):
    """Would catch a mistake that is told by the log of some process, or not at all."""
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("glimt.commands.cluster.listen", lambda host, port: closed())
    status, output = run(*arguments)
    assert status == 2
    assert said in output


def test_a_port_that_is_taken_is_told(monkeypatch):
    """Would catch a cluster that starts for a minute and then answers nobody."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, output = run("--port", str(taken.getsockname()[1]))
    assert status == 2
    assert "cannot be opened: Address already in use" in output


def test_without_ray_it_says_what_to_install(monkeypatch):
    """Would catch a traceback of an import in its place."""
    names = ("AUTH_MODE", "USAGE_STATS_ENABLED", "ENABLE_WINDOWS_OR_OSX_CLUSTER", "DEDUP_LOGS")
    for name in names:
        monkeypatch.setenv(f"RAY_{name}", "0")  # put back at the end
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("glimt.commands.cluster.listen", lambda host, port: closed())
    monkeypatch.setattr("glimt.commands.cluster.start_logging", lambda level, form: None)
    status, output = run()
    assert status == 2
    assert "pip install 'glimt[cluster]'" in output
