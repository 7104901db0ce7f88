"""An aggregation rule that remembers how far each client agreed with the others, and an attack to hold it against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clients import Updates
from strategies import Aggregator, Context, Plugin


class Trust(Aggregator):
    """Weighs clients by their trust, ``t <- memory t + (1 - memory) max(0, cos(row, median row))``."""

    needs = "rows"
    min_rows = 3

    def __init__(self, memory: float = 0.5):
        self.memory = memory

    def init(self, ctx: Context) -> dict[str, Tensor]:
        return {"trust": torch.full((ctx.population.clients,), 0.5, dtype=ctx.layout.dtype)}

    def combine(
        self, u: Updates, state: dict[str, Tensor], ctx: Context
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        agreement = torch.cosine_similarity(u.rows, u.rows.median(0).values[None]).clamp(min=0)
        trust = state["trust"].clone()
        trust[u.clients] = self.memory * trust[u.clients] + (1 - self.memory) * agreement
        weights = trust[u.clients] * agreement
        return weights @ u.rows / weights.sum().clamp(min=1e-12), {"trust": trust}, {"trust": trust[u.clients]}


class Reverse(Plugin):
    """The first ``attackers`` clients send ``-scale`` times their update."""

    def __init__(self, attackers: int = 3, scale: float = 5.0):
        self.attackers, self.scale = attackers, scale

    def client(self, u: Updates, state: dict[str, Tensor], ctx: Context) -> tuple[Updates, dict[str, Tensor]]:
        turned = torch.where(u.clients < self.attackers, -self.scale, 1.0)
        return u.replace(rows=u.rows * turned[:, None]), state
