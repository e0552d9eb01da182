"""Runs `glimt` with other arguments, and says which of the originals' variables do nothing here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from glimt.cli import main
from glimt.commands.console import note

# What the originals' scripts set or read, and what has no meaning without their machine.
IGNORED = (
    "ASCEND_RT_VISIBLE_DEVICES",
    "SET_NPU_DEVICE",
    "TP_WORLD_SIZE",
    "WORLD_SIZE",
    "RANK",
    "LOCAL_RANK",
    "MASTER_PORT",
    "MAX_MEMORY_GB",
    "RESERVED_MEMORY_GB",
    "NPU_MEMORY_FRACTION",
    "BIND_CPU",
    "IS_QUANT",
    "IS_BF16",
    "USE_REFACTOR",
    "PRECISION_TEST",
    "MODELTEST_DATASET_SPECIFIED",
    "INF_NAN_MODE_ENABLE",
    "TASK_QUEUE_ENABLE",
    "ATB_OPERATION_EXECUTE_ASYNC",
    "ATB_CONVERT_NCHW_TO_ND",
    "ATB_CONTEXT_WORKSPACE_SIZE",
    "ATB_LAYER_INTERNAL_TENSOR_REUSE",
    "ATB_LAUNCH_KERNEL_WITH_TILING",
    "ATB_WORKSPACE_MEM_ALLOC_GLOBAL",
    "LCCL_ENABLE_FALLBACK",
    "ATB_LLM_LOGITS_SAVE_ENABLE",
    "ATB_LLM_LOGITS_SAVE_FOLDER",
    "ATB_LLM_TOKEN_IDS_SAVE_ENABLE",
    "ATB_LLM_TOKEN_IDS_SAVE_FOLDER",
    "ATB_PROFILING_ENABLE",
    "PROFILING_LEVEL",
    "PROFILING_FILEPATH",
)


def ignored_variables(environment: Mapping[str, str]) -> list[str]:
    """Those of the originals' variables that are set and do nothing here, as NAME=value."""
    return [f"{name}={environment[name]}" for name in IGNORED if environment.get(name)]


def say_ignored(environment: Mapping[str, str], options: Sequence[str] = ()) -> None:
    """Tell on stderr, in one line, what was given and does nothing here; nothing if all does.

    options: arguments of the command line that are among it, as they were typed
    """
    if ignored := [*options, *ignored_variables(environment)]:
        note(f"ignored, because it means nothing on this machine: {', '.join(ignored)}")


def run_glimt(arguments: Sequence[str]) -> NoReturn:
    """Run `glimt` with these arguments, as if they had been typed, and end with its exit code."""
    sys.argv = ["glimt", *arguments]  # a report names the command that gives it again
    main()
    raise SystemExit(0)
