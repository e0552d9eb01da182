"""`glimt serve --mindie-config`: the file's settings, and the options that go before them."""

from __future__ import annotations

import json
import subprocess

import pytest
from typer.testing import CliRunner

from glimt.cli import app
from glimt.commands import serve as command


@pytest.fixture
def path(tmp_path):
    model = {"modelName": "glm4v", "modelWeightPath": "demo", "worldSize": 1}
    backend = {
        "backendName": "x",
        "ModelDeployConfig": {"maxSeqLen": 2560, "ModelConfig": [model]},
        "ScheduleConfig": {"maxBatchSize": 9, "maxIterTimes": 33},
    }
    content = {"ServerConfig": {"port": 11025, "httpsEnabled": False}, "BackendConfig": backend}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def jobs(monkeypatch):
    """Jobs that the command would have run."""
    taken = []
    monkeypatch.setattr(command, "serve", lambda job: taken.append(job) or 0)
    return taken


def run(*arguments):
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_the_file_stands_in_for_the_options(path, jobs):
    """Catches a file that is declared and not read."""
    result = run("--mindie-config", path)
    assert result.exit_code == 0
    (job,) = jobs
    assert (job.engine["model"], job.engine["max_num_seqs"]) == ("demo", 9)
    assert (job.server.port, job.server.management_port) == (11025, 1026)
    assert job.server.served_model_names == ("glm4v",)
    assert job.server.max_output_tokens == 33
    assert "without effect here: backendName" in result.stderr


def test_an_option_that_is_typed_goes_before_the_file(path, jobs):
    """Catches a file that overrules what was just typed, defaults included."""
    run("--mindie-config", path, "--port", "8000", "--max-num-seqs", "64", "-m", "other",
        "--served-model-name", "me", "--request-timeout", "600")  # fmt: skip
    (job,) = jobs
    assert (job.server.port, job.engine["max_num_seqs"], job.engine["model"]) == (8000, 64, "other")
    assert job.server.served_model_names == ("me",)
    assert job.server.request_timeout_s == 600


def test_a_wrong_file_is_told_with_all_that_is_wrong(path, jobs):
    """Catches a traceback, and a server that starts all the same."""
    path.write_text(path.read_text().replace("11025", '"11025"').replace("33", "-1"))
    result = run("--mindie-config", path)
    assert result.exit_code == 2
    assert "ServerConfig.port" in result.stderr
    assert "ScheduleConfig.maxIterTimes" in result.stderr
    assert not jobs


@pytest.mark.parametrize("has_password", [False, True])
def test_a_certificate_that_is_none_is_told_before_anything_is_loaded(tmp_path, has_password):
    """Catches OpenSSL's own words, and its question for a password in a service's log."""
    key, cert = tmp_path / "k.pem", tmp_path / "c.pem"
    protected = ["-passout", "pass:abcd"] if has_password else ["-nodes"]
    try:
        made = subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", *protected, "-keyout", key,
             "-out", cert, "-days", "1", "-subj", "/CN=localhost"],
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("needs openssl to make a certificate")
    assert made.returncode == 0
    files = (cert, key) if has_password else (key, cert)
    result = run("-m", "demo", "--port", "0", "--tls-cert", files[0], "--tls-key", files[1])
    assert result.exit_code == 2
    assert "are no certificate and its key, in PEM and without a password" in result.stderr
