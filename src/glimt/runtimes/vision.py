"""OfflineTower: pictures -> features through a compiled tower. Knows no runtime by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glimt.errors import ConfigError, EngineError
from glimt.layers.tower import Stages, run_through
from glimt.runtimes.base import VisionSession, find_runtime
from glimt.runtimes.manifest import Manifest, read_manifest
from glimt.types import ImageInput


@dataclass(frozen=True, slots=True)
class TowerOwner:
    """The model that a tower must have been made of.

    digest: of its tower's weights (`weights.tower_digest`)
    """

    family: str
    digest: str


class OfflineTower:
    """A compiled tower in the place of a model's own.

    torch_device, dtype: of the features that it gives
    """

    def __init__(
        self,
        session: VisionSession,
        manifest: Manifest,
        torch_device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.session = session
        self.manifest = manifest
        self._torch_device = torch_device
        self._dtype = dtype

    def image_features(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """One tensor [image.num_tokens, hidden_size] per picture."""
        return run_through(self.image_stages(images))

    def image_stages(self, images: Sequence[ImageInput]) -> Stages[list[Tensor]]:
        """[image.num_tokens, hidden_size] per picture; each run of the file is one part.

        A part is a whole tower, however many layers it has: one is all that a step should take.
        """
        features: list[Tensor] = []
        for number, group in enumerate(_groups(images, self.manifest.batch or len(images))):
            if number:
                yield math.inf
            features += self._encoded(group)
        return features

    def _encoded(self, images: Sequence[ImageInput]) -> list[Tensor]:
        """[image tokens, hidden_size] of each; a file of a fixed batch gets blank ones beside."""
        batch = self.manifest.batch or len(images)
        pixels = np.zeros((batch, *self.manifest.image_size, 3), dtype=np.float32)
        for place, image in zip(pixels, images, strict=False):
            place[:] = image.pixels
        found = self.session.run(pixels)
        expected = (batch, self.manifest.image_tokens, self.manifest.hidden_size)
        if found.shape != expected:
            said = f"the vision model gave {list(found.shape)}, but {list(expected)} is expected"
            raise EngineError(f"{said}; export it again")
        features = torch.from_numpy(found).to(self._torch_device, self._dtype)
        return list(features[: len(images)])


def open_tower(
    name: str,
    path: Path,
    owner: TowerOwner,
    num_threads: int | None,
    place: tuple[torch.device, torch.dtype],
) -> OfflineTower:
    """A compiled tower, checked and loaded.

    name: of the runtime; place: device and dtype of the features
    Raises ConfigError for an unknown runtime, a file that is missing, damaged or of another format,
    or one that was made of another model; MissingDependency without the runtime's package.
    """
    runtime = find_runtime(name)
    manifest = read_manifest(path)
    if manifest.format != runtime.format:
        said = f"{path} is {manifest.format}, but the runtime {name} runs {runtime.format}"
        raise ConfigError("vision_model", [f"{said}; export with --to {runtime.format}"])
    _check_owner(manifest, owner, path)
    return OfflineTower(runtime.open(path, num_threads), manifest, *place)


def _check_owner(manifest: Manifest, owner: TowerOwner, path: Path) -> None:
    advice = "export this model's own with `glimt export vision`"
    if manifest.family != owner.family:
        said = f"{path} was made of a {manifest.family} model, but this one is {owner.family}"
        raise ConfigError("vision_model", [f"{said}; {advice}"])
    if manifest.tower_digest != owner.digest:
        said = f"{path} was made of other tower weights ({manifest.tower_digest[:19]}…)"
        raise ConfigError(
            "vision_model", [f"{said} than this model's ({owner.digest[:19]}…); {advice}"]
        )


def _groups(images: Sequence[ImageInput], size: int) -> Iterator[Sequence[ImageInput]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]
