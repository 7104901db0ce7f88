"""Compression: codecs that round to few levels here, and all others by name."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from strategies.codecs import Codec, Generators, Groups, few_rows, norms
from strategies.error_feedback import Downlink, ErrorFeedback
from strategies.packing import pack, packed_size, unpack
from strategies.signs import Sign
from strategies.sparsification import RandomK, TopK

__all__ = ["QSGD", "Codec", "Downlink", "ErrorFeedback", "Quantize", "RandomK", "Sign", "TopK"]

Bits = Annotated[int, Field(ge=1, le=16)]
Levels = Annotated[int, Field(ge=1, le=32767)]

_SCALE = np.dtype("<f4")


class _Levels(Codec):
    """Rounds to equally spaced levels from -scale to scale, ``intervals`` between them.

    Code c of ``0 .. intervals`` stands for ``(2c - intervals) / intervals scale``. With ``x = v / scale intervals / 2``
    the code is ``floor(x + 1/2 [intervals is odd] + u) + intervals // 2`` for u uniform in [0, 1), and 1/2 where it is
    rounded to the nearest. Adding whole numbers after the rounding keeps the digits of small values.
    """

    @property
    @abstractmethod
    def intervals(self) -> int:
        """How many intervals there are between the lowest and the highest level."""

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """Bits a coordinate."""

    @property
    def draws(self) -> bool:
        """Whether rounding is stochastic."""
        return True

    @abstractmethod
    def scales(self, rows: Tensor) -> Tensor:
        """The highest level of each row ``[k, d]``: ``float32 [k, 1]``, NaN where the row is not finite."""

    def payload_size(self, size: int, groups: int = 1) -> int:
        """``4 groups + ceil(size bits / 8)``: how many bytes a row takes."""
        return _SCALE.itemsize * groups + packed_size(size, self.code_bits)

    def encode(self, row: Tensor, generator: torch.Generator, groups: Groups | None = None) -> bytes:
        uniforms = self._uniforms(len(row), [generator])
        scales, codes = [], []
        for group in _grouped(groups, len(row)):
            scale = self.scales(row[None, group])
            scales.append(scale.numpy())
            rounded = self._rounded(row[None, group], scale, None if uniforms is None else uniforms[:, group])
            codes.append(rounded[0].nan_to_num_(nan=0.0).to(torch.int64) + self.intervals // 2)
        return np.array(scales, _SCALE).tobytes() + pack(torch.cat(codes).numpy(), self.code_bits)

    def decode(self, payload: bytes, size: int, groups: Groups | None = None) -> Tensor:
        parts = _grouped(groups, size)
        head = _SCALE.itemsize * len(parts)
        scales = torch.from_numpy(np.frombuffer(payload[:head], _SCALE).astype(np.float32))
        codes = torch.from_numpy(unpack(payload[head:], self.code_bits, size)) - self.intervals // 2
        if bool(scales.isnan().any()):
            return torch.full((size,), torch.nan, dtype=torch.float32)
        row = codes.to(torch.float32)[None]
        for group, scale in zip(parts, scales, strict=True):
            self._values(row[:, group], scale.reshape(1, 1))
        return row[0]

    def transmit(self, rows: Tensor, generators: Generators, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        size = rows.shape[1]
        parts = _grouped(groups if self.by_tensor else None, size)
        arrived = torch.empty_like(rows)
        for few in few_rows(rows):
            uniforms = self._uniforms(size, generators[few])
            lost = torch.zeros(len(rows[few]), 1, dtype=torch.bool)
            for group in parts:
                scale = self.scales(rows[few, group])
                part = self._rounded(rows[few, group], scale, None if uniforms is None else uniforms[:, group])
                arrived[few, group] = self._values(part, scale)
                lost |= scale.isnan()
            if bool(lost.any()):
                arrived[few].masked_fill_(lost, torch.nan)
        return arrived, torch.full((len(rows),), self.payload_size(size, len(parts)), dtype=torch.int64)

    def _uniforms(self, size: int, generators: Generators) -> Tensor | None:
        return uniforms(size, generators) if self.draws else None

    def _rounded(self, rows: Tensor, scale: Tensor, uniforms: Tensor | None) -> Tensor:
        """Codes less ``intervals // 2``, as new ``float32 [k, d]``."""
        nothing = scale == 0
        x = (rows / scale.masked_fill(nothing, 1.0).to(rows.dtype)).to(torch.float32)
        odd, half = self.intervals % 2, self.intervals // 2
        x *= self.intervals / 2
        x += 0.5 if uniforms is None else uniforms
        x += 0.5 * odd
        return x.floor_().clamp_(-half, half + odd)

    def _values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What codes less ``intervals // 2`` stand for, in place."""
        codes *= 2
        codes -= self.intervals % 2
        codes /= self.intervals
        codes *= scale
        nothing = scale == 0
        return codes.masked_fill_(nothing, 0.0) if bool(nothing.any()) else codes


@dataclass(frozen=True)
class Quantize(_Levels):
    """Sends ``bits`` a coordinate: one of 2^bits equally spaced levels, sign included, from -max|v| to max|v|.

    Stochastic rounding goes up with the probability of how far a value is from the level below, so that the mean is the
    value (unbiased), with variance ``f (1 - f) step^2``, f that distance over the step of ``2 max|v| / (2^bits - 1)``.
    Rounding to the nearest is off by at most half a step, and is biased. Neither is a contraction: no level is zero,
    so that beside one large value all others become larger.

    A payload is the scale, 4 bytes for each tensor or one for the row, and ``ceil(d bits / 8)`` bytes. Keeps nothing.

    Args:
        bits: 1 to 16.
        scale: whether max|v| is of the whole ``row``, or of each named ``tensor``.
        rounding: ``stochastic``, or to the ``nearest`` level.
    """

    bits: Bits = 8
    scale: Literal["row", "tensor"] = "row"
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    @property
    def unbiased(self) -> bool:  # type: ignore[override]
        return self.draws

    @property
    def by_tensor(self) -> bool:  # type: ignore[override]
        return self.scale == "tensor"

    @property
    def draws(self) -> bool:
        return self.rounding == "stochastic"

    @property
    def intervals(self) -> int:
        return (1 << self.bits) - 1

    @property
    def code_bits(self) -> int:
        return self.bits

    def scales(self, rows: Tensor) -> Tensor:
        largest = rows.abs().amax(dim=1, keepdim=True) if rows.shape[1] else rows.new_zeros(len(rows), 1)
        return _upwards(largest)


@dataclass(frozen=True)
class QSGD(_Levels):
    """Sends ``||v||_2 sgn(v_i) xi_i / levels``, xi_i a whole number (Alistarh et al. 2017, "QSGD", section 3.1).

    ``xi_i`` is ``|v_i| levels / ||v||`` rounded up or down by chance, so that the mean is the value (unbiased). The
    variance is ``(||v|| / s)^2 sum_i f_i (1 - f_i)``, f_i the fraction of ``|v_i| s / ||v||``, and at most
    ``min(d / s^2, sqrt(d) / s) ||v||^2``: above ``||v||^2`` for few levels, so no contraction. On average at most
    ``s (s + sqrt(d))`` coordinates are not zero.

    A payload is the norm, 4 bytes, and ``2 s + 1`` symbols of ``ceil(log2(2 s + 1))`` bits, ``ceil(d bits / 8)`` bytes.
    Keeps nothing.

    Args:
        levels: s, levels beside zero on either side; 7 take 4 bits.
    """

    levels: Levels = 7
    unbiased = True

    @property
    def intervals(self) -> int:
        return 2 * self.levels

    @property
    def code_bits(self) -> int:
        return self.intervals.bit_length()

    def scales(self, rows: Tensor) -> Tensor:
        return _upwards(norms(rows, 2))


def uniforms(size: int, generators: Generators) -> Tensor:
    """Uniform draws in [0, 1), ``float32 [k, size]``, one generator a row.

    Draws of 16 bits take half the time of a float32's, which are most of what a codec costs. The bits below are drawn
    once a row and added to all its draws, so that each of them is uniform to the last bit of a float32 all the same,
    and rounding by them unbiased also where a value is less than 2^-16 of a step.
    """
    words = torch.empty(len(generators), size // 4 + 2, dtype=torch.int64)
    for row, generator in zip(words, generators, strict=True):
        row.random_(-(1 << 63), None, generator=generator)
    drawn = words.view(torch.int16)[:, :size].to(torch.float32)  # four to a word, and signed: hence the half
    drawn /= 1 << 16
    drawn += (words[:, -1:] & 0xFF).to(torch.float32) / (1 << 24) + 0.5
    return drawn


def _grouped(groups: Groups | None, size: int) -> Groups:
    return [slice(0, size)] if groups is None else groups


def _upwards(scales: Tensor) -> Tensor:
    """The next float32 that is no less; NaN for what is not finite there."""
    rounded = scales.to(torch.float32)
    less = rounded.to(scales.dtype) < scales
    rounded = torch.where(less, torch.nextafter(rounded, torch.full_like(rounded, torch.inf)), rounded)
    return rounded.masked_fill(~rounded.isfinite(), torch.nan)
