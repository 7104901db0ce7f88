"""q-FedAvg: fairer averaging, clients with a higher loss count for more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clients.errors import RunError
from clients.recipe import NonNegative, Positive
from clients.updates import Updates
from strategies.aggregation import Aggregator, State
from strategies.context import Context
from strategies.strategy import Strategy

#: Added to every loss, as the authors' code does: F^(q - 1) has a pole at 0.
_ABOVE_ZERO = 1e-10


class QFedAvg(Strategy):
    """Averaging for the objective sum_k F_k^(q + 1) / (q + 1), which evens out clients (Li et al. 2020, q-FFL).

    See :class:`Fair`.

    Args:
        q: 0 is the unweighted mean; the larger, the more the worst client counts.
        lr: 1/L; left out, the clients' learning rate.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    composes_with = "any sampling and correction; it sends more than the row, so no noise on the row alone"

    def __init__(self, q: NonNegative = 1.0, lr: Positive | None = None, **parts: Any):
        super().__init__(**{"aggregator": Fair(q, lr), **parts})


@dataclass(frozen=True)
class Fair(Aggregator):
    """w <- w - sum_k Delta_k / sum_k h_k, the step of q-FedAvg.

    Li et al. 2020, "Fair resource allocation in federated learning", Algorithm 2. With F_k the loss of the round's
    weights w on all training examples of client k, before it trains, and w_k what it makes of them:

        Delta_k = F_k^q L (w - w_k),    h_k = q F_k^(q - 1) ||L (w - w_k)||^2 + L F_k^q

    A client sends F_k^q (w_k - w) and ``h``, its h_k/L: both sides of the fraction are divided by L, so that q = 0 is
    the mean over clients to the bit. Clients count alike, for any q; the paper samples them in proportion to their
    examples. The loss is the mean over examples, without penalties, and 10^-10 is added to it; with another scale the
    result is another. There is no state.

    Args:
        q: how much unevenness costs.
        lr: 1/L, the learning rate of which L is the inverse; left out, the clients', before schedules.
    """

    q: NonNegative = 1.0
    lr: Positive | None = None
    needs_loss_before = True

    def prepare(self, u: Updates, ctx: Context) -> Updates:
        if self.lr is None and ctx.recipe is None:
            raise RunError("q-FedAvg: needs the clients' learning rate; give lr, or the context a recipe")
        lr = self.lr if self.lr is not None or ctx.recipe is None else ctx.recipe.learning_rate
        assert lr is not None
        sends = dict(u.sends)
        F = sends.pop("loss_before") + _ABOVE_ZERO
        moved = torch.linalg.vector_norm(u.rows, dim=1, dtype=torch.float64)
        h = self.q * F ** (self.q - 1) * moved**2 / lr + F**self.q
        return u.replace(weights=F**self.q, sends=sends).send(h=h)

    def combine(self, u: Updates, state: State, ctx: Context) -> tuple[Tensor, State, dict[str, Any]]:
        return u.rows[0] / u.sends["h"].sum(), state, {}
