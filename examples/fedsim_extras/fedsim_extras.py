"""A plug-in, an aggregator, a strategy and a check, published for fedsim by entry points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clients.recipe import Positive, Rate
from strategies import Aggregator, Check, Plugin, Strategy


@dataclass(frozen=True)
class Agreement(Plugin):
    """Scales every update by its agreement with the last aggregate.

    ``D_k <- (1 - strength + strength max(0, cos(D_k, D))) D_k`` with D ``[d]`` the aggregate of the last round that
    moved the weights; in the first there is none, and updates stay as they are. Keeps D on the server and sends it with
    the weights, which doubles the bytes down; records ``agreement``.

    Args:
        strength: 0 changes nothing; the nearer to 1, the less counts an update at right angles to the last aggregate.
    """

    strength: Rate = 0.5

    def init(self, ctx):
        return {"last": torch.zeros_like(ctx.weights)}

    def client(self, u, state, ctx):
        if not bool(state["last"].any()):
            return u.tell(agreement=torch.ones(len(u))), state
        agreement = torch.cosine_similarity(u.rows, state["last"][None]).clamp(min=0)
        factors = 1 - self.strength + self.strength * agreement
        return u.replace(rows=u.rows * factors[:, None]).tell(agreement=agreement), state

    def server_total(self, u, state, ctx):
        return u, {"last": u.rows[0]}


@dataclass(frozen=True)
class SteadyMean(Aggregator):
    """The weighted mean, of which rounds with few examples move the weights less.

    ``D = sum_k n_k D_k / max(W, M)`` with W the round's total weight and ``M <- beta M + (1 - beta) W`` its running
    mean, in the first round W itself. Under Poisson sampling, drop-outs or times of day cohorts vary, and the mean of a
    handful of clients is noisy. Keeps M, one number.

    Args:
        beta: how long M remembers; 0 is the plain mean.
    """

    beta: Rate = 0.9

    def init(self, ctx):
        return {"weight": 0.0}

    def combine(self, u, state, ctx):
        weight, before = u.weights.sum(), state["weight"]
        usual = self.beta * before + (1 - self.beta) * weight if float(before) else weight
        return u.rows[0] / torch.maximum(weight, usual), {"weight": usual}, {}


class SteadyAvg(Strategy):
    """Averaging that looks back: :class:`SteadyMean` of updates scaled by :class:`Agreement`.

    Args:
        beta: how long the usual weight of a round is remembered.
        strength: how much agreement with the last aggregate counts.
        **parts: other parts of the composition, see :class:`strategies.Strategy`.
    """

    keeps = "the last aggregate and a round's usual weight, on the server"
    composes_with = "any sampling, correction and server optimiser"

    def __init__(self, beta: Rate = 0.9, strength: Rate = 0.5, **parts: Any):
        super().__init__(**{"aggregator": SteadyMean(beta), "plugins": (Agreement(strength),), **parts})


@dataclass(frozen=True)
class LayerNorms(Check):
    """The Euclidean norm of each tensor of the final weights, and how much of the whole it is.

    Args:
        largest: fails where a tensor's norm is above; left out, it only tells.
    """

    largest: Positive | None = None

    def run(self, ctx):
        norms = {slot.name: float(ctx.weights[slot.start : slot.start + slot.size].norm()) for slot in ctx.layout}
        whole = float(ctx.weights.norm())
        table = [{"tensor": name, "norm": norm, "share": norm / whole if whole else 0} for name, norm in norms.items()]
        name = max(norms, key=norms.__getitem__)
        if self.largest is not None and norms[name] > self.largest:
            raise ValueError(f"the norm of {name} is {norms[name]:.4g}, above {self.largest:g}")
        return {"largest_norm": norms[name], "norm": whole}, {"layer_norms": table}, {}
