"""TowerJob: pictures on their way through the tower. Knows no request, no cache and no clock."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from torch import Tensor

from glimt.layers.tower import Stages, run_through
from glimt.models.base import PictureEncoder
from glimt.types import ImageInput


class TowerJob:
    """Pictures that go through the tower together, a few stages at a time.

    images: at least one; num_patches: of all of them, what one stage's work grows with
    """

    def __init__(self, encoder: PictureEncoder, images: Sequence[ImageInput]) -> None:
        self.images = tuple(images)
        self.num_patches = sum(patches_of(image) for image in images)
        self._encoder = encoder
        self._stages: Stages[list[Tensor]] | None = None

    def advance(
        self, num_stages: float, is_enough: Callable[[], bool] = lambda: False
    ) -> list[Tensor] | None:
        """Run the next stages; once the last is done, [num_tokens, hidden_size] per picture.

        num_stages: blocks of the tower; parts of blocks add up to them
        is_enough:  asked after each part, of which one is always run
        Raises what the encoder raises; the job is of no further use then.
        """
        if self._stages is None:
            self._stages = self._encoder.image_stages(self.images)
        done = 0.0
        try:
            while done < num_stages:
                share = next(self._stages)
                done += 1.0 if share is None else share
                if is_enough():
                    break
        except StopIteration as end:
            return list(end.value)
        return None

    def finish(self) -> list[Tensor]:
        """Run all that is left; [num_tokens, hidden_size] per picture. Raises as `advance` does."""
        if self._stages is None:
            return self._encoder.image_features(self.images)
        return list(run_through(self._stages))

    def has_any_of(self, digests: Collection[bytes]) -> bool:
        """Whether one of these pictures is among its own."""
        return any(image.digest in digests for image in self.images)


def patches_of(image: ImageInput) -> int:
    """How many patches the tower sees of a picture."""
    rows, columns = image.grid
    return rows * columns


def groups_of(images: Sequence[ImageInput], max_patches: int) -> Iterator[list[ImageInput]]:
    """Split pictures into runs of at most max_patches patches, at least one picture each."""
    group: list[ImageInput] = []
    patches = 0
    for image in images:
        size = patches_of(image)
        if group and patches + size > max_patches:
            yield group
            group, patches = [], 0
        group.append(image)
        patches += size
    if group:
        yield group
