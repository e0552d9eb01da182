"""`glimt doctor`: another machine's files, what is wrong with it, and that the fix is told."""

import json
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from glimt.cli import app
from glimt.commands import doctor, machine
from glimt.commands.doctor import (
    CardState,
    Check,
    DeviceState,
    Facts,
    NativeKernels,
    Torch,
    check,
    collect,
    is_healthy,
)
from glimt.commands.machine import Library, Processor, read_processor
from glimt.commands.show_doctor import show
from glimt.devices.host import Memory, Threads, read_memory
from glimt.kernels.library import ISAS, library_path

GIB = 2**30

PROCESSOR = Processor("Test 9000", "x86_64", 8, 8, 8, {"avx2": True, "amx_int8": False})
MEMORY = Memory(total=64 * GIB, available=60 * GIB, disk_cache=GIB, swap_total=0, swap_used=0)
HEALTHY = Facts(
    python="3.12.1",
    processor=PROCESSOR,
    memory=MEMORY,
    torch=Torch(num_threads=8),
    devices=(DeviceState("cpu", None), DeviceState("npu", "no card")),
    devices_error=None,
    libraries=(Library("Pillow", ">=11.3", "", "12.0"), Library("ray", ">=2.52", "cluster", None)),
    threads_setting=None,
    encoding="UTF-8",
)


def wrong(facts: Facts) -> list[Check]:
    return [found for found in check(facts) if found.level != "ok"]


# --- reading ---------------------------------------------------------------------------------


X86 = """processor	: {0}
model name	: Test(R) CPU @ 2.00GHz
physical id	: 0
core id		: {1}
flags		: fpu sse2 fma avx2 avx512f avx512_bf16 amx_tile

"""
ARM = """processor	: 0
Features	: fp asimd asimddp i8mm bf16
CPU implementer	: 0x41
CPU part	: 0xd4f

"""


def test_a_processor_with_two_threads_per_core_is_counted_right(tmp_path):
    """Catches threads taken for cores, and sets that another set's name contains."""
    (tmp_path / "cpuinfo").write_text("".join(X86.format(i, i // 2) for i in range(4)))
    found = read_processor(tmp_path, tmp_path)
    assert found.model == "Test(R) CPU @ 2.00GHz"
    assert found.physical_cores == 2
    present = [name for name, has in found.instruction_sets.items() if has]
    assert present == ["avx2", "fma", "avx512f", "avx512_bf16", "amx_tile"]


def test_an_arm_processor_is_named_by_its_numbers(tmp_path):
    """Catches a nameless machine, and x86 sets looked for on it."""
    (tmp_path / "cpuinfo").write_text(ARM)
    found = read_processor(tmp_path, tmp_path)
    assert found.model == "ARM implementer 0x41 part 0xd4f"
    assert found.instruction_sets["i8mm"]
    assert not found.instruction_sets["sve"]
    assert "avx2" not in found.instruction_sets


def test_a_machine_without_proc_is_read_without_an_error(tmp_path):
    """Catches doctor failing where it should tell that it cannot know."""
    memory = read_memory(tmp_path, tmp_path)
    assert memory == Memory(0, 0, 0, 0, 0)
    assert read_processor(tmp_path, tmp_path).logical_cores == os.cpu_count()
    facts = replace(HEALTHY, memory=memory)
    assert [(c.name, c.level) for c in wrong(facts)] == [("memory", "warning")]


VERSIONS = [
    (">=11.3", "11.3", False),
    (">=11.3", "11.10.1", False),
    (">=11.3", "11.2.9", True),
    (">=11.3", "9.5", True),
    ("==2.13.0", "2.13.0+cpu", False),
    ("==2.13.0", "2.9.1", True),
    ("", "0.1", False),
    (">=2.0", "2", False),
]


@pytest.mark.parametrize(("wanted", "version", "is_too_old"), VERSIONS)
def test_versions_are_compared_as_numbers(wanted, version, is_too_old):
    """Catches 11.10 taken for older than 11.3, as text would have it."""
    assert Library("x", wanted, "", version).is_too_old is is_too_old


def test_the_requirements_of_the_installed_glimt_are_listed():
    """Catches a list of libraries that goes stale, or that holds the developers' tools."""
    found = {library.name: library for library in machine.read_libraries()}
    assert found["Pillow"].extra == ""
    assert found["Pillow"].version is not None
    assert found["ray"].extra == "cluster"
    assert found["ray"].wanted.startswith(">=")
    assert "pytest" not in found


def test_this_machine_can_be_read():
    """Catches a reader that only works on the files of the other tests."""
    facts = collect({"OMP_NUM_THREADS": "3"})
    assert facts.threads_setting == "3"
    assert facts.torch.error is None
    assert DeviceState("cpu", None) in facts.devices
    assert facts.processor.usable_cores > 0


def test_a_broken_device_is_told_and_not_raised(monkeypatch):
    """Catches doctor dying of the very thing it should find."""

    def fails():
        raise OSError("libascend.so is missing")

    monkeypatch.setattr("glimt.devices.base.all_devices", fails)
    found = wrong(replace(collect({}), libraries=HEALTHY.libraries))
    (broken,) = [each for each in found if each.name == "devices"]
    assert broken.level == "problem"
    assert "OSError: libascend.so is missing" in broken.says


# --- judging ---------------------------------------------------------------------------------


def test_a_healthy_machine_has_nothing_wrong():
    """Catches a check that cries wolf, an absent extra above all."""
    assert wrong(HEALTHY) == []
    assert {found.name for found in check(HEALTHY)} == {
        "libraries", "torch", "devices", "processor", "memory", "disk cache", "threads", "text",
    }  # fmt: skip


CARD = CardState(0, "NVIDIA H100", 80 * GIB, "9.0", "570.124.06")
OF_CARDS = replace(
    HEALTHY,
    devices=(
        DeviceState(
            "cuda",
            None,
            cards=(CARD, replace(CARD, index=1, name="Tesla T4", memory_bytes=16 * GIB)),
            missing=(("triton is not installed", "pip install triton"),),
        ),
    ),
)


def test_cards_are_told_with_what_fits_and_what_is_missing(capsys):
    """Catches a card that is too small for both models, or a fix for one that is not."""
    said = [found for found in check(OF_CARDS) if found.name == "cuda"]
    assert [(found.level, found.says.partition(";")[0]) for found in said] == [
        ("warning", "triton is not installed"),
        ("ok", "card 0 has 80.0 GiB, enough for VisualGLM-6B and GLM-4v-9B in 16 bits"),
        ("warning", "card 1 has 16.0 GiB"),
    ]
    assert said[2].says.endswith("VisualGLM-6B (16.9 GiB) and GLM-4v-9B (27.7 GiB)")
    assert (said[0].fix, said[2].fix) == (
        "pip install triton",
        "--quant int8 or int4, or --tp with more cards",
    )
    show(OF_CARDS, [])
    shown = capsys.readouterr().out
    assert "NVIDIA H100, 80.0 GiB, capability 9.0, driver 570.124.06" in shown


SMALL = replace(MEMORY, available=20 * GIB)
CONTAINER = replace(MEMORY, cgroup_limit=6 * GIB, cgroup_free=5 * GIB)
WRONG = [
    ({"libraries": ()}, "libraries", "warning", "pip install"),
    ({"libraries": (Library("Pillow", ">=11.3", "", "9.0"),)}, "libraries", "problem", "11.3"),
    ({"libraries": (Library("numpy", ">=1", "", None),)}, "libraries", "problem", "numpy"),
    ({"libraries": (Library("ray", ">=2", "cluster", "1.9"),)}, "libraries", "warning", "ray>=2"),
    ({"torch": Torch(error="OSError: libgomp")}, "torch", "problem", "force-reinstall"),
    ({"torch": Torch(built_for="cuda 12.8", num_threads=8)}, "torch", "warning", "nvidia-smi"),
    ({"devices": (DeviceState("npu", "no card"),)}, "devices", "problem", "reasons"),
    ({"processor": replace(PROCESSOR, instruction_sets={})}, "processor", "warning", "newer"),
    ({"memory": SMALL}, "memory", "warning", "close other programs"),
    ({"memory": replace(MEMORY, available=GIB // 2)}, "memory", "problem", "close"),
    ({"memory": CONTAINER}, "container", "warning", "--memory"),
    ({"memory": replace(MEMORY, swap_used=2 * GIB)}, "swap", "warning", "swapoff"),
    ({"threads_setting": "many"}, "threads", "warning", "OMP_NUM_THREADS=8"),
    ({"threads_setting": "0"}, "threads", "warning", "OMP_NUM_THREADS=8"),
    ({"threads_setting": "1"}, "threads", "warning", "unset OMP_NUM_THREADS"),
    ({"torch": Torch(num_threads=9)}, "threads", "warning", "OMP_NUM_THREADS=8"),
    ({"encoding": "ISO-8859-1"}, "text", "warning", "LANG=C.UTF-8"),
]


@pytest.mark.parametrize(("change", "name", "level", "fix"), WRONG, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_told_with_its_fix(change, name, level, fix):
    """Catches a check that never fires, or that leaves the user with only bad news."""
    found = wrong(replace(HEALTHY, **change))
    assert name in [each.name for each in found]
    (told,) = [each for each in found if each.name == name]
    assert told.level == level
    assert fix in told.fix
    assert is_healthy(found) is (level == "warning")


def test_the_models_that_do_not_fit_are_named():
    """Catches 'too little memory' without saying for what."""
    (found,) = wrong(replace(HEALTHY, memory=SMALL))
    assert "20.0 GiB of memory can be had" in found.says
    assert "GLM-4v-9B (27.7 GiB)" in found.says
    assert "VisualGLM" not in found.says


def test_memory_that_is_just_enough_is_enough():
    """Catches a limit that moved: by a byte here, or by what a model takes."""
    needed = 2 * 13_906_320_896 + 320 * 2**20 + 3 * 2**29
    assert wrong(replace(HEALTHY, memory=replace(MEMORY, available=needed))) == []
    (found,) = wrong(replace(HEALTHY, memory=replace(MEMORY, available=needed - 1)))
    assert found.name == "memory"


def test_the_containers_limit_is_what_counts():
    """Catches 60 GiB of the machine promised to a container of 6."""
    says = {found.name: found.says for found in wrong(replace(HEALTHY, memory=CONTAINER))}
    assert says["memory"].startswith("5.0 GiB of memory can be had, by the container's limit")
    assert "6.0 GiB of 64.0 GiB" in says["container"]


def test_a_broken_torch_is_told_once():
    """Catches one broken package filling the screen: no device can be listed without it."""
    facts = replace(
        HEALTHY, torch=Torch(error="OSError: x"), devices=(), devices_error="OSError: x"
    )
    assert [found.name for found in wrong(facts)] == ["torch"]


# --- telling ---------------------------------------------------------------------------------


def run(monkeypatch: pytest.MonkeyPatch, facts: Facts, *options: str):
    monkeypatch.setattr(doctor, "collect", lambda **_: facts)
    return CliRunner().invoke(app, ["doctor", *options])


def test_scripts_get_one_json_object_and_the_exit_code(monkeypatch):
    """Catches a warning that fails a script, and a problem that does not."""
    result = run(monkeypatch, replace(HEALTHY, memory=SMALL), "--json")
    said = json.loads(result.stdout)
    assert (result.exit_code, said["ok"]) == (0, True)
    assert said["processor"]["instruction_sets"] == {"avx2": True, "amx_int8": False}
    assert said["memory"]["usable"] == 20 * GIB
    cpu = {"name": "cpu", "unavailable": None, "cards": [], "missing": []}
    assert cpu in said["devices"]
    blocked = run(monkeypatch, replace(HEALTHY, torch=Torch(error="x")), "--json")
    assert blocked.exit_code == 1
    assert json.loads(blocked.stdout)["ok"] is False


def test_people_see_facts_and_fixes(monkeypatch):
    """Catches a table that leaves out what the checks are about, and markup in a message."""
    torch = Torch(error="OSError: [bold]lib[/bold]")
    result = run(monkeypatch, replace(HEALTHY, torch=torch))
    assert result.exit_code == 1
    for said in ("Test 9000", "60.0 GiB available", "Pillow", "pip install 'glimt[cluster]'"):
        assert said in result.stdout
    assert "PROBLEM torch: cannot be imported: OSError: [bold]lib[/bold]" in result.stdout
    assert "fix: install it again" in result.stdout
    assert "mend what is marked PROBLEM first" in result.stdout


# --- kernels and limits ----------------------------------------------------------------------


def test_kernels_that_are_not_built_are_told_with_the_way_to_build_them():
    """Catches a machine that is slow for want of a library that nobody misses."""
    absent, broken = NativeKernels(), NativeKernels("x.so", "is of another build")
    for kernels in (absent, broken, NativeKernels("x.so")):
        found = wrong(replace(HEALTHY, kernels=kernels))
        assert [(one.name, one.level) for one in found] == [("kernels", "warning")]
        assert "cmake" in found[0].fix
    good = NativeKernels("x.so", None, ("avx2",), {"amx": "killed"}, None, "avx2")
    assert wrong(replace(HEALTHY, kernels=good)) == []


def test_kernels_that_the_user_switched_off_are_told():
    """Catches a GLIMT_ISA forgotten in a shell's profile: all is slow, or nothing starts."""
    off = NativeKernels("x.so", None, ("avx2",), wanted="none")
    bad = NativeKernels("x.so", "'sse' is unknown", ("avx2",), wanted="sse")
    for kernels, level in ((off, "warning"), (bad, "problem")):
        (found,) = wrong(replace(HEALTHY, kernels=kernels))
        assert (found.name, found.level, found.fix) == ("kernels", level, "unset GLIMT_ISA")


def test_the_set_in_use_and_the_reasons_against_the_others_are_shown(monkeypatch):
    """Catches a machine with AMX on which nobody learns why AMX is not used."""
    refused = {"amx": "the self-test was killed by signal 4"}
    kernels = NativeKernels("x.so", None, ("avx512", "avx2"), refused, None, "avx512")
    said = run(monkeypatch, replace(HEALTHY, kernels=kernels)).stdout
    assert "avx512 in use; usable: avx512, avx2" in said
    assert "not amx" in said
    assert "killed by signal 4" in said
    assert "kernels: of avx512 are used" in said


@pytest.mark.parametrize(("wanted", "in_use"), [("none", None), ("portable", "portable")])
def test_the_kernels_of_this_machine_are_read(wanted, in_use):
    """Catches a doctor that shows the best set while GLIMT_ISA names another."""
    if library_path() is None:
        pytest.skip("the native kernels were not built")
    kernels = collect({"GLIMT_ISA": wanted}).kernels
    assert kernels is not None
    assert (kernels.wanted, kernels.in_use, kernels.error) == (wanted, in_use, None)
    assert {*kernels.instruction_sets, *kernels.refused} == set(ISAS)
    assert collect({"GLIMT_ISA": "sse"}).kernels.error.startswith("'sse' is unknown")


def test_limits_are_shown_when_they_were_measured(monkeypatch):
    """Catches limits that are measured and not told, and a processor without int8 units."""
    limits = {"read_bytes": 25e9, "bf16_ops": 1.5e12, "int8_ops": None}
    facts = replace(HEALTHY, limits=limits, numa_nodes=2, threads=Threads(2, (0, 8)))
    result = run(monkeypatch, facts, "--limits")
    assert "25.0 GB/s" in result.stdout
    assert "2, kept on processors 0, 8" in result.stdout
    assert "1.50 TFLOP/s in bfloat16" in result.stdout
    assert "int8," not in result.stdout
    assert json.loads(run(monkeypatch, facts, "--json").stdout)["limits"] == limits


def test_what_runs_and_compiles_a_tower_is_told(stand_in_atc):
    """Catches a user who finds out after the export; an absence is no fault of the machine."""
    found = collect({}).towers
    assert found["om"] is not None
    assert found["om"].startswith("ais_bench is not installed; install the aclruntime")
    assert found["atc"] == "not on PATH; source CANN's set_env.sh"
    stand_in_atc.install()
    after = collect({})
    assert after.towers["atc"] is None
    assert "ais_bench" not in {check.name for check in check(after)}
    shown = CliRunner().invoke(app, ["doctor"]).stdout
    assert "exported vision towers" in shown
    assert (
        json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["towers"] == after.towers
    )
