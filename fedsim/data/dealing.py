"""What a partition is, and what every one of them is made with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from clients.errors import RequestError


class Partition(NamedTuple):
    """Client ``k`` holds the examples ``order[offsets[k]:offsets[k + 1]]``.

    Attributes:
        order: ``int64 [N]``, a permutation of the examples.
        offsets: ``int64 [clients + 1]``, from 0 to N.
    """

    order: np.ndarray
    offsets: np.ndarray


def enough(examples: int, clients: int, each: int = 1, setting: str | None = None) -> None:
    """Refuses more clients than there are examples for, ``each`` a client, as ``setting`` asks."""
    if clients < 1:
        raise RequestError(f"data.clients: {clients} given; at least 1 is needed")
    if examples < clients:
        raise RequestError(f"data.clients: {clients} clients but only {examples} examples to train on; lower it")
    if examples < clients * each:
        raise RequestError(
            f"data.partition.{setting}: {each} for each of {clients} clients are {clients * each}, but there are "
            f"{examples} examples; lower it or data.clients"
        )


#: A concentration at which Dirichlet's shares are equal to the last bit; sums of larger ones overflow.
_EVEN = 1e100


def positive(value: float, setting: str) -> float:
    """A parameter of a law, no larger than makes a difference.

    Raises:
        RequestError: for what is not above 0 (or is NaN), for those who call a partition without :func:`partition`.
    """
    if not 0 < value < np.inf:
        raise RequestError(f"data.partition.{setting}: {value} given; give a number above 0")
    return min(value, _EVEN)


def classes_of(labels: np.ndarray, name: str) -> np.ndarray:
    """The labels, once it is known that they are one integer class an example."""
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise RequestError(
            f"data.partition: {name} goes by labels, one integer class an example, and this source has none; "
            "take iid, quantity_skew or natural"
        )
    return labels


def equal(examples: int, parts: int) -> np.ndarray:
    """Offsets of parts whose sizes differ by at most one, ``int64 [parts + 1]``."""
    return np.arange(parts + 1, dtype=np.int64) * examples // parts


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """Where each client's examples begin and end, ``int64 [clients + 1]``."""
    offsets = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def by_owner(examples: np.ndarray, owner: np.ndarray, clients: int) -> Partition:
    """The partition in which ``examples[i]`` belongs to ``owner[i]``; within a client the given order stays."""
    return Partition(examples[np.argsort(owner, kind="stable")], offsets_of(np.bincount(owner, minlength=clients)))


def rank(grouped: np.ndarray, kinds: int) -> np.ndarray:
    """The position of each element within its group; ``grouped`` is sorted."""
    return np.arange(len(grouped)) - offsets_of(np.bincount(grouped, minlength=kinds))[grouped]


def level(sizes: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """How everyone comes to have ``least``: the largest are lowered to one level.

    Args:
        sizes: ``int64 [clients]`` whose sum is at least ``clients * least``.
        least: what each client shall have.

    Returns:
        How many examples each client gives, and how many each gets, both ``int64 [clients]`` of one sum.
    """
    missing = np.maximum(least - sizes, 0)
    needed = int(missing.sum())
    low, high = least, int(sizes.max())  # the highest level with enough above it; there always is enough above least
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.maximum(sizes - middle, 0).sum() >= needed else (low, middle - 1)
    give = np.maximum(sizes - low, 0)
    excess = int(give.sum()) - needed  # fewer than the clients above the level, else the level would be higher
    givers = np.flatnonzero(give)
    give[givers[len(givers) - excess :]] -= 1
    return give, missing
