"""The ranks of a divided model as real processes: the same answers, and no hang when one dies."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import glimt
import glimt.ranks as ranks_module
from conftest import run_greedy
from glimt import EngineConfig, SamplingParams
from glimt.commands.quantize import plan_quantize, quantize
from glimt.devices.base import Seat
from glimt.engine import Engine
from glimt.errors import ConfigError, EngineError, RankError
from glimt.quant.plan import QuantOptions
from glimt.ranks import Place, Ranks, TCPStore, start_ranks
from glimt.runner.messages import Channel, Message
from processes import is_running, rank_pids, wait_until_gone

PICTURE = Path(__file__).parents[1] / "examples" / "house.png"
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=480, ignore_eos=True)


def chats() -> list[list[dict[str, object]]]:
    """With a picture and without one."""
    shown = [{"type": "image", "image": str(PICTURE)}, {"type": "text", "text": "What is this?"}]
    return [[{"role": "user", "content": shown}], [{"role": "user", "content": "Hello"}]]


def answers(folder: Path, **options: object) -> list[tuple[int, ...]]:
    llm = glimt.LLM(str(folder), dtype="float32", kv_bytes=2**24, **options)
    try:
        return [output.token_ids for output in llm.chat(chats(), GREEDY)]
    finally:
        llm.close()


@pytest.fixture
def divided(folders: dict[str, Path]) -> Iterator[glimt.AsyncEngine]:
    config = EngineConfig(
        model=str(folders["glm4v_9b"]), dtype="float32", tp_size=2, kv_bytes=2**26
    )
    engine = glimt.AsyncEngine.load(config)
    yield engine
    engine.close()


def test_two_processes_answer_as_one(folder: Path) -> None:
    """Catches what only the real way can lose: pictures, positions, cleared blocks, padding."""
    assert answers(folder, tp_size=2) == answers(folder)


def test_drafts_chunks_and_slices_are_led_too(folder: Path) -> None:
    """Catches calls that rank 0 makes alone: chunks, drafts, a picture in slices, a small pool."""
    options = {"max_num_batched_tokens": 24, "num_draft_tokens": 3, "num_blocks": 24}
    assert answers(folder, tp_size=2, tower_slice_patches=1, **options) == answers(folder)


@pytest.mark.parametrize("name", ["int8", "int4-g32"])
def test_quantised_checkpoints_are_divided_too(folder: Path, tmp_path: Path, name: str) -> None:
    """Catches a matrix whose scales stay behind when its rows go to another rank."""
    options = QuantOptions(blocks=name, tower="int8")
    quantize(plan_quantize(folder, tmp_path / "q", options, force=False))
    assert answers(tmp_path / "q", tp_size=2) == answers(tmp_path / "q")


def test_a_killed_rank_ends_every_request_and_every_rank(divided: glimt.AsyncEngine) -> None:
    """Catches a hang in a sum, a request without an end, an orphan."""
    (other,) = rank_pids(divided)

    async def ask() -> Exception:
        request = await divided.prepare_chat(chats()[1], LONG)
        try:
            async for output in divided.stream(request):
                if output.token_ids:
                    with suppress(ProcessLookupError):  # by another of the requests
                        os.kill(other, signal.SIGKILL)
        except EngineError as error:
            return error
        raise AssertionError("it ended as if nothing had happened")

    async def ask_all() -> list[Exception]:
        return await asyncio.wait_for(asyncio.gather(*(ask() for _ in range(3))), 60)

    for error in asyncio.run(ask_all()):
        assert "rank 1 is gone: killed by signal 9" in str(error)
    assert not divided.is_alive
    with pytest.raises(ProcessLookupError):
        os.kill(other, 0)


def test_a_rank_that_dies_while_nothing_runs_is_noticed(divided: glimt.AsyncEngine) -> None:
    """Catches a server that says that it is well, and fails its next request."""
    os.kill(rank_pids(divided)[0], signal.SIGKILL)

    async def wait() -> None:
        while divided.is_alive:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(wait(), 60))
    assert "rank 1 is gone" in divided.failure


def test_a_rank_that_is_stopped_is_noticed(
    divided: glimt.AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a request that waits for a sum, or for room to say something, for minutes."""
    (other,) = rank_pids(divided)
    os.kill(other, signal.SIGSTOP)
    monkeypatch.setattr(ranks_module, "_SILENT_S", 4.0)
    try:
        with pytest.raises(EngineError, match="rank 1 stands still"):
            asyncio.run(asyncio.wait_for(divided.chat(chats()[1], GREEDY), 60))
    finally:
        with suppress(ProcessLookupError):
            os.kill(other, signal.SIGCONT)  # one that nobody has noticed
    while is_running(other):
        pass


def connected() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        far = socket.create_connection(server.getsockname())
        return server.accept()[0], far


@pytest.fixture
def talk() -> Iterator[tuple[Ranks, Channel]]:
    """Rank 0's side, and the end at which rank 1 would be. Descriptors are as in a busy server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    near, far = connected()
    high = socket.socket(fileno=fcntl.fcntl(near, fcntl.F_DUPFD, 1100))
    near.close()
    ranks = Ranks(Seat(0, 2), {1: Channel(high)}, {})
    with far:
        yield ranks, Channel(far)
    ranks.stop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_signs_of_life_are_enough(
    talk: tuple[Ranks, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a false alarm while a rank computes, and a sign that is given only once."""
    monkeypatch.setattr(ranks_module, "_SILENT_S", 1.0)
    monkeypatch.setattr(ranks_module, "_BEAT_S", 0.01)
    ranks, far = talk
    ranks_module._show_life(far)
    time.sleep(2.5)
    far.send(Message("loaded", {"num_blocks": 7}))
    assert ranks.agree(9) == 7
    assert far.receive().values == {"num_blocks": 7}
    assert ranks.failure == ""


def test_a_rank_behind_a_high_descriptor_is_missed(talk: tuple[Ranks, Channel]) -> None:
    """Catches a watcher that ends in silence in a server with a thousand connections."""
    ranks, far = talk
    far.close()
    with pytest.raises(RankError, match="rank 1 is gone"):
        ranks.all_say("loaded")


def test_a_rank_that_dies_before_it_joins_is_noticed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches five minutes in which the group waits for a rank that has come and is gone."""
    begun = Ranks.all_say

    def all_say(ranks: Ranks, kind: str) -> list[Message]:
        ranks._processes[1].kill()
        return begun(ranks, kind)

    monkeypatch.setattr(Ranks, "all_say", all_say)
    with pytest.raises(RankError, match="rank 1 is gone: killed by signal 9"):
        start_ranks(EngineConfig(model=str(folders["glm4v_9b"]), tp_size=2))


def test_a_rank_that_dies_while_the_group_begins_is_noticed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches five minutes in which rank 0 waits for a rank that said that it joins, and a start
    after it that waits under another name.
    """
    config = EngineConfig(model=str(folders["glm4v_9b"]), tp_size=2)
    begun = Ranks.all_say

    def all_say(ranks: Ranks, kind: str) -> list[Message]:
        said = begun(ranks, kind)
        ranks._processes[1].kill()
        return said

    with monkeypatch.context() as patch:
        patch.setattr(ranks_module, "_JOIN_S", 2.0)
        patch.setattr(Ranks, "all_say", all_say)
        with pytest.raises(RankError, match="rank 1 is gone: killed by signal 9"):
            start_ranks(config)
    start_ranks(config).stop()


def test_a_sum_waits_longer_than_the_group_does_to_begin(folders: dict[str, Path]) -> None:
    """Catches the short patience of the beginning in a sum behind a long computation."""
    assert ranks_module._JOIN_S < ranks_module._SUM_S
    ranks = start_ranks(EngineConfig(model=str(folders["glm4v_9b"]), tp_size=2))
    world = dist.group.WORLD
    assert world is not None
    backend = world._get_backend(torch.device("cpu"))
    assert backend.options._timeout == timedelta(seconds=ranks_module._SUM_S)
    ranks.stop()


@pytest.mark.parametrize("device", ["abacus", "cuda", "npu"])
def test_a_device_that_is_not_here_is_named(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of torch's, which knows no sums for what is not there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=f"^device: .*{device}"):
        start_ranks(EngineConfig(model="demo", tp_size=2, device=device))


@pytest.mark.parametrize("is_stopped", [False, True])
def test_ranks_end_with_the_first(folders: dict[str, Path], is_stopped: bool) -> None:
    """Catches orphans of a program that is killed and can end nothing itself."""
    program = (
        "import sys, time, glimt\n"
        "llm = glimt.LLM(sys.argv[1], tp_size=2, kv_bytes=2**24)\n"
        "print(*[p.pid for p in llm.engine.opened.ranks._processes.values()], flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(folders["glm4v_9b"])], stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        (other,) = map(int, first.stdout.readline().split())
        if is_stopped:
            os.kill(other, signal.SIGSTOP)
        first.kill()
    wait_until_gone(other)


def test_ranks_meet_again_where_others_failed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a server with a MASTER_PORT of its own that cannot start its ranks again, because
    the error that it keeps keeps the port.
    """
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    config = EngineConfig(model=str(folders["glm4v_9b"]), tp_size=2, kv_bytes=2**24)
    kept: list[Exception] = []
    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "all_say", lambda ranks, kind: 1 / 0)
        with pytest.raises(ZeroDivisionError) as failed:
            start_ranks(config)
    kept.append(failed.value)
    engine = Engine.load(config)
    ranks = engine.opened.ranks
    assert isinstance(ranks, Ranks)
    ranks._processes[1].kill()
    with pytest.raises(RankError) as failed:
        run_greedy(engine, engine.prepare_chat(chats()[0], GREEDY))
    kept.append(failed.value)
    engine.close()
    start_ranks(config).stop()


def test_ranks_meet_after_a_group_that_did_not_begin(folders: dict[str, Path]) -> None:
    """Catches ranks that wait for each other under two names for the whole of five minutes,
    because one died while another group began.
    """
    with pytest.raises(RuntimeError):
        dist.init_process_group(
            "gloo", store=dist.HashStore(), rank=0, world_size=2, timeout=timedelta(seconds=1)
        )
    config = EngineConfig(model=str(folders["glm4v_9b"]), tp_size=2, kv_bytes=2**24)
    start_ranks(config).stop()


def test_torchrun_starts_the_ranks_instead(folders: dict[str, Path]) -> None:
    """Catches ranks that each answer the command for themselves, or that never end."""
    told = ["generate", "--model", str(folders["glm4v_9b"]), "--prompt", "Hello", "--tp", "2"]
    settings = ["--dtype", "float32", "--temperature", "0", "--max-tokens", "12", "--ignore-eos"]
    settings += ["--json", "--prompt-logprobs", "1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    started = subprocess.run(
        [*torchrun, "--master-port", str(free_port()), "-m", "glimt", *told, *settings],
        capture_output=True,
        timeout=280,
        check=True,
    )
    alone = subprocess.run(
        [sys.executable, "-m", "glimt", *told[:-1], "1", *settings],
        capture_output=True,
        timeout=280,
        check=True,
    )
    divided, whole = json.loads(started.stdout), json.loads(alone.stdout)
    assert divided["token_ids"] == whole["token_ids"]
    assert len(whole["token_ids"]) == 12
    scores = [[each["logprob"] for each in said["prompt_logprobs"]] for said in (divided, whole)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_a_port_in_use_is_named(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback of a socket where a setting is wrong."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=f"MASTER_PORT.*127.0.0.1:{port}"):
            start_ranks(EngineConfig(model=str(folders["glm4v_9b"]), tp_size=2))


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")


@needs_ipv6
@pytest.mark.parametrize("address", ["::1", "[::1]"])
def test_ranks_meet_over_ipv6(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    """Catches an address that a socket of IPv4, or a ':' between host and port, does not take."""
    alone = answers(folders["glm4v_9b"])
    monkeypatch.setenv("MASTER_ADDR", address)
    assert answers(folders["glm4v_9b"], tp_size=2) == alone


@needs_ipv6
def test_torchrun_meets_over_ipv6(folders: dict[str, Path]) -> None:
    """Catches a rank of torchrun's that looks for the store, or for rank 0, by another name."""
    told = ["generate", "--model", str(folders["glm4v_9b"]), "--prompt", "Hello", "--tp", "2"]
    program = [sys.executable, "-m", "glimt", *told, "--temperature", "0", "--max-tokens", "4"]
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
    where = {"MASTER_ADDR": "::1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    # As torchrun sets it up: the store is held by who starts the ranks.
    store = TCPStore("::1", port, 2, True, wait_for_workers=False)
    ranks = [
        subprocess.Popen(program, env=os.environ | where | {"RANK": rank}, stdout=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    said = [rank.communicate(timeout=280)[0] for rank in ranks]
    del store
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert said[0].strip()
    assert not said[1]


@needs_ipv6
def test_a_port_in_use_over_ipv6_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ::1:29500, in which nobody finds the port."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "::1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ConfigError, match=rf"MASTER_PORT.*\[::1\]:{port}: Address .* in use"):
            start_ranks(EngineConfig(model="demo", tp_size=2))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("192.0.2.1", "is '192.0.2.1', where nobody can listen: "),
        ("no..name", "is 'no..name', which is not found: "),
        ("[::1", r"is '\[::1', which is not found: "),
    ],
)
def test_an_address_that_is_none_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str, said: str
) -> None:
    """Catches another setting blamed, and a traceback."""
    known = socket.getaddrinfo

    def without_asking(host: str, *given: object, **options: object) -> list[object]:
        if host.startswith("["):  # no name server is asked in a test
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(host, *given, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", without_asking)
    monkeypatch.setenv("MASTER_ADDR", address)
    with pytest.raises(ConfigError, match=f"^MASTER_ADDR: {said}.*; give an address of this mach"):
        start_ranks(EngineConfig(model="demo", tp_size=2))


@pytest.mark.parametrize("size", [0, 3, 16, True, "2", None])
def test_only_sizes_that_divide_the_models_are_taken(size: object) -> None:
    """Catches a size that would fail later, in the midst of loading."""
    with pytest.raises(ConfigError, match="tp_size"):
        EngineConfig(model="demo", tp_size=size)  # type: ignore[arg-type]


def test_a_rank_that_cannot_start_is_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches two minutes of waiting for a process that ended at once."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EngineError, match="rank 1 ended with status 1 before it was ready"):
        glimt.LLM(str(folders["glm4v_9b"]), tp_size=2)


def test_torchruns_ranks_must_be_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches ranks that wait for others who never come."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun started 4 ranks"):
        start_ranks(EngineConfig(model="demo", tp_size=2))


def test_wrong_words_of_torchrun_are_named() -> None:
    """Catches a traceback of int()."""
    with pytest.raises(ConfigError, match=r"MASTER_PORT.*'x'"):
        Place.read({"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "x"})
    assert Place.read({"RANK": "1"}) is None


def test_a_failure_of_the_first_rank_ends_all(
    divided: glimt.AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches ranks that wait in a sum for one that has given up, and a request tried again."""
    model = divided.engine.opened.model
    monkeypatch.setattr(model, "logits", lambda hidden: 1 / 0)
    (other,) = rank_pids(divided)
    with pytest.raises(EngineError, match="rank 0 failed: ZeroDivisionError"):
        asyncio.run(asyncio.wait_for(divided.chat(chats()[1], GREEDY), 60))
    assert not divided.is_alive
    while is_running(other):
        pass


def test_a_stranger_is_hung_up_on(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches anybody on this machine who could take a rank's place, or keep it waiting."""
    begun = ranks_module._Start._accept_all
    answers: list[bytes] = []

    def accept(start: ranks_module._Start, *given: object) -> None:
        address = start.listener.getsockname()
        with socket.create_connection(address), socket.create_connection(address) as stranger:
            Channel(stranger).send(Message("hello", {"rank": 1, "word": "guess"}))
            begun(start, *given)  # type: ignore[arg-type]
            answers.append(stranger.recv(1))

    monkeypatch.setattr(ranks_module._Start, "_accept_all", accept)
    llm = glimt.LLM(str(folders["glm4v_9b"]), tp_size=2, kv_bytes=2**24)
    llm.close()
    assert answers == [b""]


def framed(head: object) -> bytes:
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<I", len(text)) + text


def hello(values: object, **arrays: object) -> bytes:
    return framed({"kind": "hello", "values": values, "arrays": arrays})


@pytest.mark.parametrize(
    "said",
    [
        hello({"rank": 1, "word": "wörd"}),
        hello({"rank": 1, "word": "\ud800"}),
        hello({"rank": 2, "word": "word"}),
        hello({"rank": 0, "word": "word"}),
        hello({"rank": [1], "word": "word"}),
        hello(["word"]),
        hello({"rank": 1, "word": "word"}, pixels=["uint8", [4097]]),
        hello({"rank": 1, "word": "word", "more": "x" * 4096}),
        framed(b"[" * 4000),
    ],
)
def test_what_a_stranger_says_ends_nothing(said: bytes) -> None:
    """Catches a start that fails for a stranger's words, and memory that he asks for."""
    start = ranks_module._Start(
        EngineConfig(model="demo", tp_size=2), None, "127.0.0.1", socket.socket()
    )
    channels: dict[int, Channel] = {}
    with start.listener:
        for words, found in ((said, []), (hello({"rank": 1, "word": "word"}), [1])):
            near, far = connected()
            with far:
                far.sendall(words)
                start._greet(Channel(near), channels, "word")
            assert list(channels) == found
    channels[1].close()


def test_who_says_hello_by_single_bytes_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stranger for whom the start waits as long as he likes."""
    monkeypatch.setattr(ranks_module, "_GREET_S", 0.2)
    start = ranks_module._Start(
        EngineConfig(model="demo", tp_size=2), None, "127.0.0.1", socket.socket()
    )
    channels: dict[int, Channel] = {}
    near, far = connected()
    is_over = threading.Event()

    def drip() -> None:
        for byte in itertools.chain(framed(b" " * 400)[:4], itertools.repeat(32)):
            if is_over.wait(0.05):
                return
            far.send(bytes([byte]))

    stranger = threading.Thread(target=drip)
    stranger.start()
    with start.listener, far:
        start._greet(Channel(near), channels, "word")
        is_over.set()
        stranger.join()
    assert channels == {}
    assert near.fileno() == -1


def test_a_second_divided_model_in_a_process_is_refused(divided: glimt.AsyncEngine) -> None:
    """Catches two groups of ranks whose sums go astray."""
    with pytest.raises(ConfigError, match="close it first"):
        start_ranks(EngineConfig(model="demo", tp_size=2))


def test_a_cancelled_picture_is_left_by_all(folder: Path) -> None:
    """Catches a tower run that stays with the other ranks, or that they go on with alone."""
    shown = chats()[0]
    config = EngineConfig(
        model=str(folder), dtype="float32", tp_size=2, kv_bytes=2**26, tower_slice_patches=1
    )
    engine = Engine.load(config)
    try:
        first = engine.prepare_chat(chats()[1], LONG)
        engine.add_request(first)
        engine.step()
        second = engine.prepare_chat(shown, GREEDY)
        engine.add_request(second)
        engine.step()
        engine.abort(second.request_id)
        engine.step()
        engine.abort(first.request_id)
        found = run_greedy(engine, engine.prepare_chat(shown, GREEDY))
    finally:
        engine.close()
    assert tuple(found) == answers(folder)[0]
