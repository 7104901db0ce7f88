"""Sets of classes for clients: so many each, none twice, every class to as many clients as any other."""

from __future__ import annotations

import numpy as np

#: Trades a client takes part in. Two classes of one client stay together with probability below 1/2 at each, so that
#: what is left of the regular sets that trading starts from is below 2 ** -16.
_TRADES = 16


def deal(counts: np.ndarray, clients: int, generator: np.random.Generator) -> np.ndarray:
    """Random sets of classes, by trades between random pairs of clients (the curveball chain, Strona et al. 2014).

    Args:
        counts: ``int64 [classes]``, to how many clients each class goes: at most ``clients``, and together a multiple
            of it.
        clients: how many.
        generator: what draws.

    Returns:
        ``int64 [clients, each]``, the classes of each client, all different.
    """
    dealt = np.repeat(np.arange(len(counts), dtype=np.min_scalar_type(len(counts))), counts)
    each = len(dealt) // clients
    # a class fills at most as many places in a row as there are clients, so that no column step meets it twice
    sets = np.ascontiguousarray(dealt.reshape(each, clients).T)[generator.permutation(clients)]
    if 0 < each < len(counts):
        for _ in range(_TRADES):
            pairs = generator.permutation(clients)[: clients // 2 * 2].reshape(2, -1)
            sets[pairs[0]], sets[pairs[1]] = _traded(sets[pairs[0]], sets[pairs[1]], generator)
    return sets.astype(np.int64)


def _traded(ours: np.ndarray, theirs: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Row by row, what only one of two clients has is shuffled between them; both ``[pairs, each]``."""
    both = np.sort(np.concatenate([ours, theirs], axis=1), axis=1)
    shared = both[:, 1:] == both[:, :-1]
    place = generator.random(both.shape, dtype=np.float32)
    place[:, :-1][shared] = -1  # of what both have, one goes to the first and one to the second
    place[:, 1:][shared] = 2
    mixed = np.take_along_axis(both, np.argsort(place, axis=1), axis=1)
    each = ours.shape[1]
    return mixed[:, :each], mixed[:, each:]
