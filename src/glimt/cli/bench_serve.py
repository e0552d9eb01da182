"""`glimt bench serve`: what a client of a running server sees. Options and help only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from glimt.cli.options import OUT, RUN, AsJson, Report, option

_SERVER, _LOAD = "Server", "Load"


def bench_serve(
    *,
    base_url: Annotated[
        str, option("--base-url", "Address of a running server.", _SERVER, "URL")
    ] = "http://127.0.0.1:8000",
    model: Annotated[
        str | None, option("--model -m", "Default: the first that it lists.", _SERVER, "NAME")
    ] = None,
    api_key: Annotated[
        str | None, option("--api-key", "Default: OPENAI_API_KEY, if it is set.", _SERVER, "KEY")
    ] = None,
    endpoint: Annotated[
        str, option("--endpoint", "chat or completions; pictures need chat.", _SERVER, "NAME")
    ] = "chat",
    timeout_s: Annotated[
        float, option("--timeout", "Seconds that a request may take in all.", _SERVER, "S")
    ] = 600.0,
    concurrency: Annotated[
        int | None,
        option(
            "--concurrency -c",
            "Requests in flight: the next is sent when one is done. With --rate: at most so many. "
            "Default: 1; no limit with --rate.",
            _LOAD,
            "N",
        ),
    ] = None,
    rate: Annotated[
        float | None,
        option("--rate -r", "Requests per second that arrive, done or not.", _LOAD, "R"),
    ] = None,
    burstiness: Annotated[
        float,
        option("--burstiness", "Of arrivals: 1 is Poisson, less comes in bursts.", _LOAD, "B"),
    ] = 1.0,
    num_requests: Annotated[
        int | None,
        option(
            "--num-requests -n", "How many. Default: 100; without end with --duration.", _LOAD, "N"
        ),
    ] = None,
    duration_s: Annotated[
        float | None, option("--duration", "Send nothing more after so many seconds.", _LOAD, "S")
    ] = None,
    num_warmup: Annotated[
        int, option("--warmup", "Requests before, which are not counted.", _LOAD, "N")
    ] = 2,
    seed: Annotated[int, option("--seed", "Of texts, pictures and arrivals.", _LOAD, "S")] = 0,
    input_len: Annotated[
        int,
        option(
            "--input-len",
            "Length of each text: tokens with --tokenizer, else words. Pictures come on top.",
            RUN,
            "N",
        ),
    ] = 64,
    output_len: Annotated[
        int, option("--output-len", "Tokens of each answer, by ignore_eos.", RUN, "N")
    ] = 128,
    stops_at_eos: Annotated[
        bool, option("--stop-at-eos", "Let answers end by themselves, without ignore_eos.", RUN)
    ] = False,
    temperature: Annotated[float, option("--temperature -t", "0: greedy.", RUN, "T")] = 0.0,
    tokenizer: Annotated[
        str | None,
        option("--tokenizer", "A model folder, to count tokens as the model does.", RUN, "DIR"),
    ] = None,
    image_size: Annotated[
        list[str] | None,
        option(
            "--image-size", "Draw pictures of this size; may be repeated, by turns.", RUN, "WxH"
        ),
    ] = None,
    images: Annotated[
        Path | None, option("--images", "Send the pictures of this folder as they are.", RUN, "DIR")
    ] = None,
    images_per_request: Annotated[
        int, option("--images-per-request", "How many pictures each request shows.", RUN, "N")
    ] = 1,
    text_share: Annotated[
        float, option("--text-share", "Share of requests without a picture, 0 to 1.", RUN, "P")
    ] = 0.0,
    percentiles: Annotated[
        str, option("--percentiles", "Which to tell, with commas between.", OUT, "P,P")
    ] = "50,90,99",
    goodput: Annotated[
        list[str] | None,
        option(
            "--goodput",
            "A limit in ms, as ttft:2000, tpot:100 or e2el:12000; may be repeated. Two named "
            "pairs are told in any case.",
            OUT,
            "NAME:MS",
        ),
    ] = None,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, option("--out", "Write the JSON object to a file as well.", OUT, "FILE")
    ] = None,
    report: Report = None,
) -> None:
    """Put a load on a running OpenAI-compatible server and time what a client sees."""
    from glimt.commands.bench_serve import run as run_load
    from glimt.commands.bench_serve_job import ServeJob

    job = ServeJob(
        base_url=base_url,
        model=model,
        api_key=api_key,
        endpoint=endpoint,
        concurrency=concurrency,
        rate=rate,
        burstiness=burstiness,
        num_requests=num_requests,
        duration_s=duration_s,
        num_warmup=num_warmup,
        timeout_s=timeout_s,
        input_len=input_len,
        output_len=output_len,
        stops_at_eos=stops_at_eos,
        temperature=temperature,
        tokenizer=tokenizer,
        image_sizes=tuple(image_size or ()),
        images=images,
        images_per_request=images_per_request,
        text_share=text_share,
        seed=seed,
        percentiles=percentiles,
        goodput=tuple(goodput or ()),
        as_json=as_json,
        out=out,
        report=report,
    )
    if code := run_load(job):
        raise typer.Exit(code)
