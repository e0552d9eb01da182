"""`glimt export vision`: a model's vision tower -> an ONNX or OM file, with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glimt.commands.console import byte_bar, note, out_console, print_json, told_as_json
from glimt.commands.writing import whole_files
from glimt.devices.base import Device
from glimt.errors import ConfigError, EngineError, MissingDependency
from glimt.export import atc
from glimt.export.check import Comparison, check_picture, compare
from glimt.export.onnx_file import check_onnx, external_data, write_onnx
from glimt.export.trace import OPSETS, GraphShape, import_onnx, trace_tower
from glimt.loader import Findings, ModelFolder, build_model, model_folder, parse_dtype, read_folder
from glimt.models.base import BuildContext, Model
from glimt.quant.base import NONE
from glimt.quant.plan import plan_formats
from glimt.runtimes.manifest import Manifest, manifest_path, sha256_of
from glimt.runtimes.onnx_runtime import RUNTIME as ONNXRUNTIME
from glimt.sizes import size_text
from glimt.types import ImageInput
from glimt.weights import (
    WeightFormats,
    is_vision,
    load_weights,
    plan_weights,
    tower_digest,
)

FORMATS = ("onnx", "om")
DTYPES = ("float32", "float16")
DYNAMIC = "dynamic"
BATCHES = range(1, 65)  # a request shows no more pictures
# A float32 graph is cast by ATC, whose default this is; a float16 one has its casts already.
_PRECISIONS = {"float32": "fp16", "float16": "origin"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What was asked for.

    batch:      pictures at once, as text, or "dynamic"
    precision:  of ATC; None: what suits the dtype
    checks:     compare with the torch tower before anything is left behind
    print_only: of an OM, write what ATC needs and tell its command
    """

    model: str
    to: str
    output: Path
    opset: int = 13
    batch: str = "1"
    dtype: str = "float32"
    soc_version: str | None = None
    precision: str | None = None
    force: bool = False
    checks: bool = True
    print_only: bool = False

    @property
    def onnx(self) -> Path:
        """Where the ONNX file goes: of an OM, beside it."""
        return self.output.with_suffix(".onnx")

    @property
    def names(self) -> set[str]:
        """Every file that an export to this output may leave, and one before it may have left."""
        models = {self.output, self.onnx}
        weights = external_data(self.onnx).name
        return {weights, *(m.name for m in models), *(manifest_path(m).name for m in models)}

    @property
    def num_pictures(self) -> int | None:
        """Pictures at once, None for any number."""
        return None if self.batch == DYNAMIC else int(self.batch)


@dataclass(frozen=True, slots=True, eq=False)
class ExportPlan:
    """An export whose every check has passed and of which nothing is written yet.

    formats:  in which the checkpoint holds the other weights
    reads, writes: bytes of the tower's weights in the checkpoint, and in the file
    hashes:        bytes of all files that a digest is made of, about
    """

    job: ExportJob
    found: ModelFolder
    model: Model
    formats: WeightFormats
    image: ImageInput
    compiler: str | None
    reads: int
    writes: int

    @property
    def hashes(self) -> int:
        """An OM is about as large as its graph."""
        return self.writes * (1 if self.compiler is None else 2)

    @property
    def compilation(self) -> atc.AtcJob | None:
        """What ATC is to do; None where an ONNX file is all that is wanted."""
        if self.job.to != "om":
            return None
        return _compilation(self.job, self.image)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """What was written. comparison: None where it was not wanted; command: of ATC, if any."""

    output: Path
    manifest: Manifest
    files: dict[str, int]
    comparison: Comparison | None
    command: str | None
    is_compiled: bool

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, for JSON."""
        return {
            "output": str(self.output),
            **asdict(self.manifest),
            "files": self.files,
            "check": None if self.comparison is None else asdict(self.comparison),
            "atc": self.command,
            "compiled": self.is_compiled,
        }


# --- checks ----------------------------------------------------------------------------------


def plan_export(job: ExportJob) -> ExportPlan:
    """Check everything that can be checked before a weight is read.

    Raises ConfigError and CheckpointError, each listing all it found; MissingDependency.
    """
    if problems := list(_option_problems(job)):
        raise ConfigError("export", problems)
    import_onnx()
    if job.checks and ONNXRUNTIME.absent():
        raise MissingDependency("onnxruntime", "export")
    folder = model_folder(job.model)
    found = read_folder(folder)
    dtype = parse_dtype("float32" if job.checks else job.dtype)
    model = build_model(found, BuildContext(Device(), dtype, found.config.max_positions))
    _refuse_quantised(found)
    formats = WeightFormats(stored=plan_formats(model, found.stored))
    plan = plan_weights(found.checkpoint, model, formats, is_vision)
    if found.errors or plan.problems:
        raise Findings(folder, found.errors).error(plan.problems)
    values = sum(p.numel() for name, p in model.named_parameters() if is_vision(name))
    if not values:
        raise ConfigError(str(folder), ["is a text model: it has no vision tower to export"])
    assert found.processor is not None, "its absence is among the errors"
    image = check_picture(found.processor)
    compiler = _find_compiler(job, image)
    writes = values * parse_dtype(job.dtype).itemsize
    return ExportPlan(job, found, model, formats, image, compiler, plan.nbytes, writes)


def _option_problems(job: ExportJob) -> Iterator[str]:
    known = {"to": (job.to, FORMATS), "dtype": (job.dtype, DTYPES)}
    for name, (value, choices) in known.items():
        if value not in choices:
            yield f"{name} {value!r} is unknown; choose one of {', '.join(choices)}"
    if job.opset not in OPSETS:
        yield f"opset is {job.opset}; {OPSETS[0]} to {OPSETS[-1]} can be written"
    if job.batch not in (DYNAMIC, *map(str, BATCHES)):
        yield f"batch is {job.batch!r}; {BATCHES[0]} to {BATCHES[-1]} or {DYNAMIC} is needed"
    if job.to in FORMATS:
        yield from _output_problems(job)
    yield from _compiler_problems(job) if job.to == "om" else _unused(job)


def _output_problems(job: ExportJob) -> Iterator[str]:
    if job.output.suffix != f".{job.to}":
        yield f"output is {job.output}, whose name must end in .{job.to}"
    if job.output.is_dir():
        yield f"output {job.output} is a folder; name a file in it"
    elif not job.force:
        places = [job.output.with_name(name) for name in sorted(job.names)]
        taken = [path for path in places if path.exists()]
        yield from (f"{path} exists; replace it with --force" for path in taken)


def _compiler_problems(job: ExportJob) -> Iterator[str]:
    yield from atc.soc_problems(job.soc_version)
    if job.opset in OPSETS and job.opset not in atc.OPSETS:
        yield f"opset is {job.opset}, but ATC takes {atc.OPSETS[0]} to {atc.OPSETS[-1]}"
    if job.batch == DYNAMIC:
        yield "batch is dynamic, but an OM has one size; give the number of pictures"
    if job.precision is not None and job.precision not in atc.PRECISIONS:
        choices = ", ".join(atc.PRECISIONS)
        yield f"precision_mode {job.precision!r} is unknown; choose one of {choices}"


def _unused(job: ExportJob) -> Iterator[str]:
    """Options of the compiler where there is nothing to compile."""
    given = {
        "--soc-version": job.soc_version,
        "--precision-mode": job.precision,
        "--print-only": job.print_only or None,
    }
    for name, value in given.items():
        if value is not None:
            yield f"{name} is for --to om; leave it out"


def _refuse_quantised(found: ModelFolder) -> None:
    if found.stored.tower != NONE:
        said = (
            f"its tower is quantised ({found.stored.tower}); export the checkpoint it was made of"
        )
        raise ConfigError(str(found.checkpoint.folder), [said])


def _compilation(job: ExportJob, image: ImageInput) -> atc.AtcJob:
    assert job.soc_version is not None, "it was checked"
    assert job.num_pictures is not None, "it was checked"
    height, width, _ = image.pixels.shape
    return atc.AtcJob(
        onnx=job.onnx,
        om=job.output,
        soc_version=job.soc_version,
        batch=job.num_pictures,
        image_size=(height, width),
        precision=job.precision or _PRECISIONS[job.dtype],
    )


def _find_compiler(job: ExportJob, image: ImageInput) -> str | None:
    """ATC, before the long work; None where it is not needed."""
    if job.to != "om" or job.print_only:
        return None
    if (found := atc.find_atc()) is None:
        raise atc.absent_atc(_compilation(job, image))
    return found


# --- writing ---------------------------------------------------------------------------------


def export_vision(
    plan: ExportPlan,
    on_read: Callable[[int], None] | None = None,
    on_write: Callable[[int], None] | None = None,
    on_hash: Callable[[int], None] | None = None,
) -> ExportReport:
    """Write the target and what belongs to it: complete or, on any error, not at all.

    What an export before it left under its names goes once this one is whole.

    on_read, on_write: called with bytes of weights read and written, of plan.reads and plan.writes
    on_hash: called with bytes of files hashed, of plan.hashes
    Peak memory is the tower's weights once, and one of them again.
    Raises ConfigError, EngineError if the file does not compute what the torch tower does.
    """
    job = plan.job
    manifest = _manifest(plan)
    with whole_files(job.output, plan.writes, job.names) as partial:
        path = partial / job.onnx.name
        expected = _write(plan, path, on_read, on_write)
        check_onnx(path)
        comparison = _compare(plan, path, manifest, expected) if job.checks else None
        written = sorted(partial.iterdir())
        manifest = _settled(manifest, "onnx", written, on_hash)
        files = manifest.files
        manifest_path(path).write_text(manifest.to_json(), encoding="utf-8")
        if plan.compilation is not None:
            manifest = _compile(plan, plan.compilation, partial, manifest, on_hash)
    return ExportReport(
        output=job.output,
        manifest=manifest,
        files={**files, **manifest.files},
        comparison=comparison,
        command=plan.compilation.as_text() if plan.compilation else None,
        is_compiled=plan.compiler is not None,
    )


def _write(
    plan: ExportPlan,
    path: Path,
    on_read: Callable[[int], None] | None,
    on_write: Callable[[int], None] | None,
) -> Tensor | None:
    """Write the ONNX file. Returns what the torch tower makes of the test picture, if wanted."""
    job, model = plan.job, plan.model
    shape = GraphShape(batch=job.num_pictures, opset=job.opset, dtype=parse_dtype(job.dtype))
    graph = trace_tower(plan.found, plan.image, shape)
    own = parse_dtype("float32" if job.checks else job.dtype)
    cpu = torch.device("cpu")
    load_weights(plan.found.checkpoint, model, own, cpu, on_read, plan.formats, is_vision)
    with torch.inference_mode():
        expected = model.image_features([plan.image])[0] if job.checks else None
    weights = {name: p.data for name, p in model.named_parameters() if is_vision(name)}
    write_onnx(graph, weights, path, shape.dtype, on_write)
    model.to("meta")  # onnxruntime needs the room next
    return expected


def _compare(
    plan: ExportPlan, path: Path, manifest: Manifest, expected: Tensor | None
) -> Comparison:
    assert expected is not None, "the tower was run"
    found = compare(path, manifest, plan.image, expected)
    if not found.is_within:
        advice = "nothing was written; export with --dtype float32, or as it is with --no-check"
        said = f"the exported tower is not the torch tower: {found.as_text()}"
        raise EngineError(f"{said}; {advice}")
    return found


def _compile(
    plan: ExportPlan,
    compilation: atc.AtcJob,
    partial: Path,
    of_onnx: Manifest,
    on_hash: Callable[[int], None] | None,
) -> Manifest:
    """Run ATC, where there is one, and say beside what it wrote, or will write, what it is."""
    written = [atc.run_atc(compilation, plan.compiler, partial)] if plan.compiler else []
    manifest = _settled(of_onnx, "om", written, on_hash)
    manifest = replace(manifest, soc_version=compilation.soc_version)
    text = manifest.to_json()
    manifest_path(partial / compilation.om.name).write_text(text, encoding="utf-8")
    return manifest


def _manifest(plan: ExportPlan) -> Manifest:
    job, image = plan.job, plan.image
    height, width, _ = image.pixels.shape
    return Manifest(
        format="onnx",
        family=plan.found.family.name,
        tower_digest=tower_digest(plan.found.checkpoint, plan.model),
        image_size=(height, width),
        grid=image.grid,
        image_tokens=image.num_tokens,
        hidden_size=plan.model.embedding.weight.shape[1],
        batch=job.num_pictures,
        opset=job.opset,
        dtype=job.dtype,
        files={},
    )


def _settled(
    manifest: Manifest,
    form: str,
    written: Sequence[Path],
    on_hash: Callable[[int], None] | None,
) -> Manifest:
    """With the format, and what is known of the files that were written."""
    sizes = {file.name: file.stat().st_size for file in written}
    digests = {file.name: sha256_of(file, on_hash) for file in written}
    return replace(manifest, format=form, files=sizes, sha256=digests)


# --- the command -----------------------------------------------------------------------------


def run(job: ExportJob, as_json: bool) -> None:
    """Export, showing progress, and tell what was written and measured."""
    with told_as_json(as_json):
        plan = plan_export(job)
        with byte_bar("exporting", plan.reads + plan.writes + plan.hashes) as on_bytes:
            report = export_vision(plan, on_bytes, on_bytes, on_bytes)
    print_json(report.as_dict()) if as_json else _tell(report)


def _tell(report: ExportReport) -> None:
    manifest = report.manifest
    height, width = manifest.image_size
    pictures = manifest.batch or "any number"
    sizes = ", ".join(f"{name} {size_text(nbytes)}" for name, nbytes in report.files.items())
    lines = [
        f"{report.output}: {manifest.family}, opset {manifest.opset}, {manifest.dtype}",
        f"input [{pictures}, {height}, {width}, 3] float32, 0 to 255; "
        f"output [{pictures}, {manifest.image_tokens}, {manifest.hidden_size}]",
        f"files: {sizes}",
    ]
    if report.comparison is not None:
        lines.append(f"beside the torch tower: {report.comparison.as_text()}")
    if report.command is not None:
        lines.append(report.command)
    out_console().print("\n".join(lines), soft_wrap=True)
    if report.command is not None and not report.is_compiled:
        note(
            f"run the command beside the ONNX file where CANN is; then keep {report.output.name}"
            f" and {report.output.name}.json together"
        )
