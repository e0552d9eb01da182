"""Which kernels are chosen, with the library and the self-test's process put in place by hand."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glimt.errors import ConfigError
from glimt.kernels import choose
from glimt.kernels.library import ISAS, available, library_path
from glimt.kernels.native import Native

ALL_RIGHT: Mapping[str, Any] = dict.fromkeys(ISAS, 0)


class Machine:
    """A build of the library, and what the self-test of each set does here.

    outcomes: exit status, (status, stderr), or an exception to raise; tried: sets, in order
    """

    def __init__(self, folder: Path) -> None:
        self.library = folder / "_native.so"
        self.library.write_bytes(b"first build")
        self.outcomes: dict[str, Any] = dict(ALL_RIGHT)
        self.has: tuple[str, ...] = ISAS
        self.tried: list[str] = []

    def run(self, command: list[str], **options: Any) -> Any:
        isa = command[-1]
        self.tried.append(isa)
        outcome = self.outcomes[isa]
        if isinstance(outcome, Exception):
            raise outcome
        status, said = outcome if isinstance(outcome, tuple) else (outcome, "")
        return SimpleNamespace(returncode=status, stderr=said, stdout="")

    def choose(self, wanted: str | None = None) -> str | None:
        return choose.chosen_isa(wanted, str(self.library))

    def next_process(self) -> None:
        choose.why_not.cache_clear()
        choose._say_plain.cache_clear()
        self.tried.clear()


@pytest.fixture(autouse=True)
def forgets() -> Iterator[None]:
    """What one test learns must not be another's, nor the made-up machine's be the real one's."""
    for cached in (choose.why_not, choose._say_plain):
        cached.cache_clear()
    yield
    for cached in (choose.why_not, choose._say_plain):
        cached.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choose, "available", lambda path: [i for i in ISAS if i in made.has])
    monkeypatch.setattr(choose.subprocess, "run", made.run)
    return made


def test_the_best_set_is_taken_and_the_rest_are_not_tried(machine):
    """Catches an order by name, and a start that tries every set for nothing."""
    assert machine.choose() == "amx"
    assert machine.tried == ["amx"]


def test_an_empty_variable_is_none_at_all(machine):
    """Catches GLIMT_ISA= in a shell taken for the name of a set."""
    assert machine.choose("") == "amx"


@pytest.mark.parametrize("wanted", ISAS)
def test_the_set_that_is_asked_for_is_taken(machine, wanted):
    """Catches a wish that is overruled by a better set."""
    assert machine.choose(wanted) == wanted
    assert machine.tried == [wanted]


def test_none_is_the_plain_path_and_touches_nothing(machine):
    """Catches a self-test run, or a library opened, by someone who wants neither."""
    assert machine.choose("none") is None
    assert choose.open_native("none", 2) is None
    assert machine.tried == []


def test_an_unknown_set_is_refused_with_the_known_ones(machine):
    """Catches a typing error that silently gives the best set."""
    with pytest.raises(ConfigError, match="'avx1024' is unknown") as caught:
        machine.choose("avx1024")
    assert all(isa in str(caught.value) for isa in (*ISAS, "none"))


def test_a_set_that_is_not_there_is_refused_if_asked_for_and_else_passed_over(machine):
    """Catches an instruction that the processor does not know."""
    machine.has = ("avx2", "portable")
    assert machine.choose() == "avx2"
    with pytest.raises(ConfigError, match="'amx' cannot be used: it is not compiled in"):
        machine.choose("amx")
    assert machine.tried == ["avx2"]


FAILURES = [
    ((choose.WRONG_VALUES, "some warning\nlinear gives wrong values"), "linear gives wrong values"),
    (-4, "killed by signal 4"),
    (-11, "killed by signal 11"),
    (-9, "killed by signal 9"),
    ((1, "MemoryError"), "MemoryError"),
    (17, "status 17"),
    (subprocess.TimeoutExpired("python", 120), "did not end"),
    (OSError("no more processes"), "no more processes"),
]


@pytest.mark.parametrize(("outcome", "reason"), FAILURES, ids=lambda value: str(value)[:30])
def test_a_set_that_fails_falls_back_to_the_next_and_says_why(machine, caplog, outcome, reason):
    """Catches a failing self-test that stops the start, or that nobody hears of."""
    machine.outcomes["amx"] = outcome
    with caplog.at_level(logging.WARNING, "glimt"):
        assert machine.choose() == machine.choose() == "avx512"
    assert machine.tried == ["amx", "avx512"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "amx" in said
    assert reason in said
    with pytest.raises(ConfigError, match="'amx' cannot be used"):
        machine.choose("amx")


@pytest.mark.parametrize("outcome", [(choose.WRONG_VALUES, "decode gives wrong values"), -4, -11])
def test_what_the_kernels_did_wrong_is_remembered_for_this_build(machine, outcome):
    """Catches a crash at every start, and one that outlives the build it was of."""
    machine.outcomes["amx"] = outcome
    assert machine.choose() == "avx512"
    machine.next_process()
    assert machine.choose() == "avx512"
    assert machine.tried == []
    machine.outcomes["amx"] = 0
    machine.library.write_bytes(b"the second build is longer")
    machine.next_process()
    assert machine.choose() == "amx"
    assert machine.tried == ["amx"]


@pytest.mark.parametrize("outcome", [-9, -15, (1, "MemoryError"), OSError("no more processes")])
def test_what_the_machine_cut_short_is_tried_again(machine, outcome):
    """Catches a machine that was once out of memory and never uses its best kernels again."""
    machine.outcomes["amx"] = outcome
    assert machine.choose() == "avx512"
    machine.next_process()
    machine.outcomes["amx"] = 0
    assert machine.choose() == "amx"
    assert machine.tried == ["amx"]


def test_another_processor_is_tried_anew(machine, monkeypatch):
    """Catches a home folder shared by two machines, one of which has no AMX."""
    machine.choose()
    machine.next_process()
    monkeypatch.setattr(choose, "_processor", lambda: "another one")
    machine.choose()
    assert machine.tried == ["amx"]


def test_a_folder_that_cannot_be_written_only_costs_time(machine, monkeypatch, tmp_path):
    """Catches a start that fails in a container whose file system is read-only."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert machine.choose() == "amx"
    machine.next_process()
    assert machine.choose() == "amx"
    assert machine.tried == ["amx"]


@pytest.mark.parametrize("content", ["", "{", "[]", '"amx"', '{"sse": ""}', "\x00"])
def test_a_damaged_memory_is_no_memory(machine, content):
    """Catches a start that fails over half a file."""
    file = choose.memory_file(str(machine.library))
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert machine.choose() == "amx"
    assert json.loads(file.read_text()) == {"amx": ""}


def test_no_set_that_is_right_is_plain_torch(machine, caplog):
    """Catches kernels that are used although every self-test failed."""
    machine.outcomes = dict.fromkeys(ISAS, (choose.WRONG_VALUES, "norm gives wrong values"))
    with caplog.at_level(logging.WARNING, "glimt"):
        assert machine.choose() is None
    assert machine.tried == list(ISAS)
    assert "plain torch" in caplog.records[-1].getMessage()


def test_without_a_library_torch_is_taken_with_one_warning(monkeypatch, caplog):
    """Catches a crash where there was no compiler, and a warning per engine."""
    monkeypatch.setattr(choose, "library_path", lambda: None)
    with caplog.at_level(logging.WARNING, "glimt"):
        assert choose.open_native(None, 2) is choose.open_native(None, 2) is None
    assert len(caplog.records) == 1
    assert "not built" in caplog.records[0].getMessage()
    assert choose.usable_isas() == []
    with pytest.raises(ConfigError, match="'avx2' cannot be used: the native kernels were not"):
        choose.open_native("avx2", 2)


def test_a_library_of_another_build_is_plain_torch(machine, monkeypatch, caplog):
    """Catches structs of one build handed to functions of another."""

    def refuses(path: str) -> list[str]:
        raise OSError(f"{path} is of another build (ABI 1, not 2)")

    monkeypatch.setattr(choose, "available", refuses)
    with caplog.at_level(logging.WARNING, "glimt"):
        assert machine.choose() is None
    assert "of another build" in caplog.records[0].getMessage()
    with pytest.raises(ConfigError, match="of another build"):
        machine.choose("portable")


# --- the real thing --------------------------------------------------------------------------

needs_library = pytest.mark.skipif(library_path() is None, reason="the kernels were not built")


@needs_library
def test_every_set_of_this_machine_passes_its_self_test():
    """Catches wrong kernels, and a child that does not find the package."""
    path = library_path()
    assert path is not None
    assert list(choose.usable_isas()) == list(available(path))


@needs_library
def test_the_self_test_says_which_kernel_is_wrong(monkeypatch, capsys):
    """Catches a self-test that cannot fail: every kernel is spoilt in turn."""
    from glimt.kernels import selftest

    monkeypatch.setattr(selftest.torch, "set_num_threads", lambda count: None)
    for name in ("linear", "mlp", "attention", "decode", "norm", "rotate"):
        with monkeypatch.context() as patch:
            real = getattr(Native, name)

            def spoilt(self: Native, *args: Any, real: Any = real, **options: Any) -> Any:
                out = real(self, *args, **options)
                out.view(-1)[-1] += 100
                return out

            patch.setattr(Native, name, spoilt)
            assert selftest.main("portable") == choose.WRONG_VALUES
        assert f"{name} gives wrong values" in capsys.readouterr().err
    assert selftest.main("portable") == 0


@needs_library
def test_a_set_chosen_later_is_in_force(monkeypatch):
    """Catches a cached answer: the library holds one set, and the last wish must reach it."""
    used: list[bytes] = []
    library = Native(str(library_path()), "portable", 1).library
    real = library.glimt_use
    monkeypatch.setattr(library, "glimt_use", lambda name: (used.append(name), real(name))[1])
    for wanted in ("portable", *choose.usable_isas()[:1], "portable"):
        native = choose.open_native(wanted, 1)
        assert native is not None
        assert native.isa == wanted
        assert used[-1] == wanted.encode()


def test_the_child_is_this_interpreter_and_finds_what_this_process_finds(machine, monkeypatch):
    """Catches a child that tries another installation's kernels, or none."""
    seen: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> Any:
        seen.update(options, command=command)
        return machine.run(command)

    monkeypatch.setattr(choose.subprocess, "run", run)
    monkeypatch.setattr(sys, "path", [*sys.path, "/only/here"])
    machine.choose()
    assert seen["command"][0] == sys.executable
    assert "/only/here" in seen["env"]["PYTHONPATH"]
    assert seen["timeout"] > 0
