"""Segmentation: images of a disc, a small conv net, Dice loss, and the metrics Dice and mean IoU."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import fedsim
from clients import Task


def discs(examples: int = 160, size: int = 12) -> fedsim.Source:
    """Noisy images of a disc; every fourth example is one client's, and clients differ in brightness."""
    draw = torch.Generator().manual_seed(0)
    clients = torch.arange(examples) % 8
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    centre = torch.randint(3, size - 3, (examples, 2, 1, 1), generator=draw)
    radius = torch.randint(2, 4, (examples, 1, 1), generator=draw)
    mask = (rows - centre[:, 0]).square() + (columns - centre[:, 1]).square() <= radius.square()
    image = 0.5 * mask + 0.2 * torch.randn(examples, size, size, generator=draw) + 0.02 * clients[:, None, None]
    return fedsim.Source(train={"image": image[:, None], "mask": mask.long()}, clients=clients, label="mask")


class ConvNet(nn.Module):
    """Logits ``[B, 2, H, W]``."""

    def __init__(self, channels: int = 6):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 2, 3, padding=1)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class Dice(Task):
    """Dice loss of each image (Milletari et al. 2016), ``1 - (2 sum p t + 1) / (sum p + sum t + 1)``."""

    primary = "dice"
    higher_is_better = True

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["image"])

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        disc, truth = outputs.softmax(1)[:, 1].flatten(1), batch["mask"].to(outputs.dtype).flatten(1)
        return 1 - (2 * (disc * truth).sum(1) + 1) / (disc.sum(1) + truth.sum(1) + 1)

    def statistics(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        said, truth = (torch.stack([1 - mask, mask], 1).flatten(2) for mask in (outputs.argmax(1), batch["mask"]))
        both, sizes = (said * truth).sum(2), (said + truth).sum(2)
        return {"dice": torch.stack([both[:, 1], sizes[:, 1]], dim=1), "mean_iou": torch.cat([both, sizes], dim=1)}

    def metric(self, name: str, total: Mapping[str, Tensor]) -> float:
        both, sizes = total[name].chunk(2)
        return float((2 * both / sizes if name == "dice" else both / (sizes - both)).mean())
