"""OfflineTower: pictures -> features through a compiled tower. Knows no runtime by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glimt.errors import ConfigError, EngineError
from glimt.layers.tower import Stages, run_through
from glimt.runtimes.base import VisionRuntime, VisionSession, find_runtime
from glimt.runtimes.manifest import Manifest, check_digests, read_manifest
from glimt.types import ImageInput

log = logging.getLogger(__name__)


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


class TowerFile:
    """A compiled tower that belongs to the model, of whose files only the sizes were looked at.

    They are read once, when the weights are: that a start can fail is told before it begins.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        runtime: VisionRuntime,
        num_threads: int | None,
        place: tuple[torch.device, torch.dtype],
    ) -> None:
        """num_threads: of the processor; place: device and dtype of the features."""
        self.path = path
        self._manifest = manifest
        self._runtime = runtime
        self._num_threads = num_threads
        self._place = place
        self._tower: OfflineTower | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that loading reads to check them."""
        return sum(self._manifest.files[name] for name in self._manifest.sha256)

    @property
    def loaded(self) -> OfflineTower:
        """The tower, after `load`."""
        assert self._tower is not None, "it is loaded with the weights"
        return self._tower

    def load(self, on_bytes: Callable[[int], None] | None = None) -> None:
        """Check what is in the files, and give them to the runtime.

        on_bytes: called with the bytes checked
        Raises ConfigError for a file that is damaged, or that the runtime does not take;
        MissingDependency without the runtime's package.
        """
        if unchecked := sorted(self._unchecked()):
            why = "export it again to have one" if self._manifest.files else "compiled elsewhere"
            said = f"what is in {', '.join(unchecked)} is not checked: its manifest has no digest"
            log.warning("%s; %s", said, why)
        check_digests(self._manifest, self.path.parent, on_bytes)
        session = self._runtime.open(self.path, self._num_threads)
        self._tower = OfflineTower(session, self._manifest, *self._place)

    def _unchecked(self) -> set[str]:
        """Files without a digest; of an OM that was compiled elsewhere no file is known."""
        return {self.path.name, *self._manifest.files} - self._manifest.sha256.keys()


def open_tower(
    name: str,
    path: Path,
    owner: TowerOwner,
    num_threads: int | None,
    place: tuple[torch.device, torch.dtype],
) -> TowerFile:
    """A compiled tower, checked but for what is in its files, and not loaded.

    name: of the runtime; place: device and dtype of the features
    Raises ConfigError for an unknown runtime or one that cannot be used here, a file that is
    missing, cut off or of another format, or one that was made of another model.
    """
    runtime = find_runtime(name)
    manifest = read_manifest(path)
    if manifest.format != runtime.format:
        said = f"{path} is {manifest.format}, but the runtime {name} runs {runtime.format}"
        raise ConfigError("vision_model", [f"{said}; export with --to {runtime.format}"])
    _check_owner(manifest, owner, path)
    if (reason := runtime.absent()) is not None:
        raise ConfigError("vision_runtime", [reason])
    return TowerFile(path, manifest, runtime, num_threads, place)


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
