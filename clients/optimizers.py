"""Local optimisers on a block ``[k, d]`` of clients: one or two operations for all of them.

Each follows torch.optim's algorithm of the same name; rows of clients that have finished are simply not in the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.recipe import NonNegative, Positive

State = dict[str, Tensor]


class Optimizer:
    """The base: ``state`` names the blocks to keep (zeros at first), ``step`` updates rows in place."""

    state: tuple[str, ...] = ()

    def init(self, rows: Tensor) -> State:
        """Zeros like ``rows`` ``[k, d]`` for each name in ``state``."""
        return {name: torch.zeros_like(rows) for name in self.state}

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: float, step: int) -> None:
        """One step in place; ``step`` counts from 0; ``grads`` may be overwritten."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sgd(Optimizer):
    """w <- w - lr g."""

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: float, step: int) -> None:
        rows.add_(grads, alpha=-lr)


@dataclass(frozen=True)
class Momentum(Optimizer):
    """m <- momentum m + g; w <- w - lr m."""

    momentum: NonNegative = 0.9
    state = ("m",)

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: float, step: int) -> None:
        rows.add_(state["m"].mul_(self.momentum).add_(grads), alpha=-lr)


@dataclass(frozen=True)
class Nesterov(Optimizer):
    """m <- momentum m + g; w <- w - lr (g + momentum m)."""

    momentum: NonNegative = 0.9
    state = ("m",)

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: float, step: int) -> None:
        m = state["m"].mul_(self.momentum).add_(grads)
        rows.add_(grads.add_(m, alpha=self.momentum), alpha=-lr)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam with bias correction (Kingma and Ba 2015), as torch.optim.Adam."""

    b1: NonNegative = 0.9
    b2: NonNegative = 0.999
    eps: Positive = 1e-8
    state = ("m", "v")

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: float, step: int) -> None:
        m = state["m"].lerp_(grads, 1 - self.b1)
        v = state["v"].mul_(self.b2).addcmul_(grads, grads, value=1 - self.b2)
        t = step + 1
        scale = v.sqrt().mul_((1 - self.b2**t) ** -0.5).add_(self.eps)
        rows.addcdiv_(m, scale, value=-lr / (1 - self.b1**t))


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled decay (Loshchilov and Hutter 2019): w <- w - lr decay w before Adam's step."""

    weight_decay: NonNegative = 0.01

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: float, step: int) -> None:
        rows.mul_(1 - lr * self.weight_decay)
        super().step(rows, grads, state, lr, step)


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """v <- alpha v + (1 - alpha) g^2; w <- w - lr g / (sqrt(v) + eps)."""

    alpha: NonNegative = 0.99
    eps: Positive = 1e-8
    state = ("v",)

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: float, step: int) -> None:
        v = state["v"].mul_(self.alpha).addcmul_(grads, grads, value=1 - self.alpha)
        rows.addcdiv_(grads, v.sqrt().add_(self.eps), value=-lr)


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """v <- v + g^2; w <- w - lr g / (sqrt(v) + eps)."""

    eps: Positive = 1e-10
    state = ("v",)

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: float, step: int) -> None:
        v = state["v"].addcmul_(grads, grads)
        rows.addcdiv_(grads, v.sqrt().add_(self.eps), value=-lr)
