"""Decoding steps as NPU graphs, on Atlas A2 and A3. Not run on hardware, so off by default.

The fused attention reads the lengths of contexts on the host. A graph therefore waits, at each of
its calls, until `update` has sent that call anew; there is one `update` for every `replay`. Source:
Ascend/pytorch, torch_npu/npu/graphs.py and torch_npu/npu/_npugraph_handlers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from glimt.devices.npu_runtime import chip_of, takes
from glimt.devices.replay import Replay
from glimt.errors import ConfigError

SWITCH = "GLIMT_NPU_GRAPHS"

_LENGTHS = "actual_seq_lengths_kv"  # of npu_fused_infer_attention_score, in plain lengths
_AUTO = "auto_dispatch_capture"  # lets a graph find the calls that `update` sends anew


def wants_graphs(said: str) -> bool:
    """What GLIMT_NPU_GRAPHS asks for. Raises ConfigError if it is neither 0 nor 1."""
    if said not in ("", "0", "1"):
        advice = "1 records decoding steps, 0 does not"
        raise ConfigError(SWITCH, [f"{said!r} is unknown; {advice}"])
    return said == "1"


def why_no_graphs(torch_npu: Any) -> tuple[str, str] | None:
    """What keeps this chip, or this torch-npu, from recording, and what to do; None if nothing."""
    unset = f"unset {SWITCH}"
    if chip_of(torch_npu) != "a2":
        return "only Atlas A2 and A3 record decoding steps", unset
    advice = f"install one of its branch 26.0.0 or newer, or {unset}"
    installed = f"torch-npu {torch_npu.__version__}"
    if not takes("npu.npu_scatter_pa_kv_cache", "cache_mode"):
        return f"{installed} writes the cache by ATB, which a graph cannot hold", advice
    graph = getattr(torch_npu.npu, "graph", None)
    if graph is None or _AUTO not in inspect.signature(graph).parameters:
        return f"{installed} has no {_AUTO}, so a graph would keep its first lengths", advice
    return None


def check_graphs(torch_npu: Any) -> None:
    """Raise ConfigError where steps are to be recorded and cannot be."""
    if why := why_no_graphs(torch_npu):
        raise ConfigError(SWITCH, ["; ".join(why)])


class GraphRecorder:
    """Records functions as NPU graphs, which share their memory; it is called as a `Record`.

    forget: drops what the device keeps for the other layers of a step. What was made before a
            recording would be read by it as it is, and never made anew.
    """

    def __init__(
        self, torch_npu: Any, torch_device: torch.device, forget: Callable[[], None]
    ) -> None:
        self._npu = torch_npu.npu
        self._torch_device = torch_device
        self._forget = forget
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        """Run a function once, so that operators are loaded, and then record it.

        Raises RuntimeError if it does what a graph cannot hold.
        """
        npu = self._npu
        with npu.device(self._torch_device):
            aside, current = npu.Stream(), npu.current_stream()
            aside.wait_stream(current)
            with npu.stream(aside):
                function()
            current.wait_stream(aside)
            with npu.stream(current):  # and back to it: a recording that fails stays on its own
                return self._recorded(function)

    def _recorded(self, function: Callable[[], Tensor]) -> tuple[Tensor, Replay]:
        graph = self._npu.NPUGraph()
        # Other threads prepare pictures meanwhile: what they ask of the driver is their own.
        options = {_AUTO: True, "capture_error_mode": "thread_local"}
        self._forget()
        try:
            with self._npu.graph(graph, pool=self._pool, **options):
                result = function()
        except RuntimeError as error:
            _leave(graph)
            raise RuntimeError(str(_first(error))) from error
        finally:
            self._forget()
        self._pool = graph.pool()
        return result, lambda context_lens: _replay(graph, context_lens)


def _replay(graph: Any, context_lens: Sequence[int]) -> None:
    graph.update(cpu_update_input=[{_LENGTHS: list(context_lens)}])  # one entry, for all layers
    graph.replay()


def _leave(graph: Any) -> None:
    """Let no later call be taken for one of a recording that failed.

    torch_npu ends the recording first; if that raises, it goes on watching for such calls.
    """
    mode = graph.graph_dispatch_mode
    if any(one is mode for one in _get_current_dispatch_mode_stack()):
        mode.__exit__(None, None, None)


def _first(error: BaseException) -> BaseException:
    """What a recording could not hold: ending it fails after that, and says less."""
    while isinstance(error.__context__, RuntimeError):
        error = error.__context__
    return error
