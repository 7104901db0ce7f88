"""What masked sums are made of: whole numbers in place of rows, who masks with whom, and the masks.

All of it is arithmetic modulo 2^32, in which masks that are added by one client and subtracted by another cancel
exactly. The streams are pseudo-random and fast, and not cryptographic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clients import randomness

MODULUS = 1 << 32

#: float64 adds so many words of 32 bits without rounding.
MOST_CLIENTS = 1 << 21

_STEPS, _AT_ONCE = 1 << 12, 1 << 15


@dataclass(frozen=True)
class Grid:
    """Rows and weights as whole numbers, so fine that the sum over so many clients cannot wrap.

    A row x of weight w becomes ``round(w / largest * x * steps / clip)`` with x clamped to +-clip and ``steps =
    floor((2^31 - 1) / clients)``; so a sum of rows stays within +-(2^31 - 1), and is off by ``clients largest clip / (2
    steps)`` at most in each coordinate. A weight becomes ``round(w 2^bits)``: whole numbers stay exact as long as
    ``clients largest`` is below 2^32.

    Args:
        clip: the largest coordinate.
        largest: the largest weight.
        clients: how many are added, at most.
    """

    clip: float
    largest: float
    clients: int

    @property
    def steps(self) -> int:
        return (MODULUS // 2 - 1) // self.clients

    @property
    def bits(self) -> int:
        """The most for which ``clients`` of the largest weight stay below 2^32."""
        found = 32 - math.frexp(self.clients * self.largest)[1]
        while self.clients * round(math.ldexp(self.largest, found)) >= MODULUS:
            found -= 1
        return found

    def words(self, rows: Tensor, weights: Tensor) -> np.ndarray:
        """Rows ``[k, d]`` times weights ``float64 [k]``, then the weights, modulo 2^32: ``uint32 [k, d + 1]``."""
        factors = weights / self.largest * (self.steps / self.clip)
        numbers = rows.to(torch.float64).clamp(-self.clip, self.clip).mul_(factors[:, None]).round_()
        counted = (weights * 2.0**self.bits).round_()
        return torch.cat([numbers, counted[:, None]], dim=1).to(torch.int64).numpy().astype(np.uint32)

    def values(self, words: np.ndarray) -> tuple[Tensor, Tensor]:
        """What a sum of words ``uint32 [d + 1]`` stands for: the row ``float64 [1, d]`` and the weight ``[1]``."""
        row = torch.from_numpy(words[None, :-1].view(np.int32).astype(np.float64))
        weight = torch.from_numpy(words[-1:].astype(np.float64))
        return row * (self.clip / self.steps * self.largest), weight * 2.0**-self.bits


def neighbors(draws: np.ndarray, degree: int, who: np.ndarray) -> np.ndarray:
    """Who masks with whom: everybody stands on a circle in the order of the draws, and masks with the nearest.

    The random k-regular graph of Bell et al. 2020, "Secure single-server aggregation with (poly)logarithmic overhead"
    (a Harary graph, its nodes shuffled), the same from both ends.

    Args:
        draws: ``[n]`` one a client.
        degree: how many neighbours each has; an odd number gets one more, and never more than all others.
        who: ``int64 [k]`` positions of the clients that are asked for.

    Returns:
        ``int64 [k, degree]`` positions.
    """
    n, half = len(draws), (degree + 1) // 2
    if 2 * half >= n - 1:
        others = np.arange(n - 1)
        return others + (others >= who[:, None])
    order = np.argsort(draws, kind="stable")
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    steps = np.concatenate([np.arange(1, half + 1), -np.arange(1, half + 1)])
    return order[(place[who][:, None] + steps) % n]


def mask(added: np.ndarray, subtracted: np.ndarray, size: int) -> np.ndarray:
    """The streams of some keys less those of others, modulo 2^32.

    Args:
        added: ``uint64 [a]`` keys, see :func:`clients.randomness.keys`.
        subtracted: ``uint64 [b]``.
        size: words of each.

    Returns:
        ``uint32 [size]``.
    """
    total = np.zeros(size + size % 2, dtype=np.uint32)
    for keys, combine in ((added, np.add), (subtracted, np.subtract)):
        for start, words in _streams(keys, len(total) // 2):
            part = total[start : start + words.shape[1]]
            combine(part, words.sum(0, dtype=np.uint32), out=part)
    return total[:size]


def _streams(keys: np.ndarray, steps: int) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces ``uint32 [some, words]`` of all keys' streams, and where they start: SplitMix64 in counter mode, two words
    a step. A piece stays in the processor's cache, and is valid until the next is asked for."""
    width = min(steps, _STEPS)
    some = max(1, _AT_ONCE // max(1, width))
    counters = np.arange(1, steps + 1, dtype=np.uint64) * randomness.GOLDEN
    for first in range(0, len(keys), some):
        chosen = keys[first : first + some, None]
        for start in range(0, steps, width):
            x = chosen + counters[start : start + width]
            yield 2 * start, randomness.mix(x).view(np.uint32)
