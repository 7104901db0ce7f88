"""What a strategy changes in the local loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clients.hooks import Correction, Variables
from clients.recipe import NonNegative
from clients.regularization import proximal_gradient


@dataclass(frozen=True, eq=False)
class Prox(Correction):
    """Each client minimises F_k(w) + mu/2 ||w - w_t||^2: its gradient gets mu (w - w_t).

    Equation 2 of Li et al. 2020, "Federated optimization in heterogeneous networks".

    The anchor w_t is the round's global weights for the whole round: not the weights of the last step or epoch, where
    the term would be zero, and not zero, where it would be weight decay. It is added before the optimiser, so Adam and
    the like rescale it with the rest of the gradient. It holds the shared parameters only: batch norm's running
    statistics and personal parameters are free.

    Args:
        mu: 0 is FedAvg, to the bit.
    """

    mu: NonNegative = 0.01

    def gradient(self, grad: Tensor, row: Tensor, v: Variables, step: int) -> Tensor:
        return grad + proximal_gradient(row, v.weights, self.mu) if self.mu else grad
