"""Where training examples come from."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Examples(Protocol):
    """Where training examples come from: positions of any shape in, columns of that shape out."""

    def take(self, index: Tensor) -> dict[str, Tensor]: ...


def in_precision(columns: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point columns in the rows' dtype; all others as they are."""
    return {
        name: column.to(dtype) if column.is_floating_point() and column.dtype != dtype else column
        for name, column in columns.items()
    }
