"""Every key of MindIE's config.json that is checked: its type, range, default and meaning here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Rule:
    """One key. to: "engine.x" or "server.x"; empty: checked, and used by the code below if at all.

    only: the values that can be had here, and why no other
    """

    section: str
    key: str
    kind: type
    default: Any = None
    low: float | None = None
    high: float | None = None
    to: str = ""
    only: tuple[Any, ...] = ()
    convert: Callable[[Any], Any] | None = None

    @property
    def name(self) -> str:
        """Section and key."""
        return f"{self.section}.{self.key}"


def _megabytes(value: int) -> int:
    return value * 2**20


def _cache_bytes(gigabytes: float) -> int | None:
    """-1 is MindIE's "as much as there is"."""
    return None if gigabytes == -1 else int(gigabytes * 2**30)


SERVER, BACKEND, DEPLOY = "ServerConfig", "BackendConfig", "ModelDeployConfig"
MODEL, SCHEDULE, LOG = "ModelConfig", "ScheduleConfig", "LogConfig"

RULES = (
    Rule(SERVER, "ipAddress", str, "127.0.0.1", to="server.host"),
    Rule(SERVER, "managementIpAddress", str),
    Rule(SERVER, "port", int, 1025, 1024, 65535, "server.port"),
    Rule(SERVER, "managementPort", int, 1026, 1024, 65535, "server.management_port"),
    Rule(SERVER, "metricsPort", int, None, 1024, 65535),
    Rule(SERVER, "allowAllZeroIpListening", bool, False),
    Rule(SERVER, "maxLinkNum", int, 1000, 1, 4096),
    Rule(SERVER, "httpsEnabled", bool, True),
    Rule(SERVER, "tlsCaPath", str, ""),
    Rule(SERVER, "tlsCaFile", list, ()),
    Rule(SERVER, "tlsCert", str, ""),
    Rule(SERVER, "tlsPk", str, ""),
    Rule(SERVER, "tlsPkPwd", str, ""),
    Rule(SERVER, "tlsCrlPath", str, ""),
    Rule(SERVER, "tlsCrlFiles", list, ()),
    Rule(SERVER, "fullTextEnabled", bool, False, to="server.full_text_streams"),
    Rule(SERVER, "inferMode", str, "standard", only=("standard",)),
    Rule(SERVER, "tokenTimeout", int, 600, 1, 3600, "server.token_timeout_s", convert=float),
    Rule(SERVER, "e2eTimeout", int, 600, 1, 65535, "server.request_timeout_s", convert=float),
    Rule(SERVER, "maxRequestLength", int, 40, 1, 100, "server.max_body_bytes", (), _megabytes),
    Rule(BACKEND, "modelInstanceNumber", int, 1, only=(1,)),
    Rule(BACKEND, "npuDeviceIds", list),
    Rule(BACKEND, "tokenizerProcessNumber", int, 8, 1, 32, "server.num_decoders"),
    Rule(BACKEND, "multiNodesInferEnabled", bool, False, only=(False,)),
    Rule(DEPLOY, "maxSeqLen", int, 2560, 1, None, "engine.max_model_len"),
    Rule(DEPLOY, "maxInputTokenLen", int, 2048, 1, None),
    Rule(DEPLOY, "truncation", int, 0, only=(0, False)),
    Rule(MODEL, "modelInstanceType", str, "Standard", only=("Standard",)),
    Rule(MODEL, "modelName", str, to="server.served_model_names", convert=lambda name: (name,)),
    Rule(MODEL, "modelWeightPath", str, to="engine.model"),
    Rule(MODEL, "worldSize", int, 1, 1, None),
    Rule(MODEL, "cpuMemSize", float, 0, 0, None),
    Rule(MODEL, "npuMemSize", float, -1, -1, None, "engine.kv_bytes", (), _cache_bytes),
    Rule(MODEL, "trustRemoteCode", bool, False, only=(False,)),
    Rule(SCHEDULE, "templateType", str, "Standard", only=("Standard", "Mix")),
    Rule(SCHEDULE, "cacheBlockSize", int, 128, 16, None, "engine.block_size"),
    Rule(SCHEDULE, "maxPrefillTokens", int, 8192, 1, None, "engine.max_num_batched_tokens"),
    Rule(SCHEDULE, "prefillPolicyType", int, 0, only=(0,)),
    Rule(SCHEDULE, "decodePolicyType", int, 0, only=(0,)),
    Rule(SCHEDULE, "maxBatchSize", int, 200, 1, None, "engine.max_num_seqs"),
    Rule(SCHEDULE, "maxIterTimes", int, 512, 1, None, "server.max_output_tokens"),
    Rule(SCHEDULE, "maxPreemptCount", int, 0, 0, None),
    Rule(SCHEDULE, "maxN", int, 128, 1, 128, "server.max_choices"),
    Rule(LOG, "dynamicLogLevel", str, None),
    Rule(LOG, "logLevel", str, None),
)
SECTIONS = (SERVER, BACKEND, DEPLOY, MODEL, SCHEDULE, LOG)
INNER = (DEPLOY, MODEL, SCHEDULE)  # keys of other sections, not settings
WITH_MEANING = (
    *("ipAddress", "port", "managementPort", "allowAllZeroIpListening", "maxLinkNum"),
    *("httpsEnabled", "inferMode", "maxInputTokenLen", "dynamicLogLevel", "logLevel"),
    *("modelInstanceNumber", "multiNodesInferEnabled", "truncation", "modelInstanceType"),
    *("trustRemoteCode", "templateType", "prefillPolicyType", "decodePolicyType"),
    *("npuDeviceIds", "worldSize", "managementIpAddress", "metricsPort"),
)
OF_TLS = ("tlsCaPath", "tlsCaFile", "tlsCert", "tlsPk", "tlsPkPwd", "tlsCrlPath", "tlsCrlFiles")


def problem(rule: Rule, value: Any) -> str:
    """What is wrong with a value; "" if nothing is."""
    if rule.only:
        known = ", ".join(map(repr, dict.fromkeys(rule.only)))
        is_known = any(value == each and type(value) is type(each) for each in rule.only)
        return "" if is_known else f"is {value!r}; only {known} can be had here"
    if not _is_of(value, rule.kind):
        return f"is {value!r}; {_KINDS[rule.kind]} is needed"
    if rule.kind in (int, float) and not (
        (rule.low is None or value >= rule.low) and (rule.high is None or value <= rule.high)
    ):
        most = "" if rule.high is None else f" and at most {rule.high}"
        return f"is {value}; it must be at least {rule.low}{most}"
    return ""


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
}


def _is_of(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
