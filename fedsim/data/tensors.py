"""Arrays as tensors, and whether their numbers can be used."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError

#: Numbers that are looked at at once.
_BLOCK = 2**22


def as_tensor(array: np.ndarray) -> Tensor:
    """The array's memory as a tensor, read-only memory (a memory map) included: nothing here writes into columns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def to_column(value: Any, where: str) -> Tensor:
    """A column as a tensor ``[N, ...]`` that shares the given memory, where that is in this machine's byte order.

    Args:
        value: a tensor or an array.
        where: what an error begins with, e.g. ``"data.source.train.x"``.

    Raises:
        RequestError: for what is no tensor of real numbers, or a single number.
    """
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise RequestError(f"{where}: an array of objects (ragged rows?); pad or crop its rows to one shape")
        try:
            value = as_tensor(value.astype(value.dtype.newbyteorder("="), copy=False))
        except (TypeError, ValueError):
            raise RequestError(f"{where}: no tensor has dtype {value.dtype}; give numbers") from None
    if not isinstance(value, Tensor):
        raise RequestError(f"{where}: {type(value).__name__} given; give a tensor or an array [N, ...]")
    if value.is_complex():
        raise RequestError(f"{where}: complex numbers given; give real ones, such as real and imaginary parts")
    if value.dim() == 0:
        raise RequestError(f"{where}: a single number given; give one value an example, [N, ...]")
    return value.detach()


def to_int64(values: Tensor) -> Tensor | Wrong:
    """Whole numbers ``[N, ...]``, or yes and no, as int64; the first number that does not fit there is wrong."""
    found = values.to(torch.int64)
    if values.dtype == torch.uint64 and values.numel() and int(found.min()) < 0:
        place = (found < 0).nonzero()[0]
        return Wrong(str(int(found[tuple(place)]) + 2**64), place.tolist(), "too large for int64")
    return found


class Wrong(NamedTuple):
    """A number that cannot be used.

    Attributes:
        value: it, as an error shows it.
        place: its index in the column.
        why: what is wrong with it, and what to do.
    """

    value: str
    place: list[int]
    why: str

    def __str__(self) -> str:
        return f"{self.value} at {self.place}; {self.why}"


def not_finite(values: Tensor | np.ndarray, dtype: torch.dtype | None = None, instead: str = "") -> Wrong | None:
    """The first number of ``[N, ...]`` that is not finite.

    Args:
        values: the numbers; whole ones are all finite.
        dtype: the type that they will be computed in, where they must be finite too; left out, their own.
        instead: what else a user can do about numbers that are too large for it.
    """
    floating = values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
    if not floating or 0 in values.shape:
        return None
    rows = max(1, _BLOCK // int(np.prod(values.shape[1:])))
    for start in range(0, len(values), rows):
        block = values[start : start + rows]
        if isinstance(block, np.ndarray):
            block = as_tensor(block.astype(block.dtype.newbyteorder("="), copy=False))
        # The extremes of numbers with NaN are NaN, so this needs no tensor of flags as large as the data.
        if torch.stack(block.aminmax()).to(dtype or block.dtype).isfinite().all():
            continue
        place = (~block.to(dtype or block.dtype).isfinite()).nonzero()[0]
        value, at = float(block[tuple(place)]), [start + int(place[0]), *place[1:].tolist()]
        if not np.isfinite(value):
            return Wrong(str(value), at, "every number must be finite")
        return Wrong(f"{value:g}", at, f"too large for {str(dtype)[6:]}; scale it{instead}")
    return None
