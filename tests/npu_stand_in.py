"""A torch_npu without an NPU: the operators of one version over CPU tensors, and what it is asked.

`contract` defines every operator of that version by its schema, so that a wrong keyword fails, and
gives those that glimt calls a checked implementation (npu_operators.py); any other has none, and
calling it fails. Only one contract can be open at a time: the namespaces are the process's own.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import GOLDEN
from glimt.devices.npu_310p import Atlas310P
from glimt.devices.npu_a2 import AtlasA2
from npu_graphs import SYNCS, Graphs
from npu_operators import Chip, need

SCHEMAS = GOLDEN / "npu_schemas.json"
VERSIONS = ("26.1.0", "26.0.0", "7.3.0")
SOC = {"a2": 223, "310p": 202}
KEY = "CompositeExplicitAutograd"


class StandIn:
    """What glimt calls of the module torch_npu."""

    __version__ = torch.__version__

    def __init__(self, chip: Chip, num_devices: int = 2) -> None:
        self.chip = chip
        self.graphs = Graphs(chip)
        self.chosen: list[Any] = []
        self.npu = SimpleNamespace(
            config=_Config(chip),
            get_soc_version=lambda: SOC[chip.kind],
            device_count=lambda: num_devices,
            set_device=self.chosen.append,
            set_compile_mode=lambda jit_compile: self.chosen.append(("jit_compile", jit_compile)),
            mem_get_info=lambda: (3 * 2**30, 64 * 2**30),
            max_memory_allocated=lambda: 2**30,
            **self.graphs.surface(),
        )

    def get_npu_format(self, x: torch.Tensor) -> int:
        return 29 if self.chip.in_tiles(x) else 2

    def __getattr__(self, name: str) -> Any:
        for namespace in (torch.ops.npu, torch.ops.atb):
            with suppress(AttributeError):
                return getattr(namespace, name)
        raise AttributeError(f"this version of torch_npu has no {name}")


class _Config:
    """torch.npu.config: on A2 no format but the plain one is allowed until it is set."""

    def __init__(self, chip: Chip) -> None:
        object.__setattr__(self, "_chip", chip)

    def __setattr__(self, name: str, value: Any) -> None:
        need(name == "allow_internal_format", f"{name} is no setting")
        self._chip.allows_tiles = value


class Contract:
    """One version on one chip. module: to be had as torch_npu; calls: operators by name."""

    def __init__(self, version: str, chip: Chip) -> None:
        self.version = version
        self.chip = chip
        self.module = StandIn(chip)
        self.calls: Counter[str] = Counter()

    def device(self, **options: Any) -> AtlasA2 | Atlas310P:
        """The device of this chip over CPU tensors; of an exact one also in float32."""
        made = (AtlasA2 if self.chip.kind == "a2" else Atlas310P)(self.module, "cpu", **options)
        if self.chip.is_exact:
            made.fused_dtypes = made.fused_dtypes | {torch.float32}
        return made

    @contextmanager
    def watching(self) -> Iterator[Log]:
        """Know what is on the host, and what reaches the device. Of one thread."""
        with _Hosts(self.chip), Log(self.chip) as log:
            yield log


class _Hosts(TorchFunctionMode):
    """Marks what torch.tensor makes without a device; on an NPU that is on the host."""

    def __init__(self, chip: Chip) -> None:
        super().__init__()
        self.chip = chip

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.tensor and (kwargs or {}).get("device") is None:
            self.chip.hosts[result] = True
        return result


# What an NPU does with a matrix in tiles without laying it out anew.
TAKE_TILES = {"aten.linear", "aten.t", "aten.addmm", "aten.mm", "aten.detach", "aten.new_zeros"}
TAKE_TILES |= {"aten.alias", "aten.empty_like", "aten.new_empty"}


class Log(TorchDispatchMode):
    """Counts the operators of torch; fills what is uninitialised with NaN, and guards tiles."""

    def __init__(self, chip: Chip) -> None:
        super().__init__()
        self.chip = chip
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = str(func).rpartition(".")[0]
        self.seen[name] += 1
        if name.startswith("aten.") and name not in TAKE_TILES:
            tiled = [x for x in args if isinstance(x, torch.Tensor) and self.chip.in_tiles(x)]
            need(not tiled, f"{name} of a tensor in tiles")
        result = func(*args, **(kwargs or {}))
        if (
            name in ("aten.empty", "aten.empty_like", "aten.new_empty")
            and result.is_floating_point()
        ):
            result.fill_(float("nan"))
        return result

    @property
    def syncs(self) -> dict[str, int]:
        return {name: count for name, count in self.seen.items() if name in SYNCS}

    @property
    def plain(self) -> set[str]:
        """Operators of torch itself."""
        return {name for name in self.seen if name.startswith("aten.")}

    @property
    def fused(self) -> set[str]:
        """Operators of torch_npu."""
        return {name.split(".")[1] for name in self.seen if name.startswith(("npu.", "atb."))}


def schemas(version: str) -> list[tuple[str, str]]:
    """Namespace and schema of every operator of a version."""
    listed = json.loads(SCHEMAS.read_text(encoding="utf-8"))
    return [(one["ns"], one["schema"]) for one in listed if version in one["versions"]]


class _Defined:
    """The namespaces npu and atb, which the process has once: of one version, for one contract."""

    def __init__(self) -> None:
        self.version = ""
        self.libraries: dict[str, torch.library.Library] = {}
        self.opened: Contract | None = None

    def define(self, version: str) -> None:
        """Nothing is done where that version is defined already: it takes a tenth of a second."""
        if version == self.version:
            return
        for library in self.libraries.values():
            library._destroy()
        self.version = version
        self.libraries = {ns: torch.library.Library(ns, "DEF") for ns in ("npu", "atb")}
        for namespace, schema in schemas(version):
            self.libraries[namespace].define(schema)
            name = schema.partition("(")[0]
            if hasattr(Chip, name):
                self.libraries[namespace].impl(name, self._checked(name, schema), KEY)

    def _checked(self, name: str, schema: str) -> Any:
        """What the contract's chip does, with this version's defaults: a dispatcher drops them."""
        arguments = torch._C.parse_schema(schema).arguments
        own = inspect.signature(getattr(Chip, name)).parameters
        order = [argument.name for argument in arguments]
        defaults = {
            a.name: a.default_value for a in arguments if a.has_default_value() and a.name in own
        }

        def run(*args: Any, **given: Any) -> Any:
            assert self.opened is not None, "no contract is open"
            self.opened.calls[name] += 1
            known = {*order[: len(args)], *given}
            left = {n: value for n, value in defaults.items() if n not in known}
            # What the implementation does below the dispatcher is the NPU's own business.
            with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                return getattr(self.opened.chip, name)(*args, **left, **given)

        return run


_DEFINED = _Defined()


@contextmanager
def contract(kind: str, version: str = "26.1.0", is_exact: bool = False) -> Iterator[Contract]:
    """Define a version's operators for a chip, "a2" or "310p"."""
    assert _DEFINED.opened is None, "one contract is open already"
    _DEFINED.define(version)
    _DEFINED.opened = Contract(version, Chip(kind, is_exact))
    try:
        yield _DEFINED.opened
    finally:
        _DEFINED.opened = None
