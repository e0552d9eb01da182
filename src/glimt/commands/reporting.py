"""What every report says of its run, and the files of a report."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path

import glimt
from glimt.commands.console import note
from glimt.commands.machine import installed_version, read_processor
from glimt.commands.writing import write_file
from glimt.config import EngineConfig
from glimt.devices.host import read_memory
from glimt.errors import ConfigError
from glimt.loader import OpenedModel
from glimt.reports.document import Document, Plot
from glimt.reports.html import to_html
from glimt.reports.markdown import to_markdown
from glimt.sizes import size_text

_CHUNK = 16 * 2**20  # bytes hashed at once


# --- what a run belongs to -------------------------------------------------------------------


def command_line() -> str:
    """What was typed, quoted so that a shell takes it again."""
    return shlex.join(["glimt", *sys.argv[1:]])


def run_facts(
    opened: OpenedModel,
    config: EngineConfig,
    repeats: str,
    more: Mapping[str, str] | None = None,
    digest: str | None = None,
) -> dict[str, str]:
    """What figures of one engine belong to; repeats: how often, and how the spread is told.

    digest: of the weights, where it is known; else every weight file is read once for it
    """
    return {
        **model_facts(opened, digest or model_digest(opened)),
        "settings": settings_text(config),
        **(more or {}),
        "repeats and spread": repeats,
        **place_facts(),
    }


def model_facts(opened: OpenedModel, digest: str) -> dict[str, str]:
    """Which weights, by their content, and what they are computed in."""
    return {
        "model": f"{opened.checkpoint.folder.name} ({opened.family.name})",
        "model digest": digest,
        "device": opened.device.name,
        "dtype": str(opened.dtype).removeprefix("torch."),
        "context": f"{opened.max_model_len} tokens",
    }


def place_facts() -> dict[str, str]:
    """The program, the machine, the command and the time."""
    processor = read_processor()
    sets = [name for name, has in processor.instruction_sets.items() if has]
    return {
        "glimt": f"{glimt.__version__}, commit {engine_commit()}",
        "machine": f"{processor.model} ({processor.architecture}), {processor.usable_cores:g} of "
        f"{processor.logical_cores} cores, {size_text(read_memory().total or 0)}",
        "instruction sets": ", ".join(sets) or "none that matter here",
        "kernels asked for": os.environ.get("GLIMT_ISA") or "the best that are right here",
        "torch": installed_version("torch") or "not installed",
        "command": command_line(),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


_IN_MODEL_FACTS = ("model", "device", "dtype")


def settings_text(config: EngineConfig) -> str:
    """Every engine option that is not at its default."""
    plain = EngineConfig(model=config.model)
    names = [name for name in plain.__dataclass_fields__ if name not in _IN_MODEL_FACTS]
    changed = [(name, getattr(config, name)) for name in names]
    said = [f"{name}={value}" for name, value in changed if value != getattr(plain, name)]
    return ", ".join(said) or "defaults"


def model_digest(opened: OpenedModel) -> str:
    """SHA-256 of config.json and of every weight file; a synthetic model's name says all."""
    folder = opened.checkpoint.folder
    if not folder.is_dir():
        return str(folder)
    return files_digest((folder / "config.json", *sorted(opened.checkpoint.files)))


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 of files with their names and sizes, in the order given."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        for chunk in _chunks(path):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def file_digest(path: Path) -> str:
    """SHA-256 of one file alone, as sha256sum tells it."""
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def engine_commit() -> str:
    """The commit of the checkout that this program runs from, or that there is none."""
    folder = Path(glimt.__file__).parent
    head = _git(folder, "rev-parse", "HEAD")
    if not head or _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return "unknown (not run from a checkout)"
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{head}{' and local changes' if changed else ''}"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says, None if it fails or is not there."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


# --- files -----------------------------------------------------------------------------------


def check_folder(folder: Path | None, field: str) -> None:
    """A run takes long: that its files cannot be written must be known before. Makes the folder.

    Raises ConfigError.
    """
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{folder} cannot be made: {error.strerror or error}"
        raise ConfigError(field, [f"{said}; name a folder that can be written"]) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(field, [f"{folder} cannot be written to; name another folder"])


def check_file(path: Path | None, field: str) -> None:
    """The same for a file that will be written; makes the folder that it lies in.

    A device or a pipe will do: `write_file` writes into it. Raises ConfigError.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(field, [f"{path} is a folder; name a file"])
    if not path.exists() or path.is_file():
        check_folder(path.parent, field)
    elif not os.access(path, os.W_OK):
        raise ConfigError(field, [f"{path} cannot be written to; name another file"])


def check_apart(path: Path | None, field: str, read: Iterable[Path]) -> None:
    """Raise ConfigError for a file to be written that is one of those to be read, by any name."""
    if path is None or not path.exists():
        return
    for each in read:
        if each.exists() and path.samefile(each):
            said = f"{path} would be written over {each}, which is read; name another file"
            raise ConfigError(field, [said])


def write_report(document: Document, folder: Path, name: str) -> None:
    """NAME.html, which holds all, and NAME.md with its plots as PNG beside it.

    Raises ConfigError if the folder cannot be written to.
    """
    plots = [section for section in document.sections if isinstance(section, Plot)]
    files = {
        f"{name}.html": _encoded(to_html(document)),
        f"{name}.md": _encoded(to_markdown(document)),
        **{f"{plot.name}.png": plot.png for plot in plots},
    }
    for file, content in files.items():
        write_output(folder / file, content, "report")
    note(f"report: {folder / f'{name}.html'}")


def _encoded(text: str) -> bytes:
    """UTF-8; file names of another encoding hold halves of characters, shown as question marks."""
    return text.encode("utf-8", "replace")


def write_output(path: Path, content: bytes, field: str) -> None:
    """Write a file whole or not at all. Raises ConfigError naming it."""
    try:
        write_file(path, content)
    except OSError as error:
        said = f"{path} cannot be written: {error.strerror or error}"
        raise ConfigError(field, [f"{said}; make room, or name another place"]) from error
