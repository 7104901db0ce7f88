"""Small populations for the tests of what counts them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedsim.data.population import CSR


@dataclass
class Holding:
    """What a census reads of a population.

    Attributes:
        counts: ``int [clients, classes]`` training examples of each client and class.
        others: examples of each client in further splits.
        labelled: whether labels are classes.
        matched: whether the clients' test examples are the server's.
        asked: the clients whose labels were looked at.
    """

    counts: np.ndarray
    others: dict[str, np.ndarray] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=lambda: {"test": range(40), "proxy": range(12)})
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    labelled: bool = True
    matched: bool = False
    asked: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def clients(self) -> int:
        return len(self.counts)

    @property
    def classes(self) -> int | None:
        return self.counts.shape[1] if self.labelled else None

    @property
    def splits(self) -> dict[str, CSR]:
        return {"train": _csr(self.counts.sum(1))} | {name: _csr(sizes) for name, sizes in self.others.items()}

    def label_table(self, split: str, clients: np.ndarray) -> np.ndarray | None:
        assert split == "train"
        self.asked = clients
        return self.counts[clients] if self.labelled else None


def _csr(sizes: np.ndarray) -> CSR:
    return CSR(np.arange(sizes.sum()), np.concatenate([[0], np.cumsum(sizes)]))


def skewed(clients: int, classes: int = 10, alpha: float = 0.3, seed: int = 0) -> np.ndarray:
    """``int [clients, classes]`` counts with a Dirichlet label mix and sizes that differ much."""
    generator = np.random.Generator(np.random.Philox(seed))
    mixes = generator.dirichlet(np.full(classes, alpha), clients)
    sizes = np.rint(generator.lognormal(3, 1, clients)).astype(np.int64)
    return np.stack([generator.multinomial(size, mix) for size, mix in zip(sizes, mixes, strict=True)])
