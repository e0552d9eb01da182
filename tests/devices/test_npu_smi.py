"""Three products' tables of npu-smi, and a machine whose npu-smi is absent, broken or slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from glimt.commands.doctor import Check, DeviceState, check, collect
from glimt.commands.show_doctor import show
from glimt.devices.npu_smi import parse_npus, read_npus

LINE = (
    "+---------------------------+---------------+----------------------------------------------+"
)
PROCESSES = """
| NPU     Chip              | Process id    | Process name             | Process memory(MB)        |
| 0       0                 | 4711          | python3                  | 1200                      |
| No running processes found in NPU 1                                                            |
"""
A2 = f"""
+------------------------------------------------------------------------------------------------+
| npu-smi 24.1.rc2                 Version: 24.1.rc2                                             |
{LINE}
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
{LINE}
| 0     910B3               | OK            | 101.8       43                0    / 0             |
| 0                         | 0000:C1:00.0  | 7           0    / 0          3318 / 65536         |
{LINE}
| 1     910B3               | Warning       | 95.2        41                0    / 0             |
| 0                         | 0000:01:00.0  | 0           0    / 0          3317 / 65536         |
{LINE}{PROCESSES}"""
DUO = f"""
| npu-smi 23.0.0                   Version: 23.0.0                                               |
{LINE}
| NPU     Name              | Health        | Power(W)     Temp(C)        Hugepages-Usage(page) |
| Chip    Device            | Bus-Id        | AICore(%)    Memory-Usage(MB)                     |
{LINE}
| 6       310P3             | OK            | NA           55             0     / 0             |
| 0       0                 | 0000:83:00.0  | 0            1175 / 44280                         |
| 6       310P3             | OK            | NA           52             3262  / 3262          |
| 1       1                 | 0000:83:00.0  | 0            8322/43693                           |
{LINE}{PROCESSES}"""
A3 = f"""
| npu-smi 25.0                     Version: 25.0                                                 |
{LINE}
| NPU     Name              | Health        | Power(W)     Temp(C)        Hugepages-Usage(page) |
| Chip    Phy-ID            | Bus-Id        | AICore(%)    Memory-Usage(MB) HBM-Usage(MB)       |
{LINE}
| 0       Ascend910         | OK            | 160.4        36             0     / 0             |
| 0       0                 | 0000:9D:00.0  | 0            0     / 0      3120 / 65536          |
| 0       Ascend910         | OK            | -            35             0     / 0             |
| 1       1                 | 0000:9F:00.0  | 0            0     / 0      2877 / 65536          |
{LINE}{PROCESSES}"""


def figures(text: str) -> list[tuple[object, ...]]:
    return [
        (s.npu, s.chip, s.name, s.power_w, s.temperature_c, s.used_mb, s.total_mb)
        for s in parse_npus(text)
    ]


def test_each_product_is_read_from_its_own_columns() -> None:
    """Catches the 0 / 0 of A2's other memory, a power of NA, and pairs with or without blanks."""
    assert figures(A2) == [
        (0, 0, "910B3", 101.8, 43.0, 3318, 65536),
        (1, 0, "910B3", 95.2, 41.0, 3317, 65536),
    ]
    assert figures(DUO) == [
        (6, 0, "310P3", None, 55.0, 1175, 44280),
        (6, 1, "310P3", None, 52.0, 8322, 43693),
    ]
    assert figures(A3) == [
        (0, 0, "Ascend910", 160.4, 36.0, 3120, 65536),
        (0, 1, "Ascend910", None, 35.0, 2877, 65536),
    ]
    assert [(s.health, s.busy_percent) for s in parse_npus(A2)] == [("OK", 7.0), ("Warning", 0.0)]


def test_what_is_no_table_has_no_chips() -> None:
    """Catches a message of the driver that is taken for a chip."""
    assert figures("DrvMngGetConsoleLogLevel failed. (g_conLogLevel=3)\n| dcmi | a | b |") == []


def install(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program called npu-smi, found before any other."""
    program = folder / "npu-smi"
    program.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


def npu_checks(reason: str | None) -> list[Check]:
    facts = collect({})
    object.__setattr__(facts, "devices", (DeviceState("npu", reason),))
    return [one for one in check(facts) if one.name == "NPUs"]


def test_doctor_tells_of_chips_and_why_they_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a machine with NPUs that is told nothing of them, and an ill chip called well."""
    (tmp_path / "table").write_text(A2, encoding="utf-8")
    install(tmp_path, f'[ "$1" = info ] && while read -r l; do echo "$l"; done < {tmp_path}/table',
            monkeypatch)  # fmt: skip
    (absent,) = npu_checks("torch-npu is not installed")
    assert (absent.level, absent.fix) == ("warning", "torch-npu is not installed")
    assert absent.says == "2 found (910B3), but they cannot be used"
    (ill,) = npu_checks(None)
    assert ill.level == "warning"
    assert ill.says == "2 found (910B3); 1/0 is Warning"
    show(collect({}), [])
    assert "3318 of 65536 MB in use, 101.8 W, 43 °C" in " ".join(capsys.readouterr().out.split())


def test_without_npu_smi_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a doctor that fails where no driver is installed, or its tool fails."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read_npus() == ()
    install(tmp_path, "echo no device; exit 3", monkeypatch)
    assert read_npus() == ()
    assert npu_checks("torch-npu is not installed") == []
