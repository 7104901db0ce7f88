"""The engine seam: an ordered map with a broadcast."""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Answer:
    """What a worker's method returns: a small value, and tensors that may be large.

    The tensors are valid until the next result is taken from :meth:`Engine.map`.
    """

    value: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A chunk's result.

    Attributes:
        chunk: the chunk it is of (a half, where a chunk had to be split).
        answer: what the worker returned; ``None`` where the chunk was lost for good.
        pid: process that did the work.
        seconds: how long it worked.
        lost: why the chunk was given up, else empty.
        retries: workers that were lost over this chunk before, one line each.
    """

    chunk: Any
    answer: Answer | None
    pid: int
    seconds: float
    lost: str = ""
    retries: tuple[str, ...] = ()


class Engine(abc.ABC):
    """Runs a worker's methods over chunks, in order, wherever the workers are.

    A *worker* is whatever ``setup()`` makes: one object in each process, with a method for each task. Results come in
    the order of the chunks, whoever finished first, so that additions have one order. Tensors made by :meth:`share`
    and :meth:`buffer` cross by reference.
    """

    @abc.abstractmethod
    def start(self, setup: Callable[[], Any]) -> None:
        """Makes the workers; once. ``setup`` is called in each of them."""

    @abc.abstractmethod
    def map(self, task: str, chunks: Sequence[Any], broadcast: Mapping[str, Any]) -> Iterator[Result]:
        """Calls ``worker.<task>(chunk, broadcast)`` for each chunk; yields results in order.

        A chunk whose worker is lost is retried elsewhere, twice, then split (``chunk.split()``) until one is at fault.

        Raises:
            RequestError: where the worker's method raises one (data that are read when they are taken).
            RunError: where the worker's method itself raises, what it says where it raises one.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Ends the workers; nothing of them remains."""

    def share(self, tensor: Tensor) -> Tensor:
        """The same content where workers can see it without a copy of their own."""
        return tensor

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A named block of memory that workers see too, and may write; asked for again, it is reused."""
        return _reused(self.__dict__.setdefault("_buffers", {}), name, shape, dtype, torch.empty)

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return 1

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _reused(
    known: dict[str, Tensor],
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    make: Callable[..., Tensor],
) -> Tensor:
    size = math.prod(shape)
    if name not in known or known[name].dtype != dtype or known[name].numel() < size:
        known[name] = make(max(size, 1), dtype=dtype)
    return known[name][:size].view(*shape)
