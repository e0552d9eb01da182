"""Tells an engine's memory plan."""

from __future__ import annotations

from glimt.commands.console import note
from glimt.engine import Engine
from glimt.memory_plan import MemoryPlan
from glimt.sizes import size_text

_SAID = {
    "language": "weights, language model",
    "head": "weights, output head",
    "embedding": "weights, embedding",
    "vision": "weights, vision",
    "kv": "KV cache",
    "features": "picture features",
    "workspace": "workspace, estimated",
    "reserve": "reserve",
}


def plan_rows(plan: MemoryPlan, peak_rss: int | None = None) -> dict[str, str]:
    """Names and sizes; peak_rss: what the process really took, in bytes."""
    rows = {_SAID[name]: size_text(nbytes) for name, nbytes in plan.parts().items() if nbytes}
    rows["planned in all"] = size_text(plan.total)
    if plan.limit is not None:
        rows["limit"] = size_text(plan.limit)
    if peak_rss is not None:
        rows["peak of the process"] = size_text(peak_rss)
    return rows


def plan_line(plan: MemoryPlan) -> str:
    """The whole plan in one line: a large model's is told at every start."""
    parts = {
        "weights": plan.language + plan.head + plan.embedding,
        "vision": plan.vision,
        "KV cache": plan.kv,
        "picture features": plan.features,
        "work and reserve": plan.workspace + plan.reserve,
    }
    listed = ", ".join(f"{name} {size_text(nbytes)}" for name, nbytes in parts.items() if nbytes)
    limit = "" if plan.limit is None else f" of at most {size_text(plan.limit)}"
    return f"memory planned: {size_text(plan.total)}{limit} ({listed})"


def note_plan(engine: Engine) -> None:
    """One line for each part, on stderr."""
    for name, size in plan_rows(engine.memory).items():
        note(f"{name}: {size}")
