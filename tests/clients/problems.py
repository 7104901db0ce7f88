"""Small learning problems for the tests of the local loop."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from clients.hooks import Correction
from clients.optimizers import Optimizer, Sgd
from clients.recipe import Recipe
from clients.task import Classification, Task
from clients.training import Trainer
from clients.weights import Layout


class Pool:
    """A pool of examples as tensors."""

    def __init__(self, **columns: Tensor):
        self.columns = columns

    def take(self, index: Tensor) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


#: Ragged on purpose: several batches with a short last one, exactly full ones, fewer than one batch, a single example.
SIZES = (25, 40, 7, 31, 1, 20)


def members(sizes: tuple[int, ...] = SIZES):
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return lambda client: np.arange(offsets[client], offsets[client + 1])


def digits_like(sizes: tuple[int, ...] = SIZES, features: int = 12, classes: int = 4) -> Pool:
    made = torch.Generator().manual_seed(0)
    y = torch.randint(classes, (sum(sizes),), generator=made)
    x = torch.randn(sum(sizes), features, generator=made) + 0.5 * torch.eye(classes, features)[y]
    return Pool(x=x, y=y)


def mlp(features: int = 12, classes: int = 4, norm: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        middle = [nn.BatchNorm1d(16)] if norm else []
        return nn.Sequential(nn.Linear(features, 16), *middle, nn.ReLU(), nn.Linear(16, classes))


def trainer(
    model: nn.Module,
    pool: Pool,
    *,
    stacked: bool,
    recipe: Recipe | None = None,
    sizes: tuple[int, ...] = SIZES,
    optimizer: Optimizer | None = None,
    correction: Correction | None = None,
    task: Task | None = None,
    layout: Layout | None = None,
    **rest: object,
) -> Trainer:
    return Trainer(
        model,
        task or Classification(),
        recipe or Recipe(batch_size=10, epochs=2, lr=0.1),
        layout or Layout(model),
        pool,
        members(sizes),
        optimizer=optimizer or Sgd(),
        correction=correction,
        stacked=stacked,
        **rest,  # type: ignore[arg-type]
    )


def apart(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())
