"""The model, how it is trained, and who has which examples."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from clients import Recipe
from strategies import Fixed, Scaffold

SEED = 0
TEST = 360

#: How a client trains.
recipe = Recipe(optimizer="sgd", lr=0.1, batch_size=10, epochs=2, initialization="he_normal")

#: SCAFFOLD (Karimireddy et al. 2020): one half of it runs on the server, the other on clients, with control variates.
strategy = Scaffold(sampling=Fixed(fraction=0.5))


def model() -> nn.Module:
    """A perceptron for pictures of 8x8."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All pictures ``[1797, 64]`` in [0, 1] and their labels, in an order drawn once."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(y))
    return torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])


def examples(partition_id: int, num_partitions: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a client trains on, and a fifth as much that it tests on; no two clients share an example."""
    x, y = digits()
    mine = torch.arange(TEST, len(y))[partition_id::num_partitions]
    cut = len(mine) // 6
    test, train = mine[:cut], mine[cut:]
    return {"x": x[train], "y": y[train]}, {"x": x[test], "y": y[test]}


def server_examples() -> tuple[Tensor, Tensor]:
    """The pictures that no client has."""
    x, y = digits()
    return x[:TEST], y[:TEST]
