"""Manifest: what a compiled vision tower is, in a small JSON file beside it.

The exporter writes it and the runtimes read it, so that a file of another model is refused before
any picture goes through it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glimt.errors import ConfigError
from glimt.models.config_reader import ConfigReader, read_json

INPUT, OUTPUT = "input", "output"  # names of the graph's two ends, as in the original's export
VERSION = 1  # of the manifest's own form


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
    soc_version: str | None = None

    def to_json(self) -> str:
        """As a person would read it, with a line feed at the end."""
        said = {"manifest_version": VERSION, **asdict(self), "input": INPUT, "output": OUTPUT}
        return json.dumps(said, indent=2, ensure_ascii=False) + "\n"


def manifest_path(model: Path) -> Path:
    """Where the manifest of a compiled tower lies: beside it, under its name and .json."""
    return model.with_name(f"{model.name}.json")


def read_manifest(model: Path) -> Manifest:
    """The manifest of a compiled tower whose files are whole.

    Raises ConfigError if the model or its manifest is missing, cannot be read, or is of a size that
    the exporter did not write.
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
        soc_version=None if raw.get("soc_version") is None else r.text("soc_version"),
    )
    r.check()
    return manifest


def _check_sizes(manifest: Manifest, folder: Path) -> None:
    problems = []
    for name, nbytes in manifest.files.items():
        path = folder / Path(name).name  # beside the manifest, whatever it says
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            problems.append(f"{path} is missing; copy it beside the model, or export it again")
        elif found != nbytes:
            problems.append(f"{path} has {found} bytes, but {nbytes} were written; export it again")
    if problems:
        raise ConfigError("vision_model", problems)
