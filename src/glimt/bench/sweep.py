"""What a sweep of static batches came to, whatever its rows are: counts, machine, and their words.

Knows nothing of running, and nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from glimt.bench.roofline import ModelCosts
from glimt.sizes import size_text

NONE = "-"


class SweepRow(Protocol):
    """A row of any sweep."""

    @property
    def left_out(self) -> str:
        """Why there is no measure; "" where there is one."""

    @property
    def is_error(self) -> bool:
        """It was begun and failed: worth another try."""


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """What the machine does at most in a second: bytes read, and bfloat16 operations."""

    read_bytes: float
    bf16_ops: float


R = TypeVar("R", bound=SweepRow)


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepResult(Generic[R]):
    """All rows of a folder, and what they were measured on.

    num_runs:     that it took; more than one where a run was stopped and another went on
    host_bytes:   the most that the process held
    device_bytes: the most that was held on the device; None where that is the host
    limits:       None where the device is not the host
    remark:       what was not as usual; "" for nothing
    """

    family: str
    rows: tuple[R, ...]
    num_runs: int
    host_bytes: int
    device_bytes: int | None
    limits: MachineLimits | None
    costs: ModelCosts
    remark: str = ""

    @property
    def measured(self) -> list[R]:
        """Rows with figures."""
        return [row for row in self.rows if not row.left_out]

    @property
    def failed(self) -> list[R]:
        """Rows that were begun and ended with an error."""
        return [row for row in self.rows if row.is_error]

    @property
    def unfit(self) -> list[R]:
        """Rows that cannot run in this context or cache."""
        return [row for row in self.rows if row.left_out and not row.is_error]


def status_line(found: SweepResult[R], rows: str) -> str:
    """One sentence: how much was measured, and what was not; rows: what a row is called."""
    parts = [f"{len(found.measured)} of {len(found.rows)} {rows} measured"]
    if found.failed:
        parts.append(f"{len(found.failed)} ended with an error")
    if found.unfit:
        parts.append(f"{len(found.unfit)} do not fit the context or the cache")
    if found.num_runs > 1:
        parts.append(f"in {found.num_runs} runs, each going on where the one before stopped")
    return f"{'With errors' if found.failed else 'Whole'}: {'; '.join(parts)}."


def memory_rows(found: SweepResult[R]) -> dict[str, str]:
    """Peak memory of host and device, for a table."""
    device = found.device_bytes
    return {
        "peak memory, host": size_text(found.host_bytes),
        "peak memory, device": f"{NONE} (the host)" if device is None else size_text(device),
    }
