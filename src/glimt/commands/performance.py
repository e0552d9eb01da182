"""`glimt bench performance`: VisualGLM's `--mode performance`, its files and a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glimt.bench import original_files as files
from glimt.bench.performance import (
    Case,
    PerformanceJob,
    PerformanceResult,
    PerformanceRow,
    PictureTimes,
    measure,
    time_pictures,
    warm_tower,
)
from glimt.bench.performance_report import document, picture_rows
from glimt.bench.roofline import engine_costs
from glimt.bench.sweep import NONE
from glimt.bench.workload import Workload
from glimt.commands import static_batch as static
from glimt.commands.bench import parse_counts
from glimt.commands.console import note, out_console, print_json, told_as_json, warn
from glimt.commands.reporting import check_folder, run_facts, write_report
from glimt.commands.sweep_folder import SweepFolder
from glimt.commands.tables import figures, key_values
from glimt.engine import Engine
from glimt.errors import EngineError, RequestError
from glimt.loader import OpenedModel
from glimt.ranks import open_on_ranks

NAME = "performance.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class PerformanceCommand:
    """What was typed.

    engine: fields of EngineConfig
    batch, input_len, output_len: whole numbers with commas between
    """

    engine: Mapping[str, Any]
    batch: str
    input_len: str
    output_len: str
    repeats: int
    seed: int
    image: str | None
    out: Path
    restart: bool
    report: Path | None
    as_json: bool

    def job(self) -> PerformanceJob:
        """Checked. Raises ConfigError."""
        return PerformanceJob(
            batches=parse_counts(self.batch, "batch"),
            input_lens=parse_counts(self.input_len, "input"),
            output_lens=parse_counts(self.output_len, "output_len"),
            repeats=self.repeats,
            seed=self.seed,
            image=self.image,
        )


def run(command: PerformanceCommand) -> None:
    """Measure what the folder does not have yet, write its files, tell the averages.

    Raises RequestError or SetupError before anything is measured, EngineError at the end if rows
    failed.
    """
    with told_as_json(command.as_json):
        found, folder, engine = _found(command)
    print_json(_as_dict(found, folder)) if command.as_json else _print(found)
    if command.report:
        _write_report(found, command, engine, folder, command.report)
    static.tell_rows(found, folder, lambda row: _named(row.case))


def _found(command: PerformanceCommand) -> tuple[PerformanceResult, SweepFolder, Engine]:
    job = command.job()
    check_folder(command.report, "report")
    config = static.static_config(command.engine, max(job.batches))
    given = static.read_given(job.image, config)
    opened = open_on_ranks(config)
    settings = static.sweep_settings(opened, config, job.image, given)
    settings |= {"seed": job.seed, "repeats": job.repeats}
    patterns = [files.performance_name("*", opened.family.name), _averages_name(opened)]
    cost = static.image_tokens(opened, job.image, given)
    with SweepFolder.open(command.out, NAME, settings, patterns, command.restart) as folder:
        engine, remark = static.load_static(opened, config, _step_tokens(job, opened, cost))
        return _sweep(job, engine, folder, remark), folder, engine


def _write_report(
    found: PerformanceResult,
    command: PerformanceCommand,
    engine: Engine,
    folder: SweepFolder,
    report: Path,
) -> None:
    repeats = f"{command.repeats} of each row, medians told; spread: least … most decoding step"
    settings = folder.settings
    more = {
        "picture": settings["image"],
        "seed": str(command.seed),
        "files": str(folder.folder),
    }
    facts = run_facts(engine.opened, engine.config, repeats, more, settings["model"])
    write_report(document(found, facts), report, "performance")


def _step_tokens(job: PerformanceJob, opened: OpenedModel, image_tokens: int) -> int:
    """Prompt tokens of the largest batch that the context allows."""
    longest = min(max(job.input_lens) + image_tokens, opened.max_model_len)
    return max(job.batches) * longest


def _averages_name(opened: OpenedModel) -> str:
    return f"performance_averages_{opened.family.name}.csv"


# --- the sweep -------------------------------------------------------------------------------


def _sweep(
    job: PerformanceJob, engine: Engine, folder: SweepFolder, remark: str
) -> PerformanceResult:
    workload = Workload(engine, job.seed, job.image)
    workload.check_length(min(job.input_lens))
    pictures = _pictures(engine, job, folder)  # before any row: the first one pays for what is new
    done = {row.case for row in _rows(folder) if not row.left_out}
    missing = [case for case in job.cases() if case not in done]
    if done:
        note(f"rows already there: {len(done)}; to be measured: {len(missing)}")
    if missing:
        warm_tower(workload)
    with static.row_bar(len(missing), folder) as on_row:
        for row in measure(workload, missing, job.repeats):
            _keep(row, folder, engine.opened)
            on_row(1)
    return _result(engine, folder, pictures, remark)


def _pictures(engine: Engine, job: PerformanceJob, folder: SweepFolder) -> PictureTimes | None:
    """What the first run measured, or what is measured now."""
    if known := folder.extra.get("pictures"):
        return PictureTimes(known["first_s"], tuple(known["later_s"]))
    try:
        times = time_pictures(engine, job.seed)
    except (RequestError, EngineError) as error:  # the rows can do without
        warn(f"picture process time is not measured: {error}")
        return None
    folder.extra["pictures"] = None if times is None else asdict(times)
    return times


def _keep(row: PerformanceRow, folder: SweepFolder, opened: OpenedModel) -> None:
    """The record first: from it the tables can be made again, but not the other way round."""
    folder.add(row.as_dict(), ("case",))
    _write_tables(folder, opened, [row.case.batch])


def _write_tables(folder: SweepFolder, opened: OpenedModel, batches: list[int]) -> None:
    rows, family = _rows(folder), opened.family.name
    for batch in batches:
        of_batch = [row for row in rows if row.case.batch == batch]
        folder.write(files.performance_name(batch, family), files.performance_csv(of_batch))
    folder.write(_averages_name(opened), files.averages_csv(rows))


def _rows(folder: SweepFolder) -> list[PerformanceRow]:
    """In the order of the original's files."""
    rows: list[PerformanceRow] = folder.rows_as(PerformanceRow)
    return sorted(rows, key=lambda row: (row.case.batch, row.case.input_len, row.case.output_len))


def _result(
    engine: Engine,
    folder: SweepFolder,
    pictures: PictureTimes | None,
    remark: str,
) -> PerformanceResult:
    machine = static.note_machine(engine, folder)
    rows = _rows(folder)
    _write_tables(folder, engine.opened, sorted({row.case.batch for row in rows}))
    return PerformanceResult(
        family=engine.opened.family.name,
        rows=tuple(rows),
        num_runs=folder.num_runs,
        pictures=pictures,
        costs=engine_costs(engine),
        remark=remark,
        **machine,
    )


# --- telling ---------------------------------------------------------------------------------


def _named(case: Case) -> str:
    return f"batch {case.batch}, input {case.input_len}, output {case.output_len}"


def _as_dict(found: PerformanceResult, folder: SweepFolder) -> dict[str, Any]:
    names = ("tokens_per_s", "response_ms", "first_token_ms", "time_per_token_ms")
    return {
        **static.result_dict(found, folder),
        "averages": [
            {"batch": batch, **dict(zip(names, values, strict=True))}
            for batch, values in files.averages(found.rows).items()
        ],
        "pictures": None if found.pictures is None else asdict(found.pictures),
        "rows": [row.as_dict() for row in found.rows],
    }


def _print(found: PerformanceResult) -> None:
    headings = files.AVERAGES_HEADER.replace("(ms)", "").split(",")  # or a terminal breaks them
    table = figures(*headings, title=f"averages, {found.family}; times in ms")
    for batch, values in files.averages(found.rows).items():
        table.add_row(str(batch), *(f"{value:.2f}" for value in values))
    if not files.averages(found.rows):
        table.add_row(*[NONE] * 5)
    console = out_console()
    console.print(table, "")
    console.print(key_values("pictures and memory", picture_rows(found)))
