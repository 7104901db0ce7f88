"""Messages between the driver and its worker processes: a pickle, and the descriptors of segments it refers to."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

from fedsim.engines.memory import Segment, Segments, adopt, dumps

_HEADER = struct.Struct("<QI")
_KEY = struct.Struct("<QQQ")
_FDS = 64


class Channel:
    """One end of a socket pair. Each side's segments are mapped on the other when a message first refers to them."""

    def __init__(self, sock: socket.socket, segments: Segments):
        self.sock = sock
        self.segments = segments
        self.sent: set[tuple[int, int]] = set()

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Any) -> None:
        """Raises OSError where the other side is gone."""
        payload, used = dumps(message, self.segments)
        self.send_pickled(payload, used)

    def send_pickled(self, payload: bytes, used: set[tuple[int, int]]) -> None:
        """Sends what :func:`dumps` made, so that one pickle can go to many."""
        fresh = [self.segments.by_key[key] for key in sorted(used - self.sent)]
        self.sock.sendall(_HEADER.pack(len(payload), len(fresh)))
        for start in range(0, len(fresh), _FDS):
            part = fresh[start : start + _FDS]
            described = b"".join(_KEY.pack(*segment.key, segment.size) for segment in part)
            socket.send_fds(self.sock, [described[:1]], [segment.fd for segment in part])
            self.sock.sendall(described[1:])
        self.sent.update(segment.key for segment in fresh)
        self.sock.sendall(payload)

    def receive(self) -> Any:
        """The next message. Raises EOFError where the other side is gone."""
        size, count = _HEADER.unpack(self._exactly(_HEADER.size))
        for start in range(0, count, _FDS):
            part = min(_FDS, count - start)
            first, fds, _, _ = socket.recv_fds(self.sock, 1, part)
            if not first:
                raise EOFError
            described = first + self._exactly(_KEY.size * part - 1)
            for fd, (owner, number, length) in zip(fds, _KEY.iter_unpack(described), strict=True):
                self.segments.add(Segment((owner, number), length, fd))
                self.sent.add((owner, number))
        payload = self._exactly(size)
        adopt(self.segments)
        return pickle.loads(payload)

    def _exactly(self, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            try:
                got = self.sock.recv_into(view)
            except ConnectionResetError:
                got = 0
            if not got:
                raise EOFError
            view = view[got:]
        return data

    def close(self) -> None:
        self.sock.close()
