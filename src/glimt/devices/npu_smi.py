"""What `npu-smi info` tells of the NPUs of this machine, whichever version and product prints it.

It prints a table with two rows per chip; which columns stand there, and how wide they are, differs.
Sources: hicann/driver, npu_info_print.c (facts only); docs/ascend.md.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_COMMAND = ("npu-smi", "info")
_WAIT_S = 10.0  # a driver that hangs must not hang whoever asks
_UNKNOWN = frozenset({"", "-", "NA", "N/A"})


@dataclass(frozen=True, slots=True)
class NpuState:
    """One chip. npu, chip: its numbers; name: such as "910B3"; None for what it does not tell.

    used_mb, total_mb: of the memory that models lie in: HBM, or the only one that there is
    """

    npu: int
    chip: int
    name: str
    health: str
    power_w: float | None
    temperature_c: float | None
    busy_percent: float | None
    used_mb: int | None
    total_mb: int | None


def read_npus(command: Sequence[str] = _COMMAND) -> tuple[NpuState, ...]:
    """The chips of this machine; none where npu-smi is absent or fails."""
    try:
        ended = subprocess.run(command, capture_output=True, timeout=_WAIT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(parse_npus(ended.stdout.decode(errors="replace")))


def parse_npus(text: str) -> Iterator[NpuState]:
    """Every chip of the table; a row of which a number is missing is left out."""
    rows = list(_rows(text))
    heads = [i for i, row in enumerate(rows) if re.match(r"(NPU\s+Name|Chip\b)", row[0])]
    if len(heads) < 2:
        return
    upper, lower = (_Columns.of(rows[i]) for i in heads[:2])
    body = rows[heads[1] + 1 :]
    for first, second in zip(body[::2], body[1::2], strict=False):
        if not first[0].split()[0].isdigit() or first[0].startswith("NPU"):
            return  # the table of processes
        yield _state(upper.read(first), lower.read(second))


def _rows(text: str) -> Iterator[list[str]]:
    """The cells of every line of three cells; those of processes have four."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.lstrip().startswith("|") and len(cells) == 3 and cells[0]:
            yield cells


@dataclass(frozen=True, slots=True)
class _Columns:
    """Names of the values in the first and in the third cell of a row."""

    first: tuple[str, ...]
    third: tuple[str, ...]

    @classmethod
    def of(cls, head: Sequence[str]) -> _Columns:
        return cls(tuple(head[0].split()), tuple(re.sub(r"\(\w*%?\)", "", head[2]).split()))

    def read(self, row: Sequence[str]) -> dict[str, str]:
        """Values by name; a pair such as "3318 / 65536" is one value."""
        values = re.findall(r"\S+\s*/\s*\S+|\S+", row[2])
        named = dict(zip(self.third, values, strict=False))
        return named | dict(zip(self.first, row[0].split(), strict=False)) | {"second": row[1]}


def _state(upper: dict[str, str], lower: dict[str, str]) -> NpuState:
    # With memory of its own (HBM) the other pair is 0 / 0; without, that is what there is.
    pair = lower.get("HBM-Usage") or lower.get("Memory-Usage") or ""
    used, _, total = pair.partition("/")
    return NpuState(
        npu=int(upper["NPU"]),
        chip=int(lower["Chip"]),
        name=upper.get("Name", ""),
        health=upper["second"],
        power_w=_number(upper.get("Power", "")),
        temperature_c=_number(upper.get("Temp", "")),
        busy_percent=_number(lower.get("AICore", "")),
        used_mb=_whole(used),
        total_mb=_whole(total),
    )


def _number(text: str) -> float | None:
    return None if text.strip() in _UNKNOWN else float(text)


def _whole(text: str) -> int | None:
    number = _number(text.strip())
    return None if number is None else int(number)
