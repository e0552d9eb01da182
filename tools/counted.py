"""What is counted of a folder of code, whatever language it is in."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Function:
    """One function; it is named file:Class.function.

    lines:         those on which code stands
    raw_lines:     all from the first to the last, without decorators
    depth:         blocks around the innermost statement
    is_hinted:     whether each argument and what is returned have a type
    names_shapes:  whether the docstring has a shape; asked of public functions of tensors only
    None is what was not asked.
    """

    name: str
    lines: int
    raw_lines: int
    depth: int | None = None
    is_hinted: bool | None = None
    names_shapes: bool | None = None


@dataclass(frozen=True)
class Counted:
    """One folder.

    files:      lines, all of them, by the file's name
    documented: whether it has a docstring, by name of every public module, class and function
    """

    files: dict[str, int] = field(default_factory=dict)
    functions: list[Function] = field(default_factory=list)
    documented: dict[str, bool] = field(default_factory=dict)
