"""What goes between ranks: values and arrays as they were, and nothing else is believed."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator

import numpy as np
import pytest

from glimt.errors import RankError
from glimt.runner.messages import Channel, Message


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
        with one, other:
            yield one, other


def test_values_and_arrays_arrive_as_they_were(ends: tuple[socket.socket, socket.socket]) -> None:
    """Catches a lost shape or dtype, and an empty array that shifts the next one."""
    arrays = {
        "none": np.empty((0, 3), dtype=np.int64),
        "pixels": np.arange(24, dtype=np.uint8).reshape(2, 4, 3)[:, ::2],
        "ids": np.array([-1, 2**40]),
    }
    Channel(ends[0]).send(Message("forward", {"shape": [2, 3], "名": "字"}, arrays))
    Channel(ends[0]).send(Message("stop"))
    reader = Channel(ends[1])
    found = reader.receive()
    assert (found.kind, found.values) == ("forward", {"shape": [2, 3], "名": "字"})
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        assert found.arrays[name].dtype == array.dtype
    assert reader.receive().kind == "stop"


def test_a_connection_waits_for_ever_unless_told(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    """Catches a rank of an idle server that ends after the time it had to connect."""
    ends[1].settimeout(120)
    channel = Channel(ends[1])
    assert ends[1].gettimeout() is None
    channel.wait_at_most(0.01)
    with pytest.raises(RankError, match="timed out"):
        channel.receive()


def framed(head: object) -> bytes:
    text = json.dumps(head).encode()
    return struct.pack("<I", len(text)) + text


@pytest.mark.parametrize(
    "said",
    [
        struct.pack("<I", 2**31),
        struct.pack("<I", 4) + b"\xff\xfe{}",
        framed([1, 2]),
        framed({"kind": "x"}),
        framed({"kind": "x", "values": {}, "arrays": {"a": ["object", [1]]}}),
        framed({"kind": "x", "values": {}, "arrays": {"a": ["int64", [-1]]}}),
        framed({"kind": "x", "values": {}, "arrays": {"a": ["int64", [2**40]]}}),
        framed({"kind": "x", "values": {}, "arrays": {"a": ["int64", "no"]}}),
        framed({"kind": "x", "values": {}, "arrays": {"a": ["int64", [0, 10**30]]}}),
        framed({"kind": "x", "values": [1], "arrays": {}}),
        struct.pack("<I", 10**5) + b"[" * 10**5,
    ],
)
def test_nonsense_is_refused(said: bytes, ends: tuple[socket.socket, socket.socket]) -> None:
    """Catches memory taken for whatever a stranger announces, and a traceback for the user."""
    ends[0].sendall(said)
    with pytest.raises(RankError):
        Channel(ends[1]).receive()


def test_a_peer_that_hangs_up_is_noticed(ends: tuple[socket.socket, socket.socket]) -> None:
    """Catches a rank that waits for ever for the rest of a message."""
    ends[0].sendall(framed({"kind": "x", "values": {}, "arrays": {"a": ["int64", [4]]}}) + b"half")
    ends[0].close()
    with pytest.raises(RankError, match="closed"):
        Channel(ends[1]).receive()


def test_only_the_first_message_is_bounded(ends: tuple[socket.socket, socket.socket]) -> None:
    """Catches a bound that a picture then breaks, or a wait that ends while nothing is to do."""
    speaker, reader = Channel(ends[0]), Channel(ends[1])
    speaker.send(Message("hello", {"rank": 1}))
    assert reader.first(100, 5.0).values == {"rank": 1}
    assert ends[1].gettimeout() is None
    speaker.send(Message("pixels", arrays={"0": np.zeros(1000, dtype=np.uint8)}))
    assert reader.receive().arrays["0"].nbytes == 1000
    speaker.send(Message("hello", {"text": "x" * 100}))
    with pytest.raises(RankError, match="bytes"):
        reader.first(100, 5.0)
