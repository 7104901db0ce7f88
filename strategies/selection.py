"""Robust rules that choose rows: Krum, Multi-Krum, Bulyan, divide and conquer. Each has a sibling that says which."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from clients import randomness
from clients.errors import RequestError
from strategies.columns import checked, one_blas_thread, row_of, whole
from strategies.coordinates import around_median
from strategies.distances import central, combined, gram, squared_distances, squared_norms


def krum(rows: Tensor, num_malicious: int) -> Tensor:
    """The row whose n - f - 2 nearest others are nearest (Blanchard et al. 2017, "Machine learning with adversaries").

    ``argmin_i sum_{j near i} ||x_i - x_j||^2``; of rows as good, the first. Tolerates f malicious rows of n >= 2f + 3.

    Args:
        rows: ``[n, d]``, finite.
        num_malicious: f.

    Returns:
        ``[d]``, one of the rows.

    Raises:
        RequestError: for n < 2f + 3, or rows that are not finite.
    """
    return krum_selection(rows, num_malicious)[0]


def krum_selection(rows: Tensor, num_malicious: int) -> tuple[Tensor, Tensor]:
    """:func:`krum`, and which row it is: ``bool [n]``."""
    array = checked("krum", rows, num_malicious, least=2 * _whole(num_malicious) + 3, why="n >= 2f + 3")
    best = int(_krum_scores(squared_distances("krum", array), num_malicious).argmin())
    return rows[best].clone(), _kept(len(array), np.array([best]))


def multi_krum(rows: Tensor, num_malicious: int, num_selected: int | None = None) -> Tensor:
    """The mean of the m rows with the best Krum scores, all counting alike (Blanchard et al. 2017, section 4).

    Tolerates f malicious rows of n >= 2f + 3.

    Args:
        rows: ``[n, d]``, finite.
        num_malicious: f.
        num_selected: m, from 1 (Krum) to n - f, which is the default.

    Returns:
        ``[d]`` in the rows' dtype.

    Raises:
        RequestError: for n < 2f + 3, an m out of range, or rows that are not finite.
    """
    return multi_krum_selection(rows, num_malicious, num_selected)[0]


def multi_krum_selection(rows: Tensor, num_malicious: int, num_selected: int | None = None) -> tuple[Tensor, Tensor]:
    """:func:`multi_krum`, and which rows it averages: ``bool [n]``."""
    array = checked("multi_krum", rows, num_malicious, least=2 * _whole(num_malicious) + 3, why="n >= 2f + 3")
    most = len(array) - num_malicious
    number = most if num_selected is None else num_selected
    if not whole(number) or not 1 <= number <= most:
        raise RequestError(
            f"multi_krum.num_selected: {number} is not from 1 to n - f = {most}; more would surely include a malicious"
            " row"
        )
    scores = _krum_scores(squared_distances("multi_krum", array), num_malicious)
    chosen = np.argsort(scores, kind="stable")[:number]
    return _mean_of(rows, array, chosen), _kept(len(array), chosen)


def bulyan(rows: Tensor, num_malicious: int) -> Tensor:
    """Bulyan over Krum (El Mhamdi et al. 2018, "The hidden vulnerability of distributed learning in Byzantium").

    Krum chooses one row after the other, n - 2f in all: each time among the r rows that are left, with
    max(1, r - f - 2) neighbours. Of those, the mean in every coordinate of the n - 4f values closest to the median.
    Tolerates f malicious rows of n >= 4f + 3. For f < 3 the last choices have one neighbour: the two rows that are
    nearest to each other tie, and the first is taken, so that the order of rows matters.

    Args:
        rows: ``[n, d]``, finite.
        num_malicious: f.

    Returns:
        ``[d]`` in the rows' dtype.

    Raises:
        RequestError: for n < 4f + 3, or rows that are not finite.
    """
    return bulyan_selection(rows, num_malicious)[0]


def bulyan_selection(rows: Tensor, num_malicious: int) -> tuple[Tensor, Tensor]:
    """:func:`bulyan`, and which rows Krum chose: ``bool [n]``."""
    array = checked("bulyan", rows, num_malicious, least=4 * _whole(num_malicious) + 3, why="n >= 4f + 3")
    square, left, chosen = squared_distances("bulyan", array), np.arange(len(array)), []
    for _ in range(len(array) - 2 * num_malicious):
        best = int(_krum_scores(square[np.ix_(left, left)], num_malicious).argmin())
        chosen.append(left[best])
        left = np.delete(left, best)
    members = np.sort(chosen)
    row = around_median("bulyan", array, members, len(chosen) - 2 * num_malicious)
    return row_of(row, rows), _kept(len(array), members)


def dnc(
    rows: Tensor,
    num_malicious: int,
    generator: torch.Generator | None = None,
    *,
    iterations: int = 5,
    columns: int = 10_000,
    fraction: float = 1.0,
) -> Tensor:
    """Divide and conquer (Shejwalkar and Houmansadr 2021, "Manipulating the Byzantine", algorithm 2).

    Each iteration takes ``columns`` random coordinates, centres the rows on their mean and drops the ``fraction * f``
    (rounded up) rows that lie farthest along the top right-singular vector v, ``(x_i . v)^2``. The result is the mean
    of the rows that every iteration kept; should there be none, of those kept most often. Tolerates f malicious rows of
    n > 2f that pull into one direction.

    Args:
        rows: ``[n, d]``, finite.
        num_malicious: f.
        generator: draws the coordinates; left out, one of a fixed seed. Not used where ``columns >= d``.
        iterations: the paper's niters.
        columns: the paper's b.
        fraction: the paper's c.

    Returns:
        ``[d]`` in the rows' dtype.

    Raises:
        RequestError: for n <= 2f, a fraction that drops every row, or rows that are not finite.
    """
    return dnc_selection(rows, num_malicious, generator, iterations=iterations, columns=columns, fraction=fraction)[0]


def dnc_selection(
    rows: Tensor,
    num_malicious: int,
    generator: torch.Generator | None = None,
    *,
    iterations: int = 5,
    columns: int = 10_000,
    fraction: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`dnc`, and which rows it averages: ``bool [n]``."""
    array = checked("dnc", rows, num_malicious, least=2 * _whole(num_malicious) + 1, why="n > 2f")
    n, d = array.shape
    drop = dropped(num_malicious, fraction)
    if iterations < 1 or columns < 1:
        raise RequestError(f"dnc: iterations = {iterations} and columns = {columns} must be at least 1")
    if drop >= n:
        raise RequestError(f"dnc.fraction: {fraction:g} of {num_malicious} drops all {n} rows; give less")
    squared_norms("dnc", array)  # refuses what is not finite in the columns that nobody draws, too
    drawn = randomness.generator(0, "dnc") if generator is None else generator
    times = np.zeros(n, dtype=np.int64)
    # With all coordinates every iteration is the same.
    for _ in range(iterations if columns < d else 1):
        some = array if columns >= d else array[:, torch.randperm(d, generator=drawn)[:columns].sort().values.numpy()]
        times[np.argsort(_outlyingness(some), kind="stable")[: n - drop]] += 1
    chosen = np.flatnonzero(times == times.max())
    return _mean_of(rows, array, chosen), _kept(n, chosen)


def dropped(num_malicious: int, fraction: float) -> int:
    """How many rows an iteration of :func:`dnc` drops: c f, rounded up (but 1.1 * 10 is 11)."""
    return math.ceil(fraction * num_malicious - 1e-9)


def _outlyingness(some: np.ndarray) -> np.ndarray:
    """``(x_i . v)^2`` but for a factor, v the top right-singular vector of the centred rows.

    With A = U S V^T, A v is the first column of U S, and that of U is the top eigenvector of A A^T ``[n, n]``. Products
    of differences to any row become those of differences to the mean by taking off the means of rows and columns.
    """
    products = gram("dnc", some, some[central(some)])
    centred = products - products.mean(0) - products.mean(1)[:, None] + products.mean()
    with one_blas_thread():
        return np.linalg.eigh(centred)[1][:, -1] ** 2


def _krum_scores(square: np.ndarray, num_malicious: int) -> np.ndarray:
    """``float64 [r]``: each row's sum of squared distances to its max(1, r - f - 2) nearest others."""
    others = np.sort(square + np.diag(np.full(len(square), np.inf)), axis=1)[:, :-1]
    return others[:, : max(1, len(square) - num_malicious - 2)].sum(1)


def _mean_of(rows: Tensor, array: np.ndarray, chosen: np.ndarray) -> Tensor:
    shares = np.zeros(len(array))
    shares[chosen] = 1 / len(chosen)
    return row_of(combined(array, shares), rows)


def _kept(n: int, chosen: np.ndarray) -> Tensor:
    kept = torch.zeros(n, dtype=torch.bool)
    kept[torch.from_numpy(chosen)] = True
    return kept


def _whole(num_malicious: int) -> int:
    """f as far as it is one; what it is instead is refused where the rows are checked."""
    return int(num_malicious) if whole(num_malicious) else 0
