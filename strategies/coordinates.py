"""Robust rules that treat every coordinate by itself: median, trimmed mean, majority of signs."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from clients.errors import RequestError
from strategies.columns import by_column, checked, each_block, refuse_not_finite, row_of, whole


def median(rows: Tensor) -> Tensor:
    """Coordinate-wise median (Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal rates").

    For an even n the mean of the two middle values, as ``numpy.median`` (``torch.median`` takes the lower). Tolerates
    fewer than n / 2 malicious rows.

    Args:
        rows: ``[n, d]``, finite.

    Returns:
        ``[d]`` in the rows' dtype.

    Raises:
        RequestError: for rows that are not finite.
    """
    array = checked("median", rows)
    low, high = (len(array) - 1) // 2, len(array) // 2
    # In float64, so that the sum of two large float32 numbers is finite; it is rounded once.
    result = by_column(array, lambda block: (block[:, low].astype(np.float64) + block[:, high]) / 2)
    return row_of(_finite("median", array, result), rows)


def trimmed_mean(rows: Tensor, num_malicious: int) -> Tensor:
    """Coordinate-wise mean without the f lowest and the f highest values (Yin et al. 2018).

    Trimmed by count, as no fraction of n is rounded. Tolerates f malicious rows of n > 2f; f = 0 is the mean.

    Args:
        rows: ``[n, d]``, finite.
        num_malicious: f.

    Returns:
        ``[d]`` in the rows' dtype; added up in float64.

    Raises:
        RequestError: for n <= 2f, or rows that are not finite.
    """
    least = 2 * num_malicious + 1 if whole(num_malicious) else 1
    array = checked("trimmed_mean", rows, num_malicious, least=least, why="n > 2f")
    kept = slice(num_malicious, len(array) - num_malicious)
    result = by_column(array, lambda block: _mean(block[:, kept]))
    return row_of(_finite("trimmed_mean", array, result), rows)


def mean_around_median(rows: Tensor, num_kept: int) -> Tensor:
    """Coordinate-wise mean of the ``num_kept`` values closest to the median; of two as close, the smaller.

    The second half of Bulyan (El Mhamdi et al. 2018).

    Args:
        rows: ``[n, d]``, finite.
        num_kept: how many values count in every coordinate, 1 to n.

    Returns:
        ``[d]`` in the rows' dtype.
    """
    array = checked("mean_around_median", rows)
    if not 1 <= num_kept <= len(array):
        raise RequestError(f"mean_around_median.num_kept: {num_kept} is not from 1 to n = {len(array)}")
    return row_of(around_median("mean_around_median", array, np.arange(len(array)), num_kept), rows)


def around_median(rule: str, array: np.ndarray, members: np.ndarray, num_kept: int) -> np.ndarray:
    """:func:`mean_around_median` of some rows of an array ``[n, d]``: ``[d]``."""
    n = len(members)
    low, high, spare = (n - 1) // 2, n // 2, n - num_kept
    window = np.arange(num_kept)

    def reduce(block: np.ndarray) -> np.ndarray:
        twice = block[:, low].astype(np.float64) + block[:, high]
        # The closest values are neighbours. Their window moves up while it loses a value farther from the middle than
        # the one it gains: middle - lost > gained - middle.
        farther = np.add(block[:, :spare], block[:, num_kept:], dtype=np.float64) < twice[:, None]
        first = np.arange(0, block.size, n) + np.count_nonzero(farther, axis=1)
        middle = twice[:, None] / 2
        return middle[:, 0] + (block.take(first[:, None] + window) - middle).sum(1) / num_kept

    return _finite(rule, array, by_column(array, reduce, members))


def sign_majority(rows: Tensor) -> Tensor:
    """``sign(sum_k sign(x_k))`` by coordinate, one vote a row (Bernstein et al. 2019, "signSGD with majority vote").

    Tolerates fewer than n / 2 malicious rows, which cannot make a coordinate larger than 1. Not equivariant to shifts,
    and equal rows give their signs.

    Args:
        rows: ``[n, d]``, finite.

    Returns:
        ``[d]`` of -1, 0 (a tie) and 1 in the rows' dtype.

    Raises:
        RequestError: for rows that are not finite.
    """
    array = checked("sign_majority", rows)
    result = np.empty(array.shape[1], array.dtype)

    def work(columns: slice) -> bool:
        block = array[:, columns]
        result[columns] = np.sign(np.sign(block).sum(0))
        return bool(np.isfinite(block).all())

    if not all(list(each_block(array.shape, work))):
        refuse_not_finite("sign_majority", array)
    return row_of(result, rows)


def _finite(rule: str, array: np.ndarray, result: np.ndarray) -> np.ndarray:
    if np.isnan(result).any():
        refuse_not_finite(rule, array)
    return result


def _mean(block: np.ndarray) -> np.ndarray:
    """``[b, m] -> [b]``; equal values give that very value, since only what lies beyond the lowest is added up."""
    low = block[:, :1].astype(np.float64)
    return low[:, 0] + (block - low) @ np.ones(block.shape[1]) / block.shape[1]
