"""An experiment of your own: data, model, loss and metric. Run it with `fedsim run` and this file's name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import fedsim
from clients import Task

Batch = Mapping[str, Tensor]


def source() -> fedsim.Source:
    """A noisy curve, of which every client sees mostly its own stretch: replace it by your own tensors or arrays."""
    draw = torch.Generator().manual_seed(0)
    clients = torch.arange(1000) % 20
    x = torch.linspace(-1, 1, 20)[clients, None] + 0.7 * torch.randn(1000, 1, generator=draw)
    y = (2 * x[:, 0]).sin() + 0.1 * torch.randn(1000, generator=draw)
    return fedsim.Source(train={"x": x, "y": y}, clients=clients)


class Net(nn.Module):
    """Any module: `forward` gets a batch of inputs and returns what the loss needs."""

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)[:, 0]


class MyTask(Task):
    """The loss and the metric. Statistics are by example; a metric is made of their sums."""

    primary = "rmse"

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return (outputs - batch["y"]).square()

    def statistics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"rmse": (outputs - batch["y"]).square()}

    def metric(self, name: str, total: Mapping[str, Tensor]) -> float:
        return float(total["rmse"][0] / total["examples"][0]) ** 0.5


experiment = fedsim.Experiment(
    name="my",
    rounds=50,
    data={"source": source, "proxy": 0, "partition": "natural"},
    model=Net,
    task=MyTask,
    client={"optimizer": "adam", "lr": 0.01, "epochs": 5},
    strategy={"name": "fedavg", "clients_per_round": 10},
)

if __name__ == "__main__":
    print(fedsim.run(experiment).metrics)
