"""The closed-form quadratics F_k(x) = a_k/2 (x - e_k)^2 of the tests, and a context to call strategies with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from clients.task import Classification
from clients.updates import Updates
from clients.weights import Layout
from strategies.context import Context

A = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
E = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
ETA = 0.05


def descend(x: Tensor, tau: Tensor) -> Tensor:
    """tau_k gradient steps of each client from x ``[1]``; the local weights ``[k, 1]``."""
    local = x.repeat(len(A))
    for step in range(int(tau.max())):
        local = torch.where(step < tau, local - ETA * A * (local - E), local)
    return local[:, None]


@dataclass(frozen=True)
class People:
    clients: int

    @property
    def trainable(self) -> np.ndarray:
        return np.arange(self.clients)


def context(weights: Tensor | None = None, *, round: int = 1, clients: int = 3, seed: int = 0) -> Context:
    """A context over a row of any length."""
    weights = torch.zeros(1, dtype=torch.float64) if weights is None else weights
    layout = Layout(nn.Linear(len(weights), 1, bias=False).to(weights.dtype))
    return Context(round, layout, weights, People(clients), Classification(), seed)


def updates(rows: Tensor, examples: Tensor | None = None) -> Updates:
    k = len(rows)
    return Updates(
        rows=rows,
        clients=torch.arange(k),
        examples=torch.ones(k, dtype=torch.int64) if examples is None else examples,
        steps=torch.ones(k, dtype=torch.int64),
        weights=torch.ones(k, dtype=torch.float64),
    )


def play(strategy, rows: Tensor, state: dict, ctx: Context, examples: Tensor | None = None):
    """One round of a strategy on these updates: the new weights and state."""
    u, _ = strategy.contribute(updates(rows, examples), strategy.broadcast(state), {}, ctx)
    if strategy.aggregator.needs == "sum":
        u = strategy.reduce(u)
    row, state, _ = strategy.aggregate(u, state, ctx)
    return row, state
