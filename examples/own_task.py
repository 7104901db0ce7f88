"""A task of your own: segmentation, with your data, model, Dice loss and Dice coefficient.

    python own_task.py
    fedsim run own_task.py --set client.lr=0.01

A task works example by example: `loss` gives one value each, and a metric is made of statistics that are summed over
examples, clients and machines.
"""

import torch
from torch import nn

import fedsim
from clients import Task


def discs() -> fedsim.Source:
    """Noisy images of a disc. Each of 12 hospitals has a scanner of its own brightness."""
    draw = torch.Generator().manual_seed(0)
    hospital = torch.arange(360) % 12
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    centre = torch.randint(4, 12, (360, 2, 1, 1), generator=draw)
    radius = torch.randint(2, 5, (360, 1, 1), generator=draw)
    mask = (rows - centre[:, 0]).square() + (columns - centre[:, 1]).square() <= radius.square()
    image = 0.5 * mask + 0.2 * torch.randn(360, 16, 16, generator=draw) + 0.01 * hospital[:, None, None]
    return fedsim.Source(train={"image": image[:, None], "mask": mask.long()}, clients=hospital, label="mask")


class Net(nn.Module):
    """Logits of two classes for each pixel."""

    def __init__(self, channels: int = 8):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2, 1),
        )

    def forward(self, image):
        return self.layers(image)


class Dice(Task):
    """The Dice loss of each image, 1 - 2 |P and T| / (|P| + |T|) with probabilities for P; the coefficient by pixel."""

    primary = "dice"
    higher_is_better = True

    def forward(self, model, batch):
        return model(batch["image"])

    def loss(self, outputs, batch):
        said, truth = outputs.softmax(dim=1)[:, 1].flatten(1), batch["mask"].flatten(1)
        return 1 - (2 * (said * truth).sum(1) + 1) / (said.sum(1) + truth.sum(1) + 1)

    def statistics(self, outputs, batch):
        said, truth = outputs.argmax(dim=1).flatten(1), batch["mask"].flatten(1)
        return {"dice": torch.stack([2 * (said * truth).sum(1), said.sum(1) + truth.sum(1)], dim=1)}

    def metric(self, name, total):
        twice_both, sizes = total["dice"].tolist()
        return twice_both / sizes


experiment = fedsim.Experiment(
    name="discs",
    rounds=20,
    data={"source": discs, "partition": "natural", "proxy": 0},
    model=Net,
    task=Dice,
    client={"optimizer": "adam", "lr": 0.005, "epochs": 3},
    strategy={"clients_per_round": 6},
    evaluation={"every": 5},
)

if __name__ == "__main__":
    result = fedsim.run(experiment)
    print(result.history[["test_dice", "test_loss"]].dropna())
    print(f"Dice {result.metrics['test']['dice']:.3f}; report: {result.out / 'report.html'}")
