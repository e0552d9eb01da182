"""ClusterPlan: what was asked for, checked before Ray is started, and as text for its processes.

Settings cross from process to process as JSON, so that no object of ours is pickled.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimt.config import EngineConfig
from glimt.errors import ConfigError
from glimt.server.config import ServerConfig

_RANGE = re.compile(r"(\d{1,6})(?:\.\.(\d{1,6}))?")
_CARDS = {"cuda": "GPU", "npu": "NPU"}  # what Ray calls a device's cards
_LONGEST_S = 3600.0
HEALTH_S = 5.0
"""Between two looks of Serve at a replica."""
_PATHS = ("media_path", "tls_cert", "tls_key", "tls_ca")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """How many replicas there are, and what each of them reserves.

    Raises ConfigError listing every impossible value.
    """

    engine: EngineConfig
    server: ServerConfig
    model_name: str
    min_replicas: int = 1
    max_replicas: int = 1
    replica_cpus: int | None = None  # cores of one replica; None: threads times tp_size
    target_ongoing: int | None = None  # answers per replica to scale by; None: half of a full batch
    scale_up_after_s: float = 30.0  # of more than that, until a replica is added
    full_at: int = 8  # answers of one replica, beyond which others take its pictures too
    num_ingresses: int = 1  # processes that take requests and pass them on
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}; a whole number of at least 1 is needed"
            for name in ("min_replicas", "full_at", "num_ingresses")
            if (value := getattr(self, name)) < 1
        ]
        problems += [
            f"{name} is {value!r}; a whole number of at least 1 is needed"
            for name in ("replica_cpus", "target_ongoing")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not 0 <= self.scale_up_after_s <= _LONGEST_S:
            said = f"scale_up_after_s is {self.scale_up_after_s!r}"
            problems.append(f"{said}; seconds from 0 to {_LONGEST_S:.0f} are needed")
        if self.max_replicas < self.min_replicas:
            said = f"replicas are {self.min_replicas}..{self.max_replicas}"
            problems.append(f"{said}; the second number must not be less than the first")
        problems += _refused(self.server)
        if problems:
            raise ConfigError("cluster options", problems)

    @property
    def tp_size(self) -> int:
        """Cards, or processes on a CPU, that one replica's model is divided among."""
        return self.engine.tp_size

    @property
    def bundle(self) -> dict[str, float]:
        """What one replica reserves, all of it on one machine: cores, and cards if it has any."""
        threads = self.engine.num_threads or 1
        cores = {"CPU": float(self.replica_cpus or threads * self.tp_size)}
        card = _CARDS.get(self.engine.device.partition(":")[0])
        return cores if card is None else {**cores, card: float(self.tp_size)}

    @property
    def scales(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.min_replicas != self.max_replicas

    @property
    def max_ongoing(self) -> int:
        """Requests that a replica is given; what it refuses itself, with 429, is among them."""
        return self.engine.max_num_seqs + self.server.max_waiting + 16

    def replica_text(self) -> str:
        """For `replica_parts`. Without keys: those stay at the door."""
        engine = {**dataclasses.asdict(self.engine), "num_threads": self._num_threads}
        inner = dataclasses.replace(self.server, api_keys=(), tls_cert=None, tls_key=None)
        said = {"engine": engine, "server": _plain(inner), "model_name": self.model_name}
        return json.dumps(said)

    @property
    def _num_threads(self) -> int:
        """Of one rank: what the replica has reserved, divided among them."""
        return self.engine.num_threads or max(1, int(self.bundle["CPU"]) // self.tp_size)

    def server_text(self) -> str:
        """For `read_server`."""
        return json.dumps(_plain(self.server))


def _refused(server: ServerConfig) -> list[str]:
    """Options of one server that several behind one port cannot keep."""
    problems = []
    if server.management_port is not None:
        problems.append("management_port is of one server; leave it out, glimt serve has it")
    if server.max_connections is not None:
        said = "max_connections: Ray Serve's proxy takes as many as come"
        problems.append(f"{said}; leave it out, and bound them in a proxy in front")
    if server.tls_ca is not None:
        said = "tls_ca: Ray Serve asks clients for no certificate"
        problems.append(f"{said}; use --api-key, or a proxy in front that checks certificates")
    return problems


def replica_range(text: str) -> tuple[int, int]:
    """Least and most replicas of "N" or "MIN..MAX". Raises ConfigError."""
    found = _RANGE.fullmatch(text.strip())
    if found is None:
        said = f"is {text!r}; a number such as 4, or a range such as 1..8, is needed"
        raise ConfigError("replicas", [said])
    least = int(found[1])
    return least, int(found[2] or least)


# --- as text ---------------------------------------------------------------------------------


def _plain(server: ServerConfig) -> dict[str, Any]:
    fields = dataclasses.asdict(server)
    return fields | {name: str(fields[name]) for name in _PATHS if fields[name] is not None}


def read_server(text: str) -> ServerConfig:
    """The settings that `server_text` wrote."""
    return _server(json.loads(text))


def replica_parts(text: str) -> tuple[EngineConfig, ServerConfig, str]:
    """Settings of engine and server, and the model's name, as `replica_text` wrote them."""
    said = json.loads(text)
    return EngineConfig.from_dict(said["engine"]), _server(said["server"]), said["model_name"]


def _server(said: Mapping[str, Any]) -> ServerConfig:
    fields: dict[str, Any] = {
        name: tuple(each) if isinstance(each, list) else each for name, each in said.items()
    }
    paths = {name: Path(fields[name]) for name in _PATHS if fields[name] is not None}
    return ServerConfig(**(fields | paths))
