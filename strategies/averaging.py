"""Averaging: FedAvg, with momentum on the server, and with a proximal term on the clients."""

from __future__ import annotations

from typing import Any, Literal

from clients.recipe import NonNegative, Positive, Rate
from strategies.aggregation import Mean
from strategies.corrections import Prox
from strategies.server_optimizers import SGD
from strategies.strategy import Strategy


class FedAvg(Strategy):
    """x <- x + sum_k n_k (x_k - x) / sum_k n_k over the round's clients (McMahan et al. 2017).

    Args:
        weighting: ``examples`` weighs clients by their training examples, ``uniform`` counts them alike.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples", **parts: Any):
        super().__init__(**{"aggregator": Mean(weighting), **parts})


class FedProx(Strategy):
    """FedAvg of clients that each minimise F_k(w) + mu/2 ||w - w_t||^2 (Li et al. 2020), see :class:`Prox`.

    Clients that do less work than others are kept, as in the paper; ``client.stragglers = "drop"`` leaves them out.

    Args:
        mu: 0 is FedAvg, to the bit.
        weighting: ``examples`` weighs clients by their training examples, ``uniform`` counts them alike.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    composes_with = "any sampling, plug-ins, aggregator and server optimiser"

    def __init__(self, mu: NonNegative = 0.01, weighting: Literal["examples", "uniform"] = "examples", **parts: Any):
        super().__init__(**{"correction": Prox(mu), "aggregator": Mean(weighting), **parts})


class FedAvgM(Strategy):
    """FedAvg with server momentum: m <- momentum m + D, x <- x + lr m, D the mean update (Hsu et al. 2019).

    Args:
        lr: server learning rate.
        momentum: below 1, no dampening; 0 with ``lr`` 1 is FedAvg to the bit.
        nesterov: x <- x + lr (D + momentum m).
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    keeps = "momentum on the server"
    composes_with = "any sampling, correction, plug-ins and aggregator"

    def __init__(self, lr: Positive = 1.0, momentum: Rate = 0.9, nesterov: bool = False, **parts: Any):
        super().__init__(**{"server_optimizer": SGD(lr, momentum, nesterov), **parts})
