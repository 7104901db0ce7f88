"""One of each of the smaller things that an experiment can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import fedsim
from clients import Optimizer
from strategies import Check, CheckContext, Context, Sampling, ServerOptimizer


def blobs(examples: int = 600, classes: int = 4) -> fedsim.Source:
    """Points around ``classes`` centres."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(examples) % classes
    x = 1.5 * torch.randn(classes, 6, generator=draw)[y] + torch.randn(examples, 6, generator=draw)
    return fedsim.Source(train={"x": x, "y": y}, proxy={"x": x[:50]})


def growing(
    labels: np.ndarray, clients: int, generator: np.random.Generator, *, ratio: float = 1.3
) -> fedsim.Partition:
    """Client ``k`` holds ``ratio`` times as many examples as client ``k - 1``."""
    shares = np.cumsum(ratio ** np.arange(clients))
    offsets = np.concatenate([[0], np.rint(shares / shares[-1] * len(labels))]).astype(int)
    return fedsim.Partition(generator.permutation(len(labels)), offsets)


def narrow(weight: Tensor, fan_in: int, fan_out: int, generator: torch.Generator, *, width: float = 0.1) -> Tensor:
    """Uniform in ``[-width, width]``."""
    return weight.uniform_(-width, width, generator=generator)


class Neighbours(Sampling):
    """A block of clients with ids side by side, which starts anywhere."""

    def __init__(self, block: int = 3):
        self.block = block

    def cohort(self, ctx: Context) -> np.ndarray:
        ids = ctx.population.trainable
        start = int(torch.randint(len(ids), (1,), generator=ctx.generator("neighbours")))
        return np.sort(ids[(start + np.arange(self.block)) % len(ids)])


class Lion(Optimizer):
    """Evolved sign momentum (Chen et al. 2023): w <- w - lr sign(b1 m + (1 - b1) g), m <- b2 m + (1 - b2) g."""

    state = ("m",)

    def __init__(self, b1: float = 0.9, b2: float = 0.99):
        self.b1, self.b2 = b1, b2

    def step(self, rows: Tensor, grads: Tensor, state: dict[str, Tensor], lr: float, step: int) -> None:
        m = state["m"]
        rows.sub_(lr * torch.sign(self.b1 * m + (1 - self.b1) * grads))
        m.mul_(self.b2).add_(grads, alpha=1 - self.b2)


class Warming(ServerOptimizer):
    """Adds the update times a factor that grows to 1 over ``rounds`` rounds."""

    def __init__(self, rounds: int = 4):
        self.rounds = rounds

    def init(self, row: Tensor) -> dict[str, Tensor]:
        return {"round": torch.zeros((), dtype=torch.int64)}

    def step(self, row: Tensor, update: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        reached = state["round"] + 1
        return row + update * min(1.0, int(reached) / self.rounds), {"round": reached}


class Worst(Check):
    """The class that is recognised worst, and a table of all."""

    def __init__(self, at_least: float = 0.0):
        self.at_least = at_least

    def run(self, ctx: CheckContext) -> tuple[Mapping[str, float], Mapping[str, Any], Mapping[str, Any]]:
        assert ctx.model is not None
        test = ctx.data("test")
        right = ctx.model(test["x"]).argmax(1) == test["y"]
        by_class = {int(c): float(right[test["y"] == c].float().mean()) for c in test["y"].unique()}
        worst = min(by_class.values())
        if worst < self.at_least:
            raise ValueError(f"a class has accuracy {worst:.2f}, below {self.at_least}")
        return {"worst": worst}, {"classes": [{"class": c, "accuracy": a} for c, a in by_class.items()]}, {}


class Patience:
    """A callback that stops once the validation loss has not fallen for ``evaluations`` evaluations."""

    def __init__(self, evaluations: int = 2):
        self.evaluations, self.best, self.waited = evaluations, float("inf"), 0

    def __call__(self, record: fedsim.RoundRecord) -> Literal["stop"] | None:
        if "validation" not in record.metrics:
            return None
        loss = record.metrics["validation"]["loss"]
        self.waited = 0 if loss < self.best else self.waited + 1
        self.best = min(self.best, loss)
        return "stop" if self.waited >= self.evaluations else None
