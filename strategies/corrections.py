"""What a strategy changes in the local loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clients.hooks import Correction, Variables
from clients.recipe import NonNegative, Positive, Recipe
from clients.regularization import proximal_gradient
from clients.updates import Updates


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


@dataclass(frozen=True, eq=False)
class Scaffold(Correction):
    """Control variates against client drift: each client steps along g_i(y) - c_i + c.

    Algorithm 1, option II, of Karimireddy et al. 2020, "SCAFFOLD: stochastic controlled averaging for federated
    learning". With x the round's weights, y_i what client i's K steps of rate eta make of them:

        c_i+ = c_i - c + (x - y_i) / (K eta),    c <- c + 1/N sum_{i in S} (c_i+ - c_i)

    K counts the steps that the client took, and N all clients that can be trained, whether sampled or not. All c_i and
    c ``[d]`` are zero at first, and c is the mean of the c_i after every round; a client whose update was lost keeps
    its own. (x - y_i) / (K eta) is the mean of what the client descended along: its gradients, clipped where they are
    clipped, and its penalties. Only plain SGD at one rate divides so, and other recipes are refused.

    A client sends ``control``, its c_i+ - c_i, beside the update, and is sent c with the weights: twice FedAvg's bytes
    each way.

    Args:
        weighting: ``uniform``, the paper's, for the mean of the F_i; ``examples`` for the mean by training examples,
            with c the mean of the c_i by examples. The mean of the updates has to be weighted alike.
    """

    weighting: Literal["uniform", "examples"] = "uniform"
    client_state = {"control": "row"}
    server_state = {"control": "row"}

    def check(self, recipe: Recipe) -> list[str]:
        why = "control variates divide what a client moved by its steps and their rate"
        problems = unequal_steps(recipe, why)
        if recipe.optimizer.name != "sgd":
            problems.append(f'client.optimizer: {recipe.optimizer.name!r} moves otherwise, and {why}; give "sgd"')
        if recipe.lr_factors:
            problems.append(f"client.lr_factors: {why}, which must be one; leave them out")
        return problems

    def fits(self, strategy: Any) -> list[str]:
        said = getattr(strategy.aggregator, "weighting", self.weighting)
        if said == self.weighting:
            return []
        return [
            f"strategy.weighting: {said!r} for updates, and {self!r} for control variates, would lead to neither"
            " objective; give both alike"
        ]

    def gradient(self, grad: Tensor, row: Tensor, v: Variables, step: int) -> Tensor:
        return grad - v.client["control"] + v.server["control"]

    def finish(self, u: Updates, v: Variables) -> tuple[Updates, dict[str, Tensor]]:
        before, moved = v.client["control"], u.steps[:, None].to(u.rows.dtype) * v.lr
        after = before - v.server["control"] - u.rows / moved
        share = 1 if self.weighting == "uniform" else u.examples[:, None]
        return u.send(control=share * (after - before)), {"control": after}

    def server(self, u: Updates, server_state: dict[str, Tensor], ctx: Any) -> dict[str, Tensor]:
        able = ctx.population.trainable
        whole = len(able) if self.weighting == "uniform" else int(ctx.population.examples[able].sum())
        c = server_state["control"]
        return {"control": (c + u.sends["control"].sum(0, dtype=torch.float64) / whole).to(c.dtype)}


@dataclass(frozen=True, eq=False)
class FedDyn(Correction):
    """Dynamic regularisation: each client minimises F_k(w) - <g_k, w> + alpha/2 ||w - w_t||^2.

    The client's half of Algorithm 1 of Acar et al. 2021, "Federated learning based on dynamic regularization"; the
    server's is :class:`strategies.drift.Dynamic`, with the same alpha. The gradient gets -g_k + alpha (w - w_t), and
    after training ``g_k <- g_k - alpha (w_k - w_t)``, the gradient of F_k at w_k where w_k is that minimum.

    g_k ``[d]`` is zero at first and stays with the client; a client whose update was lost keeps its own. Any local
    optimiser will do, the better the closer it comes to the minimum. Nothing is sent beside the update.

    Args:
        alpha: how strongly clients are held to the round's weights; the fixed point does not depend on it.
    """

    alpha: Positive = 0.1
    client_state = {"gradient": "row"}

    def check(self, recipe: Recipe) -> list[str]:
        if not recipe.regularization.proximal:
            return []
        return [
            "client.regularization.proximal: FedDyn holds clients by alpha already, and its g_k counts on nothing"
            " else that does; leave it out"
        ]

    def fits(self, strategy: Any) -> list[str]:
        if getattr(strategy.aggregator, "alpha", None) == self.alpha:
            return []
        return [
            f"strategy.aggregator: {strategy.aggregator!r} is not the server's half of {self!r}; give dynamic with the"
            " same alpha, or name the strategy feddyn"
        ]

    def gradient(self, grad: Tensor, row: Tensor, v: Variables, step: int) -> Tensor:
        return grad - v.client["gradient"] + proximal_gradient(row, v.weights, self.alpha)

    def finish(self, u: Updates, v: Variables) -> tuple[Updates, dict[str, Tensor]]:
        return u, {"gradient": v.client["gradient"] - self.alpha * u.rows}


def unequal_steps(recipe: Recipe, why: str) -> list[str]:
    """What makes a client's steps unequal in rate, or the weights those after another number of steps; a line a key.

    Args:
        recipe: how clients train.
        why: what needs equal steps, for the message.
    """
    problems = []
    if recipe.step_schedule.name != "constant" or any(recipe.step_schedule.settings.values()):
        problems.append(f"client.step_schedule: {why}, which must be the same for all of a round; leave it out")
    if recipe.early_stopping is not None:
        problems.append(f"client.early_stopping: {why}, and it sends weights of fewer steps; leave it out")
    if recipe.personal_epochs is not None:
        problems.append(f"client.personal_epochs: {why}, and shared weights rest in its steps; leave it out")
    return problems
