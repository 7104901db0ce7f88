"""What is easily got wrong in a thing of one's own; each class has one mistake."""

from __future__ import annotations

import torch
from torch import nn

import clients
import strategies


class TooNarrow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 10)

    def forward(self, x):
        return self.layer(x)


class OtherColumn(clients.Classification):
    def forward(self, model, batch):
        return model(batch["image"])


class AveragedLoss(clients.Classification):
    def loss(self, outputs, batch):
        return super().loss(outputs, batch).mean()


class AveragedStatistic(clients.Classification):
    def statistics(self, outputs, batch):
        return {"accuracy": (outputs.argmax(1) == batch["y"]).float().mean()}


class MissingMetric(clients.Classification):
    primary = "f1"


class RowAlone(strategies.Aggregator):
    needs = "rows"

    def combine(self, u, state, ctx):
        return u.rows.mean(0)


class MatrixForRow(strategies.Aggregator):
    needs = "rows"

    def combine(self, u, state, ctx):
        return u.rows, state, {}


class NotANumber(strategies.Aggregator):
    needs = "rows"

    def combine(self, u, state, ctx):
        return u.rows.mean(0) / 0 * 0, state, {}


class UnknownNeed(strategies.Aggregator):
    needs = "row"  # type: ignore[assignment]


class ForgetfulPlugin(strategies.Plugin):
    client_state = {"residual": "row"}

    def client(self, u, state, ctx):
        return u, {}


class UnknownSize(strategies.Plugin):
    client_state = {"residual": "rows"}


class Anybody(strategies.Sampling):
    """Chooses among all clients and not among those that can be trained."""

    def cohort(self, ctx):
        return torch.arange(ctx.population.clients)


class Halves(strategies.Sampling):
    def cohort(self, ctx):
        return ctx.population.trainable / 2


class WeightsAlone(strategies.ServerOptimizer):
    def step(self, row, update, state):
        return row + update
