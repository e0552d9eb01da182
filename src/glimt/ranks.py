"""The ranks of a divided model as processes: started or found, joined, and watched over.

Rank 0 is this process. The others are started here (`python -m glimt.ranks`), or by torchrun. They
meet at MASTER_ADDR:MASTER_PORT, on the loopback unless said otherwise; each then holds a connection
to rank 0, on which it is told what to compute, and a process group of torch for sums. When one of
them is gone, all are ended: what is left of a divided model is of no use.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from glimt.config import EngineConfig
from glimt.devices.base import Seat, find_device
from glimt.errors import ConfigError, EngineError, GlimtError, RankError
from glimt.loader import OpenedModel, open_model
from glimt.memory_plan import plan_memory
from glimt.parallel import Group, TorchGroup
from glimt.runner.kv_cache import KVCaches, allocate_kv, cache_dtype
from glimt.runner.messages import Channel, Message
from glimt.runner.worker import Worker

log = logging.getLogger(__name__)

TCPStore: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch forgot to say that it is public

_MEET_S = 120.0  # until every rank has come; a loaded machine takes its time to import torch
_GREET_S = 5.0  # for a rank that is connected to say who it is
_SUM_S = 300.0  # a sum that takes longer is one whose rank stands still
_LOOK_S = 0.1  # between two looks at the others
_END_S = 5.0  # for a rank to end by itself
_WHY_S = 3.0  # to learn which rank made a sum fail
_ADDRESS = "glimt/channel"  # in the store: where rank 0 listens, and the word that opens it


@dataclass(frozen=True, slots=True)
class Place:
    """This process among the ranks, and where they meet."""

    rank: int
    size: int
    host: str
    port: int
    seat: Seat

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Place | None:
        """What torchrun, or rank 0, said; None if nobody did. Raises ConfigError."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        rank, size = (_whole(environment, name) for name in ("RANK", "WORLD_SIZE"))
        index = _whole(environment, "LOCAL_RANK", str(rank))
        seat = Seat(index, _whole(environment, "LOCAL_WORLD_SIZE", str(size)))
        return cls(rank, size, _host(environment), _whole(environment, "MASTER_PORT"), seat)


def _whole(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    if not text.isdigit() or int(text) > 65535:
        raise ConfigError(name, [f"is {text!r}; a whole number from 0 to 65535 is needed"])
    return int(text)


def _host(environment: Mapping[str, str]) -> str:
    return environment.get("MASTER_ADDR") or "127.0.0.1"


# --- rank 0 ----------------------------------------------------------------------------------


class Ranks:
    """The other ranks, as rank 0 knows them.

    group:     all of them, with sums
    seat:      of rank 0 on this machine
    processes: those that were started here, by rank
    """

    def __init__(
        self,
        group: Group,
        seat: Seat,
        channels: Mapping[int, Channel],
        processes: Mapping[int, subprocess.Popen[bytes]],
    ) -> None:
        self.group = group
        self.seat = seat
        self._channels = dict(channels)
        self._processes = dict(processes)
        self._failure = ""
        self._room: int | None = None  # cache blocks that each of the others can hold
        self._is_broken = threading.Event()
        self._is_stopping = False
        self._watcher: threading.Thread | None = None
        atexit.register(self.stop)  # of a program that forgets it

    @property
    def failure(self) -> str:
        """What happened to a rank that is gone; "" while all are well."""
        return self._failure

    def tell(self, message: Message) -> None:
        """Send to each rank. Raises RankError."""
        if self._failure:
            raise RankError(self._failure)
        for channel in self._channels.values():
            channel.send(message)

    def why(self, error: Exception) -> RankError:
        """The rank that is gone, if one is; all of them are ended."""
        self._is_broken.wait(_WHY_S)
        self._break(self._failure or f"rank 0 failed: {type(error).__name__}: {error}")
        return RankError(self._failure)

    def agree(self, num_blocks: int) -> int:
        """Give all ranks caches of one size, once they have loaded: what each has room for.

        num_blocks: what rank 0 has room for. Raises RankError with what one of them could not do.
        """
        if self._room is None:
            self._room = min(self._offer(rank) for rank in self._channels)
            self._watcher = threading.Thread(target=self._watch, name="glimt-ranks", daemon=True)
            self._watcher.start()
        agreed = min(self._room, num_blocks)
        self.tell(Message("cache", {"num_blocks": agreed}))
        return agreed

    def _offer(self, rank: int) -> int:
        """Cache blocks that a rank has room for, which it says when it has loaded."""
        message = self._channels[rank].receive()
        if message.kind != "loaded":
            self._break(f"rank {rank} failed: {message.values.get('why', message.kind)}")
            raise RankError(self._failure)
        return int(message.values["num_blocks"])

    def _watch(self) -> None:
        """Nothing comes from a rank that is well; see who hangs up, and say it."""
        by_socket = {channel.fileno(): rank for rank, channel in self._channels.items()}
        while not self._is_stopping and not self._failure:
            readable, _, _ = select.select(list(by_socket), [], [], _LOOK_S)
            for descriptor in readable:
                if not self._is_stopping:
                    self._break(self._last_words(by_socket[descriptor]))
                return

    def _last_words(self, rank: int) -> str:
        try:
            message = self._channels[rank].receive()
        except RankError:
            return f"rank {rank} is gone{self._exit_text(rank)}"
        return f"rank {rank} failed: {message.values.get('why', message.kind)}"

    def _exit_text(self, rank: int) -> str:
        process = self._processes.get(rank)
        if process is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(1.0)
            return f": killed by signal {-code}" if code < 0 else f": it ended with status {code}"
        return ""

    def _break(self, failure: str) -> None:
        """Remember the first failure and end all ranks: sums that wait for them then fail."""
        if not self._failure:
            self._failure = failure
            log.error("the ranks are ended: %s", failure)
        self._is_broken.set()
        for process in self._processes.values():
            process.kill()

    def stop(self) -> None:
        """End the others, and forget the group. Does nothing the second time."""
        if self._is_stopping:
            return
        self._is_stopping = True
        atexit.unregister(self.stop)
        for channel in self._channels.values():
            with contextlib.suppress(RankError):
                channel.send(Message("stop"))
            channel.close()
        end_s = time.monotonic() + _END_S
        for process in self._processes.values():
            _end(process, end_s - time.monotonic())
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join()
        self.group.close()


def _end(process: subprocess.Popen[bytes], patience_s: float) -> None:
    try:
        process.wait(max(0.0, patience_s))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def open_on_ranks(config: EngineConfig) -> OpenedModel:
    """Open a model here and, where it is to be divided, on the other ranks, which then load.

    Raises what `open_model` and `start_ranks` raise.
    """
    if config.tp_size == 1:
        return open_model(config)
    ranks = start_ranks(config)
    try:
        return replace(open_model(config, ranks.group, ranks.seat), ranks=ranks)
    except BaseException:
        ranks.stop()
        raise


def start_ranks(config: EngineConfig) -> Ranks:
    """Start the other ranks, or meet those that torchrun started, and join them.

    config: with tp_size over 1. Raises ConfigError, or EngineError if they do not come.
    """
    find_device(config.device)  # before processes are started that could only say so one by one
    if dist.is_initialized():
        said = "a divided model runs in this process already; close it first"
        raise ConfigError("tp_size", [said])
    place = Place.read(os.environ)
    if place is not None and place.size != config.tp_size:
        said = f"is {config.tp_size}, but torchrun started {place.size} ranks: make them equal"
        raise ConfigError("tp_size", [said])
    host = _host(os.environ)
    with _listener(host, 0) as listener:
        return _Start(config, place, host, listener).run()


@dataclass(frozen=True, slots=True, eq=False)
class _Start:
    """One start of the ranks; place: given by torchrun."""

    config: EngineConfig
    place: Place | None
    host: str
    listener: socket.socket

    def run(self) -> Ranks:
        store = self._store()
        word = secrets.token_hex(16)
        store.set(_ADDRESS, f"{self.host} {self.listener.getsockname()[1]} {word}")
        processes = {} if self.place else self._start_processes(store.port)
        channels: dict[int, Channel] = {}
        seat = self.place.seat if self.place else Seat(0, self.config.tp_size)
        try:
            self._accept_all(channels, processes, word)
            told = Message("start", {"config": asdict(self.config)})
            for channel in channels.values():
                channel.send(told)
            group = _join(self.config, store, 0, self.config.tp_size)
        except BaseException:
            Ranks(Group(), seat, channels, processes).stop()
            raise
        return Ranks(group, seat, channels, processes)

    def _store(self) -> Any:
        size, patience = self.config.tp_size, timedelta(seconds=_MEET_S)
        if self.place is not None:
            return TCPStore(self.place.host, self.place.port, size, False, patience)
        port = _whole(os.environ, "MASTER_PORT", "0")
        bound = _listener(self.host, port)  # by us: torch's own would listen on every interface
        port = bound.getsockname()[1]
        return TCPStore(
            self.host, port, size, True, patience, False, master_listen_fd=bound.detach()
        )

    def _start_processes(self, port: int) -> dict[int, subprocess.Popen[bytes]]:
        size = self.config.tp_size
        return {rank: _start_process(rank, size, self.host, port) for rank in range(1, size)}

    def _accept_all(
        self,
        channels: dict[int, Channel],
        processes: Mapping[int, subprocess.Popen[bytes]],
        word: str,
    ) -> None:
        end_s = time.monotonic() + _MEET_S
        self.listener.settimeout(_LOOK_S)
        while len(channels) < self.config.tp_size - 1:
            _check_running(processes)
            if time.monotonic() > end_s:
                missing = sorted({*range(1, self.config.tp_size)} - channels.keys())
                raise EngineError(f"ranks {missing} did not come within {_MEET_S:.0f} s")
            with contextlib.suppress(TimeoutError):
                connection, _ = self.listener.accept()
                rank = _greeted(Channel(connection), word, channels)
                log.info("rank %s has come", rank)


def _check_running(processes: Mapping[int, subprocess.Popen[bytes]]) -> None:
    for rank, process in processes.items():
        code = process.poll()
        if code is not None:
            raise EngineError(f"rank {rank} ended with status {code} before it was ready")


def _greeted(channel: Channel, word: str, channels: dict[int, Channel]) -> int | None:
    """The rank at the other end; anybody else is hung up on."""
    channel.wait_at_most(_GREET_S)
    try:
        message = channel.receive()
    except RankError:
        channel.close()
        return None
    channel.wait_at_most(None)
    rank, said = message.values.get("rank"), str(message.values.get("word"))
    if not secrets.compare_digest(said, word) or not isinstance(rank, int) or rank in channels:
        channel.close()
        return None
    channels[rank] = channel
    return rank


def _start_process(rank: int, size: int, host: str, port: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        "GLIMT_PARENT": str(os.getpid()),
    }
    # In a session of its own: Ctrl-C is rank 0's to answer, which then ends the others.
    return subprocess.Popen(
        [sys.executable, "-m", "glimt.ranks"],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        said = f"the ranks cannot meet at {host}:{port}: {error.strerror or error}"
        raise ConfigError("MASTER_PORT", [f"{said}; choose another port"]) from error


def _join(config: EngineConfig, store: Store, rank: int, size: int) -> Group:
    backend = find_device(config.device).collectives
    if backend == "gloo" and _host(os.environ).startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=_SUM_S)
    )
    world = dist.group.WORLD
    assert world is not None, "init_process_group made it"
    return TorchGroup(world)


# --- the other ranks -------------------------------------------------------------------------


def serve_rank(place: Place) -> int:
    """Be a rank other than the first until rank 0 ends it. Returns the exit status."""
    patience = timedelta(seconds=_MEET_S)
    store = TCPStore(place.host, place.port, place.size, False, patience)
    host, port, word = store.get(_ADDRESS).decode().split()
    channel = Channel(socket.create_connection((host, int(port)), _MEET_S))
    channel.send(Message("hello", {"rank": place.rank, "word": word}))
    _end_with(os.environ.get("GLIMT_PARENT"))
    try:
        _serve(channel, store, place)
    except RankError as error:
        log.warning("%s", error)
        return 1
    except Exception as error:  # whatever it is, rank 0 says it to the user
        why = str(error) if isinstance(error, GlimtError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RankError):
            channel.send(Message("failed", {"why": why}))
        return 1
    return 0


def _serve(channel: Channel, store: Store, place: Place) -> None:
    config = EngineConfig.from_dict(channel.receive().values["config"])
    group = _join(config, store, place.rank, place.size)
    try:
        _work(channel, config, group, place.seat)
    finally:
        group.close()


def _work(channel: Channel, config: EngineConfig, group: Group, seat: Seat) -> None:
    opened = open_model(config, group, seat)
    opened.load()
    offer, _ = plan_memory(config, opened.model, opened.device, opened.dtype, opened.max_model_len)
    channel.send(Message("loaded", {"num_blocks": offer}))
    where = opened.device.torch_device
    stored = cache_dtype(config.kv_dtype, opened.dtype)

    def allocate(num_blocks: int) -> KVCaches:
        block_size = opened.device.block_size(config.block_size)
        return allocate_kv(opened.model, num_blocks, block_size, stored, opened.device)

    Worker(opened.model, allocate, group, where, opened.dtype).serve(channel)


def _end_with(parent: str | None) -> None:
    """End when rank 0 does, also in the midst of a sum that waits for it."""
    if parent is None:
        return

    def watch() -> None:
        while str(os.getppid()) == parent:
            time.sleep(_LOOK_S)
        os._exit(1)

    threading.Thread(target=watch, name="glimt-parent", daemon=True).start()


def main() -> int:
    """`python -m glimt.ranks`, as rank 0 starts it; returns the exit status."""
    place = Place.read(os.environ)
    if place is None or place.rank == 0:
        print("this is started by glimt with --tp, or by torchrun", file=sys.stderr)
        return 2
    return serve_rank(place)


if __name__ == "__main__":
    sys.exit(main())
