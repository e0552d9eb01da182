"""MindIE's config.json as settings of ours: what has a meaning here, what has not, what is wrong.

Knows the file and its rules; the command merges what it gives with its own options.
Source: Ascend/MindIE-LLM, docs/zh/user_guide/user_manual/service_parameter_configuration.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from glimt.errors import ConfigError
from glimt.server.mindie_config_rules import (
    BACKEND,
    DEPLOY,
    INNER,
    LOG,
    MODEL,
    OF_TLS,
    RULES,
    SCHEDULE,
    SECTIONS,
    SERVER,
    WITH_MEANING,
    Rule,
    problem,
)

_MEDIA_HOSTS = ("ALLOWED_MEDIA_DOMAINS_ENV", "ALLOWED_MEDIA_URLS_ENV")
_CONTAINER_IP = "MIES_CONTAINER_IP"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class MindieSettings:
    """A file, read.

    engine, server: fields of EngineConfig and ServerConfig
    notes:          what the operator should know, one line each
    """

    engine: Mapping[str, Any]
    server: Mapping[str, Any]
    log_level: str | None
    notes: tuple[str, ...]


def read_mindie_config(path: Path, environment: Mapping[str, str]) -> MindieSettings:
    """Read a config.json; keys that are not there have MindIE's defaults.

    Raises ConfigError listing everything that is wrong.
    """
    return _Reading(path, _sections(path), environment).settings()


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    where = str(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(where, [f"cannot be read: {error.strerror or error}"]) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(where, [f"is not JSON in UTF-8: {error}"]) from error
    if not isinstance(raw, dict):
        raise ConfigError(where, ["holds no JSON object"])
    backend = raw.get(BACKEND) or {}
    inside = backend if isinstance(backend, dict) else {}
    deploy = inside.get(DEPLOY) or raw.get(DEPLOY) or {}
    models = deploy.get(MODEL) if isinstance(deploy, dict) else None
    if not isinstance(models, list) or len(models) != 1:
        raise ConfigError(where, [f"{DEPLOY}.{MODEL} must be a list of one model"])
    schedule = inside.get(SCHEDULE) or raw.get(SCHEDULE)
    found = {SERVER: raw.get(SERVER), LOG: raw.get(LOG), SCHEDULE: schedule}
    found |= {BACKEND: backend, DEPLOY: deploy, MODEL: models[0]}
    wrong = [name for name, each in found.items() if not isinstance(each or {}, dict)]
    if wrong:
        raise ConfigError(where, [f"{name} must be an object" for name in wrong])
    return {name: each or {} for name, each in found.items()}


@dataclass(slots=True)
class _Reading:
    """One pass over a file."""

    path: Path
    sections: Mapping[str, Mapping[str, Any]]
    environment: Mapping[str, str]
    values: dict[str, Any] = field(default_factory=dict)
    out: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def settings(self) -> MindieSettings:
        for rule in RULES:
            self._read(rule)
        if not self.problems:
            for step in (self._address, self._tls, self._sizes, self._pictures, self._say_unused):
                step()
        if self.problems:
            raise ConfigError(str(self.path), self.problems)
        level = self.values["LogConfig.dynamicLogLevel"] or self.values["LogConfig.logLevel"]
        return MindieSettings(
            engine=self._of("engine."),
            server=self._of("server."),
            log_level=_log_level(level),
            notes=tuple(self.notes),
        )

    def _of(self, prefix: str) -> dict[str, Any]:
        return {
            name.removeprefix(prefix): each
            for name, each in self.out.items()
            if name.startswith(prefix)
        }

    def _read(self, rule: Rule) -> None:
        given = self.sections[rule.section].get(rule.key)
        value = rule.default if given is None else given
        self.values[rule.name] = value
        if given is not None and (said := problem(rule, given)):
            self.problems.append(f"{rule.name} {said}")
        elif rule.to and value is not None:
            self.out[rule.to] = rule.convert(value) if rule.convert else value

    # --- what takes more than one key ---

    def _address(self) -> None:
        host = self.environment.get(_CONTAINER_IP) or self.out["server.host"]
        self.out["server.host"] = host
        if host in ("0.0.0.0", "::") and not self.values["ServerConfig.allowAllZeroIpListening"]:
            said = "needs ServerConfig.allowAllZeroIpListening to be true"
            self.problems.append(f"ServerConfig.ipAddress {host} {said}")
        management = self.values["ServerConfig.managementIpAddress"]
        if management not in (None, *_LOOPBACK):
            self.notes.append("managementIpAddress: management is served at 127.0.0.1 only")
        if self.out["server.management_port"] == self.out["server.port"]:
            del self.out["server.management_port"]
            said = "so there are no management routes: what can stop a server is no public route"
            self.notes.append(f"managementPort is the port itself, {said}")
        metrics = self.values["ServerConfig.metricsPort"]
        if metrics not in (None, self.out["server.port"]):
            self.notes.append("metricsPort: metrics are at the public port")

    def _tls(self) -> None:
        if not self.values["ServerConfig.httpsEnabled"]:
            return
        value = {key: self.values[f"ServerConfig.{key}"] for key in OF_TLS}
        if not value["tlsCert"] or not value["tlsPk"]:
            said = "is true (its default) and needs tlsCert and tlsPk; or set it to false"
            self.problems.append(f"ServerConfig.httpsEnabled {said}")
            return
        if value["tlsPkPwd"]:
            said = "is given, but encrypted keys are not read; store the key without a password"
            self.problems.append(f"ServerConfig.tlsPkPwd {said}")
        if value["tlsCrlFiles"]:
            self.problems.append("ServerConfig.tlsCrlFiles: revocation lists are not read")
        if len(value["tlsCaFile"]) > 1:
            self.problems.append("ServerConfig.tlsCaFile must name one file")
        self.out["server.tls_cert"] = self._file(value["tlsCert"])
        self.out["server.tls_key"] = self._file(value["tlsPk"])
        if value["tlsCaFile"]:
            self.out["server.tls_ca"] = self._file(value["tlsCaPath"], str(value["tlsCaFile"][0]))

    def _file(self, *names: str) -> Path:
        """Relative names are MindIE's folder's, which is the one above the file's `conf`."""
        relative = Path(*names)
        beside = self.path.parent / relative
        return beside if beside.exists() else self.path.parent.parent / relative

    def _sizes(self) -> None:
        most_prompt = self.values["ModelDeployConfig.maxInputTokenLen"]
        if self.out["engine.max_num_batched_tokens"] < most_prompt:
            self.problems.append("ScheduleConfig.maxPrefillTokens is below maxInputTokenLen")
        if self.out["engine.block_size"] % 16:
            self.problems.append("ScheduleConfig.cacheBlockSize is no multiple of 16")
        if (
            self.values["ScheduleConfig.maxPreemptCount"]
            and not self.values["ModelConfig.cpuMemSize"]
        ):
            self.problems.append("ScheduleConfig.maxPreemptCount above 0 needs cpuMemSize above 0")
        self.out["server.max_prompt_tokens"] = most_prompt
        in_progress = 3 * self.values["ServerConfig.maxLinkNum"]  # running, and twice as many more
        self.out["server.max_waiting"] = max(0, in_progress - self.out["engine.max_num_seqs"])
        self._devices()

    def _devices(self) -> None:
        world_size, ids = (
            self.values["ModelConfig.worldSize"],
            self.values["BackendConfig.npuDeviceIds"],
        )
        if ids is not None and not (len(ids) == 1 and isinstance(ids[0], list)):
            self.problems.append("BackendConfig.npuDeviceIds must be a list of one list")
        elif ids is not None and len(ids[0]) != world_size:
            said = f"names {len(ids[0])} devices, but ModelConfig.worldSize is {world_size}"
            self.problems.append(f"BackendConfig.npuDeviceIds {said}")
        if world_size > 1:
            self.notes.append(f"worldSize {world_size}: the model runs on one device here")

    def _pictures(self) -> None:
        """Hosts that MindIE's environment allows; of a URL its host."""
        listed = [
            each for name in _MEDIA_HOSTS for each in self.environment.get(name, "").split(",")
        ]
        hosts = [urlsplit(each).hostname or "" if "://" in each else each for each in listed]
        if kept := tuple(dict.fromkeys(host.strip() for host in hosts if host.strip())):
            self.out["server.allowed_media_domains"] = kept

    def _say_unused(self) -> None:
        """Every key that changes nothing here, once."""
        if unused := list(self._unused()):
            self.notes.append(f"without effect here: {', '.join(unused)}")

    def _unused(self) -> Iterator[str]:
        used = {rule.name for rule in RULES if rule.to or rule.key in WITH_MEANING}
        if self.values["ServerConfig.httpsEnabled"]:
            used |= {f"ServerConfig.{key}" for key in OF_TLS}
        for section in SECTIONS:
            for key in self.sections[section]:
                if f"{section}.{key}" not in used and key not in INNER:
                    yield key


def _log_level(level: str | None) -> str | None:
    """MindIE's word for a level as ours."""
    words = {"warn": "warning", "verbose": "debug", "critical": "error"}
    given = (level or "").strip().lower()
    known = words.get(given, given)
    return known if known in ("debug", "info", "warning", "error") else None
