"""Arrays as tensors, and whether their numbers can be used."""

from __future__ import annotations

import warnings
from typing import Any

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
    """A column as a tensor ``[N, ...]`` that shares the given memory.

    Args:
        value: a tensor or an array.
        where: what an error begins with, e.g. ``"data.source.train.x"``.

    Raises:
        RequestError: for what is no tensor, or a single number.
    """
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise RequestError(f"{where}: an array of objects (ragged rows?); pad or crop its rows to one shape")
        try:
            value = as_tensor(value)
        except (TypeError, ValueError):
            raise RequestError(f"{where}: no tensor has dtype {value.dtype}; give numbers") from None
    if not isinstance(value, Tensor):
        raise RequestError(f"{where}: {type(value).__name__} given; give a tensor or an array [N, ...]")
    if value.dim() == 0:
        raise RequestError(f"{where}: a single number given; give one value an example, [N, ...]")
    return value.detach()


def not_finite(values: Tensor | np.ndarray) -> str | None:
    """``nan at [4, 1]``: the first number ``[N, ...]`` that is not finite and where it is; None where there is none."""
    floating = values.is_floating_point() if isinstance(values, Tensor) else values.dtype.kind == "f"
    if not floating or 0 in values.shape:
        return None
    rows = max(1, _BLOCK // int(np.prod(values.shape[1:])))
    for start in range(0, len(values), rows):
        block = values[start : start + rows]
        if isinstance(block, np.ndarray):
            block = as_tensor(block.astype(block.dtype.newbyteorder("="), copy=False))
        # The extremes of numbers with NaN are NaN, so this needs no tensor of flags as large as the data.
        if not torch.stack(block.aminmax()).isfinite().all():
            place = (~block.isfinite()).nonzero()[0]
            return f"{float(block[tuple(place)])} at {[start + int(place[0]), *place[1:].tolist()]}"
    return None
