"""ONNX -> OM with ATC, the offline compiler of CANN. Checked against a stand-in, not a chip.

Source of the options: hicann/ge, docs/zh/user_guides/atc_tools.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glimt.errors import ConfigError
from glimt.runtimes.manifest import INPUT

OPSETS = range(11, 19)  # that ATC takes
PRECISIONS = ("fp16", "origin", "cube_fp16in_fp32out", "mixed_float16")
_ONNX_FRAMEWORK = 5
_SOC = re.compile(r"Ascend(310|910|950)\w*")
_SOC_ADVICE = (
    "it is Ascend and the name that `npu-smi info` shows, such as Ascend910B3 or Ascend310P3"
)
_LAST_LINES = 8  # of what a failed ATC said


@dataclass(frozen=True, slots=True, kw_only=True)
class AtcJob:
    """One compilation. batch: pictures at once; image_size: (height, width).

    precision: of --precision_mode_v2; "origin" keeps the dtypes of the graph
    """

    onnx: Path
    om: Path
    soc_version: str
    batch: int
    image_size: tuple[int, int]
    precision: str

    def command(self) -> list[str]:
        """The command, to be run in the folder of the ONNX file: external weights lie there."""
        height, width = self.image_size
        return [
            "atc",
            f"--framework={_ONNX_FRAMEWORK}",
            f"--model={self.onnx.name}",
            f"--output={self.om.name.removesuffix('.om')}",
            f"--soc_version={self.soc_version}",
            f"--input_shape={INPUT}:{self.batch},{height},{width},3",
            f"--precision_mode_v2={self.precision}",
        ]

    def as_text(self) -> str:
        """The command as a shell takes it, quoted."""
        return shlex.join(self.command())


def soc_problems(soc_version: str | None) -> list[str]:
    """What is wrong with the name of a chip."""
    if soc_version is None:
        return [f"soc_version is missing; name the chip with --soc-version: {_SOC_ADVICE}"]
    if not _SOC.fullmatch(soc_version):
        return [f"soc_version {soc_version!r} is no chip of Ascend; {_SOC_ADVICE}"]
    return []


def find_atc() -> str | None:
    """The path of ATC, None where it is not on PATH."""
    return shutil.which("atc")


def absent_atc(job: AtcJob) -> ConfigError:
    """What to say where there is no ATC."""
    said = (
        "atc is not on PATH: source CANN's set_env.sh, or write the ONNX file alone with "
        f"--print-only and run this beside it where CANN is: {job.as_text()}"
    )
    return ConfigError("export", [said])


def run_atc(job: AtcJob, atc: str, folder: Path) -> Path:
    """Compile in a folder that holds the ONNX file. Returns the OM file, under job.om's name.

    Raises ConfigError with what ATC said last if it fails or writes nothing.
    """
    done = subprocess.run(
        [atc, *job.command()[1:]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    made = _made(job, folder)
    if done.returncode or not made:
        raise _failed(job, done.returncode, done.stdout)
    return made[0].rename(folder / job.om.name)


def _made(job: AtcJob, folder: Path) -> Sequence[Path]:
    """ATC puts the host's system and processor into the name of what is bound to them."""
    stem = job.om.name.removesuffix(".om")
    return [path for path in (folder / f"{stem}.om", *sorted(folder.glob("*.om"))) if path.exists()]


def _failed(job: AtcJob, status: int, output: str) -> ConfigError:
    last = " / ".join(output.strip().splitlines()[-_LAST_LINES:]) or "it said nothing"
    said = (
        f"atc ended with status {status} and no OM file" if not status else f"atc failed ({status})"
    )
    return ConfigError("atc", [f"{said}: {last}; the command was: {job.as_text()}"])
