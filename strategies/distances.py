"""Distances between rows that are right in float32 too, and combinations of rows: one pass over blocks of columns.

``|x|^2 + |y|^2 - 2 x.y`` cancels where rows lie close together and far from the origin. Here the products are of
differences to a row among them, in float64, and where they cancel all the same (a group far from that row, say) the
group is measured once more from one of its own. No tensor is larger than ``[n, n]`` or a block of columns.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from strategies.columns import each_block, refuse_not_finite

#: A squared distance below this share of the squared distances to the centre has lost more digits than it may.
_CANCELS = 1e-6
_SAMPLED = 1024


def squared_distances(rule: str, array: np.ndarray) -> np.ndarray:
    """``float64 [n, n]`` squared Euclidean distances between rows ``[n, d]``; symmetric, zero where rows are equal.

    Raises:
        RequestError: in the rule's name, for rows that are not finite or overflow when squared.
    """
    found = np.zeros((len(array), len(array)))
    groups = [np.arange(len(array))]
    while groups:
        members = groups.pop()
        mine = array if len(members) == len(array) else array[members]
        products = gram(rule, mine, mine[central(mine)])
        norms = np.diag(products)
        scale = norms[:, None] + norms[None, :]
        square = np.maximum(scale - 2 * products, 0)
        np.fill_diagonal(square, 0)
        found[np.ix_(members, members)] = square
        near = square < _CANCELS * scale
        np.fill_diagonal(near, False)
        # Its centre is near nobody, so each group is smaller than the one it comes from.
        groups += [members[group] for group in _connected(near)]
    return found


def gram(rule: str, array: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """``float64 [n, n]`` inner products of ``x_i - centre``.

    Raises:
        RequestError: in the rule's name, for rows that are not finite or overflow when squared.
    """

    def work(columns: slice) -> np.ndarray:
        moved = array[:, columns].astype(np.float64)
        moved -= centre[columns]
        return moved @ moved.T

    return _added(rule, array, work, np.zeros((len(array), len(array))))


def squared_norms(rule: str, array: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """``float64 [n]`` squared norms of the rows, or of their differences to ``centre`` ``[d]``.

    Raises:
        RequestError: in the rule's name, for rows that are not finite or overflow when squared.
    """

    def work(columns: slice) -> np.ndarray:
        moved = np.subtract(array[:, columns], 0 if centre is None else centre[columns], dtype=np.float64)
        return np.einsum("ij,ij->i", moved, moved)

    return _added(rule, array, work, np.zeros(len(array)))


def products_with(rule: str, array: np.ndarray, row: np.ndarray) -> np.ndarray:
    """``float64 [n]`` inner products of the rows with one ``[d]``.

    Raises:
        RequestError: in the rule's name, for rows that are not finite or overflow when multiplied.
    """

    def work(columns: slice) -> np.ndarray:
        return array[:, columns].astype(np.float64) @ row[columns].astype(np.float64)

    return _added(rule, array, work, np.zeros(len(array)))


def _added(rule: str, array: np.ndarray, work: Callable[[slice], np.ndarray], total: np.ndarray) -> np.ndarray:
    """The sum of every block's part, in the blocks' order."""

    def quiet(columns: slice) -> np.ndarray:
        with np.errstate(all="ignore"):
            return work(columns)

    for part in each_block(array.shape, quiet):
        total += part
    if not np.isfinite(total).all():
        refuse_not_finite(rule, array)
    return total


def combined(array: np.ndarray, shares: np.ndarray, centre: np.ndarray | None = None) -> np.ndarray:
    """``centre + sum_k s_k (x_k - centre)`` in float64, rounded once; rows of no share are not read.

    Args:
        array: ``[n, d]``.
        shares: ``float64 [n]``.
        centre: ``[d]``; left out, the row of the largest share, so that equal rows give that very row: shares must then
            add up to 1.

    Returns:
        ``[d]`` in the array's dtype.
    """
    used = np.flatnonzero(shares)
    base = array[int(np.abs(shares).argmax())] if centre is None else centre
    mine, weights = (array, shares) if len(used) == len(array) else (array[used], shares[used])
    result = np.empty(array.shape[1], array.dtype)

    def work(columns: slice) -> None:
        moved = np.subtract(mine[:, columns], base[columns], dtype=np.float64)
        result[columns] = base[columns] + weights @ moved

    if not len(used):
        return base.astype(array.dtype)
    for _ in each_block(mine.shape, work):
        pass
    return result


def central(array: np.ndarray) -> int:
    """A row near the middle of most: the closest to the coordinate median over some of the columns."""
    some = array[:, :: max(1, array.shape[1] // _SAMPLED)].astype(np.float64)
    with np.errstate(all="ignore"):
        away = ((some - np.median(some, axis=0)) ** 2).sum(1)
    return int(np.nanargmin(away)) if np.isfinite(away).any() else 0


def _connected(near: np.ndarray) -> list[np.ndarray]:
    """The groups of two or more that are joined by ``near`` ``bool [n, n]``."""
    left, groups = set(np.flatnonzero(near.any(1)).tolist()), []
    while left:
        group, edge = set(), [left.pop()]
        while edge:
            one = edge.pop()
            group.add(one)
            fresh = set(np.flatnonzero(near[one]).tolist()) & left
            left -= fresh
            edge += fresh
        groups.append(np.array(sorted(group)))
    return groups
