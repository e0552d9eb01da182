"""Counts Python: lines and nesting of functions, hints, docstrings, shapes in docstrings.

Lines of code are those on which code stands: blank lines, lines of comment alone and docstrings are
none. A function's begin with its signature, and those of a function inside are also its own.
Nesting is how many if, for, while, with, try and match stand around the innermost statement.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tools.counted import Counted, Function

FunctionNode: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
Definition: TypeAlias = FunctionNode | ast.ClassDef

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
SHAPE = re.compile(r"\[[^\]]+\]")
TENSORS = re.compile(r"\b(Tensor|ndarray)\b")


@dataclass(frozen=True)
class Place:
    """A class or function, and where it stands.

    name:  Outer.inner, from the file on
    owner: the class that it is a method of, or None
    """

    node: Definition
    name: str
    is_public: bool
    owner: ast.ClassDef | None


def count(folder: Path) -> Counted:
    """Count every .py file below a folder."""
    texts = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }
    modules = {name: ast.parse(text) for name, text in texts.items()}
    nodes = [node for module in modules.values() for node in ast.walk(module)]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    counted = Counted({name: len(text.splitlines()) for name, text in texts.items()})
    for name, module in modules.items():
        count_file(counted, name, module, code_lines(texts[name], module), classes)
    return counted


def count_file(
    counted: Counted,
    name: str,
    module: ast.Module,
    lines: set[int],
    classes: dict[str, ast.ClassDef],
) -> None:
    """Add a file's functions and docstrings; the rest is as in `function_of`."""
    counted.documented[name] = ast.get_docstring(module) is not None
    for place in places(module, f"{name}:"):
        if place.is_public:
            counted.documented[place.name] = ast.get_docstring(place.node) is not None
        if isinstance(place.node, FUNCTIONS):
            counted.functions.append(function_of(place, place.node, lines, classes))


def function_of(
    place: Place, node: FunctionNode, lines: set[int], classes: dict[str, ast.ClassDef]
) -> Function:
    """What is counted of the function at a place.

    lines:   numbers of the file's lines of code
    classes: of the folder, by name
    """
    texts = [ast.get_docstring(node) or "", *docstrings(node.name, place.owner, classes)]
    asks_for_shapes = place.is_public and has_tensors(node)
    return Function(
        name=place.name,
        lines=len(lines.intersection(span(node))),
        raw_lines=len(span(node)),
        depth=depth(node),
        is_hinted=None not in hints(node),
        names_shapes=any(map(SHAPE.search, texts)) if asks_for_shapes else None,
    )


# --- where things stand ----------------------------------------------------------------------


def places(
    node: ast.AST, prefix: str, is_public: bool = True, owner: ast.ClassDef | None = None
) -> Iterator[Place]:
    """Every class and function below a node; none inside a function is public."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, DEFINITIONS):
            yield from places(child, prefix, is_public, owner)
        elif not is_declaration(child):
            name, is_open = prefix + child.name, is_public and not child.name.startswith("_")
            as_class = child if isinstance(child, ast.ClassDef) else None
            yield Place(child, name, is_open, owner)
            yield from places(child, f"{name}.", is_open and as_class is not None, as_class)


def is_declaration(node: Definition) -> bool:
    """Whether a definition's body is "..." alone: an overload, or a protocol's plain attribute."""
    return [ast.unparse(statement) for statement in node.body] == ["..."]


# --- lines and nesting -----------------------------------------------------------------------


def span(node: Definition | ast.stmt) -> range:
    """Numbers of a statement's lines; decorators stand before the first."""
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def code_lines(text: str, module: ast.Module) -> set[int]:
    """Numbers of the lines on which code stands."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    spans = [(t.start[0], t.end[0]) for t in tokens if t.type not in NOT_CODE]
    lines = {line for first, last in spans for line in range(first, last + 1)}
    return lines.difference(*(docstring_lines(node) for node in ast.walk(module)))


def docstring_lines(node: ast.AST) -> range:
    """Those of a module's, class's or function's docstring; none of anything else."""
    if not isinstance(node, (ast.Module, *DEFINITIONS)) or ast.get_docstring(node) is None:
        return range(0)
    return span(node.body[0])


def depth(node: ast.AST) -> int:
    """Blocks around the innermost statement, not looking into inner functions."""
    inner = [child for child in ast.iter_child_nodes(node) if not isinstance(child, DEFINITIONS)]
    return max((depth(child) + is_block(child, node) for child in inner), default=0)


def is_block(node: ast.AST, parent: ast.AST) -> bool:
    """Whether a node's statements stand one deeper; those of an elif stand where its if's do."""
    if isinstance(node, ast.If) and isinstance(parent, ast.If):
        return node.col_offset != parent.col_offset
    return isinstance(node, BLOCKS)


# --- hints and docstrings --------------------------------------------------------------------


def hints(node: FunctionNode) -> list[ast.expr | None]:
    """Of every argument but self and cls, and of what is returned; None where one is missing."""
    of = node.args
    every = [*of.posonlyargs, *of.args, *of.kwonlyargs, of.vararg, of.kwarg]
    arguments = [a for a in every if a is not None and a.arg not in ("self", "cls")]
    return [*(a.annotation for a in arguments), node.returns]


def has_tensors(node: FunctionNode) -> bool:
    """Whether a function takes or returns tensors or arrays."""
    return any(TENSORS.search(ast.unparse(hint)) for hint in hints(node) if hint is not None)


def docstrings(
    name: str, owner: ast.ClassDef | None, classes: dict[str, ast.ClassDef]
) -> Iterator[str]:
    """Those of the method `name` in a class and in all that it derives from in this folder."""
    for child in owner.body if owner else []:
        if isinstance(child, FUNCTIONS) and child.name == name:
            yield ast.get_docstring(child) or ""
    for base in owner.bases if owner else []:
        parent = classes.get(ast.unparse(base).split("[")[0].split(".")[-1])
        yield from docstrings(name, parent, classes)
