"""An experiment of your own: data, model, loss and metric. Run it with `fedsim run` and this file's name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedsim
from clients import Task

Batch = Mapping[str, Tensor]


def source() -> fedsim.Source:
    """Points on two noisy half circles: replace them by your own tensors or arrays, one row an example."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(1000) % 2
    angle = torch.rand(1000, generator=draw) * torch.pi
    x = torch.stack([angle.cos(), angle.sin()], dim=1)
    x = torch.where(y[:, None] == 1, torch.tensor([1.0, 0.5]) - x, x)
    return fedsim.Source(train={"x": x + 0.15 * torch.randn(1000, 2, generator=draw), "y": y})


class Net(nn.Module):
    """Any module: `forward` gets a batch of inputs and returns what the loss needs."""

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MyTask(Task):
    """The loss and the metric, both by example: the trainer masks and averages."""

    primary = "accuracy"
    higher_is_better = True

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch["y"], reduction="none")

    def statistics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(1) == batch["y"]).float()}


experiment = fedsim.Experiment(
    name="my",
    rounds=30,
    data={"source": source, "clients": 20, "proxy": 0, "partition": {"name": "dirichlet", "alpha": 1.0}},
    model=Net,
    task=MyTask,
    client={"lr": 0.1, "epochs": 3},
    strategy={"name": "fedavg", "clients_per_round": 10},
)

if __name__ == "__main__":
    print(fedsim.run(experiment).metrics)
