"""weights.py: every way a checkpoint can be laid out, loaded and broken."""

import json
import pickle
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from glimt import weights
from glimt.checkpoint import open_checkpoint
from glimt.errors import CheckpointError
from glimt.models.base import Model, Weight, WeightTable, renamed
from glimt.weights import load_weights, plan_weights

CPU = torch.device("cpu")
SIZE = 4


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


class Layer(nn.Module):
    """One fused parameter (from two tensors) and two split ones (from one)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = parameter(2 * SIZE, SIZE)
        self.key = parameter(SIZE, SIZE)
        self.value = parameter(SIZE, SIZE)


def fuse(sources: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.cat(tuple(sources))]


def split(sources: Sequence[Tensor]) -> Sequence[Tensor]:
    return sources[0].chunk(2)


TABLE = WeightTable(
    weights=(
        *renamed({"model.embed": "table.weight", "model.norm": "norm"}),
        Weight(
            ("model.{i}.gate", "model.{i}.up"),
            ("layers.{i}.gate_up",),
            convert=fuse,
            source_shapes=lambda shapes: [(shapes[0][0] // 2, shapes[0][1])] * 2,
        ),
        Weight(
            ("model.{i}.kv",),
            ("layers.{i}.key", "layers.{i}.value"),
            convert=split,
            source_shapes=lambda shapes: [(2 * shapes[0][0], shapes[0][1])],
        ),
    ),
    ignored=("*.inv_freq",),
)


class Toy(Model):
    """Two layers, an embedding and a norm; computes nothing."""

    weight_table = TABLE

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.table = nn.Module()
        self.table.weight = parameter(6, SIZE)
        self.norm = parameter(SIZE)
        self.layers = nn.ModuleList(Layer() for _ in range(num_layers))

    def embed(self, token_ids):
        raise NotImplementedError

    def forward(self, hidden, positions, batch, caches):
        raise NotImplementedError

    def logits(self, hidden):
        raise NotImplementedError


def state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors of a two-layer Toy; the values are small integers, exact in every dtype."""
    shapes = {"model.embed": (6, SIZE), "model.norm": (SIZE,)}
    for i in range(2):
        shapes |= {f"model.{i}.gate": (SIZE, SIZE), f"model.{i}.up": (SIZE, SIZE)}
        shapes |= {f"model.{i}.kv": (2 * SIZE, SIZE)}
    draw = torch.Generator().manual_seed(1)
    return {n: torch.randint(-9, 9, s, generator=draw).to(dtype) for n, s in shapes.items()}


def expected(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the Toy's parameters must be, written without the loader."""
    want = {"table.weight": tensors["model.embed"], "norm": tensors["model.norm"]}
    for i in range(2):
        gate, up = tensors[f"model.{i}.gate"].float(), tensors[f"model.{i}.up"].float()
        want[f"layers.{i}.gate_up"] = torch.cat([gate, up])
        want[f"layers.{i}.key"] = tensors[f"model.{i}.kv"][:SIZE]
        want[f"layers.{i}.value"] = tensors[f"model.{i}.kv"][SIZE:]
    return want


def save_legacy(tensors: Mapping[str, Tensor], path: Path) -> None:
    torch.save(dict(tensors), path, _use_new_zipfile_serialization=False)


Saver = Callable[[dict[str, Tensor], Path], None]
SAVERS: dict[str, tuple[str, Saver]] = {
    "safetensors": ("model.safetensors", save_file),
    "bin-zip": ("pytorch_model.bin", torch.save),
    "bin-legacy": ("pytorch_model.bin", save_legacy),
}


def write(folder: Path, tensors: dict[str, Tensor], kind: str = "safetensors", shards: int = 1):
    """Save a checkpoint folder; with several shards, neighbouring tensors go to different files."""
    single, save = SAVERS[kind]
    if shards == 1:
        save(tensors, folder / single)
        return folder
    stem, ending = single.rsplit(".", 1)
    names = [f"{stem}-{i + 1:05}-of-{shards:05}.{ending}" for i in range(shards)]
    file_of = {name: names[i % shards] for i, name in enumerate(tensors)}
    for file in names:
        save({n: t for n, t in tensors.items() if file_of[n] == file}, folder / file)
    (folder / f"{single}.index.json").write_text(json.dumps({"weight_map": file_of}))
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, model: Model | None = None) -> Model:
    model = model or Toy()
    load_weights(open_checkpoint(folder), model, dtype, CPU)
    return model


def assert_loaded(model: Model, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    found = dict(model.named_parameters())
    want = expected(tensors)
    assert found.keys() == want.keys()
    for name, value in found.items():
        assert value.dtype == dtype
        assert not value.requires_grad
        assert value.is_contiguous()
        assert torch.equal(value, want[name].to(dtype)), name


def problems_of(folder: Path) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    return caught.value.problems


# --- loading ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_format_gives_the_same_parameters(tmp_path, kind, shards, dtype):
    """Catches a reader that mixes up files, names or halves; with 3 shards the two sources of a
    fused weight lie in different files.
    """
    write(tmp_path, state(), kind, shards)
    assert_loaded(load(tmp_path, dtype), state(), dtype)


def test_each_tensor_may_have_its_own_dtype(tmp_path):
    """Catches a loader that takes one dtype for the file: real files mix float16 and float32."""
    kinds = [torch.float32, torch.float16, torch.bfloat16]
    mixed = {name: value.to(kinds[i % 3]) for i, (name, value) in enumerate(state().items())}
    write(tmp_path, mixed)
    assert_loaded(load(tmp_path, torch.float16), mixed, torch.float16)


def test_the_number_of_layers_comes_from_the_model(tmp_path):
    """Catches an expansion over the checkpoint's numbers, which would accept a deeper one."""
    write(tmp_path, state())
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, model=Toy(num_layers=1))
    assert len(caught.value.problems) == 3
    assert all("model.1." in problem for problem in caught.value.problems)


def test_ignored_names_may_have_any_dtype(tmp_path):
    """Catches a dtype check over tensors that nobody reads."""
    write(tmp_path, state() | {"model.0.inv_freq": torch.arange(3)})
    assert_loaded(load(tmp_path), state(), torch.float32)


def test_a_shared_parameter_stays_shared(tmp_path):
    """Catches replacing one of two references: a tied head would stay on the meta device."""

    class Tied(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Module()
            self.head.weight = self.table.weight

    model = load(write(tmp_path, state()), model=Tied())
    assert model.head.weight is model.table.weight
    assert torch.equal(model.head.weight, state()["model.embed"])


def test_one_tensor_may_fill_two_parameters(tmp_path):
    """Catches handing a source out once only, when two lines of the table name it."""

    class Twice(Toy):
        weight_table = WeightTable(
            (*TABLE.weights, Weight(("model.norm",), ("second_norm",))), TABLE.ignored
        )

        def __init__(self) -> None:
            super().__init__()
            self.second_norm = parameter(SIZE)

    model = load(write(tmp_path, state(), "bin-zip", shards=2), model=Twice())
    assert torch.equal(model.second_norm, state()["model.norm"])


def test_progress_adds_up_to_the_plan(tmp_path):
    """Catches a progress bar that ends before or after 100 %."""
    write(tmp_path, state(torch.float16) | {"x.inv_freq": torch.zeros(9)}, shards=2)
    checkpoint, done = open_checkpoint(tmp_path), []
    load_weights(checkpoint, Toy(), torch.float32, CPU, done.append)
    assert len(done) == len(state())
    assert sum(done) == plan_weights(checkpoint, Toy()).nbytes
    assert sum(done) == sum(value.nbytes for value in state(torch.float16).values())


def test_safetensors_win_over_pickles(tmp_path):
    """Catches reading a pickle where the safe form of the same weights lies beside it."""
    write(tmp_path, state())
    write(tmp_path, {"other": torch.zeros(1)}, "bin-zip")
    assert [file.name for file in open_checkpoint(tmp_path).files] == ["model.safetensors"]


def test_opening_tells_shape_dtype_and_file(tmp_path):
    """Catches sizes counted in elements, or a dtype name read wrongly."""
    write(tmp_path, {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(())})
    found = open_checkpoint(tmp_path).tensors
    assert (found["a"].shape, found["a"].dtype, found["a"].nbytes) == ((2, 3), torch.bfloat16, 12)
    assert (found["b"].shape, found["b"].nbytes) == ((), 4)
    assert str(found["a"]) == "a in model.safetensors"


# --- memory ----------------------------------------------------------------------------------


def mapped_ranges(file: Path) -> list[range]:
    """Address ranges of this process that are the file itself."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    return [range(int(start, 16), int(end, 16)) for start, end in ends]


def is_mapped(tensor: Tensor, file: Path) -> bool:
    return any(tensor.data_ptr() in addresses for addresses in mapped_ranges(file))


needs_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")


@needs_proc
@pytest.mark.parametrize("kind", ["safetensors", "bin-zip"])
def test_a_parameter_of_the_same_dtype_is_the_file_itself(tmp_path, kind):
    """Catches a copy: 28 GB of weights would be read twice and kept twice."""
    model = load(write(tmp_path, state(), kind))
    file = tmp_path / SAVERS[kind][0]
    assert is_mapped(model.table.weight, file)
    assert is_mapped(model.layers[1].value, file)  # a piece of a split tensor, too
    assert not is_mapped(model.layers[1].gate_up, file)  # fused: cannot be


@needs_proc
def test_writing_to_a_mapped_parameter_leaves_the_file_alone(tmp_path):
    """Catches a shared mapping: a stray in-place operation would destroy the checkpoint."""
    before = write(tmp_path, state()).joinpath("model.safetensors").read_bytes()
    load(tmp_path).table.weight.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_misaligned_tensor_is_copied_into_alignment(tmp_path):
    """Catches handing kernels an odd address: the format allows headers of any length."""
    header = {"norm": {"dtype": "F32", "shape": [SIZE], "data_offsets": [0, 4 * SIZE]}}
    raw = json.dumps(header).encode()
    raw += b" " * (3 - len(raw) % 4)  # the data start at a multiple of 4, plus 3
    write_raw(tmp_path, raw, torch.arange(4, dtype=torch.float32).numpy().tobytes())

    class OnlyNorm(Toy):
        weight_table = WeightTable(renamed({"norm": "norm"}))

        def __init__(self) -> None:
            super().__init__(num_layers=0)
            del self.table

    norm = load(tmp_path, model=OnlyNorm()).norm
    assert norm.data_ptr() % 4 == 0
    assert norm.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["safetensors", "bin-zip"])
def test_at_most_one_source_is_alive_while_casting(tmp_path, monkeypatch, kind):
    """Catches collecting a file's tensors before casting them: peak memory would be doubled."""
    plain = WeightTable((*renamed({f"t{i}": f"values.{i}" for i in range(9)}),))

    class Flat(Toy):
        weight_table = plain

        def __init__(self) -> None:
            super().__init__(num_layers=0)
            del self.table, self.norm
            self.values = nn.ParameterList(parameter(SIZE) for _ in range(9))

    alive: set[int] = set()
    peak = 0
    open_reader = weights.open_reader

    def counting(file: Path):
        return Counted(open_reader(file))

    class Counted:
        def __init__(self, inner) -> None:
            self.inner = inner

        def __enter__(self):
            read = self.inner.__enter__()

            def counted_read(name: str) -> Tensor:
                nonlocal peak
                tensor = read(name)
                alive.add(id(tensor))
                weakref.finalize(tensor, alive.discard, id(tensor))
                peak = max(peak, len(alive))
                return tensor

            return counted_read

        def __exit__(self, *details):
            return self.inner.__exit__(*details)

    monkeypatch.setattr(weights, "open_reader", counting)
    write(tmp_path, {f"t{i}": torch.full((SIZE,), float(i)) for i in range(9)}, kind)
    model = load(tmp_path, torch.bfloat16, Flat())
    assert [int(value[0]) for value in model.values] == list(range(9))
    assert peak == 1


@pytest.mark.parametrize("shards", [1, 2])
def test_the_largest_tensors_come_first(tmp_path, monkeypatch, shards):
    """Catches a head's gigabyte read on top of a whole model, instead of beside nothing."""
    tensors = state()
    monkeypatch.setattr(weights, "_LARGE_BYTES", tensors["model.1.kv"].nbytes)
    write(tmp_path, dict(sorted(tensors.items(), key=lambda item: item[1].nbytes)), shards=shards)
    order: list[str] = []
    fill = weights._Filler.__call__

    def watched(self, step, sources):
        order.append(step.targets[0])
        fill(self, step, sources)

    monkeypatch.setattr(weights._Filler, "__call__", watched)
    assert_loaded(load(tmp_path), tensors, torch.float32)
    large = {"layers.0.gate_up", "layers.0.key", "layers.1.gate_up", "layers.1.key"}
    first = order[: len(large)] if shards == 1 else order[:1]  # of two files, each has its own
    assert large.issuperset(first)


def test_sources_in_two_files_are_held_no_longer_than_needed(tmp_path, monkeypatch):
    """Catches holding every tensor of a file until the next one, for the sake of one pair."""
    write(tmp_path, state(), shards=2)
    held_at_end_of_file: list[int] = []
    read_steps = weights._read_steps

    def watched(file, steps, tensors, held):
        yield from read_steps(file, steps, tensors, held)
        held_at_end_of_file.append(sum(len(sources) for sources in held.values()))

    monkeypatch.setattr(weights, "_read_steps", watched)
    assert_loaded(load(tmp_path), state(), torch.float32)
    assert held_at_end_of_file == [2, 0]  # one half of each layer's fused weight


# --- what does not fit -----------------------------------------------------------------------


def test_everything_that_does_not_fit_is_one_error(tmp_path):
    """Catches stopping at the first problem: users mend a checkpoint once, not five times."""
    tensors = state()
    del tensors["model.0.up"]
    tensors["model.norm"] = torch.zeros(SIZE + 1)
    tensors["model.1.kv"] = torch.zeros(2 * SIZE, SIZE, dtype=torch.int8)
    tensors["model.2.kv"] = torch.zeros(2 * SIZE, SIZE)
    model = Toy()
    with pytest.raises(CheckpointError) as caught:
        load(write(tmp_path, tensors), model=model)
    text = str(caught.value)
    assert "4 problems" in text
    assert "model.0.up [4, 4] is missing" in text
    assert "model.norm in model.safetensors has shape [5], but [4] is needed" in text
    assert "model.1.kv in model.safetensors holds int8" in text
    assert "model.2.kv in model.safetensors is unexpected" in text
    assert all(value.is_meta for value in model.parameters())


def test_a_transposed_matrix_does_not_fit(tmp_path):
    """Catches a check of sizes alone, which a matrix the other way round would pass."""
    tensors = state()
    tensors["model.1.kv"] = torch.zeros(SIZE, 2 * SIZE)
    with pytest.raises(CheckpointError, match=r"has shape \[4, 8\], but \[8, 4\] is needed"):
        load(write(tmp_path, tensors))


def test_nothing_is_read_before_everything_is_checked(tmp_path, monkeypatch):
    """Catches minutes of loading before the complaint about the last tensor."""
    tensors = state()
    del tensors["model.1.kv"]
    write(tmp_path, tensors)
    monkeypatch.setattr(weights, "open_reader", lambda file: pytest.fail("data was read"))
    with pytest.raises(CheckpointError, match=r"model\.1\.kv"):
        load(tmp_path)


def test_a_table_that_misses_a_parameter_is_our_bug(tmp_path):
    """Catches a family whose table leaves a parameter on the meta device in silence."""

    class Incomplete(Toy):
        weight_table = WeightTable(TABLE.weights[1:])

    write(tmp_path, state())
    with pytest.raises(AssertionError, match=r"table\.weight"):
        plan_weights(open_checkpoint(tmp_path), Incomplete())


# --- broken files ----------------------------------------------------------------------------


def write_raw(folder: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    size = len(header) if length is None else length
    raw = size.to_bytes(8, "little") + header + data
    (folder / "model.safetensors").write_bytes(raw)


def entry(start: int, end: int, dtype: str = "F32", shape: Sequence[object] | None = None):
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, tuple[object, int, str]] = {
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b starts at data byte 4, not 8"),
    "gap": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "b starts at data byte 12, not 8"),
    "tail": ({"a": entry(0, 8)}, 12, "4 bytes at its end are no tensor's"),
    "truncated": ({"a": entry(0, 8)}, 5, "truncated: 5 of 8 data bytes"),
    "too short": ({"a": entry(0, 8, shape=[3])}, 8, "needs 12 bytes, but 8 are given"),
    "backwards": ({"a": entry(8, 0, shape=[2])}, 8, "needs 8 bytes, but -8 are given"),
    "overflow": ({"a": entry(0, 8, shape=[2**62, 4])}, 8, "needs 73786976294838206464 bytes"),
    "beyond 64 bit": ({"a": entry(0, 0, shape=[0, 2**63])}, 0, "has shape"),
    "negative": ({"a": entry(0, 8, shape=[-1, -2])}, 8, "has shape"),
    "fraction": ({"a": entry(0, 8, shape=[2.0])}, 8, "has shape"),
    "true": ({"a": entry(0, 4, shape=[True])}, 4, "has shape"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4, "has shape None"),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}},
        4,
        "data_offsets [0, 4, 8]",
    ),
    "dtype": ({"a": entry(0, 8, dtype="F31")}, 8, "unknown dtype 'F31'"),
    "dtype list": ({"a": {**entry(0, 8), "dtype": ["F32"]}}, 8, "unknown dtype"),
    "entry": ({"a": [0, 8]}, 8, "a is no JSON object"),
    "list": ([], 0, "no JSON object"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_wrong_header_is_named(tmp_path, kind):
    """Catches trusting a header: wrong offsets would load other tensors' bytes."""
    header, num_data_bytes, said = HEADERS[kind]
    write_raw(tmp_path, json.dumps(header).encode(), bytes(num_data_bytes))
    (problem,) = problems_of(tmp_path)
    assert problem.startswith("model.safetensors ")
    assert said in problem


RAW_HEADERS = {
    "duplicate names": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        "a occurs twice",
    ),
    "flipped bytes": (b'\x7b\x22\xff\xfe":{}}', "is damaged"),
    "no JSON": (b"{{{{{{", "is damaged"),
    "nested": (b"[" * 100_000 + b"]" * 100_000, "is damaged"),
    "long number": (b'{"a":{"shape":[' + b"9" * 5000 + b"]}}", "is damaged"),
}


@pytest.mark.parametrize("kind", RAW_HEADERS)
def test_a_header_that_is_no_sound_json_is_refused(tmp_path, kind):
    """Catches a crash of the JSON parser, and a parser that lets the second name win."""
    raw, said = RAW_HEADERS[kind]
    write_raw(tmp_path, raw, bytes(8))
    assert said in problems_of(tmp_path)[0]


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1, 99_000_000, 200])
def test_an_impossible_header_length_is_refused_unread(tmp_path, length):
    """Catches allocating what eight damaged bytes ask for."""
    write_raw(tmp_path, b"{}", bytes(8), length)
    assert "truncated or no safetensors file" in problems_of(tmp_path)[0]


def test_a_header_beyond_the_formats_limit_is_refused_unread(tmp_path):
    """Catches parsing a 100 MB header; the file is sparse, so that nothing is written here."""
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)
    assert "a header of 100000001 bytes" in problems_of(tmp_path)[0]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
STAND_INS = {
    "LFS pointer": (LFS, "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html><html>", "web page"),
    "error page": (b"<?xml version='1.0'?><Error>NoSuchKey</Error>", "web page"),
    "empty": (b"", "is empty"),
    "three bytes": (b"abc", "truncated|damaged"),
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", STAND_INS)
def test_a_file_that_is_something_else_is_recognised(tmp_path, kind, name):
    """Catches a parser's puzzling message where a download went wrong."""
    content, said = STAND_INS[kind]
    (tmp_path / name).write_bytes(content)
    assert re.search(said, problems_of(tmp_path)[0])


def test_a_header_length_that_looks_like_markup_is_no_web_page(tmp_path):
    """Catches a check for "<" alone, which is the first byte of a header of 60 bytes."""
    header = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    write_raw(tmp_path, json.dumps(header).encode().replace(b" ", b"").ljust(0x3C), bytes(4))
    assert (tmp_path / "model.safetensors").read_bytes().startswith(b"<")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_truncated_file_is_refused(tmp_path, kind, share):
    """Catches loading the half of an interrupted download."""
    name, save = SAVERS[kind]
    save({"a": torch.zeros(1000)}, tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    assert re.search("truncated|damaged", problems_of(tmp_path)[0])


class Touch:
    """Unpickled by an ordinary unpickler, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("save", [torch.save, save_legacy, None], ids=["zip", "legacy", "plain"])
def test_a_pickle_that_runs_code_is_refused_unexecuted(tmp_path, save):
    """Catches weights_only=False anywhere: a model file could take over the machine."""
    witness, file = tmp_path / "executed", tmp_path / "pytorch_model.bin"
    content = {"a": torch.zeros(2), "b": Touch(witness)}
    if save:
        save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))
    (problem,) = problems_of(tmp_path)
    assert "refused because it could run code" in problem
    assert "to `False`" not in problem  # torch's advice is to run it all the same
    assert not witness.exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.zeros(2)],
        {},
        {"a": torch.zeros(2), "step": 3},
        {1: torch.zeros(2)},
        {"a": torch.zeros(2).to_sparse()},
        {"a": torch.zeros(2, device="meta")},
    ],
    ids=["list", "empty", "number", "numbered", "sparse", "meta"],
)
def test_a_pickle_of_other_things_is_refused(tmp_path, content):
    """Catches an AttributeError from a training state where weights should be."""
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert re.search("not named tensors|no plain tensor", problems_of(tmp_path)[0])


# --- the set of files ------------------------------------------------------------------------


def test_problems_of_all_files_are_one_error(tmp_path):
    """Catches reporting one broken shard per attempt: each attempt may be a 5 GB download."""
    write(tmp_path, state(), shards=4)
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).write_bytes(LFS)
    whole = (tmp_path / names[2]).read_bytes()
    (tmp_path / names[2]).write_bytes(whole[:-1])
    problems = problems_of(tmp_path)
    assert len(problems) == 3
    assert problems[0] == f"{names[0]} is missing, but model.safetensors.index.json names it"
    assert problems[1].startswith(f"{names[1]} is a Git LFS pointer")
    assert problems[2].startswith(f"{names[2]} is truncated")


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    """Catches shards of two different uploads mixed in one folder."""
    write(tmp_path, state(), "bin-zip", shards=2)
    path = tmp_path / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.extra"] = "pytorch_model-00001-of-00002.bin"
    path.write_text(json.dumps(index))
    (problem,) = problems_of(tmp_path)
    assert problem.startswith("model.extra is not in pytorch_model-00001-of-00002.bin")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    """Catches the last file winning in silence."""
    for i in range(2):
        save_file({"a": torch.full((2,), float(i))}, tmp_path / f"part{i}.safetensors")
    assert problems_of(tmp_path) == ("a in part0.safetensors is also in part1.safetensors",)


def test_a_gap_in_the_shard_numbers_is_found_without_an_index(tmp_path):
    """Catches hundreds of missing tensors reported where one missing file is the cause."""
    for i in (1, 4):
        save_file({f"t{i}": torch.zeros(1)}, tmp_path / f"model-{i:05}-of-00004.safetensors")
    assert problems_of(tmp_path) == tuple(
        f"model-{i:05}-of-00004.safetensors is missing" for i in (2, 3)
    )


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "is not readable as JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "names 3"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names '../x.safetensors'"),
        ("<html>", "web page"),
    ],
)
def test_an_index_that_is_no_index_is_refused(tmp_path, index, said):
    """Catches a crash, and a file name that leads out of the model folder."""
    save_file({"a": torch.zeros(1)}, tmp_path.parent / "x.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert said in problems_of(tmp_path)[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder.mkdir(), "holds no weights"),
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.write_text("x"), "is not a folder"),
    ],
)
def test_a_folder_without_weights_says_what_is_needed(tmp_path, make, said):
    """Catches an empty checkpoint, which would be reported as 900 missing tensors."""
    make(tmp_path / "model")
    assert said in problems_of(tmp_path / "model")[0]


def test_the_sat_form_is_recognised(tmp_path):
    """Catches "no weights" for VisualGLM's other published form, a common mix-up upstream."""
    (tmp_path / "model_config.json").write_text("{}")
    assert "glimt convert" in problems_of(tmp_path)[0]
