"""Matched client tests: each client tests on the server's examples, mixed by label as its own are."""

from __future__ import annotations

import numpy as np

from clients import randomness
from clients.errors import RequestError
from fedsim.data.csr import CSR

#: Numbers that are drawn at once.
_BLOCK = 2**21

#: Counts of labels that are held at once.
_COUNTS = 2**22


def matched_tests(
    train: CSR, labels: np.ndarray, test_labels: np.ndarray, classes: int, fraction: float, seed: int
) -> CSR:
    """For each client, test examples with the label mix of its training examples.

    A client with n training examples, ``n_c`` of class c, gets ``round(fraction * n)`` test examples, at least one, of
    which ``fraction * n_c`` are of class c, rounded by largest remainders (ties to the lower class); of a class with
    fewer examples it gets all. Its examples are drawn without replacement, and apart from other clients': clients may
    share some, and what a client gets depends on no other client.

    Args:
        train: the clients' training examples; clients without any get no test example.
        labels: ``int [N]`` the class of each position that ``train`` points at.
        test_labels: ``int [T]`` the classes of the server's test examples.
        classes: how many classes there are.
        fraction: above 0.
        seed: what the draw is keyed by.

    Returns:
        Positions in the server's test examples, ascending within a client.

    Raises:
        RequestError: where no client gets any, as the test split has none of the clients' classes.
    """
    by_class = np.argsort(test_labels, kind="stable")
    totals = np.bincount(test_labels, minlength=classes)
    starts = np.cumsum(totals) - totals
    clients, examples = [], []
    step = max(1, _COUNTS // classes)
    for first in range(0, train.clients, step):
        ids = np.arange(first, min(first + step, train.clients))
        wanted = np.minimum(wishes(train.label_table(labels, classes, ids), fraction), totals[:classes])
        for c in np.flatnonzero(wanted.any(0)):
            those = np.flatnonzero(wanted[:, c])
            counts = wanted[those, c]
            clients.append(np.repeat(ids[those], counts))
            examples.append(by_class[starts[c] + draws(ids[those], counts, int(totals[c]), seed, int(c))])
    if not clients:
        raise RequestError(
            "data.client_test: \"matched\" finds no example of the clients' classes in the server's test split; give it"
            ' more, or use "own"'
        )
    owner, found = np.concatenate(clients), np.concatenate(examples)
    order = np.lexsort((found, owner))
    offsets = np.zeros(train.clients + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner, minlength=train.clients), out=offsets[1:])
    return CSR(found[order], offsets)


def wishes(counts: np.ndarray, fraction: float) -> np.ndarray:
    """``fraction`` of label counts ``int64 [k, classes]`` by largest remainders, at least one where there are any."""
    sizes = counts.sum(1)
    shares = fraction * counts
    found = np.floor(shares + 1e-9).astype(np.int64)  # 0.7 * 10 is a little less than 7
    wanted = np.where(sizes > 0, np.maximum(np.rint(fraction * sizes).astype(np.int64), 1), 0)
    # A remainder of nothing comes last, so that no class is wished for that a client has not.
    order = np.argsort(-np.where(counts > 0, (shares - found).round(9), -1), axis=1, kind="stable")
    place = np.empty_like(order)
    np.put_along_axis(place, order, np.arange(counts.shape[1])[None], axis=1)
    return found + (place < (wanted - found.sum(1))[:, None])


def draws(clients: np.ndarray, counts: np.ndarray, total: int, seed: int, label: int) -> np.ndarray:
    """Random subsets of ``range(total)``, one a client, uniform among those of its size.

    Args:
        clients: ``int64 [k]`` ids.
        counts: ``int64 [k]`` sizes, at most ``total``.
        total: of how many.
        seed: what the draw is keyed by, together with client and label.
        label: see there.

    Returns:
        ``int64 [counts.sum()]``, client after client.
    """
    keys = randomness.keys(seed, f"matched test/{label}", clients=clients)
    found = np.empty(int(counts.sum()), dtype=np.int64)
    starts = np.cumsum(counts) - counts
    for count in np.unique(counts):
        rows = np.flatnonzero(counts == count)
        for some in np.array_split(rows, -(-len(rows) * min(total, 2 * count + 30) // _BLOCK)):
            found[starts[some][:, None] + np.arange(count)] = _subsets(keys[some], int(count), total)
    return found


def _subsets(keys: np.ndarray, count: int, total: int) -> np.ndarray:
    """Random subsets of ``range(total)``, ``int64 [k, count]``: the first distinct numbers of each key's stream."""
    width = 2 * count + 30  # of so many draws, hardly ever fewer than ``count`` are distinct
    if width >= total:
        return np.argsort(randomness.uniforms(keys, total), axis=1)[:, :count]
    numbers = (randomness.uniforms(keys, width) * total).astype(np.int64)
    order = np.argsort(numbers, axis=1, kind="stable")
    ranked = np.take_along_axis(numbers, order, axis=1)
    first = np.ones_like(ranked, dtype=bool)
    first[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    fresh = np.empty_like(first)
    np.put_along_axis(fresh, order, first, axis=1)
    chosen = np.take_along_axis(numbers, np.argsort(~fresh, axis=1, kind="stable")[:, :count], axis=1)
    short = fresh.sum(1) < count
    if short.any():
        chosen[short] = np.argsort(randomness.uniforms(keys[short], total, start=width), axis=1)[:, :count]
    return chosen
