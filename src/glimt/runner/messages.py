"""Messages between the ranks of a group: a few named plain values and arrays. No pickle anywhere.

A message is a line of JSON that names its kind, its values and its arrays, and then the arrays'
bytes one after the other. A peer that closes its end, or says nothing sensible, raises RankError.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from glimt.errors import RankError

_LENGTH = struct.Struct("<I")  # of the JSON that follows
_MAX_JSON = 64 * 2**20
_MAX_ARRAY = 2**33  # bytes
_DTYPES = ("int64", "int32", "uint8", "float32", "bool")


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """What one rank tells another.

    values: of JSON; arrays: by name, of the dtypes int64, int32, uint8, float32 and bool
    """

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


class Channel:
    """One end of a connection between two ranks. Any thread may send, one alone receives."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._sending = threading.Lock()
        self._left = math.inf  # bytes that are still taken
        self._end_s: float | None = None  # when they must have come
        self.wait_at_most(None)  # an idle rank hears nothing for days

    def wait_at_most(self, seconds: float | None) -> None:
        """After so long without a byte the peer counts as gone; None: never."""
        self._connection.settimeout(seconds)

    def first(self, max_bytes: int, seconds: float) -> Message:
        """The first message, of a peer that nobody knows yet; what follows has no such limits.

        Raises RankError where it is not there, whole and small, in time.
        """
        self._left, self._end_s = max_bytes, time.monotonic() + seconds
        message = self.receive()
        self._left, self._end_s = math.inf, None
        self.wait_at_most(None)
        return message

    def fileno(self) -> int:
        """The descriptor, to wait on with others."""
        return self._connection.fileno()

    def send(self, message: Message) -> None:
        """Give a message to the system. Raises RankError if the peer is gone."""
        arrays = {name: np.ascontiguousarray(a) for name, a in message.arrays.items()}
        described = {name: [a.dtype.name, list(a.shape)] for name, a in arrays.items()}
        head = {"kind": message.kind, "values": dict(message.values), "arrays": described}
        text = json.dumps(head, separators=(",", ":")).encode()
        try:
            with self._sending:
                self._connection.sendall(_LENGTH.pack(len(text)) + text)
                for array in arrays.values():
                    self._connection.sendall(array.data.cast("B") if array.size else b"")
        except OSError as error:
            raise RankError(f"the connection to another rank broke: {error}") from error

    def receive(self) -> Message:
        """Wait for the next message. Raises RankError if the peer is gone or talks nonsense."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > _MAX_JSON:
            raise RankError(f"another rank announced a message of {length} bytes")
        try:
            head = json.loads(bytes(self._read(length)))
            kind, values, described = str(head["kind"]), {**head["values"]}, head["arrays"]
            arrays = {name: self._array(*one) for name, one in described.items()}
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise RankError(f"another rank sent no message of glimt: {error}") from error
        except RecursionError as error:
            raise RankError("another rank sent a message that is nested too deeply") from error
        return Message(kind, values, arrays)

    def _array(self, dtype: str, shape: Sequence[int]) -> np.ndarray:
        if dtype not in _DTYPES:
            raise ValueError(f"an array of {dtype!r}")
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        if min(shape, default=0) < 0 or nbytes > _MAX_ARRAY:
            raise ValueError(f"an array of the shape {shape}")
        return np.frombuffer(self._read(nbytes), dtype=dtype).reshape(shape)

    def _read(self, nbytes: int) -> bytearray:
        if nbytes > self._left:
            raise RankError(f"another rank announced {nbytes} bytes, {self._left} are taken")
        self._left -= nbytes
        data = bytearray(nbytes)
        view, done = memoryview(data), 0
        while done < nbytes:
            try:
                if self._end_s is not None:
                    self.wait_at_most(max(0.001, self._end_s - time.monotonic()))
                count = self._connection.recv_into(view[done:])
            except OSError as error:
                raise RankError(f"the connection to another rank broke: {error}") from error
            if not count:
                raise RankError("another rank closed the connection")
            done += count
        return data

    def hang_up(self) -> None:
        """End what other threads do here, and what the peer waits for: all of it then raises."""
        with suppress(OSError):  # the peer has done so
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up; the peer's next `receive` raises. No other thread may be at work here."""
        self._connection.close()
