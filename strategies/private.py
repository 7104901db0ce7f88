"""DP-FedAvg: averaging with differential privacy for clients."""

from __future__ import annotations

from typing import Any

from clients.recipe import Count, NonNegative, Positive
from strategies.aggregation import Mean
from strategies.privacy import Accountant, AdaptiveClip, Clip, Noise, Quantile
from strategies.sampling import Poisson
from strategies.server_optimizers import SGD
from strategies.strategy import Strategy


class DPFedAvg(Strategy):
    """x <- x + lr (sum_k clip(D_k, C) + N(0, (z C)^2 I)) / (q N), with clients drawn by their own coins.

    McMahan et al. 2018, "Learning differentially private recurrent language models", Algorithm 1; with ``adaptive``,
    Andrew et al. 2021. It is the composition ``clip -> mean -> noise -> server optimiser``, see
    :class:`strategies.privacy.Clip`, :class:`strategies.privacy.Noise`: codecs among the experiment's plug-ins act
    between the clip and the mean, and the server clips again what they decode.

    Args:
        noise_multiplier: z; left out, what ``target_epsilon`` takes, or else 1.
        clipping_norm: C, at first where it is adaptive.
        adaptive: whether C follows the median of the updates' norms.
        target_epsilon: the budget; the run ends before a round that would exceed it.
        delta: left out, 1 / clients^1.1.
        accountant: ``pld`` or ``rdp``.
        amplification: whether the sampling of clients counts; left out, where it can.
        cap: counts a client by its training examples up to so many; left out, all count alike.
        lr: server learning rate.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    keeps = "the clipping norm, where it is adaptive"
    composes_with = "poisson or fixed sampling, prox, codecs, any server optimiser; nothing that sends values beside"

    def __init__(
        self,
        noise_multiplier: NonNegative | None = None,
        clipping_norm: Positive = 1.0,
        adaptive: bool = False,
        target_epsilon: Positive | None = None,
        delta: Quantile | None = None,
        accountant: Accountant = "pld",
        amplification: bool | None = None,
        cap: Count | None = None,
        lr: Positive = 1.0,
        **parts: Any,
    ):
        if noise_multiplier is None and target_epsilon is None:
            noise_multiplier = 1.0
        noise = Noise(noise_multiplier, target_epsilon, delta, accountant, amplification)
        mine = {
            "sampling": Poisson(clients_per_round=10),
            "plugins": (AdaptiveClip(clipping_norm) if adaptive else Clip(clipping_norm), noise),
            "aggregator": Mean("uniform" if cap is None else "capped", cap, "expected"),
            "server_optimizer": SGD(lr),
        }
        super().__init__(**{**mine, **parts})
