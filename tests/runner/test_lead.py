"""What rank 0 says to the others while its model is used like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from glimt import EngineConfig
from glimt.devices.base import Device
from glimt.errors import RankError
from glimt.loader import open_model
from glimt.parallel import Group
from glimt.runner.kv_cache import KVCaches, allocate_kv
from glimt.runner.lead import LeadingModel, LedCaches
from glimt.runner.messages import Message
from glimt.types import ImageInput


class Heard:
    """The other ranks, who only listen."""

    failure = ""

    def __init__(self) -> None:
        self.group = Group()
        self.messages: list[Message] = []

    def tell(self, message: Message) -> None:
        self.messages.append(message)

    def why(self, error: Exception) -> RankError:
        return RankError(f"because of {error}")

    def agree(self, num_blocks: int) -> int:
        return num_blocks

    def stop(self) -> None:
        self.messages.append(Message("stop"))


@pytest.fixture
def led(folders: dict[str, Path]) -> tuple[LeadingModel, Heard]:
    opened = open_model(EngineConfig(model=str(folders["glm4v_9b"]), dtype="float32"))
    opened.load()
    heard = Heard()
    return LeadingModel(opened.model, Group(), heard), heard


def picture(model: LeadingModel) -> ImageInput:
    side = model._own[0].vision.image_size  # type: ignore[union-attr]
    grid = side // 14
    pixels = torch.zeros(side, side, 3, dtype=torch.uint8).numpy()
    return ImageInput(b"x", (grid // 2) ** 2 + 2, (grid, grid), pixels)


def test_blocks_are_cleared_on_every_rank(led: tuple[LeadingModel, Heard]) -> None:
    """Catches NaN that a sequence left in the other ranks' caches."""
    model, heard = led
    caches = allocate_kv(model._own[0], 3, 32, torch.float32, Device())
    for cache in caches:
        cache.key.fill_(1)
    both = LedCaches(caches, heard)
    assert isinstance(both, KVCaches)
    both.clear_blocks([])
    both.clear_blocks([1])
    both.clear_slots(torch.tensor([0, 65]))
    assert [m.kind for m in heard.messages] == ["clear_blocks", "clear_slots"]
    assert heard.messages[0].values["blocks"] == [1]
    assert heard.messages[1].arrays["slots"].tolist() == [0, 65]
    assert caches[0].key[1].eq(0).all()
    assert caches[0].key[0, 0].eq(0).all()
    assert caches[0].key[2, 1].eq(0).all()
    assert caches[0].key[2, 2].eq(1).all()


def test_each_part_of_a_picture_is_told_once(led: tuple[LeadingModel, Heard]) -> None:
    """Catches a last part that rank 0 computes without the others."""
    model, heard = led
    image = picture(model)
    with torch.inference_mode():
        whole = model._own[0].image_features([image])[0]
        parts = len(list(model._own[0].image_stages([image])))
        found = model.image_features([image])[0]
    assert torch.equal(found, whole)
    kinds = [message.kind for message in heard.messages]
    assert kinds == ["pictures"] + ["stage"] * (parts + 1)
    assert {message.values["number"] for message in heard.messages} == {0}


def test_a_picture_that_is_dropped_is_left(led: tuple[LeadingModel, Heard]) -> None:
    """Catches pictures that stay with the other ranks after an abort."""
    model, heard = led
    stages = model.image_stages([picture(model)])
    with torch.inference_mode():
        next(stages)
    stages.close()
    assert [message.kind for message in heard.messages] == ["pictures", "stage", "leave"]


def test_a_failure_is_told_as_the_groups(led: tuple[LeadingModel, Heard]) -> None:
    """Catches an error that looks like one request's own."""
    model, _ = led
    with pytest.raises(RankError, match="because of"):
        model.embed(torch.tensor([10**6]))
