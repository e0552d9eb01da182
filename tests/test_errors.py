"""The errors are the tree that the module draws: callers catch by its branches."""

from __future__ import annotations

import re

import glimt.errors


def drawn() -> dict[str, str]:
    """Each error of the tree in the docstring, with the one it hangs on."""
    tree: dict[str, str] = {}
    path = ["Exception", "GlimtError"]
    for line in (glimt.errors.__doc__ or "").splitlines():
        if found := re.match(r"((?:│   |    )*)[├└]── (\w+)", line):
            depth = len(found[1]) // 4 + 2
            path[depth:] = [found[2]]
            tree[found[2]] = path[depth - 1]
    return tree


def test_every_error_hangs_where_the_tree_says() -> None:
    """Catches a picture's fault told as the engine's: 500 where 400 belongs."""
    classes = {
        name: kind
        for name, kind in vars(glimt.errors).items()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    parents = {name: kind.__mro__[1].__name__ for name, kind in classes.items()}
    assert parents == {"GlimtError": "Exception"} | drawn()
