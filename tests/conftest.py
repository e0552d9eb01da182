"""Fixtures that more than one test file needs: the oracle's checkpoints, and small toy ones."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from tests.exporting import stand_in_ais_bench, stand_in_atc
from training.data import easy_vqa
from training.data.garments import FASHION_FOLDER
from training.data.sample import DataMissing
from training.data.texts import FONT

from glimt.checkpoint import open_checkpoint
from glimt.config import EngineConfig
from glimt.demo.noise import FAMILIES, write_noise_model
from glimt.devices.base import Device, open_device
from glimt.engine import Engine
from glimt.kernels.choose import reasons
from glimt.kernels.library import ISAS, available, library_path
from glimt.kernels.native import Native
from glimt.loader import OpenedModel
from glimt.models import glm4v_9b, visualglm
from glimt.models.base import BuildContext, ModelFamily, find_family
from glimt.parallel import ALONE, Group
from glimt.types import EncodedPrompt, ImageInput, ImageSpan, Request, SamplingParams, StepRow

__all__ = ["stand_in_ais_bench", "stand_in_atc"]  # fixtures of another file

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).resolve().parents[2] / "shared"

# A shell starts what runs in the background with Ctrl-C ignored, and so would all that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Property tests try the same examples each time, so that a commit fails by what it changed alone;
# `./check --hypothesis-profile explore` draws new ones, and prints how to repeat what failed.
settings.register_profile("same", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile("same")


def shared_path(relative: str) -> Path:
    """A file of the folder beside the checkout; skips the test, with the reason, without it."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"needs shared/{relative}, which is not beside this checkout")
    return path


# What GLIMT_ISA may hold: plain torch, and every instruction set.
CHOICES = ("none", *ISAS)


def use_isa(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the devices that a test opens use one of CHOICES; skips what cannot be used here."""
    if isa in ISAS and (reason := reasons(library_path())[isa]):
        pytest.skip(f"kernels for {isa} cannot be used: {reason}")
    monkeypatch.setenv("GLIMT_ISA", isa)


# Files that take a minute or more: begun first, so that none of them is left alone at the end.
LONGEST = (
    "training/test_quick.py",
    "cluster/test_cluster.py",
    "test_parallel.py",
    "test_ranks.py",
    "test_engine.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    paths = [folder / name for name in LONGEST]
    items.sort(key=lambda item: paths.index(item.path) if item.path in paths else len(paths))


@pytest.fixture(params=CHOICES)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What every device opened in this test computes with."""
    use_isa(request.param, monkeypatch)
    return request.param


# The kernels by themselves, of every set that this processor has: here the self-test has no say.
# Those that avx512 has for processors without dot products of bfloat16 are a form of their own.
FLOATS = "avx512 in floats"
LIBRARY = library_path()
AVAILABLE = tuple(available(LIBRARY)) if LIBRARY else ()
FORMS = (*AVAILABLE, FLOATS) if "avx512" in AVAILABLE else AVAILABLE


@pytest.fixture
def library() -> str:
    """The path of the compiled kernels."""
    if LIBRARY is None:
        pytest.skip("the native kernels are not built")
    return LIBRARY


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, library: str) -> Iterator[str]:
    """The instruction set to open; the processor hides what a form of it does without."""
    isa = "avx512" if request.param == FLOATS else request.param
    opened = Native(library, isa, threads=1).library
    opened.glimt_hide_avx512_bf16(int(request.param == FLOATS))
    yield isa
    opened.glimt_hide_avx512_bf16(0)
    Native(library, isa, threads=1)  # ends the threads that the test had


@pytest.fixture
def native(form: str, library: str) -> Native:
    """Its kernels, on two threads."""
    return Native(library, form, threads=2)


@contextmanager
def scanned_too(package: ModuleType, folder: Path) -> Iterator[None]:
    """As if the files of `folder` stood in a folder that glimt scans, such as glimt.models."""
    package.__path__.append(str(folder))
    yield
    package.__path__.remove(str(folder))
    for file in folder.glob("*.py"):
        sys.modules.pop(f"{package.__name__}.{file.stem}", None)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the example pictures, where the pages' code is run."""
    shutil.copytree(Path(__file__).parents[1] / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class IdTokenizer:
    """Knows the special ids of a golden file and nothing else; text is one `<id>` per token."""

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self.special_ids = special_ids

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in token_ids)

    def decoder(self) -> IdTokenizer:
        return self

    def token_bytes(self, token_id: int) -> bytes:
        return f"<{token_id}>".encode()

    def feed(self, token_id: int) -> str:
        return f"<{token_id}>"

    def finish(self) -> str:
        return ""


class Oracle:
    """One golden file: its checkpoint folder, its expected arrays and its prompts."""

    def __init__(self, name: str, folder: Path, golden: Path) -> None:
        self.name = name
        self.folder = folder
        with np.load(golden) as file:  # closed, or whoever is collected last is warned of it
            self.arrays = dict(file)
        self.raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.family: ModelFamily[Any] = find_family(self.raw, name)
        self.config = self.family.config.from_json(self.raw, name)
        self.cases = sorted(key.split(".")[0] for key in self.arrays if key.endswith("input_ids"))

    @property
    def is_glm4v(self) -> bool:
        return self.family.name == "glm4v_9b"

    def open(
        self,
        dtype: torch.dtype = torch.float32,
        rotary_table: str = "auto",
        device: str | Device = "cpu",
        group: Group = ALONE,
    ) -> OpenedModel:
        device = open_device(device) if isinstance(device, str) else device
        context = BuildContext(device, dtype, self.config.max_positions, rotary_table, group)
        opened = OpenedModel(
            family=self.family,
            config=self.config,
            processor=self.family.processor(self.folder, self.config, self.tokenizer()),
            model=self.family.build(self.config, context),
            checkpoint=open_checkpoint(self.folder),
            device=device,
            dtype=dtype,
            max_model_len=self.config.context_tokens,
        )
        opened.load()
        return opened

    def engine(
        self, dtype: torch.dtype = torch.float32, rotary_table: str = "auto", **options: Any
    ) -> Engine:
        settings = {"kv_bytes": 64 * 2**20} | options
        config = EngineConfig(model=str(self.folder), **settings)
        return Engine(self.open(dtype, rotary_table, config.device), config)

    def tokenizer(self) -> IdTokenizer:
        return IdTokenizer(self.family.special_ids(self.config))

    def image(self) -> ImageInput:
        from PIL import Image

        processor = self.family.processor(self.folder, self.config, self.tokenizer())
        picture = Image.fromarray(self.arrays["picture"])
        return processor.prepare_image(picture, digest=b"the golden picture")

    def prompt(self, case: str) -> EncodedPrompt:
        """The golden ids with their spans and positions, without any tokenizer."""
        ids = self.arrays[f"{case}.input_ids"].tolist()
        return glm_prompt(self.config, ids) if self.is_glm4v else visual_prompt(self.config, ids)

    def request(self, case: str, **sampling: Any) -> Request:
        prompt = self.prompt(case)
        params = SamplingParams(temperature=0, **sampling)
        filled = params.with_defaults(visualglm.VisualGlmProcessor.sampling_defaults, 0)
        return Request(
            request_id=case,
            prompt=prompt,
            images=(self.image(),) if prompt.spans else (),
            sampling=filled,
            stop_token_ids=frozenset(),
            seeds=tuple(range(filled.n)),
            max_tokens=params.max_tokens or 24,
            arrival_s=0.0,
        )


def step_row(**given: Any) -> StepRow:
    """A row of one known token of plain text, but for what is given."""
    count = len(given.get("token_ids", (0,)))
    start = given.get("start", 0)
    row = {
        "sequence_id": 0,
        "request_id": "",
        "index": 0,
        "token_ids": (0,),
        "positions": np.arange(start, start + count, dtype=np.int64)[None],
        "start": 0,
        "block_table": (0,),
        "bidirectional_len": 0,
        "images": (),
        "samples": True,
        "sampling": SamplingParams(),
        "stop_token_ids": frozenset(),
        "seed": 0,
        "prompt_ids": (),
        "output_ids": (),
    }
    return StepRow(**row | given)


def run_greedy(engine: Engine, request: Request) -> list[int]:
    """The tokens of a request that runs alone."""
    engine.add_request(request)
    ids: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            ids += output.token_ids
    return ids


def glm_prompt(config: Any, ids: Sequence[int]) -> EncodedPrompt:
    builder = glm4v_9b._PromptBuilder(())
    at = 0
    while at < len(ids):
        if ids[at] == config.boi_token_id:
            builder.add_image(tuple(ids[at : at + 3]), config.vision.num_image_tokens)
            at += 3
        else:
            builder.add_text([ids[at]])
            at += 1
    return builder.build()


def visual_prompt(config: Any, ids: Sequence[int]) -> EncodedPrompt:
    has_image = list(ids[3 : 3 + config.image_length]) == [0] * config.image_length
    spans = [ImageSpan(3, config.image_length, 0)] if has_image else []
    return visualglm._with_positions(ids, spans)


def make_checkpoint(spec: Path, folder: Path) -> Path:
    script = GOLDEN / "make_checkpoint.py"
    subprocess.run([sys.executable, str(script), str(spec), str(folder)], check=True)
    return folder


@pytest.fixture(scope="session")
def glm4v_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(GOLDEN / "glm-4v-tiny.spec.json", tmp_path_factory.mktemp("glm4v"))


@pytest.fixture(scope="session")
def visualglm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = GOLDEN / "visualglm-tiny.spec.json"
    return make_checkpoint(spec, tmp_path_factory.mktemp("visualglm"))


@pytest.fixture(scope="session")
def glm4v_oracle(glm4v_folder: Path) -> Oracle:
    return Oracle("glm-4v-tiny", glm4v_folder, GOLDEN / "glm-4v-tiny.golden.npz")


@pytest.fixture(scope="session")
def visualglm_oracle(visualglm_folder: Path) -> Oracle:
    return Oracle("visualglm-tiny", visualglm_folder, GOLDEN / "visualglm-tiny.golden.npz")


@pytest.fixture(scope="session")
def glm4v_wide_oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return wide_oracle("glm-4v-wide", tmp_path_factory)


@pytest.fixture(scope="session")
def visualglm_wide_oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return wide_oracle("visualglm-wide", tmp_path_factory)


def wide_oracle(name: str, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = make_checkpoint(GOLDEN / f"{name}.spec.json", tmp_path_factory.mktemp(name))
    return Oracle(name, folder, GOLDEN / f"{name}.golden.npz")


@pytest.fixture(scope="session", params=["glm4v", "visualglm"])
def tiny_oracle(request: pytest.FixtureRequest) -> Oracle:
    return request.getfixturevalue(f"{request.param}_oracle")


@pytest.fixture(scope="session", params=["glm4v", "visualglm", "glm4v_wide", "visualglm_wide"])
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return request.getfixturevalue(f"{request.param}_oracle")


# --- noise models: nobody may change these folders -----------------------------------------------


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A noise model of each family, by its name."""
    made = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    for family, folder in made.items():
        write_noise_model(folder, family)
    return made


@pytest.fixture(scope="session", params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    """A noise model, one family after the other."""
    return folders[request.param]


# --- what the training data is drawn from; tests skip, with the reason, without it -------------


@pytest.fixture(scope="session")
def fashion() -> Path:
    if not (FASHION_FOLDER / "t10k-labels-idx1-ubyte.gz").exists():
        pytest.skip("Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    return FASHION_FOLDER


@pytest.fixture(scope="session")
def font() -> Path:
    if not FONT.exists():
        pytest.skip("the font is not here: apt-get install fonts-wqy-microhei")
    return FONT


@pytest.fixture(scope="session")
def easy_vqa_data() -> Path:
    try:
        return easy_vqa.find_data()
    except DataMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 one-coloured JPEG files, no two alike."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(70):
        Image.new("RGB", (96, 80), (3 * number, 90, 200)).save(folder / f"{number:03}.jpg")
    return folder
