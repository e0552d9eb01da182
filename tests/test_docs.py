"""The documentation: both READMEs say the same, and whatever a page names or shows is there."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tests.serving import paths

import glimt
from glimt.cli import app
from glimt.commands.chat_commands import COMMANDS as CHAT_COMMANDS
from glimt.commands.convert import convert_sat
from glimt.demo.noise import write_noise_model
from glimt.models import glm4v_9b, visualglm
from glimt.models.config_reader import ConfigReader

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "glimt"
README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
PAGES = [README, CHINESE, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_name)


# --- reading pages ---------------------------------------------------------------------------

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    language: str
    code: str

    @property
    def without_comments(self) -> str:
        lines = (re.sub(r"(^|\s+)# .*", "", line) for line in self.code.splitlines())
        return "\n".join(lines)


def blocks(page: Path, *languages: str) -> list[Block]:
    found = [Block(*match.groups()) for match in FENCE.finditer(page.read_text(encoding="utf-8"))]
    return [block for block in found if not languages or block.language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """Every `inline code` outside the blocks, its line breaks as spaces."""
    return [" ".join(span.split()) for span in SPAN.findall(prose(page))]


@dataclass(frozen=True)
class Section:
    level: str
    title: str
    text: str


def sections(page: Path) -> list[Section]:
    """Every heading, as #s and its title, with the text under it."""
    parts = re.split(r"^(#+) (.*)$", prose(page), flags=re.MULTILINE)
    return [Section(*three) for three in zip(parts[1::3], parts[2::3], parts[3::3], strict=True)]


# --- the two READMEs -------------------------------------------------------------------------


def test_both_readmes_have_the_same_sections():
    """Catches a section that one language got and the other did not."""
    assert [s.level for s in sections(README)] == [s.level for s in sections(CHINESE)]


def test_both_readmes_say_equally_much_in_each_section():
    """Catches a table row, list item, field, option or figure that only one language has."""
    for english, chinese in zip(sections(README), sections(CHINESE), strict=True):
        assert shape(english.text) == shape(chinese.text), chinese.title


def shape(text: str) -> tuple[int, int, set[str], list[str]]:
    """Table rows, list items, code spans and figures of a text."""
    rows = len(re.findall(r"^\|", text, re.MULTILINE))
    items = len(re.findall(r"^- ", text, re.MULTILINE))
    figures = re.findall(r"\d+(?:[.,]\d+)*", SPAN.sub("", text))
    return rows, items, {" ".join(span.split()) for span in SPAN.findall(text)}, sorted(figures)


def test_both_readmes_show_the_same_code():
    """Catches an example mended in one language only; comments are translated."""
    english, chinese = blocks(README), blocks(CHINESE)
    assert [b.language for b in english] == [b.language for b in chinese]
    assert [b.without_comments for b in english] == [b.without_comments for b in chinese]


# --- the command line ------------------------------------------------------------------------

ROOT_COMMAND: Any = typer.main.get_command(app)
KNOWN: dict[str, Any] = ROOT_COMMAND.commands


def options_of(command: Any) -> set[str]:
    """Also the second name of a switch, `--no-…`."""
    given = [[*parameter.opts, *parameter.secondary_opts] for parameter in command.params]
    return {"--help"}.union(*given)


def with_inner(command: Any) -> set[str]:
    """Also those of the commands inside a group."""
    inner = getattr(command, "commands", {}).values()
    return options_of(command).union(*map(with_inner, inner))


ALL_OPTIONS = with_inner(ROOT_COMMAND)
ROUTES = paths()


def glimt_lines(page: Path) -> Iterator[list[str]]:
    """The arguments of every glimt command in the page's shell blocks."""
    for block in blocks(page, "sh"):
        for line in block.code.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = [word if not set(word) <= set("|;&<>()") else None for word in lexer]
            starts = [i for i, word in enumerate(words) if word == "glimt"]
            for start in starts:
                end = words.index(None, start) if None in words[start:] else len(words)
                yield [str(word) for word in words[start + 1 : end]]


@pytest.mark.parametrize("page", [README, CHINESE], ids=page_name)
def test_every_command_line_parses(page):
    """Catches an example with an option that was renamed, or without one that is required."""
    lines = list(glimt_lines(page))
    assert {line[0] for line in lines} == set(KNOWN), "every command has an example"
    for name, *arguments in lines:
        command = KNOWN[name]
        while hasattr(command, "commands"):
            name, *arguments = arguments
            command = command.commands[name]
        command.make_context(name, arguments)


@every_page
def test_every_command_and_option_in_the_text_exists(page):
    """Catches `--max-len` in a sentence, where no example shows that it is gone."""
    for span in spans(page):
        words = span.split()
        if words[0] == "glimt" and len(words) > 1:
            commands = [word for word in words[1:] if not word.startswith("-")]
            command = KNOWN.get(commands[0]) if commands else None
            assert command or not commands or commands[0].isupper(), span
            known = with_inner(command) if command else options_of(ROOT_COMMAND)
            assert {word for word in words if word.startswith("--")} <= known, span
        elif words[0].startswith("--"):
            assert words[0] in ALL_OPTIONS, span
        elif words[0].startswith("/"):
            assert words[0] in CHAT_COMMANDS or words[0] in ROUTES, span


# --- files and names -------------------------------------------------------------------------


@every_page
def test_every_link_leads_to_a_file(page):
    """Catches a page that was moved or a heading that was renamed."""
    for target in LINK.findall(prose(page)):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], target


FILE = re.compile(r"[\w.-]+(/[\w.-]+)*(\.(py|md|toml|png)|/)")


@every_page
def test_every_file_named_exists(page):
    """Catches a file of the package that was renamed, split or never written."""
    for span in filter(FILE.fullmatch, spans(page)):
        places = (ROOT, SRC, page.parent)
        assert any((place / span).exists() for place in places), span


NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(\(.*\))?", re.ASCII)
NOT_OURS = re.compile(r"pebble|.*\.(json|model|pt|bin)")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=page_name)
def test_every_name_in_the_text_is_in_the_code(page):
    """Catches a function, class, field or setting that the code calls something else by now."""
    files = {*SRC.rglob("*.py"), *(ROOT / "tests").rglob("*.py")} - {Path(__file__)}
    text = "\n".join(f.read_text(encoding="utf-8") for f in files)
    words = set(re.findall(r"\w+", text))
    for span in filter(NAME.fullmatch, spans(page)):
        if not FILE.fullmatch(span) and not NOT_OURS.fullmatch(span):
            assert set(span.partition("(")[0].split(".")) <= words, span


@dataclass(frozen=True)
class Defined:
    """What one file of the package defines: members of each class, and everything at its top."""

    file: str
    classes: dict[str, set[str]]
    bases: dict[str, list[str]]
    top: set[str]


def defined_in(path: Path) -> Defined:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    bases = {c.name: [base.id for base in c.bases if isinstance(base, ast.Name)] for c in classes}
    members = {node.name: members_of(node) for node in classes}
    return Defined(str(path.relative_to(SRC)), members, bases, names_in(tree.body))


def names_in(body: list[ast.stmt]) -> set[str]:
    """Functions, classes and variables that statements define."""
    named = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {node.name for node in body if isinstance(node, named)}
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return names | {target.id for target in targets if isinstance(target, ast.Name)}


def members_of(node: ast.ClassDef) -> set[str]:
    """Also what a method sets on `self`, and the class's own name for its constructor."""
    stores = (n for n in ast.walk(node) if isinstance(n, ast.Attribute))
    own = {n.attr for n in stores if isinstance(n.value, ast.Name) and n.value.id == "self"}
    return names_in(node.body) | own


ALL_DEFINED = [defined_in(path) for path in sorted(SRC.rglob("*.py"))]


def members(name: str) -> set[str] | None:
    """Members of a class of the package, inherited ones too; None for a name that is none."""
    found = [(d.classes[name], d.bases[name]) for d in ALL_DEFINED if name in d.classes]
    inherited = [members(base) or set() for _, bases in found for base in bases]
    return set().union(*(own for own, _ in found), *inherited) if found else None


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=page_name)
def test_every_member_in_the_text_belongs_to_its_class(page):
    """Catches `Engine.plan_step`: both words are in the code, but not one of the other."""
    for span in filter(NAME.fullmatch, spans(page)):
        first, _, rest = span.partition("(")[0].partition(".")
        if rest and (known := members(first)) is not None:
            assert rest.split(".")[0] in known, span


def test_every_step_of_the_walk_stands_in_the_file_that_it_names():
    """Catches a row of docs/design.md whose function was moved to another file."""
    rows = [line.split("|")[1:-1] for line in prose(ROOT / "docs" / "design.md").splitlines()]
    walked = [(SPAN.findall(row[1]), SPAN.findall(row[2])) for row in rows if len(row) == 4]
    steps = [(file, name) for files, names in walked for file in files for name in names]
    assert len(steps) > 20
    by_file = {defined.file: defined for defined in ALL_DEFINED}
    for file, name in steps:
        assert name.split(".")[0] in by_file[file].top, (file, name)


# --- Python ----------------------------------------------------------------------------------


@every_page
def test_every_python_block_compiles(page):
    """Catches a bracket lost while editing."""
    for block in blocks(page, "python"):
        compile(block.code, page_name(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_the_readmes_python_runs_from_top_to_bottom(workplace, capsys):
    """Catches an example that compiles but calls what is no longer there.

    Those that ask a server are run in tests/server/test_serve_pages.py.
    """
    names: dict[str, Any] = {}
    own = (block.code for block in blocks(README, "python") if "127.0.0.1" not in block.code)
    exec("\n".join(own), names)
    assert names["output"].usage.completion_tokens > 1
    assert "tokens" in capsys.readouterr().out


# --- figures ---------------------------------------------------------------------------------


def table_row(page: Path, first: str) -> list[str]:
    rows = [line.split("|")[1:-1] for line in prose(page).splitlines() if line.startswith("|")]
    return next([cell.strip() for cell in row[1:]] for row in rows if row[0].strip() == first)


def test_the_memory_table_follows_from_the_parameter_counts():
    """Catches a figure of one model or unit in the place of another."""
    counts = [int(cell.replace(",", "")) for cell in table_row(README, "parameters")]
    assert counts == [13_906_320_896, 7_802_193_408]
    for first, size in (("weights in float32", 4), ("weights in bfloat16 or float16", 2)):
        expected = [f"{count * size / 2**30:.1f} GiB" for count in counts]
        assert table_row(README, first) == expected


def test_the_sampling_table_is_the_families_own():
    """Catches defaults that changed in the code, or two columns swapped."""
    empty = ConfigReader({}, "generation_config.json")
    ours = glm4v_9b._sampling_defaults(empty)
    defaults = ours, visualglm.VisualGlmProcessor.sampling_defaults
    assert table_row(README, "temperature") == [str(d.temperature) for d in defaults]
    assert table_row(README, "top-p") == [str(d.top_p) for d in defaults]
    assert table_row(README, "top-k") == [str(d.top_k or "all") for d in defaults]
    assert table_row(README, "repetition penalty") == [str(d.repetition_penalty) for d in defaults]
    assert [d.min_length for d in defaults] == [0, 100]


# --- error messages --------------------------------------------------------------------------


class Folder:
    """A noise model that is spoilt in one way."""

    def __init__(self, path: Path, family: str = "glm4v_9b") -> None:
        write_noise_model(path, family)
        self.path = path
        self.weights = path / "model.safetensors"

    def config(self, **changes: Any) -> str:
        file = self.path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return str(self.path)

    def tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> str:
        tensors = load_file(self.weights)
        name = "transformer.output_layer.weight"
        save_file(tensors | {name: change(tensors[name])}, self.weights)
        return str(self.path)


def without(file: str) -> Callable[[Folder], str]:
    def spoil(folder: Folder) -> str:
        (folder.path / file).unlink()
        return str(folder.path)

    return spoil


def instead(content: bytes) -> Callable[[Folder], str]:
    def spoil(folder: Folder) -> str:
        folder.weights.write_bytes(content)
        return str(folder.path)

    return spoil


def cut_off(folder: Folder) -> str:
    return instead(folder.weights.read_bytes()[:500_000])(folder)


def half_of_the_shards(folder: Folder) -> str:
    names = sorted(load_file(folder.weights))
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {name: shards[i * 2 // len(names)] for i, name in enumerate(names)}
    kept = {n: t for n, t in load_file(folder.weights).items() if index[n] == shards[0]}
    save_file(kept, folder.path / shards[0])
    folder.weights.unlink()
    file = folder.path / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}))
    return str(folder.path)


def foreign_pickle(folder: Folder) -> str:
    folder.weights.unlink()
    torch.save(
        {"weights": Path("a class of the standard library")}, folder.path / "pytorch_model.bin"
    )
    return str(folder.path)


SPOILT: tuple[Callable[[Folder], str], ...] = (
    without("config.json"),
    without("tokenizer.model"),
    instead(b"version https://git-lfs.github.com/spec/v1\n"),
    instead(b"<!DOCTYPE html><html></html>"),
    cut_off,
    half_of_the_shards,
    foreign_pickle,
    lambda folder: folder.config(model_type="llama"),
    lambda folder: folder.tensors(lambda tensor: tensor.to(torch.int8)),
)


def refusals(tmp_path: Path) -> Iterator[str]:
    """What glimt says to every mistake of the table, in the order of its stages."""
    for number, spoil in enumerate(SPOILT):
        model = spoil(Folder(tmp_path / str(number)))
        yield refusal(lambda model=model: glimt.LLM(model))
    quantised = Folder(tmp_path / "quantised", "visualglm").config(quantization_bit=2)
    yield refusal(lambda: glimt.LLM(quantised))
    sat = unmerged(tmp_path)
    yield refusal(lambda: glimt.LLM(str(sat)))
    yield refusal(lambda: convert_sat(sat, tmp_path / "target"))
    good = Folder(tmp_path / "good")
    yield refusal(lambda: glimt.LLM(str(good.path), device="tpu"))
    llm = glimt.LLM(str(good.path))
    few, many = glimt.SamplingParams(max_tokens=1), glimt.SamplingParams(max_tokens=5000)
    yield refusal(lambda: llm.chat([{"role": "user", "content": "word " * 3000}], few))
    yield refusal(lambda: llm.chat([{"role": "user", "content": "hi"}], many))
    url = {"type": "image_url", "image_url": "https://example.org/cat.png"}
    yield refusal(lambda: llm.chat([{"role": "user", "content": [url]}], few))
    broken = glimt.LLM(good.tensors(lambda tensor: tensor * torch.nan))
    yield str(broken.chat([{"role": "user", "content": "hi"}], few).completions[0].error)


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(glimt.GlimtError) as caught:
        action()
    return str(caught.value)


def unmerged(tmp_path: Path) -> Path:
    """A SAT checkpoint with a LoRA matrix in it."""
    source = Folder(tmp_path / "hub", "visualglm").path
    config = json.loads((source / "config.json").read_text())
    sat = config | {"eva_args": config["eva_config"], "qformer_args": config["qformer_config"]}
    folder = tmp_path / "sat"
    folder.mkdir()
    (folder / "model_config.json").write_text(json.dumps(sat))
    names = "transformer.word_embeddings.weight", "transformer.layers.0.attention.dense.matrix_A.0"
    state = {name: torch.zeros(2, 2) for name in names}
    torch.save({"module": state}, folder / "mp_rank_00_model_states.pt")
    return folder


def test_every_message_of_the_table_is_one_that_glimt_gives(tmp_path):
    """Catches a message reworded in the code: users search for the text they see.

    Numbers in the table are examples; they depend on the model.
    """
    (table,) = (s.text for s in sections(README) if s.title == "When something goes wrong")
    quoted = [span for span in SPAN.findall(table) if " " in span and not is_command(span)]
    assert len(quoted) > 10
    given = [re.sub(r"\d+", "N", said) for said in refusals(tmp_path)]
    for span in quoted:
        assert any(re.sub(r"\d+", "N", span) in said for said in given), (span, given)


def is_command(span: str) -> bool:
    return span.startswith(("glimt ", "git ", "--"))
