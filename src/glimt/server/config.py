"""ServerConfig: what the server may do for whom. Checked before anything is loaded."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from glimt.errors import ConfigError

PROFILES = ("upstream", "mindie")
METRICS_COMPAT = ("none", "tgi")

DELIMITERS = ("newline", "nul")
_CHOICES = {
    "profile": PROFILES,
    "metrics_compat": METRICS_COMPAT,
    "vllm_stream_delimiter": DELIMITERS,
}

_LEAST = {
    "port": 0,
    "limit_images": 1,
    "max_waiting": 0,
    "max_connections": 1,
    "max_body_bytes": 1024,
    "max_stream_bytes": 1024,
    "max_image_bytes": 1024,
    "max_image_pixels": 1,
    "num_decoders": 0,
    "max_restarts": 0,
    "max_prompt_tokens": 1,
    "max_output_tokens": 1,
    "max_choices": 1,
}
_USUAL_CONNECTIONS = 1024
_OPTIONAL = ("max_connections", "max_prompt_tokens", "max_output_tokens", "token_timeout_s")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[a-z0-9._:\[\]-]+", re.ASCII | re.IGNORECASE)
_POSITIVE_S = (
    "request_timeout_s",
    "drain_timeout_s",
    "stall_timeout_s",
    "idle_timeout_s",
    "token_timeout_s",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one server.

    Raises ConfigError listing every impossible value.
    """

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    management_port: int | None = None  # on loopback only; None: no management routes
    served_model_names: tuple[str, ...] = ()  # the first is told; empty: the model folder's name
    api_keys: tuple[str, ...] = ()  # empty: nobody is asked for one
    allowed_origins: tuple[str, ...] = ()  # of pages elsewhere; "*": of any. Empty: only our own
    profile: str = "upstream"  # or mindie: its habits that public clients do not take
    metrics_compat: str = "none"  # tgi: its names beside vLLM's
    limit_images: int = 8  # of one request
    max_waiting: int = 256  # requests beyond those that run; more are refused with 429
    max_connections: int | None = None  # of each port, 429 beyond; None: `connections_for`
    request_timeout_s: float = 600.0  # from arrival to the last token, waiting included
    drain_timeout_s: float = 90.0  # how long running requests may go on after SIGTERM
    stall_timeout_s: float = 60.0  # without a step while work waits: no longer live
    idle_timeout_s: float = 30.0  # of a connection that sends nothing, or no whole head
    max_body_bytes: int = 48 * 2**20  # a JSON body: a 32 MiB picture in base64 has 43
    max_stream_bytes: int = 2**20  # that a reader may be behind; then its stream is cut
    max_image_bytes: int = 20 * 2**20  # of one encoded picture
    max_image_pixels: int = 50_000_000  # of one picture
    num_decoders: int = 2  # child processes that decode pictures; 0: decode in this process
    allowed_media_domains: tuple[str, ...] = ()  # hosts to fetch pictures from; "*": any public one
    allowed_media_networks: tuple[str, ...] = ()  # private networks that may be fetched from
    media_path: Path | None = None  # a folder from which MindIE's forms may name files
    otlp_endpoint: str | None = None  # of an OpenTelemetry collector; None: no traces
    max_restarts: int = 3  # of an engine that failed, within an hour
    max_prompt_tokens: int | None = None  # pictures expanded; None: what the context leaves
    max_output_tokens: int | None = None  # longer wishes are cut to it; None: no limit but those
    max_choices: int = 128  # n and best_of of one request
    token_timeout_s: float | None = None  # between two tokens of an answer; None: no limit
    raw_prompt: bool = False  # texts of TGI's and MindIE's forms go to the model as they are
    vllm_stream_delimiter: str = "newline"  # or nul, as vLLM's first releases had it
    full_text_streams: bool = False  # vLLM's form under mindie: all text so far in every piece
    enable_tools: bool = False  # functions for models that were not trained to call any
    visualglm_api: bool = False  # POST / with text, image and history, as VisualGLM's api.py
    tls_cert: Path | None = None  # with tls_key: serve HTTPS
    tls_key: Path | None = None
    tls_ca: Path | None = None  # clients must show a certificate that it has signed

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {value!r}; a whole number of at least {least} is needed"
            for name, least in _LEAST.items()
            if not _is_count(value := getattr(self, name), least)
            and not (value is None and name in _OPTIONAL)
        ]
        problems += [
            f"{name} is {value!r}; seconds above 0 are needed"
            for name in _POSITIVE_S
            if not (isinstance(value := getattr(self, name), (int, float)) and value > 0)
            and not (value is None and name in _OPTIONAL)
        ]
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                problems.append(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
        problems += [
            f"allowed_media_networks: {network!r} is no network such as 10.0.0.0/8"
            for network in self.allowed_media_networks
            if not _is_network(network)
        ]
        problems += [
            f"allowed_origins: {origin!r} is no origin such as https://chat.example.org (nothing "
            "behind host and port, no part left open, a name as browsers send it: xn--…), null or *"
            for origin in self.allowed_origins
            if not _ORIGIN.fullmatch(origin)
        ]
        if "" in self.api_keys:
            problems.append("api_keys: a key is empty")
        if self.media_path is not None and not self.media_path.is_dir():
            problems.append(f"media_path {str(self.media_path)!r} is no folder")
        problems += [
            f"{name} {str(value)!r} is no file"
            for name in ("tls_cert", "tls_key", "tls_ca")
            if (value := getattr(self, name)) is not None and not value.is_file()
        ]
        if (self.tls_cert is None) != (self.tls_key is None):
            problems.append("tls_cert and tls_key are needed together")
        if problems:
            raise ConfigError("server options", problems)

    def connections_for(self, max_num_seqs: int) -> int:
        """How many may be open: if not said, twice the answers that run or wait, or 1024."""
        if self.max_connections is not None:
            return self.max_connections
        return max(_USUAL_CONNECTIONS, 2 * (max_num_seqs + self.max_waiting))


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True
