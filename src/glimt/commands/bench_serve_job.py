"""What `glimt bench serve` was asked for, and everything that can be wrong before it begins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glimt.bench.load.metrics import INTERACTIVE, SERVER
from glimt.bench.load.pictures import find_pictures, parse_size
from glimt.bench.load.run import Plan
from glimt.bench.load.server import ENDPOINTS, checked_url
from glimt.bench.load.texts import CountTokens
from glimt.bench.load.workload import Workload
from glimt.commands.reporting import check_file, check_folder
from glimt.errors import ConfigError

_NUM_REQUESTS = 100  # where neither number nor duration is given
_LIMITED = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeJob:
    """What was asked for, as it was typed."""

    base_url: str
    model: str | None
    api_key: str | None
    endpoint: str
    concurrency: int | None
    rate: float | None
    burstiness: float
    num_requests: int | None
    duration_s: float | None
    num_warmup: int
    timeout_s: float
    input_len: int
    output_len: int
    stops_at_eos: bool
    temperature: float
    tokenizer: str | None
    image_sizes: tuple[str, ...]
    images: Path | None
    images_per_request: int
    text_share: float
    seed: int
    percentiles: str
    goodput: tuple[str, ...]
    as_json: bool
    out: Path | None
    report: Path | None


@dataclass(frozen=True, slots=True, eq=False)
class Checked:
    """The job's parts that are known to be good. limits: of goodput, named ones first."""

    url: str
    plan: Plan
    workload: Workload
    percentiles: tuple[float, ...]
    limits: tuple[tuple[str, Mapping[str, float]], ...]


def check(job: ServeJob) -> Checked:
    """Everything that can be wrong before the server is asked. Raises ConfigError."""
    if problems := list(_problems(job)):
        raise ConfigError("bench serve", problems)
    url = checked_url(job.base_url)
    percentiles = parse_percentiles(job.percentiles)
    named = parse_goodput(job.goodput)
    limits = (("as asked", named),) if named else ()
    workload = _workload(job)
    check_file(job.out, "out")
    check_folder(job.report, "report")
    return Checked(url, _plan(job), workload, percentiles, (*limits, SERVER, INTERACTIVE))


def _problems(job: ServeJob) -> Iterator[str]:
    counts = {"input_len": 1, "output_len": 1, "images_per_request": 1, "num_warmup": 0}
    counts |= {
        name: 1 for name in ("concurrency", "num_requests") if getattr(job, name) is not None
    }
    for name, least in counts.items():
        if getattr(job, name) < least:
            yield f"{name} is {getattr(job, name)}; it must be at least {least}"
    positive = ["burstiness", "timeout_s"]
    positive += [name for name in ("rate", "duration_s") if getattr(job, name) is not None]
    for name in positive:
        if not 0 < getattr(job, name) < 1e9:
            yield f"{name} is {getattr(job, name)}; it must be above 0"
    if not 0 <= job.text_share <= 1:
        yield f"text_share is {job.text_share}; it must be from 0 to 1"
    if not 0 <= job.temperature <= 2:
        yield f"temperature is {job.temperature}; it must be from 0 to 2"
    if job.endpoint not in ENDPOINTS:
        yield f"endpoint is {job.endpoint!r}; choose one of {', '.join(ENDPOINTS)}"
    if job.image_sizes and job.images:
        yield "image_size and images are both given; drawn pictures or your own, not both"
    if job.endpoint == "completions" and (job.image_sizes or job.images):
        yield "endpoint completions takes no pictures; use chat"


def parse_percentiles(text: str) -> tuple[float, ...]:
    """Read "50,90,99". Raises ConfigError."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 <= value <= 100 for value in values):
        said = f"is {text!r}; numbers from 0 to 100 with commas between are needed: 50,90,99"
        raise ConfigError("percentiles", [said])
    return values


def parse_goodput(given: Sequence[str]) -> dict[str, float]:
    """Read ("ttft:2000", "tpot:100") as milliseconds by metric. Raises ConfigError."""
    limits: dict[str, float] = {}
    for each in given:
        name, _, value = each.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in _LIMITED or not 0 <= limit < 1e12:
            said = f"is {each!r}; a metric and milliseconds are needed, as in ttft:2000"
            raise ConfigError("goodput", [f"{said}; metrics are {', '.join(_LIMITED)}"])
        limits[name] = limit
    return limits


def _plan(job: ServeJob) -> Plan:
    is_unlimited = job.num_requests is None and job.duration_s is None
    return Plan(
        rate=job.rate,
        burstiness=job.burstiness,
        concurrency=job.concurrency or (1 if job.rate is None else None),
        num_requests=_NUM_REQUESTS if is_unlimited else job.num_requests,
        duration_s=job.duration_s,
        seed=job.seed,
    )


def _workload(job: ServeJob) -> Workload:
    return Workload(
        model=job.model or "",
        is_chat=job.endpoint == "chat",
        input_len=job.input_len,
        output_len=job.output_len,
        ignore_eos=not job.stops_at_eos,
        temperature=job.temperature,
        seed=job.seed,
        image_sizes=tuple(parse_size(size) for size in job.image_sizes),
        image_files=find_pictures(job.images) if job.images else (),
        images_per_request=job.images_per_request,
        text_share=job.text_share,
        count_tokens=_tokenizer(job.tokenizer) if job.tokenizer else None,
    )


def _tokenizer(name: str) -> CountTokens:
    """Counts tokens as the model does. Raises ConfigError for a folder without a tokenizer."""
    from glimt.loader import model_folder, read_folder

    processor = read_folder(model_folder(name)).processor
    if processor is None:
        raise ConfigError("tokenizer", [f"{name} has no tokenizer that can be read"])
    encode = processor.tokenizer.encode
    return lambda text: len(encode(text))
