"""Regression with an own robust loss (Huber 1964) and an own metric, R squared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedsim
from clients import Task


def curve(examples: int = 400) -> fedsim.Source:
    """``y = sin(2 x0) + x1 / 2`` with noise; every client sees its own stretch of ``x0``."""
    draw = torch.Generator().manual_seed(0)
    clients = torch.arange(examples) % 10
    x = torch.randn(examples, 2, generator=draw) * 0.6
    x[:, 0] += torch.linspace(-1, 1, 10)[clients]
    y = (2 * x[:, 0]).sin() + x[:, 1] / 2 + 0.1 * torch.randn(examples, generator=draw)
    return fedsim.Source(train={"x": x, "y": y}, clients=clients)


def network(hidden: int = 24) -> nn.Module:
    return nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1), nn.Flatten(0))


class Robust(Task):
    primary = "r2"
    higher_is_better = True

    def __init__(self, delta: float = 1.0):
        self.delta = delta

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return F.huber_loss(outputs, batch["y"], reduction="none", delta=self.delta)

    def statistics(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        y = batch["y"]
        return {"r2": torch.stack([(outputs - y).square(), y, y.square()], dim=1)}

    def metric(self, name: str, total: Mapping[str, Tensor]) -> float:
        residual, y, squares = total["r2"].tolist()
        return 1 - residual / (squares - y**2 / total["examples"].item())
