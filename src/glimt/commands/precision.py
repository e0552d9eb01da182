"""`glimt precision`: one setting of a model held against another, or against a stored reference."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from glimt.commands.console import count_bar, note, out_console, print_json, told_as_json, warn
from glimt.commands.memory import note_plan
from glimt.commands.reporting import (
    check_file,
    check_folder,
    run_facts,
    write_output,
    write_report,
)
from glimt.commands.running import load_llm
from glimt.commands.tables import figures
from glimt.config import DTYPES, EngineConfig
from glimt.errors import ConfigError
from glimt.evaluate.gates import Setting, gate_for
from glimt.evaluate.precision import FEW_TOKENS, Precision, judge
from glimt.evaluate.precision_report import check_rows, document, stage_rows, verdict
from glimt.evaluate.probes import Probe, drawn_probes, folder_probes
from glimt.evaluate.recording import Recording, RecordingSize, from_file, record, repeat, to_bytes
from glimt.llm import LLM
from glimt.loader import OpenedModel
from glimt.quant.base import NONE
from glimt.sizes import parse_size, size_text

ISA = "isa"  # of a setting; kernels are chosen by the environment
_ISA_VARIABLE = "GLIMT_ISA"
_PLAIN = {"quant": "none", "quant_head": "none", "quant_tower": "none", "kv_dtype": "auto"}
# Every probe is asked once and alone in its pictures; what a cache remembers would hide a stage.
_NO_CACHES = {"enable_prefix_cache": False, "feature_cache_bytes": 0, "max_num_seqs": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecisionJob:
    """What was asked for.

    engine:  fields of EngineConfig of the setting that is tested, or recorded
    against: a file, a dtype, or name=value pairs that change the tested setting
    record:  a file to write; nothing is compared then
    images:  a folder of pictures; None draws some
    """

    engine: Mapping[str, Any]
    against: str | None
    record: Path | None
    images: Path | None
    prompt: str | None
    size: RecordingSize
    seed: int
    report: Path | None
    as_json: bool
    is_verbose: bool = False


def run(job: PrecisionJob) -> bool:
    """Record, or compare and print. Returns whether the tested setting passes.

    Raises ConfigError for settings, files and folders that do not do, RequestError for a probe
    that the model cannot be asked.
    """
    with told_as_json(job.as_json):
        _check(job)
        if job.record is not None:
            return _record_file(job, job.record)
        reference, digest = _reference(job)
        found, setting, facts = _compare(job, reference, digest)
    _tell(job, reference, found, setting)
    if job.report is not None:
        write_report(document(found, reference, setting, facts), job.report, "precision")
    return found.passes


def _check(job: PrecisionJob) -> None:
    problems = []
    if job.record is not None and job.against is not None:
        problems.append("--record and --against exclude each other: record first, then compare")
    if job.prompt is not None and job.images is None:
        problems.append("--prompt is for the pictures of --images; drawn ones have their own")
    problems += [
        f"{field.name} is {value}; at least {least} is needed"
        for field in fields(job.size)
        if (value := getattr(job.size, field.name)) < (least := int(field.name[:4] != "num_"))
    ]
    if problems:
        raise ConfigError("precision", problems)
    check_file(job.record, "record")
    check_folder(job.report, "report")


# --- settings --------------------------------------------------------------------------------


def changed_setting(engine: Mapping[str, Any], against: str) -> dict[str, Any]:
    """The reference's setting: fields of EngineConfig, and perhaps "isa".

    against: a dtype, which quantises nothing, or name=value pairs with commas between them
    Raises ConfigError naming what is wrong.
    """
    if against in DTYPES:
        return {**engine, **_PLAIN, "dtype": against}
    changes = dict(_change(pair.strip()) for pair in against.split(","))
    return {**engine, **changes}


def _change(pair: str) -> tuple[str, Any]:
    name, sign, value = (part.strip() for part in pair.partition("="))
    known = (*EngineConfig.__dataclass_fields__, ISA)
    if not sign or name not in known:
        said = f"{pair!r} is no file, no dtype ({', '.join(DTYPES)}) and no setting"
        advice = "give name=value pairs such as quant=none,dtype=bfloat16 or isa=none"
        raise ConfigError("against", [f"{said}; {advice}"])
    if name in ("kv_bytes", "memory_limit_bytes"):
        return name, _size(name, value)
    return name, int(value) if value.isdecimal() else value


def _size(name: str, value: str) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise ConfigError("against", [f"{name}: {error}"]) from error


@contextmanager
def _loaded(engine: Mapping[str, Any], is_verbose: bool) -> Iterator[tuple[LLM, EngineConfig]]:
    """A model in a setting; gone at the end, so that the next one has its memory."""
    options = dict(engine)
    before = os.environ.get(_ISA_VARIABLE)
    isa = options.pop(ISA, before)
    _set_isa(isa)
    try:
        config = EngineConfig(**{**_NO_CACHES, **options})
        llm = load_llm(config)
        if is_verbose:
            note_plan(llm.engine)
        yield llm, config
    finally:
        _set_isa(before)
        gc.collect()


def _set_isa(isa: str | None) -> None:
    if isa is None:
        os.environ.pop(_ISA_VARIABLE, None)
    else:
        os.environ[_ISA_VARIABLE] = isa


def _setting(opened: OpenedModel, config: EngineConfig, digest: str) -> Setting:
    """What is computed with in truth: auto is settled, and stored formats count as well."""
    formats = {**opened.formats.stored, **opened.formats.wanted}

    def used(prefix: str) -> str:
        found = (form.name for name, form in formats.items() if name.startswith(prefix))
        return next(found, NONE)

    return Setting(
        family=opened.family.name,
        model=digest,
        device=opened.device.name,
        dtype=str(opened.dtype).removeprefix("torch."),
        kv_dtype=config.kv_dtype,
        quant=used("blocks."),
        quant_head=used("head."),
        quant_tower=used("tower."),
        isa=os.environ.get(_ISA_VARIABLE, ""),
    )


# --- runs ------------------------------------------------------------------------------------


def _record_file(job: PrecisionJob, path: Path) -> bool:
    recording = _record(job, job.engine)
    content = to_bytes(recording)
    write_output(path, content, "record")
    said = {
        "file": str(path),
        "bytes": len(content),
        "setting": asdict(recording.setting),
        "num_probes": len(recording.traces),
        "num_tokens": recording.num_tokens,
    }
    if job.as_json:
        print_json(said)
    else:
        note(f"{path}: {said['num_probes']} probes, {said['num_tokens']} tokens")
        note(f"{size_text(len(content))}; check another setting: glimt precision --against {path}")
    return True


def _reference(job: PrecisionJob) -> tuple[Recording, str | None]:
    """What is compared with; and the tested model's digest, if its files were read for it."""
    against = job.against or "float32"
    path = Path(against).expanduser()
    if path.is_file():
        return from_file(path), None
    if against not in DTYPES and "=" not in against:
        raise ConfigError("against", [f"{against!r} is no file that is there, and no setting"])
    engine = changed_setting(job.engine, against)
    recording = _record(job, engine)
    is_same_model = engine.get("model") == job.engine.get("model")
    return recording, recording.setting.model if is_same_model else None


def _record(job: PrecisionJob, engine: Mapping[str, Any]) -> Recording:
    with _loaded(engine, job.is_verbose) as (llm, config):
        facts = run_facts(llm.engine.opened, config, "one run; spread over tokens and rows")
        setting = _setting(llm.engine.opened, config, facts["model digest"])
        with count_bar("recording the reference, tokens", job.size.num_tokens) as on_done:
            traces = tuple(record(llm, _probes(job), job.size, on_done))
    if not sum(len(trace.token_ids) for trace in traces):
        raise ConfigError("precision", ["the reference answered nothing to any probe"])
    return Recording(setting, traces, facts)


def _probes(job: PrecisionJob) -> Iterator[Probe]:
    if job.images is None:
        return drawn_probes(job.seed)
    return folder_probes(job.images, job.prompt)


def _compare(
    job: PrecisionJob, reference: Recording, digest: str | None
) -> tuple[Precision, Setting, dict[str, str]]:
    """digest: of the tested model's files; None: they are read for it."""
    with _loaded(job.engine, job.is_verbose) as (llm, config):
        opened = llm.engine.opened
        _check_same_model(reference, opened)
        repeats = "one run; spread over tokens and rows"
        facts = run_facts(opened, config, repeats, digest=digest)
        setting = _setting(opened, config, facts["model digest"])
        with count_bar("comparing, tokens", reference.num_tokens) as on_done:
            repeated = repeat(llm, reference.traces, on_done)
            pairs = zip(reference.traces, repeated, strict=True)
            found = judge(pairs, gate_for(reference.setting, setting))
    return found, setting, facts


def _check_same_model(reference: Recording, opened: OpenedModel) -> None:
    vocab_size = reference.traces[0].logits.shape[-1]
    if (reference.setting.family, vocab_size) != (opened.family.name, opened.config.vocab_size):
        theirs = f"{reference.setting.family} with {vocab_size} tokens"
        ours = f"{opened.family.name} with {opened.config.vocab_size}"
        raise ConfigError("against", [f"the reference is of {theirs}, the model is {ours}"])


# --- telling ---------------------------------------------------------------------------------


def _tell(job: PrecisionJob, reference: Recording, found: Precision, setting: Setting) -> None:
    if reference.setting.model != setting.model:
        warn("the weights are not those of the reference (another digest)")
    if found.num_tokens < FEW_TOKENS:
        said = f"{found.num_tokens} tokens were compared; the lines are meant for {FEW_TOKENS}"
        note(f"{said} or more: --tokens, --probes")
    if job.as_json:
        print_json(_as_dict(found, reference, setting))
    else:
        _print(found, reference, setting)


def _as_dict(found: Precision, reference: Recording, setting: Setting) -> dict[str, Any]:
    drift = found.drift
    return {
        "passes": found.passes,
        "gate": asdict(found.gate),
        "reference": asdict(reference.setting),
        "tested": asdict(setting),
        "num_probes": found.num_probes,
        "num_tokens": found.num_tokens,
        "is_flat": found.is_flat,
        "checks": [
            {"name": c.name, "value": _number(c.value), "line": c.line, "passes": c.passes}
            for c in found.checks
        ],
        "first_drift": drift.name if drift else None,
        "stages": [
            {name: _number(value) for name, value in asdict(stage).items()}
            | {"passes": stage.passes}
            for stage in found.stages
        ],
    }


def _number(value: Any) -> Any:
    """JSON has neither NaN nor infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(found: Precision, reference: Recording, setting: Setting) -> None:
    console = out_console()
    title = f"{setting.said()} against {reference.setting.said()}: {found.gate.name}"
    table = figures("figure", "value", "line", "", title=title)
    for row in check_rows(found):
        table.add_row(*row)
    console.print(table, "")
    table = figures(
        "stage", "rows", "cosine, least", "mean", "largest error", "line", "", title="stages"
    )
    for stage in stage_rows(found):
        table.add_row(*stage)
    console.print(table, "")
    console.print(verdict(found), soft_wrap=True)
