"""Opens a model folder: finds its family, checks everything, loads the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from glimt.checkpoint import Checkpoint, scan_checkpoint
from glimt.config import EngineConfig
from glimt.devices.base import ONLY_SEAT, Device, Seat, open_device
from glimt.devices.memory import saying_what_fits
from glimt.errors import CheckpointError, ConfigError
from glimt.inputs.tokenizer import load_tokenizer
from glimt.memory_plan import check_weights_fit
from glimt.models.base import (
    BuildContext,
    FamilyConfig,
    Model,
    ModelFamily,
    Processor,
    Tokenizer,
    find_family,
)
from glimt.models.config_reader import read_model_config
from glimt.parallel import ALONE, Group
from glimt.quant.base import NONE
from glimt.quant.plan import QuantOptions, plan_formats, read_options, remaining
from glimt.runner.lead import Others
from glimt.runtimes.vision import TowerFile, TowerOwner, open_tower
from glimt.synthetic import (
    SyntheticName,
    SyntheticTokenizer,
    is_synthetic,
    parse_name,
    published_config,
    synthetic_checkpoint,
)
from glimt.weights import (
    AS_FLOATS,
    Chooses,
    LoadPlan,
    WeightFormats,
    every_parameter,
    is_vision,
    load_weights,
    plan_weights,
    tower_digest,
)

T = TypeVar("T")
BUILT_IN = {"demo": "glimt-demo-glm4v", "demo-visualglm": "glimt-demo-visualglm"}
FolderError = ConfigError | CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class OpenedModel:
    """A checked model folder whose weights are not loaded yet.

    max_model_len: tokens of one sequence, as configured or as the checkpoint says
    formats:       which weights are quantised, by the checkpoint or when they are loaded
    ranks:         the others, where this process has only a part of the model
    tower:         runs the pictures in place of the model's own tower, which is then not loaded
    """

    family: ModelFamily[Any]
    config: FamilyConfig
    processor: Processor
    model: Model
    checkpoint: Checkpoint
    device: Device
    dtype: torch.dtype
    max_model_len: int
    formats: WeightFormats = AS_FLOATS
    ranks: Others | None = None
    tower: TowerFile | None = None

    @property
    def _chooses(self) -> Chooses:
        return every_parameter if self.tower is None else lambda name: not is_vision(name)

    def plan(self) -> LoadPlan:
        """What loading will read."""
        return plan_weights(self.checkpoint, self.model, self.formats, self._chooses)

    @property
    def load_bytes(self) -> int:
        """Bytes that loading reads, those of a compiled tower among them."""
        return self.plan().nbytes + (self.tower.nbytes if self.tower else 0)

    def load(self, on_tensor: Callable[[int], None] | None = None) -> None:
        """Fill the model's parameters, and check and load the compiled tower, if there is one.

        on_tensor: called with the bytes of each tensor done, and of the tower's files
        Raises CheckpointError listing all that is wrong, ConfigError where a card has no room for
        the weights, and as `TowerFile.load` does.
        """
        if self.tower is not None:
            self.tower.load(on_tensor)
        where = self.dtype, self.device.torch_device
        with saying_what_fits(_weights_too_large):
            load_weights(
                self.checkpoint, self.model, *where, on_tensor, self.formats, self._chooses
            )
        self.device.keep_freed_memory()

    def close(self) -> None:
        """End the other ranks, if there are any."""
        if self.ranks is not None:
            self.ranks.stop()


def open_model(engine: EngineConfig, group: Group = ALONE, seat: Seat = ONLY_SEAT) -> OpenedModel:
    """Read a model folder without reading its weights, or prepare a synthetic model.

    group: the ranks that divide it; seat: this process among those on this machine

    Raises one ConfigError or CheckpointError with all that is wrong in the folder: config.json,
    tokenizer, weight files and the tensors in them; a ConfigError if the weights alone are beyond
    engine.memory_limit_bytes.
    """
    device = open_device(engine.device, engine.num_threads, seat)
    name = parse_name(engine.model) if is_synthetic(engine.model) else None
    found = read_synthetic(name) if name else read_folder(model_folder(engine.model))
    dtype = _choose_dtype(engine.dtype, found.config, device)
    context = BuildContext(device, dtype, found.config.max_positions, engine.rotary_table, group)
    model = build_model(found, context)
    if name:
        found = replace(found, checkpoint=synthetic_checkpoint(name, model, dtype))
    wanted = QuantOptions(blocks=engine.quant, head=engine.quant_head, tower=engine.quant_tower)
    formats = WeightFormats(
        stored=plan_formats(model, found.stored),
        wanted=plan_formats(model, remaining(wanted, found.stored)),
    )
    of_weights = plan_weights(found.checkpoint, model, formats).problems
    if found.errors or of_weights:
        raise Findings(found.checkpoint.folder, found.errors).error(of_weights)
    assert found.processor is not None, "its absence is among the errors"
    check_weights_fit(engine, model, dtype)
    tower = _open_tower(engine, found, model, formats, (device.torch_device, dtype))
    return OpenedModel(
        family=found.family,
        config=found.config,
        processor=found.processor,
        model=model,
        checkpoint=found.checkpoint,
        device=device,
        dtype=dtype,
        max_model_len=engine.max_model_len or found.config.context_tokens,
        formats=formats,
        tower=tower,
    )


def _open_tower(
    engine: EngineConfig,
    found: ModelFolder,
    model: Model,
    stored: WeightFormats,
    place: tuple[torch.device, torch.dtype],
) -> TowerFile | None:
    """The compiled tower that the configuration names; None where the model's own is to run.

    Raises ConfigError if it cannot be run, or was made of another model.
    """
    if engine.vision_runtime == "torch" or engine.vision_model is None:
        return None
    path = Path(engine.vision_model).expanduser()
    owner = TowerOwner(found.family.name, tower_digest(found.checkpoint, model, stored))
    return open_tower(engine.vision_runtime, path, owner, engine.num_threads, place)


def model_folder(name: str) -> Path:
    """Where a model lies: a path, or the name of one that comes with glimt.

    A folder of your own that bears such a name is ./demo.
    """
    if name in BUILT_IN:
        return Path(__file__).parent / "demo" / BUILT_IN[name]
    return Path(name).expanduser()


@dataclass(frozen=True, slots=True, eq=False)
class ModelFolder:
    """What a model folder holds.

    processor:  None if the tokenizer is not usable
    checkpoint: with what is wrong with the weight files; which tensors they lack only a plan for
        the model can tell
    errors:     what is wrong with the tokenizer
    stored:     the formats in which the files hold the weights
    """

    family: ModelFamily[Any]
    config: FamilyConfig
    processor: Processor | None
    checkpoint: Checkpoint
    errors: tuple[FolderError, ...]
    stored: QuantOptions


def read_folder(folder: Path) -> ModelFolder:
    """Read everything but the weights' data.

    Raises one ConfigError or CheckpointError if config.json is not usable; it then tells what
    else is wrong in the folder, too.
    """
    _check_folder(folder)
    found = Findings(folder)
    where = str(folder / "config.json")
    checkpoint = scan_checkpoint(folder)
    raw = found.attempt(lambda: read_model_config(folder))
    family = None if raw is None else found.attempt(lambda: find_family(raw, where))
    if raw is None or family is None:
        raise found.error(checkpoint.problems)
    config = found.attempt(lambda: family.config.from_json(raw, where))
    stored = found.attempt(lambda: read_options(raw, where))
    tokenizer = found.attempt(lambda: load_tokenizer(folder, family.tokenizer))
    if config is None or stored is None:
        raise found.error(checkpoint.problems)
    if family.stored_quant and stored.is_none:
        stored = replace(stored, blocks=family.stored_quant(config))
    processor = None
    if tokenizer is not None:
        found.attempt(lambda: _check_vocabulary(config, tokenizer))
        processor = found.attempt(lambda: family.processor(folder, config, tokenizer))
    return ModelFolder(family, config, processor, checkpoint, tuple(found.errors), stored)


def read_synthetic(name: SyntheticName) -> ModelFolder:
    """What a folder of a synthetic model would hold; its tensors are listed once it is built.

    Raises ConfigError for a number of layers that the published model does not have.
    """
    raw, where = published_config(name), str(name)
    family = find_family(raw, where)
    config = family.config.from_json(raw, where)
    if family.special_ids is None:
        said = f"{family.name} does not say which special ids config.json tells (special_ids)"
        raise ConfigError(where, [said])
    processor = family.processor(
        name.folder, config, SyntheticTokenizer(family.special_ids(config))
    )
    empty = Checkpoint(Path(where), (), {})
    return ModelFolder(family, config, processor, empty, (), QuantOptions(head=NONE))


def build_model(found: ModelFolder, context: BuildContext) -> Model:
    """The model without its weights. Raises ConfigError if no machine could hold it."""
    try:
        return found.family.build(found.config, context)
    except (RuntimeError, MemoryError, OverflowError) as error:
        said = f"describes a model of impossible size: {str(error).splitlines()[0]}"
        raise ConfigError(str(found.checkpoint.folder / "config.json"), [said]) from error


def _weights_too_large(said: str) -> ConfigError:
    advice = "use --quant int8 or int4, --tp with more cards, or a card with more memory"
    return ConfigError("device", [f"the weights do not fit: {said}; {advice}"])


def _check_vocabulary(config: FamilyConfig, tokenizer: Tokenizer) -> None:
    """An id without a row in the embedding would end every request that holds it."""
    if tokenizer.num_ids > config.vocab_size:
        said = f"has ids up to {tokenizer.num_ids - 1}, but the model has {config.vocab_size} rows"
        raise ConfigError("tokenizer", [f"{said}: it belongs to another checkpoint"])


class Findings:
    """Collects what is wrong with a model folder, so that it is told in one error."""

    def __init__(self, folder: Path, errors: Sequence[FolderError] = ()) -> None:
        self.folder = folder
        self.errors = list(errors)

    def attempt(self, step: Callable[[], T]) -> T | None:
        """The step's result; None, with its error kept, if it fails."""
        try:
            return step()
        except (ConfigError, CheckpointError) as error:
            self.errors.append(error)
            return None

    def problems(self) -> list[str]:
        """Every problem once, after the name of its file."""
        texts = [f"{self._place(e.where)}{said}" for e in self.errors for said in e.problems]
        return list(dict.fromkeys(texts))

    def error(self, of_weights: Sequence[str] = ()) -> FolderError:
        """One error with all problems, those of the weights last."""
        if len(self.errors) == 1 and not of_weights:
            return self.errors[0]
        problems = dict.fromkeys([*self.problems(), *of_weights])
        return CheckpointError(str(self.folder), list(problems))

    def _place(self, where: str) -> str:
        return "" if where == str(self.folder) else f"{where.removeprefix(f'{self.folder}/')}: "


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    said = "is a file" if folder.exists() else "does not exist"
    if is_synthetic(str(folder)):
        said = "is made when it runs and has no files"
    known = " or ".join(BUILT_IN)
    advice = f"give the folder that holds config.json and the weights, or {known}"
    raise ConfigError("model", [f"{str(folder)!r} {said}; {advice}"])


def _choose_dtype(wanted: str, config: FamilyConfig, device: Device) -> torch.dtype:
    if wanted != "auto":
        return parse_dtype(wanted)
    return device.preferred_dtype(parse_dtype(config.torch_dtype))


def parse_dtype(name: str) -> torch.dtype:
    """torch's dtype of the name float32, bfloat16 or float16; KeyError for any other."""
    return {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }[name]
