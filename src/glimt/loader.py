"""Opens a model folder: finds its family, checks everything, loads the weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glimt.checkpoint import Checkpoint, open_checkpoint
from glimt.config import EngineConfig
from glimt.devices.base import Device, open_device
from glimt.errors import ConfigError
from glimt.inputs.tokenizer import load_tokenizer
from glimt.models.base import (
    BuildContext,
    FamilyConfig,
    Model,
    ModelFamily,
    Processor,
    find_family,
    read_model_config,
)
from glimt.weights import load_weights


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A checked model folder whose weights are not loaded yet.

    max_model_len: tokens of one sequence, as configured or as the checkpoint says
    """

    family: ModelFamily[Any]
    config: FamilyConfig
    processor: Processor
    model: Model
    checkpoint: Checkpoint
    device: Device
    dtype: torch.dtype
    max_model_len: int

    def load(self, on_tensor: Callable[[int], None] | None = None) -> None:
        """Fill the model's parameters. Raises CheckpointError listing all that is wrong.

        on_tensor: called with the bytes of each tensor done
        """
        load_weights(self.checkpoint, self.model, self.dtype, self.device.torch_device, on_tensor)


def open_model(engine: EngineConfig) -> OpenedModel:
    """Read a model folder without reading its weights.

    Raises ConfigError or CheckpointError, each listing everything it found.
    """
    folder = model_folder(engine.model)
    raw = read_model_config(folder)
    where = str(folder / "config.json")
    family = find_family(raw, where)
    config = family.config.from_json(raw, where)
    tokenizer = load_tokenizer(folder, family.tokenizer)
    device = open_device(engine.device)
    dtype = _choose_dtype(engine.dtype, config, device)
    context = BuildContext(device, dtype, config.max_positions, engine.rotary_table)
    return OpenedModel(
        family=family,
        config=config,
        processor=family.processor(folder, config, tokenizer),
        model=family.build(config, context),
        checkpoint=open_checkpoint(folder),
        device=device,
        dtype=dtype,
        max_model_len=engine.max_model_len or config.context_tokens,
    )


BUILT_IN = {"demo": "glimt-demo-glm4v", "demo-visualglm": "glimt-demo-visualglm"}


def model_folder(name: str) -> Path:
    """The folder of a model: a path, or the name of one that comes with glimt.

    A folder of your own that bears such a name is ./demo. Raises ConfigError if there is none.
    """
    if name in BUILT_IN:
        return Path(__file__).parent / "demo" / BUILT_IN[name]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        said = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(
            "model",
            [
                f"{name!r} {said}; give the folder that holds config.json and the weights, or one of "
                f"{', '.join(BUILT_IN)}"
            ],
        )
    return folder


def _choose_dtype(wanted: str, config: FamilyConfig, device: Device) -> torch.dtype:
    if wanted != "auto":
        return parse_dtype(wanted)
    return device.preferred_dtype(parse_dtype(config.torch_dtype))


def parse_dtype(name: str) -> torch.dtype:
    """float32, bfloat16 or float16."""
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]
