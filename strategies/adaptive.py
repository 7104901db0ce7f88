"""Adaptive server optimisers as strategies (Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2)."""

from __future__ import annotations

from typing import Any

from clients.recipe import NonNegative, Positive, Rate
from strategies.server_optimizers import Adagrad, Adam, Yogi
from strategies.strategy import Strategy


class FedAdam(Strategy):
    """FedAvg's mean update D through Adam: x <- x + lr m / (sqrt(v) + tau).

    Args:
        lr: server learning rate.
        b1: first-moment decay, below 1.
        b2: second-moment decay, below 1.
        tau: degree of adaptivity.
        bias_correction: off in the paper; its published figures were made by optimisers that have it.
        initial_accumulator: v before the first round; the paper asks for tau^2 or more.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    _rule: type[Adam] = Adam

    keeps = "moments on the server"
    composes_with = "any sampling, correction, plug-ins and aggregator"

    def __init__(
        self,
        lr: Positive = 0.01,
        b1: Rate = 0.9,
        b2: Rate = 0.99,
        tau: Positive = 1e-3,
        bias_correction: bool = False,
        initial_accumulator: NonNegative = 0.0,
        **parts: Any,
    ):
        optimizer = self._rule(lr, b1, b2, tau, bias_correction, initial_accumulator)
        super().__init__(**{"server_optimizer": optimizer, **parts})


class FedYogi(FedAdam):
    """FedAvg's mean update through Yogi, whose second moment moves by at most (1 - b2) D^2; arguments as FedAdam."""

    _rule = Yogi


class FedAdagrad(Strategy):
    """FedAvg's mean update through Adagrad, by default without first moment (b1 = 0), as in the paper."""

    keeps = "moments on the server"
    composes_with = "any sampling, correction, plug-ins and aggregator"

    def __init__(
        self,
        lr: Positive = 0.1,
        b1: Rate = 0.0,
        tau: Positive = 1e-3,
        bias_correction: bool = False,
        initial_accumulator: NonNegative = 0.0,
        **parts: Any,
    ):
        optimizer = Adagrad(lr, b1, tau, bias_correction, initial_accumulator)
        super().__init__(**{"server_optimizer": optimizer, **parts})
