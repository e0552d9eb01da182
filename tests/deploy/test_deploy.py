"""What deploy/ names is there: options, paths, ports and metrics."""

from __future__ import annotations

import configparser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from tests.serving import serving

from glimt.cli import app
from glimt.server.app import PAGE
from glimt.server.config import ServerConfig
from glimt.server.middleware import OPEN_PATHS

DEPLOY = Path(__file__).parents[2] / "deploy"
DOCKERFILES = sorted(DEPLOY.glob("Dockerfile.*"))
BOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
PORT = 8000
SERVE: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]


def documents(file: str) -> list[Any]:
    return list(yaml.safe_load_all((DEPLOY / file).read_text(encoding="utf-8")))


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "glimt.service", encoding="utf-8")
    return parser


def pod() -> dict[str, Any]:
    (deployment,) = [one for one in documents("kubernetes.yaml") if one["kind"] == "Deployment"]
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return dict(only)


def docker_command(file: Path) -> list[str]:
    """CMD of a Dockerfile, which its entry point passes to glimt."""
    (command,) = re.findall(r"^CMD (\[.*\])$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return list(json.loads(command))


def commands() -> dict[str, list[str]]:
    """Every command line of the folder, without the program's name."""
    compose = documents("compose.yaml")[0]["services"]["glimt"]["command"]
    found = {file.name: docker_command(file) for file in DOCKERFILES}
    found["compose.yaml"] = compose
    found["kubernetes.yaml"] = container()["args"]
    found["glimt.service"] = shlex.split(unit()["Service"]["ExecStart"])[1:]
    return found


@pytest.mark.parametrize("file", commands())
def test_every_command_parses(file):
    """Catches an option that was renamed, and a container that only itself can reach."""
    name, *arguments = commands()[file]
    assert name == "serve"
    given = SERVE.make_context(name, arguments).params
    assert given["port"] == PORT
    assert (given["host"] == "0.0.0.0") == (file != "glimt.service")


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_every_dockerfile_is_of_one_pattern(file):
    """Catches an image that runs as root, hides its port or checks a path that is not there."""
    text = file.read_text(encoding="utf-8")
    assert f"EXPOSE {PORT}" in text
    assert f"http://127.0.0.1:{PORT}/health" in text
    assert text.index("USER 10001") < text.index("ENTRYPOINT")
    assert "not built" in text.lower()
    root = DEPLOY.parent
    for copied in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE):
        assert all((root / name).exists() for name in copied.split()), copied


def test_there_is_an_image_for_each_device():
    """Catches a file that was renamed where the documentation still names it."""
    assert [file.suffix for file in DOCKERFILES] == [".ascend", ".cpu", ".cuda"]


def test_probes_ask_what_is_there_and_open():
    """Catches a pod that is killed because its probe is answered with 401 or 404."""
    kinds = {
        "startupProbe": "/health",
        "livenessProbe": "/v2/health/live",
        "readinessProbe": "/health",
    }
    for kind, path in kinds.items():
        assert container()[kind]["httpGet"] == {"path": path, "port": "http"}
    with serving(server=ServerConfig(num_decoders=0, api_keys=("sk-1",))) as served:
        for path in kinds.values():
            assert path in OPEN_PATHS
            assert status(served.url + path) == 200
        assert status(served.url + "/metrics") == 401


def status(url: str, **headers: str) -> int:
    import requests

    return requests.get(url, headers=headers, timeout=10).status_code


def test_ports_lead_to_the_server():
    """Catches a service, a scrape or a published port that leads nowhere."""
    assert container()["ports"] == [{"name": "http", "containerPort": PORT}]
    (service,) = [one for one in documents("kubernetes.yaml") if one["kind"] == "Service"]
    assert service["spec"]["ports"][0]["targetPort"] == "http"
    assert service["spec"]["selector"] == {"app": "glimt"}
    compose = documents("compose.yaml")[0]["services"]
    assert compose["glimt"]["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    (job,) = documents("prometheus.yml")[0]["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"glimt:{PORT}"]}]


def test_whoever_ends_the_server_waits_for_its_last_answers():
    """Catches a grace period that kills running answers before --drain-timeout is over."""
    drain_s = {
        file: SERVE.make_context("serve", given[1:]).params["drain_timeout"]
        for file, given in commands().items()
    }
    pause_s = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    grace_s = pod()["terminationGracePeriodSeconds"]
    assert grace_s >= drain_s["kubernetes.yaml"] + pause_s + 10
    assert int(unit()["Service"]["TimeoutStopSec"]) >= drain_s["glimt.service"] + 10
    assert unit()["Service"]["KillMode"] == "mixed"  # or the decoders die before the server
    compose = documents("compose.yaml")[0]["services"]["glimt"]
    assert int(compose["stop_grace_period"].rstrip("s")) >= drain_s["compose.yaml"] + 10


def test_files_that_compose_mounts_are_there():
    """Catches a mount of a file that is not there, which Docker makes a folder of."""
    for service in documents("compose.yaml")[0]["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).is_file(), source
    assert (
        documents("grafana/datasource.yml")[0]["datasources"][0]["url"] == "http://prometheus:9090"
    )
    assert documents("grafana/dashboards.yml")[0]["providers"][0]["options"]["path"] == "/etc/glimt"


# --- the dashboard ---------------------------------------------------------------------------

METRIC = re.compile(r"\b(?:vllm|glimt):\w+")


def expressions() -> list[str]:
    targets = [target for panel in BOARD["panels"] for target in panel.get("targets", [])]
    return [target["expr"] for target in targets]


def metric_names(text: str) -> set[str]:
    """Names of all samples that Prometheus may get, those of counters without a value too."""
    names = set()
    for name, kind in re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE):
        ends = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {name + end for end in ends}
    return names


def test_every_metric_of_the_dashboard_is_one_of_ours():
    """Catches a panel that stays empty because its metric is called something else."""
    import requests

    with serving() as served:
        text = requests.get(f"{served.url}/metrics", timeout=10).text
    shown = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert shown - metric_names(text) == set()
    assert {"vllm:time_to_first_token_seconds_bucket", "glimt:images_total"} <= shown
    (query,) = [each["query"] for each in BOARD["templating"]["list"] if each["type"] == "query"]
    assert set(METRIC.findall(query)) <= metric_names(text)


def test_panels_have_ids_places_and_one_source():
    """Catches panels that lie on each other, or ask a data source of another Grafana."""
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        covers = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert not covers & places, panel["title"]
        places |= covers
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for expression in expressions():
        assert expression.count("(") == expression.count(")"), expression
        assert expression.count('{model_name=~"$model_name"}') == len(METRIC.findall(expression))


def test_the_installed_package_has_the_page():
    """Catches a page that is there in a checkout and missing from the wheel."""
    import glimt

    assert PAGE.is_relative_to(Path(glimt.__file__).parent)
    assert {"index.html", "page.css", "page.js", "icon.svg"} <= {p.name for p in PAGE.iterdir()}


# --- a model divided over several machines ---------------------------------------------------

GROUP_FILE = "leaderworkerset.yaml"


def group() -> dict[str, Any]:
    (found,) = [one for one in documents(GROUP_FILE) if one["kind"] == "LeaderWorkerSet"]
    template: dict[str, Any] = found["spec"]["leaderWorkerTemplate"]
    return template


def rank_pod(role: str) -> dict[str, Any]:
    spec: dict[str, Any] = group()[f"{role}Template"]["spec"]
    return spec


def rank_container(role: str) -> dict[str, Any]:
    (only,) = rank_pod(role)["containers"]
    return dict(only)


def test_every_rank_runs_the_same_command():
    """Catches a group whose ranks wait for each other for ever."""
    leader, worker = rank_container("leader"), rank_container("worker")
    assert leader["command"] == worker["command"]
    assert leader["args"] == worker["args"]
    program, *options = leader["command"]
    assert (program, options[-2:]) == ("torchrun", ["--no-python", "glimt"])
    given = dict(option.split("=") for option in options[:-2])
    assert given == {
        "--nnodes": "$(LWS_GROUP_SIZE)",
        "--node-rank": "$(LWS_WORKER_INDEX)",
        "--nproc-per-node": "4",
        "--master-addr": "$(LWS_LEADER_ADDRESS)",
        "--master-port": "29500",
    }
    cards = leader["resources"]["limits"]["nvidia.com/gpu"]
    assert cards == given["--nproc-per-node"]
    tp_size = leader["args"][leader["args"].index("--tp") + 1]
    assert int(tp_size) == group()["size"] * int(cards)


def test_torchrun_knows_the_options():
    """Catches a name that torch has dropped."""
    from torch.distributed.run import get_args_parser

    _, *options = rank_container("leader")["command"]
    numbered = [re.sub(r"\$\(LWS_\w+\)", "2", option) for option in options]
    given = get_args_parser().parse_args(numbered)
    assert (given.nnodes, given.node_rank, given.master_addr) == ("2", 2, "2")
    assert given.no_python
    assert given.training_script == "glimt"


def test_the_group_s_command_parses():
    """Catches an option that was renamed."""
    name, *arguments = rank_container("leader")["args"]
    assert name == "serve"
    given = SERVE.make_context(name, arguments).params
    assert (given["port"], given["host"], given["tp_size"]) == (PORT, "0.0.0.0", 8)


def test_the_group_is_asked_and_ended_like_a_single_server():
    """Catches probes of another path, a service that leads to a worker, and a short grace."""
    leader = rank_container("leader")
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert leader[kind] == container()[kind]
    assert "readinessProbe" not in rank_container("worker")
    (service,) = [one for one in documents(GROUP_FILE) if one["kind"] == "Service"]
    labels = group()["leaderTemplate"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels
    assert group()["workerTemplate"]["metadata"]["labels"] != labels
    for role in ("leader", "worker"):
        assert rank_pod(role)["terminationGracePeriodSeconds"] >= 90 + 5 + 10
