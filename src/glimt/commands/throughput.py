"""`glimt bench throughput`: MindIE's `--performance` for GLM-4v, its files and a report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glimt.bench import original_files as files
from glimt.bench.performance import warm_tower
from glimt.bench.roofline import engine_costs
from glimt.bench.throughput import ThroughputJob, ThroughputResult, ThroughputRow, measure
from glimt.bench.throughput_report import HEADINGS, cells_of, document
from glimt.bench.workload import Workload
from glimt.commands import static_batch as static
from glimt.commands.bench import parse_counts
from glimt.commands.console import note, out_console, print_json, told_as_json
from glimt.commands.reporting import check_file, check_folder, run_facts, write_output, write_report
from glimt.commands.sweep_folder import SweepFolder
from glimt.commands.tables import figures
from glimt.engine import Engine
from glimt.ranks import open_on_ranks

NAME = "throughput.json"
BENCHMARK = "benchmark.csv"
PERFORMANCE = "glm4v_performance.csv"
ENABLE, FILEPATH = "ATB_LLM_BENCHMARK_ENABLE", "ATB_LLM_BENCHMARK_FILEPATH"
_DEFAULT_PATH = "./benchmark_result/benchmark.csv"  # the original's
_PROMPT_ROOM = 256  # tokens of template and text beside the picture, for the step's budget


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputCommand:
    """What was typed.

    engine: fields of EngineConfig
    batch:  whole numbers with commas between
    """

    engine: Mapping[str, Any]
    batch: str
    output_len: int
    image: str
    prompt: str
    seed: int
    out: Path
    restart: bool
    report: Path | None
    as_json: bool

    def job(self) -> ThroughputJob:
        """Checked. Raises ConfigError."""
        return ThroughputJob(
            batches=parse_counts(self.batch, "batch"),
            output_len=self.output_len,
            prompt=self.prompt,
            image=self.image,
            seed=self.seed,
        )


def run(command: ThroughputCommand) -> None:
    """Measure the batch sizes that the folder does not have yet, write its files, tell the rows.

    Raises RequestError or SetupError before anything is measured, EngineError at the end if rows
    failed.
    """
    with told_as_json(command.as_json):
        found, folder, engine = _found(command)
    print_json(_as_dict(found, folder)) if command.as_json else _print(found)
    if command.report:
        _write_report(found, command.job(), engine, folder, command.report)
    static.tell_rows(found, folder, lambda row: f"batch {row.batch}")


def benchmark_path(environment: Mapping[str, str]) -> Path | None:
    """Where the original's variables want the benchmark file besides; None where they do not."""
    if environment.get(ENABLE) != "1":
        return None
    return Path(environment.get(FILEPATH) or _DEFAULT_PATH).expanduser()


def _found(command: ThroughputCommand) -> tuple[ThroughputResult, SweepFolder, Engine]:
    job = command.job()
    check_folder(command.report, "report")
    also = benchmark_path(os.environ)
    check_file(also, FILEPATH)
    if os.environ.get(FILEPATH) and also is None:
        note(f"{FILEPATH} is set, but not {ENABLE}=1: {BENCHMARK} is written into --out alone")
    config = static.static_config(command.engine, max(job.batches))
    given = static.read_given(job.image, config)
    opened = open_on_ranks(config)
    cost = static.image_tokens(opened, job.image, given)
    longest = min(cost + _PROMPT_ROOM, opened.max_model_len)
    settings = static.sweep_settings(opened, config, job.image, given)
    settings |= {"seed": job.seed, "prompt": job.prompt, "output_len": job.output_len}
    patterns = [BENCHMARK, PERFORMANCE]
    with SweepFolder.open(command.out, NAME, settings, patterns, command.restart) as folder:
        engine, remark = static.load_static(opened, config, max(job.batches) * longest)
        found = _sweep(job, engine, _Files(folder, also), remark)
    return found, folder, engine


def _write_report(
    found: ThroughputResult, job: ThroughputJob, engine: Engine, folder: SweepFolder, report: Path
) -> None:
    repeats = "1 of each batch size; spread: least … most decoding step"
    more = {
        "picture": str(folder.settings["image"]),
        "prompt": job.prompt,
        "seed": str(job.seed),
        "files": str(folder.folder),
    }
    digest = folder.settings["model"]
    facts = run_facts(engine.opened, engine.config, repeats, more, digest)
    write_report(document(found, facts), report, "throughput")


# --- the sweep -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Files:
    """The folder, and where else the benchmark file goes."""

    folder: SweepFolder
    also: Path | None

    def rows(self) -> list[ThroughputRow]:
        rows: list[ThroughputRow] = self.folder.rows_as(ThroughputRow)
        return sorted(rows, key=lambda row: row.batch)

    def keep(self, row: ThroughputRow) -> None:
        """The record first: from it the tables can be made again, but not the other way round."""
        self.folder.add(row.as_dict(), ("batch",))
        self.write()

    def write(self) -> None:
        """Both tables; the benchmark file is of the batch that was measured last."""
        self.folder.write(PERFORMANCE, files.throughput_csv(self.rows()))
        measured = [ThroughputRow.from_dict(row) for row in self.folder.rows if not row["left_out"]]
        if not measured:
            return
        text = files.benchmark_csv(measured[-1])
        self.folder.write(BENCHMARK, text)
        if self.also is not None:
            write_output(self.also, text.encode(), FILEPATH)


def _sweep(job: ThroughputJob, engine: Engine, kept: _Files, remark: str) -> ThroughputResult:
    workload = Workload(engine, job.seed, job.image)
    done = {row.batch for row in kept.rows() if not row.left_out}
    missing = [batch for batch in sorted(set(job.batches)) if batch not in done]
    if done:
        note(f"rows already there: {len(done)}; to be measured: {len(missing)}")
    if missing:
        warm_tower(workload)
    with static.row_bar(len(missing), kept.folder) as on_row:
        for row in measure(workload, missing, job.output_len, job.prompt):
            kept.keep(row)
            on_row(1)
    kept.write()
    return _result(engine, kept, remark)


def _result(engine: Engine, kept: _Files, remark: str) -> ThroughputResult:
    extra = static.note_machine(engine, kept.folder)
    return ThroughputResult(
        family=engine.opened.family.name,
        rows=tuple(kept.rows()),
        num_runs=kept.folder.num_runs,
        costs=engine_costs(engine),
        remark=remark,
        **extra,
    )


# --- telling ---------------------------------------------------------------------------------


def _as_dict(found: ThroughputResult, folder: SweepFolder) -> dict[str, Any]:
    return {
        **static.result_dict(found, folder),
        "rows": [row.as_dict() for row in found.rows],
    }


def _print(found: ThroughputResult) -> None:
    table = figures(*HEADINGS, title=f"throughput, {found.family}")
    for row in found.measured:
        table.add_row(*cells_of(row))
    out_console().print(table)
