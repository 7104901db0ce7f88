"""A codec that sends signs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from strategies.codecs import Codec, Generators, Groups, few_rows, norms
from strategies.packing import pack, packed_size, unpack

_SCALE = np.dtype("<f4")


@dataclass(frozen=True)
class Sign(Codec):
    """Sends one bit a coordinate, the sign; that of zero is +1.

    Scaled, ``mean|v| sgn(v)`` arrives: ``||v - Q(v)||^2 = ||v||^2 - ||v||_1^2 / d <= (1 - 1/d) ||v||^2``, a contraction
    (Karimireddy et al. 2019, "Error feedback fixes signSGD"), and biased. Not scaled, -1 and 1 arrive, whatever the
    size of ``v``: neither unbiased nor a contraction, and what the aggregator ``sign_majority`` counts as votes
    (Bernstein et al. 2019, "signSGD with majority vote"); give the server a learning rate then.

    A payload is ``ceil(d / 8)`` bytes, and 4 more for the scale. Keeps nothing.

    Args:
        scaled: whether signs are multiplied by the mean of ``|v|``.
    """

    scaled: bool = True

    @property
    def contraction(self) -> bool:  # type: ignore[override]
        return self.scaled

    def payload_size(self, size: int) -> int:
        """``ceil(size / 8)``, and 4 for the scale: how many bytes a row takes."""
        return _SCALE.itemsize * self.scaled + packed_size(size, 1)

    def encode(self, row: Tensor, generator: torch.Generator) -> bytes:
        scale = self._scales(row[None])[0]
        bits = pack((row >= 0).numpy(), 1)
        if self.scaled:
            return scale.numpy().astype(_SCALE).tobytes() + bits
        # One bit cannot say that there is no sign; nothing at all says so.
        return bits if bool(scale.isfinite()) else b""

    def decode(self, payload: bytes, size: int) -> Tensor:
        if len(payload) < self.payload_size(size):
            return torch.full((size,), torch.nan, dtype=torch.float32)
        head = _SCALE.itemsize * self.scaled
        scale = float(np.frombuffer(payload[:head], _SCALE)[0]) if self.scaled else 1.0
        bits = torch.from_numpy(unpack(payload[head:], 1, size))
        return _signs(bits, torch.tensor([scale], dtype=torch.float32))

    def transmit(self, rows: Tensor, generators: Generators, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        arrived = torch.empty_like(rows)
        for few in few_rows(rows):
            arrived[few] = _signs(rows[few] >= 0, self._scales(rows[few]))
        return arrived, torch.full((len(rows),), self.payload_size(rows.shape[1]), dtype=torch.int64)

    def _scales(self, rows: Tensor) -> Tensor:
        """What signs are multiplied by, ``float32 [k, 1]``; NaN where a row is not finite."""
        sums = norms(rows, 1)
        means = (sums / max(1, rows.shape[1])).to(torch.float32)
        scales = means if self.scaled else torch.ones_like(means)
        return scales.masked_fill(~means.isfinite(), torch.nan)


def _signs(positive: Tensor, scale: Tensor) -> Tensor:
    """``scale`` where ``positive``, and else ``-scale``; zero is 0.0 and not -0.0."""
    signs = positive.to(torch.float32)
    signs *= 2
    signs -= 1
    signs *= scale
    signs += 0.0
    return signs
