"""What happens to rows before a robust rule sees them, so that honest rows that differ do not look malicious."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clients import randomness
from clients.errors import RequestError
from strategies.aggregation import mean
from strategies.columns import checked, each_block, row_of, whole
from strategies.distances import central, squared_distances


def buckets(n: int, size: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """A random partition of ``0 .. n - 1`` into ``ceil(n / size)`` buckets; the last has what is left."""
    if size < 1:
        raise RequestError(f"bucketing.size: {size} is not at least 1")
    drawn = randomness.generator(0, "bucketing") if generator is None else generator
    order = torch.randperm(n, generator=drawn)
    return [bucket.sort().values for bucket in order.split(size)]


def bucketing(
    rows: Tensor, size: int, generator: torch.Generator | None = None, weights: Tensor | None = None
) -> Tensor:
    """Means of buckets of s rows drawn at random (Karimireddy et al. 2022, "... heterogeneous datasets via bucketing").

    A rule behind it meets n / s rows whose variance is s times smaller, of which still up to f are malicious: it must
    tolerate f of ceil(n / s). A size of 1 leaves the rows as they are (in another order), one of n gives the mean.

    Args:
        rows: ``[n, d]``, finite.
        size: s, at least 1. The last bucket is the mean of the rows that are left.
        generator: draws the permutation; left out, one of a fixed seed.
        weights: ``[n]``; left out, all count alike in their bucket.

    Returns:
        ``[ceil(n / s), d]`` in the rows' dtype.
    """
    checked("bucketing", rows)
    return torch.stack(
        [
            mean(rows[bucket], None if weights is None else weights[bucket])
            for bucket in buckets(len(rows), size, generator)
        ]
    )


def nearest_neighbor_mixing(rows: Tensor, num_malicious: int) -> Tensor:
    """Every row becomes the mean of the n - f nearest to it, itself included (Allouah et al. 2023, "Fixing by mixing").

    Of rows at the same distance the first counts. Tolerates f malicious rows of n > 2f, where the rule behind it does.

    Args:
        rows: ``[n, d]``, finite.
        num_malicious: f; 0 makes every row the mean.

    Returns:
        ``[n, d]`` in the rows' dtype.

    Raises:
        RequestError: for n <= 2f, or rows that are not finite.
    """
    least = 2 * num_malicious + 1 if whole(num_malicious) else 1
    array = checked("nearest_neighbor_mixing", rows, num_malicious, least=least, why="n > 2f")
    n = len(array)
    square = squared_distances("nearest_neighbor_mixing", array)
    nearest = np.argsort(square, axis=1, kind="stable")[:, : n - num_malicious]
    shares = np.zeros((n, n))
    np.put_along_axis(shares, nearest, 1 / (n - num_malicious), axis=1)
    base, mixed = array[central(array)], np.empty_like(array)

    def work(columns: slice) -> None:
        moved = np.subtract(array[:, columns], base[columns], dtype=np.float64)
        mixed[:, columns] = base[columns] + shares @ moved

    for _ in each_block(array.shape, work):
        pass
    return row_of(mixed, rows)
