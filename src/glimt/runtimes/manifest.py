"""Manifest: what a compiled vision tower is, in a small JSON file beside it.

The exporter writes it and the runtimes read it, so that a file of another model is refused before
any picture goes through it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glimt.errors import ConfigError
from glimt.models.config_reader import ConfigReader, read_json

INPUT, OUTPUT = "input", "output"  # names of the graph's two ends, as in the original's export
VERSION = 1  # of the manifest's own form
_CHUNK_BYTES = 2**22  # read at once: large enough that reading costs less than hashing
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One compiled tower.

    format:       "onnx" or "om"
    tower_digest: of the weights that it was made of (`weights.tower_digest`)
    image_size:   (height, width) of the pictures that it takes, float32 [batch, height, width, 3]
    grid:         patches of one picture as (rows, columns)
    image_tokens: rows of features of one picture; hidden_size: their width
    batch:        pictures at once, always as many; None: any number
    opset:        of the ONNX graph; dtype: of its weights and of what it gives
    files:        bytes by name of each file beside the manifest, empty where they are not known
    sha256:       in hex, by name of the same files; manifests of older exports have none
    soc_version:  the chip that an OM is for
    """

    format: str
    family: str
    tower_digest: str
    image_size: tuple[int, int]
    grid: tuple[int, int]
    image_tokens: int
    hidden_size: int
    batch: int | None
    opset: int
    dtype: str
    files: Mapping[str, int]
    sha256: Mapping[str, str] = field(default_factory=dict)
    soc_version: str | None = None

    def to_json(self) -> str:
        """As a person would read it, with a line feed at the end."""
        said = {"manifest_version": VERSION, **asdict(self), "input": INPUT, "output": OUTPUT}
        return json.dumps(said, indent=2, ensure_ascii=False) + "\n"


def manifest_path(model: Path) -> Path:
    """Where the manifest of a compiled tower lies: beside it, under its name and .json."""
    return model.with_name(f"{model.name}.json")


def read_manifest(model: Path) -> Manifest:
    """The manifest of a compiled tower whose files have the right sizes.

    What is in them `check_digests` tells, which takes longer. Raises ConfigError if the model or
    its manifest is missing, cannot be read, or is of a size that the exporter did not write.
    """
    if not model.is_file():
        said = f"{model} is no file; name one that `glimt export vision` wrote"
        raise ConfigError("vision_model", [said])
    path = manifest_path(model)
    if not path.is_file():
        said = f"{path} is missing; copy it too, or run `glimt export vision` again"
        raise ConfigError("vision_model", [said])
    manifest = _parse(read_json(path), str(path))
    _check_sizes(manifest, model.parent)
    return manifest


def _parse(raw: Mapping[str, Any], where: str) -> Manifest:
    r = ConfigReader(raw, where)
    r.must_be("manifest_version", VERSION)
    files = r.section("files")
    digests = r.section("sha256") if "sha256" in raw else ConfigReader({}, where)
    manifest = Manifest(
        format=r.text("format"),
        family=r.text("family"),
        tower_digest=r.text("tower_digest"),
        image_size=r.size("image_size"),
        grid=r.size("grid"),
        image_tokens=r.integer("image_tokens"),
        hidden_size=r.integer("hidden_size"),
        batch=None if raw.get("batch") is None else r.integer("batch"),
        opset=r.integer("opset"),
        dtype=r.text("dtype"),
        files={name: files.integer(name, low=0) for name in files.raw},
        sha256={name: digests.text(name) for name in digests.raw},
        soc_version=None if raw.get("soc_version") is None else r.text("soc_version"),
    )
    r.problems += _digest_problems(manifest)
    r.check()
    return manifest


def _digest_problems(manifest: Manifest) -> list[str]:
    """A digest of no known file would be checked by nobody."""
    problems = []
    for name, digest in manifest.sha256.items():
        if name not in manifest.files:
            problems.append(f"sha256 names {name!r}, which is not among files")
        elif not _SHA256.fullmatch(digest):
            problems.append(f"sha256.{name} is {digest!r}; 64 hexadecimal digits are needed")
    return problems


def _check_sizes(manifest: Manifest, folder: Path) -> None:
    problems = []
    for name, nbytes in manifest.files.items():
        path = _beside(folder, name)
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            problems.append(f"{path} is missing; copy it beside the model, or export it again")
        elif found != nbytes:
            problems.append(f"{path} has {found} bytes, but {nbytes} were written; export it again")
    if problems:
        raise ConfigError("vision_model", problems)


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Digest of a file's content, in hex. on_bytes: called with the bytes of each part read."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            if on_bytes:
                on_bytes(count)
    return digest.hexdigest()


def check_digests(
    manifest: Manifest, folder: Path, on_bytes: Callable[[int], None] | None = None
) -> None:
    """Hold the content of each file to its digest, if the manifest has one.

    folder:   where the files lie
    on_bytes: called with the bytes of each part read
    Raises ConfigError naming every file that is not what was written.
    """
    problems = []
    for name, digest in manifest.sha256.items():
        path = _beside(folder, name)
        try:
            found = sha256_of(path, on_bytes)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror or error}; export it again")
            continue
        if found != digest:
            said = (
                f"{path} is damaged: its SHA-256 is {found[:12]}…, but {digest[:12]}… was written"
            )
            problems.append(f"{said}; copy it again from where it was exported, or export it again")
    if problems:
        raise ConfigError("vision_model", problems)


def _beside(folder: Path, name: str) -> Path:
    """A file that a manifest names: it lies in the manifest's folder, whatever the name says."""
    return folder / Path(name).name
