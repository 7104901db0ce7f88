"""Keyed random draws: every draw is a function of (seed, purpose, round, client), never of a global generator.

A key is a 64-bit hash; :func:`uniforms` expands many keys at once (SplitMix64 in counter mode; Steele, Lea and Flood,
"Fast splittable pseudorandom number generators", 2014), so a million clients are drawn in one vectorised operation and
a client's draw does not depend on who else is drawn.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


#: SplitMix64's step from one counter to the next.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)

_ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
    (np.uint64(31), None),
)


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, a bijection of 64-bit words: changes ``uint64`` words in place, and returns them."""
    shifted = np.empty_like(x)
    for shift, factor in _ROUNDS:
        np.right_shift(x, shift, out=shifted)
        np.bitwise_xor(x, shifted, out=x)
        if factor is not None:
            np.multiply(x, factor, out=x)
    return x


def keys(seed: int, purpose: str, round: int = 0, clients: np.ndarray | int = 0) -> np.ndarray:
    """The keys of many clients at once.

    Args:
        seed: the experiment's seed.
        purpose: what the draw is for, e.g. ``"batches"``; different purposes never share a stream.
        round: the round, 0 for what happens before the first.
        clients: client ids ``[k]`` (or one id).

    Returns:
        ``uint64 [k]``.
    """
    digest = hashlib.blake2b(f"{seed}/{purpose}/{round}".encode(), digest_size=8).digest()
    base = np.uint64(int.from_bytes(digest, "little"))
    ids = np.atleast_1d(np.asarray(clients)).astype(np.int64).view(np.uint64)
    return mix(mix(ids * GOLDEN + base) + base)


def key(seed: int, purpose: str, round: int = 0, client: int = 0) -> int:
    """One key as a Python int in ``[0, 2**63)``, fit for ``torch.manual_seed``."""
    return int(keys(seed, purpose, round, client)[0] >> np.uint64(1))


def uniforms(keys: np.ndarray, size: int, start: int = 0) -> np.ndarray:
    """Uniform draws in ``[0, 1)``, one stream a key.

    Args:
        keys: ``uint64 [k]`` from :func:`keys`.
        size: draws a key.
        start: how many draws of each stream to skip.

    Returns:
        ``float64 [k, size]``.
    """
    counters = np.arange(start + 1, start + size + 1, dtype=np.uint64)
    words = mix(keys[:, None] + counters[None, :] * GOLDEN)
    return (words >> np.uint64(11)) * (1.0 / (1 << 53))


def generator(seed: int, purpose: str, round: int = 0, client: int = 0, device: str = "cpu") -> torch.Generator:
    """A torch generator for one purpose, round and client."""
    import torch

    made = torch.Generator(device=device)
    made.manual_seed(key(seed, purpose, round, client))
    return made


def numpy_generator(seed: int, purpose: str, round: int = 0, client: int = 0) -> np.random.Generator:
    """A numpy generator for one purpose, round and client."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, round, client)))
