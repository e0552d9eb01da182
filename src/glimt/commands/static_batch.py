"""What both sweeps of static batches share: the engine, its settings, memory and limits."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any

from glimt import __version__
from glimt.bench.batch_run import static_engine
from glimt.bench.sweep import MachineLimits, R, SweepResult
from glimt.bench.workload import RANDOM, SIDE
from glimt.commands.console import count_bar, note, warn
from glimt.commands.machine import read_processor
from glimt.commands.memory import plan_line
from glimt.commands.pictures import Picture, read_picture
from glimt.commands.reporting import model_digest
from glimt.commands.running import load_weights
from glimt.commands.sweep_folder import SweepFolder
from glimt.config import EngineConfig
from glimt.devices.host import peak_bytes, plan_threads
from glimt.engine import Engine
from glimt.errors import EngineError
from glimt.kernels.limits import LimitMeter
from glimt.loader import OpenedModel

# --- settings --------------------------------------------------------------------------------


def static_config(fields: Mapping[str, Any], batch: int) -> EngineConfig:
    """The engine's settings for batches of at most so many, without memory for unused caches.

    Raises ConfigError.
    """
    return EngineConfig(
        **fields, max_num_seqs=batch, enable_prefix_cache=False, feature_cache_bytes=0
    )


def read_given(image: str | None, config: EngineConfig) -> Picture | None:
    """The picture file that was named, tried at once; None for noise or none. Raises ImageError."""
    return None if image in (None, RANDOM) else read_picture(str(image), config.image_limits)


def image_tokens(opened: OpenedModel, image: str | None, given: Picture | None) -> int:
    """What a picture costs in a prompt; 0 without one. Raises RequestError without a tower."""
    if image is None:
        return 0
    size = (SIDE, SIDE) if given is None else (given.width, given.height)
    return opened.processor.image_cost(*size)


def sweep_settings(
    opened: OpenedModel, config: EngineConfig, image: str | None, given: Picture | None
) -> dict[str, Any]:
    """What every row of one folder has in common; figures of other settings do not belong there."""
    content = None if given is None else hashlib.sha256(given.content).hexdigest()
    return {
        "model": model_digest(opened),
        "family": opened.family.name,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "kv_dtype": config.kv_dtype,
        "quant": config.quant,
        "quant_head": config.quant_head,
        "quant_tower": config.quant_tower,
        "rotary_table": config.rotary_table,
        "device": opened.device.name,
        "threads": plan_threads(config.num_threads).count,
        "context": opened.max_model_len,
        "kv_bytes": config.kv_bytes,
        "memory_limit_bytes": config.memory_limit_bytes,
        "image": f"sha256:{content}" if content else image or "none",
        "processor": read_processor().model,
        "kernels": os.environ.get("GLIMT_ISA") or "best",
        "glimt": __version__,
    }


# --- running ---------------------------------------------------------------------------------


def load_static(opened: OpenedModel, config: EngineConfig, num_tokens: int) -> tuple[Engine, str]:
    """Load the weights and build an engine for batches of num_tokens prompt tokens in one step.

    Also gives the remark of `static_engine`, which is told on stderr. Raises ConfigError or
    CheckpointError.
    """
    is_told = load_weights(opened)
    engine, remark = static_engine(opened, config, num_tokens)
    if is_told:
        note(plan_line(engine.memory))
    if remark:
        warn(remark)
    return engine, remark


@contextmanager
def row_bar(total: int, folder: SweepFolder) -> Iterator[Callable[[int], None]]:
    """A progress bar over rows; a stop by Ctrl-C says how to go on."""
    try:
        with count_bar("measuring", total) as on_done:
            yield on_done or _nothing
    except KeyboardInterrupt:
        said = f"stopped; what was measured is in {folder.folder}"
        note(f"{said}, and the same command goes on from there")
        raise


def _nothing(count: int) -> None:
    """Where there is no bar."""


# --- what they were measured on --------------------------------------------------------------


def note_machine(engine: Engine, folder: SweepFolder) -> dict[str, Any]:
    """Peak memory and the machine's limits, by the fields of a result; kept in the folder too.

    Of a sweep in several runs the peak is that of the run that held most.
    """
    host = max(peak_bytes(), folder.extra.get("host_bytes") or 0)
    limits = measure_limits(engine)
    device = engine.opened.device.peak_bytes()
    folder.extra |= {"host_bytes": host, "device_bytes": device}
    folder.extra["limits"] = None if limits is None else asdict(limits)
    folder.save()
    return {"host_bytes": host, "device_bytes": device, "limits": limits}


def measure_limits(engine: Engine) -> MachineLimits | None:
    """The machine's, now; medians of three. None where the device is not the host.

    Takes 768 MiB for a moment, so the peak of memory is to be read before.
    """
    if engine.opened.device.torch_device.type != "cpu":
        return None
    meter = LimitMeter(plan_threads(engine.config.num_threads).count)
    meter.warm_up()
    read = median(meter.read() for _ in range(3))
    return MachineLimits(read, median(meter.math("bf16") for _ in range(3)))


# --- telling ---------------------------------------------------------------------------------


def result_dict(found: SweepResult[R], folder: SweepFolder) -> dict[str, Any]:
    """What every sweep's JSON has, as plain data, beside its rows."""
    return {
        "folder": str(folder.folder),
        "settings": folder.settings,
        "runs": found.num_runs,
        "is_whole": not found.failed,
        "remark": found.remark,
        "memory": {"host_bytes": found.host_bytes, "device_bytes": found.device_bytes},
        "limits": None if found.limits is None else asdict(found.limits),
    }


def tell_rows(found: SweepResult[R], folder: SweepFolder, name: Callable[[R], str]) -> None:
    """On stderr, why rows have no measure, and how many there are; name: says which row it is.

    Raises EngineError if rows failed.
    """
    for row in found.rows:
        if row.left_out:
            warn(f"{name(row)}: no measure: {row.left_out}")
    note(f"rows in {folder.folder}: {len(found.rows)}")
    if found.failed:
        said = f"rows that failed, as told above: {len(found.failed)}"
        raise EngineError(f"{said}; the same command tries them again")
