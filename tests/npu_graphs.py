"""NPU graphs without an NPU: what torch.npu has for recording, over CPU tensors.

While something is recorded, nothing is computed that anybody may see: results are NaN, and what an
operator would write is put back. A replay runs the operators again, each into the memory that its
result had. What a graph cannot hold ends the recording, as on an NPU. Source of the order of
events: Ascend/pytorch, torch_npu/npu/graphs.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from npu_operators import Chip, need

# Each of them waits for the device and brings a number to the host.
SYNCS = {"aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero"}
SYNCS |= {"aten.masked_select", "aten.unique_consecutive", "aten._unique2"}
# To the host and from it, as a user writes it: on the CPU most of them are nothing to a dispatcher.
HOST = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
HOST |= {"tensor", "as_tensor", "from_numpy"}
FACTORIES = {"aten.empty", "aten.empty_like", "aten.new_empty"}
HOST_LISTS = "npu.npu_fused_infer_attention_score"  # the operator that `update` sends anew


def refused(what: str) -> RuntimeError:
    return RuntimeError(f"{what} is not permitted while a stream is being captured (stand-in)")


class Graphs:
    """The part of torch.npu that records. Of one device, one recording at a time."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.made: list[NPUGraph] = []
        self.recording: _Recording | None = None
        self.current = self.default = Stream()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """What runs on another stream before a recording is a rehearsal, with its full widths."""
        before, self.current = self.current, stream
        was, self.chip.is_rehearsal = self.chip.is_rehearsal, stream is not self.default
        try:
            yield
        finally:
            self.current, self.chip.is_rehearsal = before, was

    @contextmanager
    def device(self, place: torch.device) -> Iterator[None]:
        assert isinstance(place, torch.device)
        yield

    def surface(self) -> dict[str, Any]:
        """Attributes of torch.npu."""
        graphs = self

        class Made(NPUGraph):
            def __init__(self) -> None:
                super().__init__(graphs)

        class graph(Capture):  # noqa: N801
            def __init__(
                self,
                npu_graph: NPUGraph,
                pool: object = None,
                stream: Stream | None = None,
                auto_dispatch_capture: bool = False,
                capture_error_mode: str = "global",
            ) -> None:
                need(capture_error_mode in ("global", "thread_local", "relaxed"), "error mode")
                need(pool is None or pool in [one.pool() for one in graphs.made], "no such pool")
                super().__init__(graphs, npu_graph, pool, stream or Stream())
                npu_graph.auto_dispatch_capture = auto_dispatch_capture

        return {
            "NPUGraph": Made,
            "graph": graph,
            "Stream": Stream,
            "stream": self.stream,
            "device": self.device,
            "current_stream": lambda: self.current,
        }


class Stream:
    """Everything runs at once here, so there is nothing to wait for."""

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


@dataclass
class Call:
    """One operator of a graph.

    places: what its result lies in, None for views; kwargs: of host lists, those of the last update
    """

    name: str
    func: Any
    args: Any
    kwargs: dict[str, Any]
    places: list[Tensor | None]

    def run(self) -> None:
        if self.name in FACTORIES:  # memory is reused, so nothing in it is known
            self.places = [None if x is None else poisoned(x) for x in self.places]
            return
        args, kwargs = tree_map(_alive, (self.args, self.kwargs))
        for place, made in zip(self.places, tensors(self.func(*args, **kwargs)), strict=True):
            if place is not None:
                need(place.shape == made.shape, f"{self.name} gives another shape")
                place.copy_(made)


class Borrowed:
    """A view of memory that was there before the recording, which a graph does not keep."""

    def __init__(self, x: Tensor) -> None:
        self.ref = StorageWeakRef(x.untyped_storage())
        self.dtype, self.place = x.dtype, (x.storage_offset(), x.shape, x.stride())

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.ref.cdata)
        need(storage is not None, "a graph reads memory that was given back")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.place)


def _alive(x: Any) -> Any:
    return x.tensor() if isinstance(x, Borrowed) else x


class WatchedMode(TorchDispatchMode):
    """What torch_npu leaves on if ending a recording fails: it takes any call for its own."""

    def __init__(self, graphs: Graphs) -> None:
        super().__init__()
        self.graphs = graphs

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if name_of(func) == HOST_LISTS and self.graphs.recording is None:
            raise RuntimeError("a task group is begun outside a recording (stand-in)")
        return func(*args, **(kwargs or {}))


class NPUGraph:
    """torch.npu.NPUGraph. records: calls whose host lists `update` replaces."""

    def __init__(self, graphs: Graphs) -> None:
        self.graph_dispatch_mode = WatchedMode(graphs)
        self.auto_dispatch_capture = False
        self.calls: list[Call] = []
        self.records: list[Call] = []
        self.num_replayed = 0
        self._graphs = graphs
        self._pool: object = None
        self._waits = False
        graphs.made.append(self)

    def hold(self, recording: _Recording, pool: object) -> None:
        self.calls = recording.calls
        self.records = [c for c in self.calls if c.name == HOST_LISTS]
        self.records = self.records if self.auto_dispatch_capture else []
        self._pool = pool or object()
        self._waits = bool(self.records)

    def pool(self) -> object:
        return self._pool

    def update(self, cpu_update_input: list[dict[str, list[int]]]) -> None:
        """Send calls anew with other host lists. An NPU ignores names that a call does not have."""
        if not self.auto_dispatch_capture:
            raise RuntimeError("update needs auto_dispatch_capture=True (stand-in)")
        given = cpu_update_input * len(self.records if len(cpu_update_input) == 1 else [1])
        if len(given) != len(self.records):
            raise RuntimeError(f"{len(self.records)} calls, but {len(given)} entries (stand-in)")
        for call, lists in zip(self.records, given, strict=True):
            for name, values in lists.items():
                need(isinstance(call.kwargs.get(name), list), f"a call has no {name}")
                need(len(values) == len(call.kwargs[name]), f"{len(values)} lengths")
                call.kwargs[name] = [*values]
        self._waits = False

    def replay(self) -> None:
        need(bool(self.calls), "nothing was recorded")
        need(not self._waits, "no update came before this replay, which waits for one for ever")
        with (
            torch.inference_mode(),
            torch._C._DisableTorchDispatch(),
            torch._C.DisableTorchFunction(),
        ):
            for call in self.calls:
                call.run()
        self._waits = bool(self.records)
        self.num_replayed += 1


class Capture:
    """torch.npu.graph. Entered and left in torch_npu's order, errors included."""

    def __init__(self, graphs: Graphs, graph: NPUGraph, pool: object, stream: Stream) -> None:
        self.graphs, self.graph, self.pool = graphs, graph, pool
        self.stream = graphs.stream(stream)
        self.recording = _Recording(graphs.chip)

    def __enter__(self) -> None:
        need(self.graphs.recording is None, "one recording is under way already")
        self.stream.__enter__()
        if self.graph.auto_dispatch_capture:
            self.graph.graph_dispatch_mode.__enter__()
        self.graphs.recording = self.recording
        self.recording.__enter__()

    def __exit__(self, *raised: Any) -> None:
        self.recording.__exit__(*raised)
        self.graphs.recording = None
        if self.recording.is_broken:
            raise RuntimeError("the captured model is invalid (stand-in)")
        self.graph.hold(self.recording, self.pool)
        if self.graph.auto_dispatch_capture:
            self.graph.graph_dispatch_mode.__exit__(*raised)
        self.stream.__exit__(*raised)


class _Recording(TorchDispatchMode):
    """Takes down each operator with its tensors."""

    def __init__(self, chip: Chip) -> None:
        super().__init__()
        self.chip = chip
        self.calls: list[Call] = []
        self.is_broken = False
        self._own: set[int] = set()  # memory that the recording has made
        self._host = _HostMode(self)

    def __enter__(self) -> Any:
        self._host.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._host.__exit__(*raised)

    def refuse(self, what: str) -> None:
        self.is_broken = True
        raise refused(what)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        self._check(name, args)
        need(name != HOST_LISTS or len(args) == 3, "query, key and value are given by place")
        before = [(x, x.clone()) for x in written(func, args, kwargs)]
        result = func(*args, **kwargs)
        for x, value in before:
            x.copy_(value)
        given = {memory(x) for x in tensors((args, kwargs))}
        places = [None if memory(x) in given else poisoned(x) for x in tensors(result)]
        if before or any(place is not None for place in places):
            kept = tree_map(self._kept, (args, kwargs))
            self.calls.append(Call(name, func, *kept, places))
        self._own |= {memory(x) for x in places if x is not None}
        return result

    def _check(self, name: str, args: Sequence[Any]) -> None:
        if name in SYNCS | {"aten.lift_fresh", "aten.item"}:
            self.refuse(name)
        if name.startswith("atb."):
            self.refuse(f"{name}, an operator of ATB,")
        if name == "aten.index" and any(x.dtype == torch.bool for x in tensors(args[1])):
            self.refuse("an index by truth")

    def _kept(self, x: Any) -> Any:
        if isinstance(x, Tensor) and memory(x) not in self._own:
            return Borrowed(x)
        return x


class _HostMode(TorchFunctionMode):
    """Sees what a user asks of a tensor."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in HOST:
            self.recording.refuse(name)
        return func(*args, **(kwargs or {}))


# --- what operators are given and give -------------------------------------------------------


def name_of(func: Any) -> str:
    """Such as "aten.add", whatever the overload."""
    return str(func).rpartition(".")[0]


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def memory(x: Tensor) -> int:
    """Whose it is; views share it."""
    return x.untyped_storage()._cdata


def written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """What the operator changes, by its schema."""
    changed: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            changed += tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return changed


def poisoned(x: Tensor) -> Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x
