"""Against client drift: SCAFFOLD and FedDyn, whose fixed points are the optimum however far clients train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clients.recipe import Positive
from clients.updates import Updates
from strategies import corrections
from strategies.aggregation import Aggregator, Mean
from strategies.context import Context
from strategies.server_optimizers import SGD
from strategies.strategy import Strategy

State = dict[str, Any]


class Scaffold(Strategy):
    """x <- x + lr mean_S(y_i - x), where clients step along g_i - c_i + c (Karimireddy et al. 2020).

    See :class:`strategies.corrections.Scaffold`; it needs plain SGD on the clients, and keeps a row for each of them.

    Args:
        lr: server learning rate, the paper's eta_g.
        weighting: ``uniform``, the paper's, or ``examples``, for updates and control variates alike.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    keeps = "control variates, a row on the server and one a client"
    composes_with = "clients with plain SGD, any sampling, plug-ins and server optimiser"

    def __init__(self, lr: Positive = 1.0, weighting: Literal["uniform", "examples"] = "uniform", **parts: Any):
        mine = {
            "correction": corrections.Scaffold(weighting),
            "aggregator": Mean(weighting),
            "server_optimizer": SGD(lr),
        }
        super().__init__(**{**mine, **parts})


class FedDyn(Strategy):
    """Clients with a dynamic regulariser, and a server that corrects their mean (Acar et al. 2021).

    See :class:`strategies.corrections.FedDyn` and :class:`Dynamic`, its two halves; it keeps a row for each client.

    Args:
        alpha: how strongly clients are held to the round's weights.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    keeps = "h on the server, a row a client"
    composes_with = "any sampling; its aggregator and correction belong together"

    def __init__(self, alpha: Positive = 0.1, **parts: Any):
        super().__init__(**{"correction": corrections.FedDyn(alpha), "aggregator": Dynamic(alpha), **parts})


@dataclass(frozen=True)
class Dynamic(Aggregator):
    """h <- h - alpha/m sum_S (w_k - w),   w <- mean_S w_k - h/alpha.

    The server's half of FedDyn (Acar et al. 2021, "Federated learning based on dynamic regularization", Algorithm 1).
    m counts all clients that can be trained, whether sampled or not, so that h ``[d]``, zero at first, is the mean of
    the clients' g_k after every round. Clients count alike. The aggregate update is mean_S (w_k - w) - h/alpha.

    Args:
        alpha: as the clients'.
    """

    alpha: Positive = 0.1

    def fits(self, strategy: Any) -> list[str]:
        if getattr(strategy.correction, "alpha", None) == self.alpha:
            return []
        return [
            f"strategy.correction: {strategy.correction!r} is not the clients' half of {self!r}; give feddyn with the"
            " same alpha, or name the strategy feddyn"
        ]

    def init(self, ctx: Context) -> State:
        return {"h": torch.zeros_like(ctx.weights)}

    def prepare(self, u: Updates, ctx: Context) -> Updates:
        return u.replace(weights=torch.ones_like(u.weights))

    def combine(self, u: Updates, state: State, ctx: Context) -> tuple[Tensor, State, dict[str, Any]]:
        total, m = u.rows[0], len(ctx.population.trainable)
        h = state["h"] - self.alpha / m * total
        return total / u.weights.sum() - h / self.alpha, {"h": h.to(state["h"].dtype)}, {}
