"""Dirichlet label skew: class by class with sizes that vary, or client by client with equal ones."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from clients import randomness
from fedsim.data.dealing import Partition, by_owner, equal, level, rank

#: Numbers that drawing anew may cost in all; a million clients are drawn once, a hundred a thousand times.
_DRAWS = 20_000_000
_TRIES = 1000


def per_class(
    classes: np.ndarray, kinds: int, clients: int, generator: np.random.Generator, alpha: float, least: int
) -> Partition:
    """Each class's examples by shares ~ Dirichlet(alpha), drawn anew until everyone has ``least``, then mended.

    Args:
        classes: ``int [N]`` from 0 to ``kinds - 1``.
        kinds: how many classes.
        clients: how many.
        generator: what draws.
        alpha: concentration.
        least: every client has at least so many examples.
    """
    mixed = generator.permutation(len(classes))
    by_class = mixed[np.argsort(classes[mixed], kind="stable")]
    totals = np.bincount(classes, minlength=kinds)
    root = int(generator.integers(2**62))

    tries = max(1, min(_TRIES, _DRAWS // (kinds * (clients + 500))))  # a class costs about 500 numbers beside its draws
    if tries == 1:  # drawing once more to save memory would cost seconds
        owner = _owners(totals, clients, alpha, root, 0)
        fewest = int(np.maximum(least - np.bincount(owner, minlength=clients), 0).sum())
    else:
        best, fewest = _fittest(totals, clients, alpha, root, tries, least)
        owner = _owners(totals, clients, alpha, root, best)
    if fewest:
        shuffled = generator.permutation(len(owner))
        by_class, owner = by_class[shuffled], _mend(owner[shuffled], clients, least)
    return by_owner(by_class, owner, clients)


def per_client(
    classes: np.ndarray, kinds: int, clients: int, generator: np.random.Generator, alpha: float
) -> Partition:
    """Every client wants labels of its own mix; examples go to the wishes at random, what is over to what is unmet.

    Args:
        classes: ``int [N]`` from 0 to ``kinds - 1``.
        kinds: how many classes.
        clients: how many.
        generator: what draws.
        alpha: concentration; a client's mix is ~ Dirichlet(alpha * kinds * class frequencies).
    """
    examples = len(classes)
    offsets = equal(examples, clients)
    sizes = np.diff(offsets)
    totals = np.bincount(classes, minlength=kinds)
    concentration = alpha * kinds * totals / examples

    block = max(1, 2**20 // kinds)  # clients at a time, so that the mixes of a million are never held at once
    wishes = np.concatenate(
        [_wishes(sizes[start : start + block], concentration, generator) for start in range(0, clients, block)]
    )
    slots = generator.permutation(examples)
    slots = slots[np.argsort(wishes[slots], kind="stable")]
    pool = generator.permutation(examples)
    pool = pool[np.argsort(classes[pool], kind="stable")]
    wished, had = wishes[slots], classes[pool]
    met = rank(wished, kinds) < totals[wished]
    given = rank(had, kinds) < np.bincount(wishes, minlength=kinds)[had]

    order = np.empty(examples, dtype=np.int64)
    order[slots[met]] = pool[given]
    order[slots[~met]] = generator.permutation(pool[~given])
    return Partition(order, offsets)


def cut(shares: np.ndarray, total: int) -> np.ndarray:
    """``total`` examples by shares that sum to 1: how many each client gets, ``int64 [clients]``."""
    edges = np.floor(np.cumsum(shares) * total).astype(np.int64)
    edges[-1] = total
    return np.diff(np.minimum(edges, total), prepend=0)


def _fittest(totals: np.ndarray, clients: int, alpha: float, root: int, tries: int, least: int) -> tuple[int, int]:
    """The first draw in which fewest examples are missing for everyone to have ``least``, and how many are."""
    best, fewest = 0, None
    for attempt in range(tries):
        sizes = sum(_cut(totals, clients, alpha, root, attempt), np.zeros(clients, dtype=np.int64))
        missing = int(np.maximum(least - sizes, 0).sum())
        if fewest is None or missing < fewest:
            best, fewest = attempt, missing
        if missing == 0:
            break
    assert fewest is not None
    return best, fewest


def _owners(totals: np.ndarray, clients: int, alpha: float, root: int, attempt: int) -> np.ndarray:
    """The owner of each example, class by class, ``int64 [N]``."""
    everyone = np.arange(clients)
    return np.concatenate([np.repeat(everyone, counts) for counts in _cut(totals, clients, alpha, root, attempt)])


def _cut(totals: np.ndarray, clients: int, alpha: float, root: int, attempt: int) -> Iterator[np.ndarray]:
    """For each class, how many of its examples each client gets, ``int64 [clients]``; a function of its arguments."""
    draw = randomness.numpy_generator(root, "dirichlet", attempt)
    concentration = np.full(clients, alpha)
    for total in totals:
        yield cut(draw.dirichlet(concentration), int(total))


def _mend(owner: np.ndarray, clients: int, least: int) -> np.ndarray:
    """Moves examples from the largest clients until everyone has ``least``.

    Args:
        owner: ``int64 [N]`` in random order, with N >= clients * least. The last examples of a client leave it.
        clients: how many.
        least: what each shall have.
    """
    give, missing = level(np.bincount(owner, minlength=clients), least)
    order, offsets = by_owner(np.arange(len(owner)), owner, clients)
    of = owner[order]
    leaves = offsets[of + 1] - np.arange(len(owner)) <= give[of]
    mended = owner.copy()
    mended[order[leaves]] = np.repeat(np.arange(clients), missing)
    return mended


def _wishes(sizes: np.ndarray, concentration: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """For each place of each client the class it wishes for, ``int64 [sum of sizes]``."""
    counts = generator.multinomial(sizes, generator.dirichlet(concentration, size=len(sizes)))
    return np.repeat(np.tile(np.arange(len(concentration)), len(sizes)), counts.reshape(-1))
