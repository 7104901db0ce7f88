"""Codecs that send few coordinates: the largest, or random ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from clients.errors import RequestError
from clients.recipe import Count
from strategies.codecs import Codec, Generators, Groups, few_rows, finite
from strategies.packing import pack, packed_size, unpack

Share = Annotated[float, Field(gt=0, le=1)]

_VALUE = np.dtype("<f4")
_SEED = np.dtype("<u8")


class _Sparse(Codec):
    """How many coordinates are sent: a share of them (rounded, at least one), or a number (at most all)."""

    name: str
    fraction: float | None
    k: int | None

    def __post_init__(self) -> None:
        if self.fraction is not None and self.k is not None:
            raise RequestError(f"plugins.{self.name}: fraction and k both say how much is sent; give one of the two")
        if self.fraction is None and self.k is None:
            object.__setattr__(self, "fraction", 0.05)

    def kept(self, size: int) -> int:
        """How many of so many coordinates are sent."""
        if self.k is not None:
            return min(self.k, size)
        assert self.fraction is not None
        return min(size, max(1, round(self.fraction * size)))


@dataclass(frozen=True)
class TopK(_Sparse):
    """Sends the k coordinates that are largest in absolute value, of equal ones the first; the others become zero.

    ``||v - Q(v)||^2 <= (1 - k/d) ||v||^2``, a contraction, and biased (Stich et al. 2018, "Sparsified SGD with memory";
    Alistarh et al. 2018, "The convergence of sparsified gradient methods"). With k = d nothing changes.

    A payload is k float32 values, and their places: ``ceil(log2 d)`` bits each or one bit a coordinate, whichever takes
    fewer bytes: ``4 k + min(ceil(k ceil(log2 d) / 8), ceil(d / 8))`` bytes. Keeps nothing.

    Args:
        fraction: k / d; left out without ``k``, 0.05.
        k: how many; or give ``fraction``.
    """

    name = "top_k"
    contraction = True

    fraction: Share | None = None
    k: Count | None = None

    def payload_size(self, size: int) -> int:
        """How many bytes a row takes."""
        k = self.kept(size)
        return _VALUE.itemsize * k + min(packed_size(size, 1), packed_size(k, _place_bits(size)))

    def encode(self, row: Tensor, generator: torch.Generator) -> bytes:
        size = len(row)
        k = self.kept(size)
        chosen = _largest(row[None].numpy(), k)[0]
        places = np.flatnonzero(chosen)
        return _sent(row, places) + (pack(chosen, 1) if _as_bitmap(size, k) else _packed_places(places, size))

    def decode(self, payload: bytes, size: int) -> Tensor:
        k = self.kept(size)
        head = _VALUE.itemsize * k
        row = np.zeros(size, np.float32)
        if _as_bitmap(size, k):
            places = np.flatnonzero(unpack(payload[head:], 1, size))
        else:
            places = _unpacked_places(payload[head:], size, k)
        row[places] = np.frombuffer(payload[:head], _VALUE)
        return torch.from_numpy(row)

    def transmit(self, rows: Tensor, generators: Generators, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        size, arrived = rows.shape[1], torch.zeros_like(rows)
        for few in few_rows(rows):
            chosen = torch.from_numpy(_largest(rows[few].numpy(), self.kept(size)))
            arrived[few] = torch.where(chosen, rows[few].to(torch.float32), 0.0)
        arrived[~finite(rows)] = torch.nan
        return arrived, torch.full((len(rows),), self.payload_size(size), dtype=torch.int64)


@dataclass(frozen=True)
class RandomK(_Sparse):
    """Sends k random coordinates, drawn anew for every client and round; the others become zero.

    ``unbiased``, they are scaled by d / k: the mean is the value, the variance ``(d / k - 1) ||v||^2``, and it is no
    contraction below k = d. Otherwise they are sent as they are, and ``E ||v - Q(v)||^2 = (1 - k/d) ||v||^2``: a
    contraction in the mean, which is what error feedback takes (Stich et al. 2018, "Sparsified SGD with memory").

    A payload is k float32 values, and the seed from which both sides draw the same places, 8 bytes: ``4 k + 8`` bytes.
    Keeps nothing.

    Args:
        fraction: k / d; left out without ``k``, 0.05.
        k: how many; or give ``fraction``.
        unbiased: whether values are scaled by d / k.
    """

    name = "random_k"

    fraction: Share | None = None
    k: Count | None = None
    unbiased: bool = True

    @property
    def contraction(self) -> bool:  # type: ignore[override]
        return not self.unbiased

    def payload_size(self, size: int) -> int:
        """How many bytes a row takes."""
        return _VALUE.itemsize * self.kept(size) + _SEED.itemsize

    def encode(self, row: Tensor, generator: torch.Generator) -> bytes:
        seed = _seed(generator)
        return np.array(seed, _SEED).tobytes() + _sent(row, self._places(seed, len(row)))

    def decode(self, payload: bytes, size: int) -> Tensor:
        row = np.zeros(size, np.float32)
        seed = int(np.frombuffer(payload[: _SEED.itemsize], _SEED)[0])
        row[self._places(seed, size)] = np.frombuffer(payload[_SEED.itemsize :], _VALUE)
        return self._scaled(torch.from_numpy(row))

    def transmit(self, rows: Tensor, generators: Generators, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        size, arrived = rows.shape[1], torch.zeros(rows.shape, dtype=torch.float32)
        for row, target, generator in zip(rows.numpy(), arrived.numpy(), generators, strict=True):
            places = self._places(_seed(generator), size)
            with np.errstate(over="ignore"):
                target[places] = row[places]
        arrived = self._scaled(arrived).to(rows.dtype)
        arrived[~finite(rows)] = torch.nan
        return arrived, torch.full((len(rows),), self.payload_size(size), dtype=torch.int64)

    def _places(self, seed: int, size: int) -> np.ndarray:
        """``int64 [k]``, different ones."""
        drawn = np.random.Generator(np.random.PCG64(seed))
        return drawn.choice(size, self.kept(size), replace=False, shuffle=False)

    def _scaled(self, rows: Tensor) -> Tensor:
        """Rows as they arrive, in place."""
        size = rows.shape[-1]
        return rows.mul_(size / self.kept(size)) if self.unbiased and size else rows


def _largest(rows: np.ndarray, k: int) -> np.ndarray:
    """Which k of every row ``[n, d]`` are largest in absolute value, of equal ones the first: ``bool [n, d]``."""
    size = rows.shape[1]
    if k == size:
        return np.ones(rows.shape, bool)
    # The bits of floats without a sign order as they do, and NaN has a place among them.
    sizes = np.abs(rows).view(f"i{rows.itemsize}")
    least = np.partition(sizes, size - k, axis=1)[:, size - k, None]
    chosen = sizes >= least
    for row, size_of, limit in zip(chosen, sizes, least, strict=True):
        spare = np.count_nonzero(row) - k
        if spare:
            row[np.flatnonzero(size_of == limit)[-spare:]] = False
    return chosen


def _sent(row: Tensor, places: np.ndarray) -> bytes:
    """The values at some places; NaN where the row is not finite, since what is not may be at another place."""
    values = row[torch.from_numpy(places)].to(torch.float32)
    if not bool(finite(row[None])[0]):
        values = torch.full_like(values, torch.nan)
    return values.numpy().astype(_VALUE).tobytes()


def _place_bits(size: int) -> int:
    """``ceil(log2 size)``."""
    return max(0, size - 1).bit_length()


def _as_bitmap(size: int, k: int) -> bool:
    """Whether one bit a coordinate takes fewer bytes than k places."""
    return packed_size(size, 1) < packed_size(k, _place_bits(size))


def _packed_places(places: np.ndarray, size: int) -> bytes:
    """Of a single coordinate the place is known."""
    return pack(places, _place_bits(size)) if size > 1 else b""


def _unpacked_places(payload: bytes, size: int, k: int) -> np.ndarray:
    return unpack(payload, _place_bits(size), k) if size > 1 else np.arange(k)


def _seed(generator: torch.Generator) -> int:
    """63 bits; all that a generator's seed can hold."""
    return int(torch.empty(1, dtype=torch.int64).random_(generator=generator))
