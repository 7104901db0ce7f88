"""A plug-in with a half on each side and state on each side: adaptive clipping with error feedback."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clients import Updates
from strategies import Context, Plugin


class AdaptiveClip(Plugin):
    """Clips updates to a bound that follows a quantile of their norms (Andrew et al. 2021); the rest is sent later.

    A client sends ``min(1, C / |x|) x`` with ``x`` its update and what it kept back before, and whether ``|x| <= C``.
    The server moves ``C <- C exp(-rate (b - quantile))`` where ``b`` is the share of clients that stayed below.
    """

    client_state = {"kept_back": "row"}

    def __init__(self, bound: float = 1.0, quantile: float = 0.5, rate: float = 0.5):
        self.bound, self.quantile, self.rate = bound, quantile, rate

    def init(self, ctx: Context) -> dict[str, Tensor]:
        return {"bound": torch.tensor([self.bound])}

    def client(self, u: Updates, state: dict[str, Tensor], ctx: Context) -> tuple[Updates, dict[str, Tensor]]:
        whole = u.rows + state["kept_back"]
        norms = whole.norm(dim=1)
        sent = whole * (state["bound"] / norms.clamp(min=1e-12)).clamp(max=1)[:, None]
        below = (norms <= state["bound"]).to(torch.float64)
        return u.replace(rows=sent).send(below=below), {"kept_back": whole - sent}

    def server_total(self, u: Updates, state: dict[str, Tensor], ctx: Context) -> tuple[Updates, dict[str, Tensor]]:
        share = float(u.sends["below"].sum()) / len(u)
        return u, {"bound": state["bound"] * math.exp(-self.rate * (share - self.quantile))}
