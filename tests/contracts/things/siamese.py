"""A data set with two input columns, a model that takes both, and their loss: do two noisy signals have one shape?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import fedsim
from clients import Task


class Pairs(Dataset):
    """Pairs of signals of length 12; ``same`` says whether both are of one of four shapes."""

    def __init__(self, pairs: int, seed: int, noise: float):
        draw = torch.Generator().manual_seed(seed)
        shapes = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
        self.same = torch.arange(pairs) % 2
        first = torch.randint(0, 4, (pairs,), generator=draw)
        step = torch.randint(1, 4, (pairs,), generator=draw)
        second = torch.where(self.same == 1, first, (first + step) % 4)
        self.left = shapes[first] + noise * torch.randn(pairs, 12, generator=draw)
        self.right = shapes[second] + noise * torch.randn(pairs, 12, generator=draw)

    def __len__(self) -> int:
        return len(self.same)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"left": self.left[index], "right": self.right[index], "same": self.same[index]}


def pairs(examples: int = 320, noise: float = 0.3) -> fedsim.Source:
    return fedsim.Source(train=Pairs(examples, 1, noise), test=Pairs(200, 2, noise), label="same")


class Siamese(nn.Module):
    """One encoder for both inputs; the logit falls with their distance."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 6))
        self.scale = nn.Parameter(torch.tensor([1.0, 1.0]))

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        distance = (self.encoder(left) - self.encoder(right)).square().sum(-1)
        return self.scale[0] - self.scale[1] * distance


class Verification(Task):
    primary = "accuracy"
    higher_is_better = True

    def forward(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["left"], batch["right"])

    def loss(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, batch["same"].to(outputs.dtype), reduction="none")

    def statistics(self, outputs: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"accuracy": ((outputs > 0) == (batch["same"] == 1)).float()}
