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
    """Noisy images of a disc, and which pixels it covers: replace them by your own images and masks."""
    draw = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    centre = torch.randint(4, 12, (400, 2, 1, 1), generator=draw)
    radius = torch.randint(2, 5, (400, 1, 1), generator=draw)
    mask = (rows - centre[:, 0]).square() + (columns - centre[:, 1]).square() <= radius.square()
    image = 0.6 * mask + 0.25 * torch.randn(400, 16, 16, generator=draw) + 0.2
    return fedsim.Source(train={"x": image[:, None].clamp(0, 1), "y": mask.long()}, input_range=(0, 1))


class Net(nn.Module):
    """Any module: `forward` gets a batch of inputs and returns what the loss needs."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 2, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MyTask(Task):
    """Cross-entropy by pixel, and the Dice coefficient of the disc, from counts that are summed over all examples."""

    primary = "dice"
    higher_is_better = True

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, batch["y"], reduction="none").mean((1, 2))

    def statistics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        said, truth = outputs.argmax(1).flatten(1), batch["y"].flatten(1)
        return {"dice": torch.stack([(said * truth).sum(1), said.sum(1) + truth.sum(1)], dim=1).float()}

    def metric(self, name: str, total: Mapping[str, Tensor]) -> float:
        both, sizes = total["dice"].tolist()
        return 2 * both / sizes if sizes else 1.0


experiment = fedsim.Experiment(
    name="my",
    rounds=20,
    data={"source": source, "clients": 16, "proxy": 0, "partition": "iid"},
    model=Net,
    task=MyTask,
    client={"optimizer": "adam", "lr": 0.01, "epochs": 2},
    strategy={"name": "fedavg", "clients_per_round": 8},
)

if __name__ == "__main__":
    print(fedsim.run(experiment).metrics)
