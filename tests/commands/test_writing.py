"""Files and folders are written whole or not at all, and what stood in the way is told."""

import os
import signal
from pathlib import Path

import pytest

from glimt.commands import writing
from glimt.commands.reporting import check_file
from glimt.commands.writing import whole_files, whole_folder, write_file
from glimt.errors import ConfigError


def test_a_folder_below_a_file_is_refused_with_its_path(tmp_path):
    """Catches the traceback of NotADirectoryError, and folders made for nothing."""
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(ConfigError, match="file/out cannot be written: Not a directory"),
        whole_folder(tmp_path / "file" / "out", 10),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_makes_no_folder(tmp_path, monkeypatch):
    """Catches empty parents left behind by a refusal."""
    monkeypatch.setattr(
        writing.shutil, "disk_usage", lambda path: writing.shutil._ntuple_diskusage(3, 2, 1)
    )
    with (
        pytest.raises(ConfigError, match=r"needs 2\.0 KiB, but 1 bytes are free in"),
        whole_folder(tmp_path / "new" / "out", 2048),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path, monkeypatch):
    """Catches /save! that loses the old conversation on a full disk."""
    path = tmp_path / "talk.json"
    path.write_text("precious")

    def half(self: Path, content: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        write_file(path, b"new")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"talk.json": "precious"}


def test_a_pipe_is_written_into_and_stays_a_pipe(tmp_path):
    """Catches a device that becomes an ordinary file, for the whole machine where root asks."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_file(pipe, "out")
        write_file(pipe, b"new")
        assert os.read(reading, 9) == b"new"
    finally:
        os.close(reading)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_file_that_cannot_be_written_is_known_before(tmp_path):
    """Catches a run of an hour whose result has no place, and a folder that is not made."""
    check_file(tmp_path / "new" / "out.json", "out")
    assert (tmp_path / "new").is_dir()
    check_file(None, "out")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "out.json"):
        with pytest.raises(ConfigError, match="out: "):
            check_file(path, "out")


def test_a_link_stays_a_link(tmp_path):
    """Catches a linked file that is replaced by a plain one."""
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_is_ended_leaves_nothing_half_written(tmp_path, number):
    """Catches gigabytes under a hidden name, for each job that a cluster ends."""

    def write() -> None:
        with whole_folder(tmp_path / "out", 10) as partial:
            (partial / "file").write_text("half")
            os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_DFL)  # nohup has these tests ignore one
    try:
        with pytest.raises(SystemExit) as ended:
            write()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert ended.value.code == 128 + number
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_ends_nothing(tmp_path):
    """Catches a job under nohup that ends when its terminal is closed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with whole_folder(tmp_path / "out", 10) as partial:
            os.kill(os.getpid(), signal.SIGHUP)
            (partial / "file").write_text("whole")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "out" / "file").read_text() == "whole"


def test_who_has_the_number_of_a_killed_process_can_write(tmp_path, monkeypatch):
    """Catches a container whose process always finds the folder of the one before."""
    monkeypatch.setattr(writing.shutil, "rmtree", lambda *given, **options: None)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", 10):
            raise KeyboardInterrupt  # as if it was killed: what it wrote stays
    assert len(list(tmp_path.iterdir())) == 2


# --- files beside others -----------------------------------------------------------------------

OLD = ("tower.onnx", "tower.onnx.data", "tower.onnx.json")
NEW = ("tower.onnx", "tower.onnx.json")


def replace_export(folder: Path) -> None:
    """Put NEW in the place of OLD."""
    with whole_files(folder / "tower.onnx", 10, OLD) as partial:
        for name in NEW:
            (partial / name).write_text("new")


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A folder with OLD and a file of somebody else."""
    for name in OLD:
        (tmp_path / name).write_text("old")
    (tmp_path / "tower.txt").write_text("mine")
    return tmp_path


def test_what_the_new_files_do_not_replace_goes_too(older):
    """Catches gigabytes of weights that stay beside a file that does not read them, and files of
    others that go with them.
    """
    replace_export(older)
    assert texts(older) == dict.fromkeys(NEW, "new") | {"tower.txt": "mine"}
    assert len(list(older.iterdir())) == 3, "nothing is put aside for ever"


def test_a_manifest_never_lies_beside_files_that_it_does_not_describe(older, monkeypatch):
    """Catches an export over an older one that is killed half way, and is then taken for whole."""
    rename = Path.rename
    seen: list[dict[str, str]] = []

    def watched(self: Path, target: Path) -> Path:
        moved = rename(self, target)
        seen.append(texts(older))
        return moved

    monkeypatch.setattr(Path, "rename", watched)
    replace_export(older)
    assert len(seen) == len(OLD) + len(NEW)
    for files in seen:
        if age := files.get("tower.onnx.json"):
            assert files == dict.fromkeys(NEW, age) | {"tower.txt": "mine"}


@pytest.mark.parametrize("moves", range(len(OLD) + len(NEW)))
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_while_files_change_places_brings_the_old_ones_back(
    older, monkeypatch, moves, error
):
    """Catches Ctrl-C between two moves, after which neither export is there."""
    rename = Path.rename
    before, done = texts(older), 0

    def failing(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == moves + 1:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((KeyboardInterrupt, ConfigError)):
        replace_export(older)
    assert texts(older) == before
    assert len(list(older.iterdir())) == len(before)
