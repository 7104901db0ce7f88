"""Blocks of columns of a matrix of rows: small enough for the cache, shared by threads, the same bits for any number.

A block's width depends on the number of rows alone, blocks are combined in order, and BLAS works with one thread
inside a block: no result depends on how many cores there are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from numbers import Integral
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError

Made = TypeVar("Made")

#: Numbers in a block; two megabytes in float64 stay in a core's cache.
_NUMBERS = 1 << 18
_WIDEST = 8192


def checked(rule: str, rows: Tensor, num_malicious: int = 0, *, least: int = 1, why: str = "") -> np.ndarray:
    """The rows ``[n, d]`` as an array that shares their memory, where their type has one; float32 otherwise.

    Args:
        rule: its name, for messages.
        rows: ``[n, d]``, a floating-point tensor.
        num_malicious: f, how many of them may be malicious.
        least: how many rows the rule needs.
        why: the condition on n and f, for the message.

    Raises:
        RequestError: for another shape or type, a negative f, or too few rows. Rows that are not finite are refused by
            :func:`refuse_not_finite`, where a rule has a cheap sign of them.
    """
    if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.dtype.is_floating_point or not len(rows):
        what = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise RequestError(f"{rule}: needs floating-point rows [n, d] with n above 0, not {what}")
    if not whole(num_malicious):
        raise RequestError(f"{rule}.num_malicious: {num_malicious!r} is not a whole number of at least 0")
    if len(rows) < least:
        raise RequestError(
            f"{rule}: {len(rows)} rows are too few for num_malicious = {num_malicious}, which needs {why}; give"
            f" {least} rows, or assume fewer malicious clients"
        )
    plain = rows.detach().cpu()
    return (plain if plain.dtype in (torch.float32, torch.float64) else plain.to(torch.float32)).numpy()


def whole(number: Any) -> bool:
    """Whether something is a whole number of at least 0, one of NumPy's included."""
    return isinstance(number, Integral) and not isinstance(number, bool) and int(number) >= 0


def refuse_not_finite(rule: str, array: np.ndarray) -> None:
    """Raises for the first row that holds NaN or infinity, or for rows whose squares overflow.

    Called where a result shows that there is one, so that finite rows are not read once more.
    """
    for i, row in enumerate(array):
        wrong = np.flatnonzero(~np.isfinite(row))
        if len(wrong):
            raise RequestError(
                f"{rule}: row {i} is {row[wrong[0]]} at column {wrong[0]}; leave out rows that are not finite"
            )
    raise RequestError(f"{rule}: the squares of these rows overflow float64; scale the rows down")


def row_of(made: np.ndarray, like: Tensor) -> Tensor:
    """An array as a tensor of the rows' dtype and device."""
    return torch.from_numpy(made).to(dtype=like.dtype, device=like.device)


def each_block(shape: tuple[int, ...], work: Callable[[slice], Made]) -> Iterator[Made]:
    """``work`` of every block of columns of a matrix ``[n, d]``, on all cores; the results come in order."""
    n, d = shape
    width = min(_WIDEST, max(16, _NUMBERS // n))
    blocks = [slice(start, min(start + width, d)) for start in range(0, d, width)]
    threads = min(len(blocks), _cores())
    with one_blas_thread():
        if threads < 2:
            yield from map(work, blocks)
            return
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(work, blocks)


def by_column(
    array: np.ndarray, reduce: Callable[[np.ndarray], np.ndarray], members: np.ndarray | None = None
) -> np.ndarray:
    """Applies ``reduce``, ``[b, n] -> [b]``, to the values of every column of ``[n, d]`` in ascending order.

    Columns are copied side by side first: sorting short contiguous runs is what NumPy has vector instructions for.

    Args:
        array: ``[n, d]``.
        reduce: gets ``[b, n]`` values, each row sorted; may overwrite them.
        members: the rows that count, where not all do.

    Returns:
        ``[d]`` in the array's dtype; NaN where a column holds NaN or infinity.
    """
    result = np.empty(array.shape[1], array.dtype)

    def work(columns: slice) -> None:
        # A copy whatever the strides are: it is sorted in place.
        block = np.array((array[:, columns] if members is None else array[members, columns]).T, order="C", copy=True)
        block.sort(axis=1)
        finite = np.isfinite(block[:, 0]) & np.isfinite(block[:, -1])
        with np.errstate(all="ignore"):
            result[columns] = reduce(block)
        result[columns][~finite] = np.nan

    for _ in each_block(array.shape, work):
        pass
    return result


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """BLAS and LAPACK with one thread inside, as its caller had them afterwards."""
    with _blas().limit(limits=1, user_api="blas"):
        yield


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
