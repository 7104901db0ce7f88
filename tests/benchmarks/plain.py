"""The plain PyTorch client that every rival runs: the model, its initialisation, and one epoch of local SGD."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.benchmarks.work import BATCH_SIZE, CLASSES, LEARNING_RATE, Work


def build(work: Work) -> nn.Module:
    """The model of a work, its weights drawn He-normal and its biases zero, as fedsim draws them by default."""
    torch.manual_seed(0)
    model = _mlp(work.shape[0]) if work.model == "mlp" else _cnn(work.shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return model


def _mlp(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def _cnn(shape: tuple[int, ...]) -> nn.Module:
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


def train(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, int]:
    """One shuffled epoch of SGD on one client's examples ``x`` [n, ...], ``y`` [n].

    Returns:
        The sum of the batches' mean losses, and the number of steps.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    order = torch.randperm(len(x))
    total, steps = torch.zeros(()), 0
    for batch in order.split(BATCH_SIZE):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[batch]), y[batch])
        loss.backward()
        optimizer.step()
        total += loss.detach()
        steps += 1
    return total.item(), steps
