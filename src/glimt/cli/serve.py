"""`glimt serve`: options and help only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from glimt.cli.options import ENGINE, Commands, Fields, gathers, option, takes

serve_app = typer.Typer(cls=Commands)
SERVER, ACCESS, PICTURES = "Server", "Access", "Pictures"


@gathers(engine=ENGINE)
def serve_job(
    ctx: typer.Context,
    *,
    engine: Fields,
    host: Annotated[str, option("--host", "Address to listen on.", SERVER, "HOST")] = "127.0.0.1",
    port: Annotated[
        int, option("--port", "Port to listen on; 0: any that is free.", SERVER, "PORT")
    ] = 8000,
    management_port: Annotated[
        int | None,
        option(
            "--management-port",
            "Port of MindIE's management routes, on 127.0.0.1. Default: none.",
            SERVER,
            "PORT",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        option(
            "--served-model-name",
            "What clients call the model; may be repeated. Default: the folder's name.",
            SERVER,
            "NAME",
        ),
    ] = None,
    max_num_seqs: Annotated[
        int, option("--max-num-seqs", "Answers that are computed together.", SERVER, "N")
    ] = 64,
    max_waiting: Annotated[
        int,
        option("--max-waiting", "Answers that may wait; beyond, requests get 429.", SERVER, "N"),
    ] = 256,
    max_connections: Annotated[
        int | None,
        option(
            "--max-connections",
            "Open connections of a port; beyond, each gets 429. Default: 1024, or twice the "
            "answers that run or wait.",
            SERVER,
            "N",
        ),
    ] = None,
    max_stretch: Annotated[
        float,
        option(
            "--max-stretch",
            "How many times as long a step may take for new prompts and pictures while others are "
            "being answered; 0: no limit, best throughput.",
            SERVER,
            "F",
        ),
    ] = 2.0,
    request_timeout: Annotated[
        float, option("--request-timeout", "Seconds that a request may take.", SERVER, "S")
    ] = 600.0,
    drain_timeout: Annotated[
        float,
        option("--drain-timeout", "Seconds for running answers after SIGTERM.", SERVER, "S"),
    ] = 90.0,
    profile: Annotated[
        str,
        option("--profile", "upstream, or mindie: MindIE's habits to the letter.", SERVER, "NAME"),
    ] = "upstream",
    mindie_config: Annotated[
        Path | None,
        option("--mindie-config", "Take settings from MindIE's config.json.", SERVER, "FILE"),
    ] = None,
    metrics_compat: Annotated[
        str,
        option("--metrics-compat", "none, or tgi: TGI's metric names as well.", SERVER, "NAME"),
    ] = "none",
    tgi_raw_prompt: Annotated[
        bool,
        option(
            "--tgi-raw-prompt",
            "Give the texts of TGI's and MindIE's forms to the model as they are, not as a turn.",
            SERVER,
        ),
    ] = False,
    vllm_stream_delimiter: Annotated[
        str,
        option("--vllm-stream-delimiter", "newline or nul, in /generate.", SERVER, "NAME"),
    ] = "newline",
    enable_tools: Annotated[
        bool,
        option(
            "--enable-tools",
            "Offer tools to GLM-4v too, which was not trained to call them.",
            SERVER,
        ),
    ] = False,
    visualglm_api: Annotated[
        bool,
        option("--visualglm-api", "Take VisualGLM's own form at POST /.", SERVER),
    ] = False,
    tls_cert: Annotated[
        Path | None, option("--tls-cert", "Serve HTTPS with this certificate.", ACCESS, "FILE")
    ] = None,
    tls_key: Annotated[
        Path | None, option("--tls-key", "The certificate's key.", ACCESS, "FILE")
    ] = None,
    tls_ca: Annotated[
        Path | None,
        option("--tls-ca", "Take only clients whose certificate it signed.", ACCESS, "FILE"),
    ] = None,
    log_level: Annotated[
        str, option("--log-level", "debug, info, warning or error.", SERVER, "LEVEL")
    ] = "info",
    log_format: Annotated[
        str, option("--log-format", "text, or json: an object a line.", SERVER, "NAME")
    ] = "text",
    otlp_endpoint: Annotated[
        str | None,
        option(
            "--otlp-endpoint",
            "Send a span of each request to this OpenTelemetry collector. Default: none.",
            SERVER,
            "URL",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        option(
            "--api-key",
            "A key that clients must send; may be repeated. Also GLIMT_API_KEY. Default: none.",
            ACCESS,
            "KEY",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        option(
            "--allow-origin",
            "A site whose pages may use the server, such as https://chat.example.org; * for any; "
            "may be repeated. Default: only the server's own page.",
            ACCESS,
            "ORIGIN",
        ),
    ] = None,
    limit_images: Annotated[
        int, option("--limit-images", "Pictures of one request.", PICTURES, "N")
    ] = 8,
    max_image_bytes: Annotated[
        int, option("--max-image-bytes", "Of one encoded picture.", PICTURES, "N")
    ] = 20 * 2**20,
    allowed_media_domains: Annotated[
        list[str] | None,
        option(
            "--allowed-media-domains",
            "A host that pictures are fetched from, *.example.org or *; may be repeated. "
            "Default: none.",
            PICTURES,
            "HOST",
        ),
    ] = None,
    allowed_media_networks: Annotated[
        list[str] | None,
        option(
            "--allowed-media-networks",
            "A private network that may be fetched from as well, such as 10.0.0.0/8.",
            PICTURES,
            "CIDR",
        ),
    ] = None,
    media_path: Annotated[
        Path | None,
        option("--media-path", "A folder whose files MindIE's forms may name.", PICTURES, "DIR"),
    ] = None,
    decoders: Annotated[
        int,
        option("--decoders", "Child processes that decode pictures; 0: none.", PICTURES, "N"),
    ] = 2,
) -> Any:
    """The ServeJob that all these options come to."""
    import os

    from glimt.commands.serve import ServeJob
    from glimt.server.config import ServerConfig

    of_environment = os.environ.get("GLIMT_API_KEY")
    server: dict[str, Any] = {
        "host": host,
        "port": port,
        "management_port": management_port,
        "served_model_names": tuple(served_model_name or ()),
        "api_keys": (*(api_key or ()), *([of_environment] if of_environment else [])),
        "allowed_origins": tuple(allow_origin or ()),
        "profile": profile,
        "metrics_compat": metrics_compat,
        "limit_images": limit_images,
        "max_waiting": max_waiting,
        "max_connections": max_connections,
        "request_timeout_s": request_timeout,
        "drain_timeout_s": drain_timeout,
        "max_image_bytes": max_image_bytes,
        "num_decoders": decoders,
        "allowed_media_domains": tuple(allowed_media_domains or ()),
        "allowed_media_networks": tuple(allowed_media_networks or ()),
        "media_path": media_path,
        "otlp_endpoint": otlp_endpoint,
        "raw_prompt": tgi_raw_prompt,
        "vllm_stream_delimiter": vllm_stream_delimiter,
        "enable_tools": enable_tools,
        "visualglm_api": visualglm_api,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "tls_ca": tls_ca,
    }
    engine = {**engine, "max_num_seqs": max_num_seqs, "max_stretch": max_stretch or None}
    if mindie_config is not None:
        from glimt.commands.console import note
        from glimt.server.mindie_config import read_mindie_config

        settings = read_mindie_config(mindie_config, os.environ)
        typed = _typed(ctx)
        engine |= {name: each for name, each in settings.engine.items() if name not in typed}
        server |= {name: each for name, each in settings.server.items() if name not in typed}
        if settings.log_level is not None and "log_level" not in typed:
            log_level = settings.log_level
        for said in settings.notes:
            note(f"{mindie_config}: {said}")
    return ServeJob(
        engine=engine, server=ServerConfig(**server), log_level=log_level, log_format=log_format
    )


_FIELDS = {
    "allow_origin": "allowed_origins",
    "served_model_name": "served_model_names",
    "request_timeout": "request_timeout_s",
    "decoders": "num_decoders",
}


def _typed(ctx: typer.Context) -> set[str]:
    """Fields whose options were typed: they go before what a file says."""
    typed = (name for name in ctx.params if _is_typed(ctx, name))
    return {_FIELDS.get(name, name) for name in typed}


@serve_app.command()
@takes(job=serve_job)
def serve(*, job: Any) -> None:
    """Serve a model over HTTP, in the forms of OpenAI, TGI, Triton, vLLM and MindIE."""
    from glimt.commands.serve import serve as run

    if status := run(job):
        raise typer.Exit(status)


def _is_typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
