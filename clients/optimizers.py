"""Local optimisers on a block ``[k, d]`` of clients: one or two operations for all of them.

Each follows torch.optim's algorithm of the same name; rows of clients that have finished are simply not in the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clients.recipe import NonNegative, Positive
from clients.recipe import Rate as Decay

State = dict[str, Tensor]
LearningRate = float | Tensor


class Optimizer:
    """The base: ``state`` names the blocks to keep (zeros at first), ``step`` updates rows in place."""

    state: tuple[str, ...] = ()

    def init(self, rows: Tensor) -> State:
        """Zeros like ``rows`` ``[k, d]`` for each name in ``state``."""
        return {name: torch.zeros_like(rows) for name in self.state}

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: LearningRate, step: int | Tensor) -> None:
        """One step in place; ``grads`` may be overwritten.

        ``lr``, and ``step`` that counts from 0, are numbers, or ``[k, 1]`` where clients differ: under a schedule over
        local steps, and where moments are kept between rounds. Where parameters have rates of their own, ``lr`` is
        ``[1, d]`` or ``[k, d]``.
        """
        raise NotImplementedError


def _descend(rows: Tensor, direction: Tensor, lr: LearningRate) -> None:
    """w <- w - lr direction, in place."""
    if isinstance(lr, Tensor):
        rows.addcmul_(direction, lr, value=-1)
    else:
        rows.add_(direction, alpha=-lr)


def _descend_by_ratio(rows: Tensor, above: Tensor, below: Tensor, lr: LearningRate) -> None:
    """w <- w - lr above / below, in place."""
    if isinstance(lr, Tensor):
        rows.addcmul_(above / below, lr, value=-1)
    else:
        rows.addcdiv_(above, below, value=-lr)


def _unbiased(decay: float, step: int | Tensor, dtype: torch.dtype) -> LearningRate:
    """1 - decay^t at step t = step + 1, in float64 whatever the rows' dtype: it is a small difference at first."""
    if isinstance(step, Tensor):
        return (1 - decay ** (step.double() + 1)).to(dtype)
    return 1 - decay ** (step + 1)


@dataclass(frozen=True)
class Sgd(Optimizer):
    """w <- w - lr g."""

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: LearningRate, step: int | Tensor) -> None:
        _descend(rows, grads, lr)


@dataclass(frozen=True)
class Momentum(Optimizer):
    """m <- momentum m + g; w <- w - lr m."""

    momentum: Decay = 0.9
    state = ("m",)

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: LearningRate, step: int | Tensor) -> None:
        _descend(rows, state["m"].mul_(self.momentum).add_(grads), lr)


@dataclass(frozen=True)
class Nesterov(Optimizer):
    """m <- momentum m + g; w <- w - lr (g + momentum m)."""

    momentum: Decay = 0.9
    state = ("m",)

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: LearningRate, step: int | Tensor) -> None:
        m = state["m"].mul_(self.momentum).add_(grads)
        _descend(rows, grads.add_(m, alpha=self.momentum), lr)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam with bias correction (Kingma and Ba 2015), as torch.optim.Adam."""

    b1: Decay = 0.9
    b2: Decay = 0.999
    eps: Positive = 1e-8
    state = ("m", "v")

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: LearningRate, step: int | Tensor) -> None:
        m = state["m"].lerp_(grads, 1 - self.b1)
        v = state["v"].mul_(self.b2).addcmul_(grads, grads, value=1 - self.b2)
        scale = v.sqrt().mul_(_unbiased(self.b2, step, rows.dtype) ** -0.5).add_(self.eps)
        _descend_by_ratio(rows, m, scale, lr / _unbiased(self.b1, step, rows.dtype))


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled decay (Loshchilov and Hutter 2019): w <- w - lr decay w before Adam's step."""

    weight_decay: NonNegative = 0.01

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: LearningRate, step: int | Tensor) -> None:
        rows.mul_(1 - lr * self.weight_decay)
        super().step(rows, grads, state, lr, step)


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """v <- alpha v + (1 - alpha) g^2; w <- w - lr g / (sqrt(v) + eps)."""

    alpha: Decay = 0.99
    eps: Positive = 1e-8
    state = ("v",)

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: LearningRate, step: int | Tensor) -> None:
        v = state["v"].mul_(self.alpha).addcmul_(grads, grads, value=1 - self.alpha)
        _descend_by_ratio(rows, grads, v.sqrt().add_(self.eps), lr)


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """v <- v + g^2; w <- w - lr g / (sqrt(v) + eps)."""

    eps: Positive = 1e-10
    state = ("v",)

    def step(self, rows: Tensor, grads: Tensor, state: State, lr: LearningRate, step: int | Tensor) -> None:
        v = state["v"].addcmul_(grads, grads)
        _descend_by_ratio(rows, grads, v.sqrt().add_(self.eps), lr)
