"""Asynchronous averaging with a buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clients.recipe import Count, NonNegative, Positive
from clients.updates import Updates
from strategies.aggregation import Aggregator, State
from strategies.context import Context
from strategies.server_optimizers import SGD
from strategies.strategy import Strategy


@dataclass(frozen=True)
class Buffered(Aggregator):
    """The buffer's mean, each update less the staler it is: ``1/K sum_k (1 + tau_k)^-exponent D_k``.

    ``tau`` is how many steps the server took since the client was sent its weights, and ``D_k`` is the client's update
    against those weights. The sum is divided by K and not by the weights' sum, so that a buffer of stale updates moves
    the weights less (Nguyen et al. 2022, Algorithm 1). Every client counts alike. Needs only the sum; no state.

    Args:
        exponent: 0.5 is the paper's ``1 / sqrt(1 + tau)``; 0 counts stale updates in full.
    """

    exponent: NonNegative = 0.5

    def prepare(self, u: Updates, ctx: Context) -> Updates:
        return u.replace(weights=torch.full_like(u.weights, (1.0 + ctx.staleness) ** -self.exponent))

    def combine(self, u: Updates, state: State, ctx: Context) -> tuple[Tensor, State, dict[str, Any]]:
        return u.rows[0] / len(u.clients), state, {}


class FedBuff(Strategy):
    """Clients train without waiting for one another; every ``clients_per_round`` updates, the server takes a step.

    x <- x + lr 1/K sum_k (1 + tau_k)^-exponent (y_k - x_{t - tau_k}) (Nguyen et al. 2022, "Federated learning with
    buffered asynchronous aggregation"). Time is virtual: how long clients take is what ``[devices]`` says of them. With
    all clients at work, a step that takes all of them, and all equally fast, it is FedAvg with equal weights, to the
    bit.

    Args:
        concurrency: clients that train at the same time.
        exponent: see :class:`Buffered`.
        lr: server learning rate.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    composes_with = "any correction, plug-ins and server optimiser; devices say how long clients take"

    def __init__(self, concurrency: Count = 20, exponent: NonNegative = 0.5, lr: Positive = 1.0, **parts: Any):
        self.concurrency = concurrency
        super().__init__(**{"aggregator": Buffered(exponent), "server_optimizer": SGD(lr), **parts})
