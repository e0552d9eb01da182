"""The ranks of a divided model as processes: started or found, joined, and watched over.

Rank 0 is this process. The others are started here (`children.py` runs this module), or by
torchrun. They meet at MASTER_ADDR:MASTER_PORT, on the loopback unless said otherwise; each then
holds a connection to rank 0, on which it is told what to compute, and a process group of torch for
sums. When one of them is gone, all are ended: what is left of a divided model is of no use.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import ipaddress
import logging
import os
import secrets
import selectors
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import Store

from glimt.children import start_child, start_children
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
_MAX_HELLO = 4096  # bytes of that
_JOIN_S = 30.0  # for the group to begin, once all have said that they join
_SUM_S = 300.0  # a sum that takes longer waits for a rank that lives but does not compute
_BEAT_S = 1.0  # between two signs of life of a rank
_SILENT_S = 30.0  # without one a rank stands still: stopped, or its machine is gone
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
    if not text.isdecimal() or int(text) > 65535:
        raise ConfigError(name, [f"is {text!r}; a whole number from 0 to 65535 is needed"])
    return int(text)


def _host(environment: Mapping[str, str]) -> str:
    """Where rank 0 is met. An IPv6 address may stand in brackets, as in a URL."""
    said = environment.get("MASTER_ADDR") or "127.0.0.1"
    return said[1:-1] if said.startswith("[") and said.endswith("]") else said


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be of any interface
        return False


# --- rank 0 ----------------------------------------------------------------------------------


class Ranks:
    """The other ranks, as rank 0 knows them.

    group: all of them, with sums; nobody until they have joined
    seat:  of rank 0 on this machine
    """

    def __init__(
        self,
        seat: Seat,
        channels: Mapping[int, Channel],
        processes: Mapping[int, subprocess.Popen[bytes]],
    ) -> None:
        """channels, processes: by rank; the processes are those that were started here."""
        self.group = Group()
        self.seat = seat
        self._channels = channels
        self._processes = processes
        self._failure = ""
        self._said: dict[int, dict[str, Message]] = {rank: {} for rank in channels}
        self._changed = threading.Condition()  # of the failure, and of what was said
        self._is_stopping = False
        self._watcher = threading.Thread(target=self._watch, name="glimt-ranks", daemon=True)
        self._watcher.start()
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

    def all_say(self, kind: str) -> list[Message]:
        """What each rank says of this kind, once all have said it. Raises RankError."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._failure or all(kind in said for said in self._said.values())
            )
        if self._failure:
            raise RankError(self._failure)
        return [said[kind] for said in self._said.values()]

    def why(self, error: Exception) -> RankError:
        """The rank that is gone, if one is; all of them are ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure, _WHY_S)
        self._break(f"rank 0 failed: {type(error).__name__}: {error}")
        return RankError(self._failure)

    def agree(self, num_blocks: int) -> int:
        """Give all ranks caches of one size, once they have loaded: what each has room for.

        num_blocks: what rank 0 has room for. Raises RankError with what one of them could not do.
        """
        offers = [int(message.values["num_blocks"]) for message in self.all_say("loaded")]
        agreed = min(num_blocks, *offers)
        self.tell(Message("cache", {"num_blocks": agreed}))
        return agreed

    def _watch(self) -> None:
        """Hear the ranks, and end all when one fails, hangs up or shows no sign of life.

        Silence is counted in looks of a bounded length: where this process stood still itself, as
        when its machine sleeps, nobody is to blame.
        """
        silent_s = dict.fromkeys(self._channels, 0.0)
        with selectors.DefaultSelector() as talking:
            for rank, channel in self._channels.items():
                talking.register(channel, selectors.EVENT_READ, rank)
            while not self._is_stopping and not self._failure:
                began_s = time.monotonic()
                heard = [key.data for key, _ in talking.select(_LOOK_S)]
                spent_s = min(time.monotonic() - began_s, 2 * _LOOK_S)
                silent_s = {r: 0.0 if r in heard else s + spent_s for r, s in silent_s.items()}
                for rank in heard:
                    self._hear(rank)
                rank, seconds = max(silent_s.items(), key=lambda item: item[1])
                if seconds > _SILENT_S:
                    self._break(f"rank {rank} stands still: no sign of life for {seconds:.0f} s")

    def _hear(self, rank: int) -> None:
        try:
            message = self._channels[rank].receive()
        except RankError:
            self._break(f"rank {rank} is gone{self._exit_text(rank)}")
            return
        if message.kind == "failed":
            self._break(f"rank {rank} failed: {message.values.get('why')}")
        with self._changed:
            self._said[rank][message.kind] = message
            self._changed.notify_all()

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
        with self._changed:
            if not self._failure:
                self._failure = failure
                log.error("the ranks are ended: %s", failure)
            self._changed.notify_all()
        for process in self._processes.values():
            process.kill()
        for channel in self._channels.values():
            channel.hang_up()

    def stop(self) -> None:
        """End the others, and forget the group. Does nothing the second time."""
        if self._is_stopping:
            return
        self._is_stopping = True
        atexit.unregister(self.stop)
        self._watcher.join()  # or it would look at connections that are closed
        _end_all(self._channels, self._processes)
        self.group.close()


def _end_all(
    channels: Mapping[int, Channel], processes: Mapping[int, subprocess.Popen[bytes]]
) -> None:
    """Tell the ranks to end, and end those that do not."""
    end_s = time.monotonic() + _END_S
    for channel in channels.values():
        channel.wait_at_most(_END_S)
        with contextlib.suppress(RankError):
            channel.send(Message("stop"))
        channel.close()
    for process in processes.values():
        try:
            process.wait(max(0.0, end_s - time.monotonic()))
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
        try:
            return _Start(config, place, host, listener).run()
        except BaseException as error:
            _let_go(error)
            raise


def _let_go(error: BaseException) -> None:
    """Forget what the failed calls were about, for the group and the store are among it.

    Whoever keeps the error, as an engine does, would keep the port where the ranks meet.
    """
    traceback.clear_frames(error.__traceback__)


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
        channels: dict[int, Channel] = {}
        processes: dict[int, subprocess.Popen[bytes]] = {}
        try:
            if self.place is None:
                self._start_processes(processes, store.port)
            self._accept_all(channels, processes, word)
        except BaseException:
            _end_all(channels, processes)
            raise
        ranks = Ranks(self._seat(), channels, processes)
        try:
            ranks.group = self._joined(ranks, store)
        except BaseException:
            ranks.stop()
            raise
        return ranks

    def _joined(self, ranks: Ranks, store: Store) -> Group:
        ranks.tell(Message("start", {"config": asdict(self.config)}))
        ranks.all_say("joins")  # the group waits for the whole of _JOIN_S for who does not
        try:
            return _join(self.config, store, 0, self.config.tp_size)
        except RuntimeError as error:
            raise ranks.why(error) from error

    def _seat(self) -> Seat:
        return self.place.seat if self.place else Seat(0, self.config.tp_size)

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

    def _start_processes(self, processes: dict[int, subprocess.Popen[bytes]], port: int) -> None:
        size = self.config.tp_size
        starts = {
            rank: partial(start_child, "glimt.ranks", _surroundings(rank, size, self.host, port))
            for rank in range(1, size)
        }
        start_children(starts, processes)

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
                self._greet(Channel(connection), channels, word)

    def _greet(self, channel: Channel, channels: dict[int, Channel], word: str) -> None:
        """Take in the rank at the other end; anybody else is hung up on."""
        with contextlib.suppress(RankError):
            values = channel.first(_MAX_HELLO, _GREET_S).values
            rank, said = values.get("rank", 0), str(values.get("word")).encode(errors="replace")
            is_free = rank in range(1, self.config.tp_size) and rank not in channels
            if secrets.compare_digest(said, word.encode()) and is_free:
                log.info("rank %d has come", rank)
                channels[rank] = channel
                return
        channel.close()


def _check_running(processes: Mapping[int, subprocess.Popen[bytes]]) -> None:
    for rank, process in processes.items():
        code = process.poll()
        if code is not None:
            raise EngineError(f"rank {rank} ended with status {code} before it was ready")


def _surroundings(rank: int, size: int, host: str, port: int) -> dict[str, str]:
    """What torchrun would tell a rank by its environment."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
    }


def _listener(host: str, port: int) -> socket.socket:
    """Listen there, on IPv4 where the name has both. Raises ConfigError naming what is wrong."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        said = f"is {host!r}, which is not found: {getattr(error, 'strerror', None) or error}"
        raise _no_address(said) from error
    families = {family for family, *_ in found}
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):  # this of low ports
            raise _no_address(f"is {host!r}, where nobody can listen: {reason}") from error
        place = f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"
        said = f"the ranks cannot meet at {place}: {reason}"
        raise ConfigError("MASTER_PORT", [f"{said}; choose another port"]) from error


def _no_address(said: str) -> ConfigError:
    advice = "give an address of this machine, as 192.0.2.7 or [::1], or unset it for the loopback"
    return ConfigError("MASTER_ADDR", [f"{said}; {advice}"])


def _join(config: EngineConfig, store: Store, rank: int, size: int) -> Group:
    backend = find_device(config.device).collectives
    if backend == "gloo" and _is_loopback(_host(os.environ)):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if not dist.is_initialized():
        # torch names a group by a count that one which failed to begin leaves behind. This process
        # would wait under "1" for ranks that, being new, wait under "0".
        distributed_c10d._world.group_count = 0
    # Nothing ends this wait but its time: of a rank that dies meanwhile only the watcher knows.
    patience = timedelta(seconds=_JOIN_S if backend == "gloo" else _SUM_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=patience)
    world = dist.group.WORLD
    assert world is not None, "init_process_group made it"
    if backend == "gloo":
        distributed_c10d._set_pg_timeout(timedelta(seconds=_SUM_S), world)
    return TorchGroup(world)


# --- the other ranks -------------------------------------------------------------------------


def serve_rank(place: Place) -> int:
    """Be a rank other than the first until rank 0 ends it. Returns the exit status."""
    patience = timedelta(seconds=_MEET_S)
    store = TCPStore(place.host, place.port, place.size, False, patience)
    host, port, word = store.get(_ADDRESS).decode().split()
    channel = Channel(socket.create_connection((host, int(port)), _MEET_S))
    channel.send(Message("hello", {"rank": place.rank, "word": word}))
    _show_life(channel)
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
    channel.send(Message("joins"))
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


def _show_life(channel: Channel) -> None:
    """Say again and again that this process is not stopped, whatever it computes meanwhile."""

    def beat() -> None:
        with contextlib.suppress(RankError):  # rank 0 is gone, which the others notice as well
            while True:
                channel.send(Message("alive"))
                time.sleep(_BEAT_S)

    threading.Thread(target=beat, name="glimt-life", daemon=True).start()


def main() -> int:
    """`python -m glimt.ranks`, as `children.py` and torchrun run it; returns the exit status."""
    place = Place.read(os.environ)
    if place is None or place.rank == 0:
        print("this is started by glimt with --tp, or by torchrun", file=sys.stderr)
        return 2
    return serve_rank(place)


if __name__ == "__main__":
    sys.exit(main())
