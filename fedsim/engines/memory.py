"""Shared memory without names: anonymous files passed by descriptor, gone with the processes that hold them."""

from __future__ import annotations

import bisect
import io
import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import cloudpickle
import numpy as np
import torch
from torch import Tensor


class Segment:
    """A block of anonymous shared memory; ``fd`` passes it on."""

    def __init__(self, key: tuple[int, int], size: int, fd: int | None = None):
        self.key = key
        self.size = max(size, 1)
        self.fd = _anonymous(self.size) if fd is None else fd
        self.memory = mmap.mmap(self.fd, self.size)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()

    def tensor(self, offset: int, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        flat = torch.frombuffer(self.memory, dtype=dtype, offset=offset)
        return flat.as_strided(tuple(shape), tuple(strides))

    def close(self) -> None:
        """Gives the descriptor back; the memory goes when the last tensor on it does."""
        os.close(self.fd)


def _anonymous(size: int) -> int:
    # /dev/shm is tiny in many containers; a memfd is not bound by it, and an unlinked file works everywhere else.
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("fedsim")
    else:  # pragma: no cover - other POSIX systems
        fd, path = tempfile.mkstemp(prefix="fedsim-")
        os.unlink(path)
    os.ftruncate(fd, size)
    return fd


class Segments:
    """The segments that this process has mapped: finds the one that an address lies in."""

    def __init__(self) -> None:
        self.by_key: dict[tuple[int, int], Segment] = {}
        self._addresses: list[int] = []
        self._sorted: list[Segment] = []

    def add(self, segment: Segment) -> Segment:
        self.by_key[segment.key] = segment
        place = bisect.bisect(self._addresses, segment.address)
        self._addresses.insert(place, segment.address)
        self._sorted.insert(place, segment)
        return segment

    def remove(self, key: tuple[int, int]) -> None:
        segment = self.by_key.pop(key)
        place = self._sorted.index(segment)
        del self._sorted[place], self._addresses[place]
        segment.close()

    def find(self, address: int) -> Segment | None:
        place = bisect.bisect(self._addresses, address) - 1
        if place < 0:
            return None
        segment = self._sorted[place]
        return segment if address < segment.address + segment.size else None

    def clear(self) -> None:
        for key in list(self.by_key):
            self.remove(key)


class _Pickler(cloudpickle.Pickler):
    """Tensors and arrays that lie in a segment are pickled as a reference to it, others as their bytes."""

    def __init__(self, file: io.BytesIO, segments: Segments):
        super().__init__(file, protocol=5)
        self.segments = segments
        self.used: set[tuple[int, int]] = set()

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.device.type == "cpu" and obj.layout == torch.strided and not obj.requires_grad:
            segment = self.segments.find(obj.data_ptr()) if obj.numel() else None
            if segment is not None:
                self.used.add(segment.key)
                offset = obj.data_ptr() - segment.address
                return _attach, (segment.key, offset, tuple(obj.shape), obj.stride(), str(obj.dtype)[6:])
            whole = obj.detach().contiguous()
            return _rebuild, (whole.reshape(-1).view(torch.uint8).numpy(), tuple(obj.shape), str(obj.dtype)[6:])
        if type(obj) is np.ndarray and obj.size and obj.flags.c_contiguous and obj.dtype.kind in "biuf":
            segment = self.segments.find(obj.ctypes.data)
            if segment is not None:
                self.used.add(segment.key)
                return _attach_array, (segment.key, obj.ctypes.data - segment.address, obj.shape, obj.dtype.str)
        return super().reducer_override(obj)


_known: Segments | None = None


def adopt(segments: Segments) -> None:
    """Makes these the segments that references are resolved in when something is unpickled in this process."""
    global _known
    _known = segments


def dumps(obj: Any, segments: Segments) -> tuple[bytes, set[tuple[int, int]]]:
    """The pickle, and the keys of the segments that it refers to."""
    file = io.BytesIO()
    pickler = _Pickler(file, segments)
    pickler.dump(obj)
    return file.getvalue(), pickler.used


def _segment(key: tuple[int, int]) -> Segment:
    assert _known is not None
    return _known.by_key[key]


def _attach(key: tuple[int, int], offset: int, shape: tuple, strides: tuple, dtype: str) -> Tensor:
    return _segment(key).tensor(offset, shape, strides, getattr(torch, dtype))


def _attach_array(key: tuple[int, int], offset: int, shape: tuple, dtype: str) -> np.ndarray:
    return np.frombuffer(_segment(key).memory, dtype=dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)


def _rebuild(data: np.ndarray, shape: tuple, dtype: str) -> Tensor:
    if not data.size:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.from_numpy(data.copy() if not data.flags.writeable else data).view(getattr(torch, dtype)).view(shape)
