"""What tools/shape.py counts, by hand on a small tree, and its aims on the package itself."""

from __future__ import annotations

import json
import sys

import pytest
from tools.counted import Counted, Function

from tools import cpp_code, python_code, shape

ONE = '''"""A module."""

from torch import Tensor


def scaled(
    x: Tensor,
    factor: float = 2.0,  # a comment beside code
) -> Tensor:
    """Times a factor.

    x: [rows, size]
    """
    # A comment alone is no code, nor is a blank line.

    text = """two lines

    of text"""
    assert text
    return x * factor


class Layer:
    """A layer."""

    @property
    def width(self) -> int:
        """Of a row."""
        return 1

    def forward(self, x: Tensor) -> Tensor:
        """[rows, size] -> the same."""

        def inner(y, z: int = 0) -> Tensor:
            if y:
                return y
            elif z:
                for _ in range(z):
                    pass
            else:
                if not z:
                    with y:
                        y()
            return y

        return inner(x)

    def _hidden(self, *rest) -> None: ...

    def __len__(self) -> int:
        return 0
'''
TWO = """from typing import overload

from one import Layer


class Child(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def backward(self, x: Tensor) -> Tensor:
        return x


@overload
def f(x: int) -> int: ...
@overload
def f(x: str) -> str: ...
def f(x): return x
"""


@pytest.fixture
def counted(tmp_path) -> Counted:
    (tmp_path / "inner").mkdir()
    (tmp_path / "one.py").write_text(ONE, encoding="utf-8")
    (tmp_path / "inner" / "two.py").write_text(TWO, encoding="utf-8")
    return python_code.count(tmp_path)


def test_every_function_is_counted_as_by_hand(counted):
    """Catches comments or docstrings that count, an elif that nests, a shape that is not found."""
    assert counted.files == {"inner/two.py": 18, "one.py": 51}
    assert counted.functions == [
        Function("inner/two.py:Child.forward", 2, 2, 0, True, True),  # by what it overrides
        Function("inner/two.py:Child.backward", 2, 2, 0, True, False),
        Function("inner/two.py:f", 1, 1, 0, False),
        Function("one.py:scaled", 9, 15, 0, True, True),
        Function("one.py:Layer.width", 2, 3, 0, True),
        Function("one.py:Layer.forward", 13, 16, 0, True, True),
        Function("one.py:Layer.forward.inner", 11, 11, 3, False),
        Function("one.py:Layer.__len__", 2, 2, 0, True),
    ]


def test_public_things_without_a_docstring_are_named(counted):
    """Catches a private or magic method that is asked for one, or a public class that is not."""
    assert counted.documented == {
        "inner/two.py": False,
        "inner/two.py:Child": False,
        "inner/two.py:Child.forward": False,
        "inner/two.py:Child.backward": False,
        "inner/two.py:f": False,
        "one.py": True,
        "one.py:scaled": True,
        "one.py:Layer": True,
        "one.py:Layer.width": True,
        "one.py:Layer.forward": True,
    }


CPP = """#include <x>
#define BODY(f) { f(); }

namespace glimt {
struct alignas(64) Unit {
    int64_t at[2] = {0, 1};
};

// A comment with a brace {
template <class T>
int64_t first(const T& unit) {
    const char* brace = "}";  // another }

    const auto inner = [&](int i) { return unit.at[i]; };
    // alone
    return *brace == '}' ? inner(0) : 0;
}

class Pool {
  public:
    explicit Pool(int n)
        : bounds_{0, n},
          n_(n) {}
    ~Pool() { n_ = 0; }
    template <>
    int at<2>() const {
        return 2;
    }

  private:
    int n_;
};
}  // namespace glimt
"""


def test_functions_of_cpp_are_found_by_their_braces():
    """Catches a struct, lambda or initialiser taken for a function, and a brace in a text."""
    assert list(cpp_code.functions_of(CPP, "a.cpp")) == [
        Function("a.cpp:first", 6, 8),
        Function("a.cpp:Pool", 3, 3),
        Function("a.cpp:~Pool", 1, 1),
        Function("a.cpp:at", 4, 4),
    ]


def function(name: str = "f", lines: int = 6, depth: int = 0) -> Function:
    return Function(name, lines, lines, depth, True)


def test_a_percentile_is_a_value_that_occurs():
    """Catches a rank that is one off."""
    assert [shape.percentile(range(1, 11), percent) for percent in (1, 50, 90, 100)] == [
        1,
        5,
        9,
        10,
    ]


def test_a_row_of_the_table_has_all_figures(counted):
    """Catches a share of the wrong whole; a dash is what was not asked of any."""
    row = shape.figures(counted)
    assert [row["functions"], row["long"], row["hinted"], row["documented"]] == [8, 0, 6 / 8, 0.5]
    assert row["function_lines"] == {"median": 2, "90th": 13}
    assert row["raw_function_lines"] == {"median": 2, "90th": 16}
    assert row["nesting"] == {"median": 0, "90th": 3}
    assert row["shapes"] == 3 / 4
    plain = shape.figures(Counted({"a.cpp": 3}, list(cpp_code.functions_of(CPP, "a.cpp"))))
    last = shape.table({"a": row, "b": plain}).splitlines()[-1]
    assert last == "| `b` | 1 | 3, 3 | 4 | 3, 6 | 3, 8 | 0 % | – | – | – | – |"


def test_each_aim_is_missed_by_what_it_forbids(counted):
    """Catches an aim that no code can miss."""
    for functions, said in (
        ([function(lines=13)], "the median function has 13 lines of code"),
        ([function()] * 24 + [function(lines=51)], "4.0% of functions have over 50"),
        ([function()] * 8 + [function(depth=3)] * 2, "the 90th percentile of nesting is 3"),
    ):
        (reason,) = shape.missed(Counted({}, functions))
        assert reason.startswith(said)
    assert set(shape.missed(counted)) >= {
        "inner/two.py:f lacks a type hint",
        "inner/two.py:Child.backward names no shapes",
        "inner/two.py:Child lacks a docstring",
    }


def test_the_package_keeps_its_aims(capsys, monkeypatch):
    """Would catch a function without a hint or docstring, and many that grow long or deep."""
    monkeypatch.setattr(sys, "argv", ["shape", "--check"])
    assert shape.main() == 0, capsys.readouterr().out


def test_the_design_page_shows_the_table():
    """Would catch a column or a tree that the page lacks; its numbers may be old ones."""
    page = (shape.ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    lines = page[page.index(f"| {' | '.join(shape.HEADINGS)} |") :].splitlines()
    shown = [row.split(" | ") for row in lines[2 : 3 + len(shape.TREES)]]
    assert [row[0] for row in shown] == [f"| `{tree}`" for tree in (*shape.TREES, shape.CSRC)]
    assert {len(row) for row in shown} == {len(shape.HEADINGS)}


def test_json_holds_the_figures_of_every_tree(capsys, monkeypatch):
    """Would catch figures that JSON cannot hold, and the rankings printed among them."""
    monkeypatch.setattr(sys, "argv", ["shape", "--json"])
    monkeypatch.setattr(shape, "TREES", ("tools",))
    assert shape.main() == 0
    assert list(json.loads(capsys.readouterr().out)) == ["tools", shape.CSRC]
