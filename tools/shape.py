"""How long files and functions are, how deep they nest, what is hinted and what is documented.

python -m tools.shape           the table of docs/design.md, and what stands out in src/glimt
python -m tools.shape --json    the figures of that table for programs
python -m tools.shape --check   exit status 1 and the reasons when src/glimt misses an aim

`tools/python_code.py` and `tools/cpp_code.py` say what a line of code is. A percentile is by
nearest rank, so it is a length that some function has.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import cpp_code, python_code
from tools.counted import Counted

ROOT = Path(__file__).parents[1]
PACKAGE = "src/glimt"
TREES = (PACKAGE, "tests", "training", "benchmarks", "tools")
CSRC = "src/glimt/kernels/csrc"
LONG = 50  # lines of code: more is a long function
HEADINGS = (
    "", "files", "lines per file", "functions", "lines of code", "with docstring", "over 50",
    "nesting", "hinted", "documented", "shapes",
)  # fmt: skip


def percentile(values: Sequence[int], percent: int) -> int:
    """The nearest rank: the least value that so many percent of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


def spread(values: Sequence[int]) -> dict[str, int] | None:
    """Median and 90th percentile; None of nothing."""
    return {"median": percentile(values, 50), "90th": percentile(values, 90)} if values else None


def share(answers: Sequence[bool]) -> float | None:
    """Of them, those that are true; None of nothing."""
    return sum(answers) / len(answers) if answers else None


def figures(counted: Counted) -> dict[str, Any]:
    """A row of the table: counts, spreads in lines or blocks, shares of 1."""
    functions = counted.functions
    return {
        "files": len(counted.files),
        "file_lines": spread(list(counted.files.values())),
        "functions": len(functions),
        "function_lines": spread([f.lines for f in functions]),
        "raw_function_lines": spread([f.raw_lines for f in functions]),
        "long": share([f.lines > LONG for f in functions]),
        "nesting": spread([f.depth for f in functions if f.depth is not None]),
        "hinted": share([f.is_hinted for f in functions if f.is_hinted is not None]),
        "documented": share(list(counted.documented.values())),
        "shapes": share([f.names_shapes for f in functions if f.names_shapes is not None]),
    }


def missed(counted: Counted) -> list[str]:
    """Every aim that the code misses, with what is to be mended."""
    row, functions = figures(counted), counted.functions
    median, nesting = row["function_lines"]["median"], row["nesting"]["90th"]
    reasons = []
    if not 5 <= median <= 12:
        reasons.append(f"the median function has {median} lines of code, not 5 to 12")
    if row["long"] >= 0.04:
        reasons.append(
            f"{row['long']:.1%} of functions have over {LONG} lines of code, not under 4%"
        )
    if nesting > 2:
        reasons.append(f"the 90th percentile of nesting is {nesting}, not 2")
    reasons += [f"{f.name} lacks a type hint" for f in functions if f.is_hinted is False]
    reasons += [f"{f.name} names no shapes" for f in functions if f.names_shapes is False]
    return reasons + [
        f"{name} lacks a docstring" for name, has in counted.documented.items() if not has
    ]


# --- writing ---------------------------------------------------------------------------------


def written(value: Any) -> str:
    """A cell: a count, "median, 90th percentile", or a share in percent; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, dict):
        return ", ".join(map(str, value.values()))
    return f"{round(100 * value, 1):g} %" if isinstance(value, float) else str(value)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures of each tree as a Markdown table."""
    cells = [[f"`{name}`", *map(written, row.values())] for name, row in rows.items()]
    lines = [HEADINGS, ["---"] * len(HEADINGS), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranking(title: str, values: dict[str, int], count: int) -> str:
    """The names with the highest values, highest first, as a Markdown list."""
    first = sorted(values.items(), key=lambda item: -item[1])[:count]
    return "\n".join([f"{title}:", "", *(f"- {value} `{name}`" for name, value in first)])


def rankings(counted: Counted) -> str:
    """What stands out in one folder."""
    lines = {f.name: f.lines for f in counted.functions}
    depths = {f.name: f.depth for f in counted.functions if f.depth is not None}
    parts = [
        ranking("Longest files", counted.files, 5),
        ranking("Longest functions, in lines of code", lines, 10),
        ranking("Deepest functions, in blocks", depths, 10),
    ]
    return "\n\n".join(parts)


def main() -> int:
    """Print what was asked for; 1 where an aim was asked after and missed."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON, not Markdown")
    parser.add_argument(
        "--check", action="store_true", help=f"only look whether {PACKAGE} keeps its aims"
    )
    arguments = parser.parse_args()
    package = python_code.count(ROOT / PACKAGE)
    if arguments.check:
        reasons = missed(package)
        print("\n".join(reasons) or f"{PACKAGE} keeps all aims")
        return 1 if reasons else 0
    counted = {tree: python_code.count(ROOT / tree) for tree in TREES}
    counted[CSRC] = cpp_code.count(ROOT / CSRC)
    rows = {name: figures(of) for name, of in counted.items()}
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(rows), rankings(package), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
