"""An experiment of your own: data, model, loss and metric. Run it with `fedsim run` and this file's name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fedsim
from clients import Task

Batch = Mapping[str, Tensor]

PADDING = 0


def source() -> fedsim.Source:
    """Sentences of tokens 1 to 9, padded to 12; a token's class is whether it is larger than the one before it."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 10, (600, 12), generator=draw)
    before = torch.cat([tokens[:, :1], tokens[:, :-1]], dim=1)
    length = torch.randint(4, 13, (600, 1), generator=draw)
    real = torch.arange(12) < length
    return fedsim.Source(train={"tokens": tokens * real, "y": (tokens > before).long() * real})


class Net(nn.Module):
    """Any module: what it is called with is said by the task's `forward`."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.mix = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.mix(self.embed(tokens).transpose(1, 2)).relu()
        return self.head(hidden.transpose(1, 2))


class MyTask(Task):
    """A class for each token. Padding is left out: an example counts by its real tokens."""

    primary = "accuracy"
    higher_is_better = True

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["tokens"])

    def loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        real = (batch["tokens"] != PADDING).float()
        losses = F.cross_entropy(outputs.transpose(1, 2), batch["y"], reduction="none")
        count = real.sum(1)
        return (losses * real).sum(1) / count.clamp(min=1), count

    def statistics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        real = batch["tokens"] != PADDING
        right = (outputs.argmax(2) == batch["y"]) & real
        return {"accuracy": torch.stack([right.sum(1), real.sum(1)], dim=1).float()}

    def metric(self, name: str, total: Mapping[str, Tensor]) -> float:
        right, tokens = total["accuracy"].tolist()
        return right / max(tokens, 1)


experiment = fedsim.Experiment(
    name="my",
    rounds=20,
    data={"source": source, "clients": 20, "proxy": 0, "partition": "iid"},
    model=Net,
    task=MyTask,
    client={"optimizer": "adam", "lr": 0.01, "epochs": 2},
    strategy={"name": "fedavg", "clients_per_round": 10},
)

if __name__ == "__main__":
    print(fedsim.run(experiment).metrics)
