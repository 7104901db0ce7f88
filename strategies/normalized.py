"""FedNova: normalised averaging, for clients that take unequal numbers of local steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clients.errors import RunError
from clients.recipe import NonNegative, Recipe
from clients.updates import Updates
from strategies.aggregation import Aggregator, State
from strategies.context import Context
from strategies.corrections import Prox, unequal_steps
from strategies.strategy import Strategy

#: Local optimisers that move by fixed sums of the gradients -> their momentum where none is given.
_LINEAR = {"sgd": 0.0, "momentum": 0.9, "nesterov": 0.9}


class FedNova(Strategy):
    """FedAvg of updates that each count as one step, times the cohort's mean number of steps (Wang et al. 2020).

    See :class:`Normalized`.

    Args:
        mu: of a proximal term on the clients, see :class:`strategies.Prox`.
        effective_steps: what the mean update is multiplied by.
        **parts: other parts of the composition, see :class:`Strategy`.
    """

    composes_with = "clients with SGD or momentum, any sampling, plug-ins and server optimiser"

    def __init__(
        self,
        mu: NonNegative = 0.0,
        effective_steps: Literal["normalizers", "steps"] = "normalizers",
        **parts: Any,
    ):
        mine = {"aggregator": Normalized(mu, effective_steps)} | ({"correction": Prox(mu)} if mu else {})
        super().__init__(**{**mine, **parts})


@dataclass(frozen=True)
class Normalized(Aggregator):
    """x <- x + tau_eff sum_i p_i (x_i - x) / ||a_i||_1 with p_i = n_i / sum n.

    Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous federated optimization" (FedNova),
    equation 11. a_i says how much each gradient of client i counts in x - x_i = eta sum_s a_i[s] g_i(s): tau ones for
    plain SGD (see :func:`normalizers`). FedAvg, which leaves it out, minimises sum_i p_i ||a_i||_1 F_i instead.

    A client sends ``normalizer``, its n_i ||a_i||_1, beside the update. There is no state.

    Args:
        mu: of the proximal term that the strategy's correction adds; the recipe's own is known.
        effective_steps: tau_eff is sum_i p_i ||a_i||_1 (``normalizers``: with equal work it is FedAvg, whatever the
            local optimiser), or sum_i p_i tau_i (``steps``: as the authors' code has it under a proximal term).
    """

    mu: NonNegative = 0.0
    effective_steps: Literal["normalizers", "steps"] = "normalizers"

    def check(self, recipe: Recipe) -> list[str]:
        """What of a recipe leaves ||a_i||_1 unknown, one line a key."""
        why = "FedNova divides what a client moved by the steps that it took"
        problems, momentum, pull = unequal_steps(recipe, why), recipe.optimizer.name != "sgd", self._pull(recipe)
        if recipe.optimizer.name not in _LINEAR:
            problems.append(
                f"client.optimizer: {recipe.optimizer.name!r} rescales gradients, and {why}; give one of"
                f" {', '.join(_LINEAR)}"
            )
        if recipe.local_training is not None:
            problems.append(f"client.local_training: {why}, which it keeps to itself; leave it out")
        if recipe.optimizer_state == "keep" and momentum:
            problems.append(f'client.optimizer_state: {why} in the round, and "keep" adds earlier ones; give "reset"')
        if pull and (recipe.schedule.name != "constant" or any(recipe.schedule.settings.values())):
            problems.append("client.schedule: FedNova's normaliser under a proximal term needs one rate; leave it out")
        if pull and recipe.lr_factors:
            problems.append(
                "client.lr_factors: FedNova's normaliser under a proximal term needs one rate; leave them out"
            )
        if pull >= 1:
            problems.append(
                f"client.lr: under a proximal term, lr mu = {pull:g} must be below 1, or steps overshoot the global"
                " weights; lower one of them"
            )
        return problems

    def fits(self, strategy: Any) -> list[str]:
        held = strategy.correction.mu if isinstance(strategy.correction, Prox) else 0.0
        if held == self.mu:
            return []
        return [
            f"strategy.aggregator: {self!r} normalises for another proximal term than the clients' {held:g}; give both"
            " the same mu"
        ]

    def prepare(self, u: Updates, ctx: Context) -> Updates:
        if ctx.recipe is None:
            raise RunError("FedNova: needs to know how clients train; give the context a recipe")
        n, optimizer = u.examples.to(torch.float64), ctx.recipe.optimizer
        momentum = float(optimizer.settings.get("momentum", _LINEAR[optimizer.name]))
        a = normalizers(u.steps, momentum, nesterov=optimizer.name == "nesterov", pull=self._pull(ctx.recipe))
        effective = a if self.effective_steps == "normalizers" else u.steps
        return u.replace(rows=u.rows / a[:, None].to(u.rows.dtype), weights=n).send(normalizer=n * effective)

    def combine(self, u: Updates, state: State, ctx: Context) -> tuple[Tensor, State, dict[str, Any]]:
        n = u.weights.sum()
        return u.sends["normalizer"].sum() / n * (u.rows[0] / n), state, {}

    def _pull(self, recipe: Recipe) -> float:
        mu = self.mu + recipe.regularization.proximal
        return recipe.learning_rate * mu if mu else 0.0


def normalizers(steps: Tensor, momentum: float = 0.0, *, nesterov: bool = False, pull: float = 0.0) -> Tensor:
    """||a||_1 after so many local steps: how far gradients of 1 carry a client, over the learning rate.

    Plain SGD: tau. With momentum rho: (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho). With a proximal term:
    (1 - (1 - eta mu)^tau) / (eta mu). Wang et al. 2020, section 4; run step by step, the two together are exact too.

    Args:
        steps: ``int64 [k]``, tau of each client.
        momentum: rho, without dampening, from zero at the round's start.
        nesterov: whether it is Nesterov's.
        pull: eta mu of a proximal term, below 1.

    Returns:
        ``float64 [k]``.
    """
    m = moved = 0.0
    reached = [moved]
    for _ in range(int(steps.max())):
        g = 1 - pull * moved
        m = momentum * m + g
        moved += g + momentum * m if nesterov else m
        reached.append(moved)
    return torch.tensor(reached, dtype=torch.float64)[steps]
