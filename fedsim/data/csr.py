"""Who holds which examples, as one array of positions and one of offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CSR:
    """Which examples each client holds: client ``k`` those at ``order[offsets[k]:offsets[k + 1]]``.

    Attributes:
        order: ``int64 [N]`` positions in the columns that it points into.
        offsets: ``int64 [clients + 1]``.
    """

    order: np.ndarray
    offsets: np.ndarray

    @property
    def clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def examples(self) -> int:
        return len(self.order)

    @property
    def sizes(self) -> np.ndarray:
        """``int64 [clients]`` examples of each client."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """``int64 [N]`` the client of each element of ``order``."""
        return np.repeat(np.arange(self.clients), self.sizes)

    def of(self, client: int) -> np.ndarray:
        """One client's examples, a view of ``order``."""
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def only(self, chosen: np.ndarray) -> CSR:
        """The same clients with those elements of ``order`` alone that are chosen, ``bool [N]``."""
        before = np.concatenate([[0], np.cumsum(chosen)])
        return CSR(self.order[chosen], before[self.offsets])

    def label_table(self, labels: np.ndarray, classes: int, clients: np.ndarray) -> np.ndarray:
        """How many examples of each class some clients hold.

        Args:
            labels: ``int [N]`` the class of each position.
            classes: how many there are.
            clients: ``int64 [k]`` ids.

        Returns:
            ``int64 [k, classes]``.
        """
        sizes = self.sizes[clients]
        row = np.repeat(np.arange(len(clients)), sizes)
        within = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        held = labels[self.order[self.offsets[clients][row] + within]]
        counts = np.bincount(row * classes + held, minlength=len(clients) * classes)
        return counts.reshape(len(clients), classes).astype(np.int64, copy=False)

    def map_tensors(self, fn: Callable[[Any], Any]) -> CSR:
        return CSR(mapped(self.order, fn), mapped(self.offsets, fn))


def mapped(array: Any, fn: Callable[[Any], Any]) -> Any:
    """``fn`` of an array as a tensor, an array again where ``fn`` gives a tensor."""
    given = fn(torch.from_numpy(array) if isinstance(array, np.ndarray) else array)
    return given.numpy() if isinstance(given, Tensor) else given
