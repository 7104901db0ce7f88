"""Clipping of rows to a Euclidean norm."""

from __future__ import annotations

import torch
from torch import Tensor

#: Below it a factor loses digits as a float32.
_TINY = 1e-30


def clip(rows: Tensor, norm: float) -> Tensor:
    """``x min(1, norm / ||x||)`` for every row, over all its coordinates jointly.

    Args:
        rows: ``[k, d]``; they stay as they are.
        norm: above 0.

    Returns:
        ``[k, d]`` in the rows' dtype; rows within the norm are untouched, to the bit.
    """
    factors = (norm / norms(rows)).clamp(max=1.0)
    clipped = rows * factors[:, None].to(rows.dtype)
    for i in (factors < _TINY).nonzero()[:, 0].tolist():
        clipped[i] = (rows[i].to(torch.float64) * factors[i]).to(rows.dtype)
    return clipped


def norms(rows: Tensor) -> Tensor:
    """Euclidean norms, ``float64 [k]``."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
