"""read_captions: names, and every line that is no picture's captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glimt.errors import ConfigError
from glimt.evaluate.captions import read_captions


def write(path: Path, *rows: object) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_captions_are_found_by_the_pictures_name(tmp_path):
    """Catches folders that differ between the two files, which they always do."""
    rows = ({"file": "images/a.jpg", "captions": ["one", "", "two"], "more": 1}, "")
    read = read_captions(write(tmp_path / "c.jsonl", *rows))
    assert read == {"a.jpg": ("one", "two")}


BAD = [
    (("{",), "line 1 of"),
    (("[1]",), "no object with a file"),
    (({"file": "a.jpg"},), "must be a list of texts"),
    (({"file": "a.jpg", "captions": ["", "!"]},), "hold no word"),
    (({"file": "x/a.jpg", "captions": ["b"]}, {"file": "y/a.jpg", "captions": ["b"]}), "line 2 of"),
    (("", ""), "holds no caption"),
    (("{",) * 20, "and 12 more"),
]


@pytest.mark.parametrize(("rows", "said"), BAD, ids=[said for _, said in BAD])
def test_bad_lines_are_told(tmp_path, rows, said):
    """Catches captions that are silently fewer than the file has."""
    with pytest.raises(ConfigError, match=said):
        read_captions(write(tmp_path / "c.jsonl", *rows))


def test_files_that_cannot_be_read_are_told(tmp_path):
    """Catches a traceback for a folder, a missing file, and another encoding."""
    with pytest.raises(ConfigError, match="No such file"):
        read_captions(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_captions(tmp_path)
    (tmp_path / "c.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read_captions(tmp_path / "c.jsonl")
