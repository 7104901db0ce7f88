"""Learning-rate schedules: a factor on the rate, over rounds or over a client's local steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from clients.described import Described
from clients.recipe import Count, Positive

Position = int | Tensor
Length = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Schedule(Described):
    """The base of every schedule; one of your own says ``factor``."""

    def factor(self, at: Position, total: Position) -> float | Tensor:
        """The factor at position ``at`` of ``total``, which counts from 0.

        A number, or ``float64 [k]`` where either is ``int64 [k]``: clients differ in how many steps they take.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class _Shaped(Schedule):
    """A shape after a linear warm-up of ``warmup`` positions, 1/warmup to 1 (Goyal et al. 2017)."""

    warmup: Length = field(default=0, kw_only=True)

    def factor(self, at: Position, total: Position) -> float | Tensor:
        pair = (torch.as_tensor(value, dtype=torch.float64) for value in (at, total))
        t, end = torch.broadcast_tensors(*pair)
        rising = (t + 1) / max(self.warmup, 1)
        shape = self.shape((t - self.warmup).clamp(min=0), (end - self.warmup).clamp(min=1))
        found = torch.where(t < self.warmup, rising, shape)
        return found if found.dim() else float(found)

    def shape(self, t: Tensor, total: Tensor) -> Tensor:
        """The factor after the warm-up, where ``t`` counts from 0 again; ``float64``, as are both arguments."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(_Shaped):
    """1 throughout."""

    def shape(self, t: Tensor, total: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class Step(_Shaped):
    """``by ** floor(t / every)``: every so many positions the rate is multiplied by ``by``."""

    every: Count
    by: Positive = 0.1

    def shape(self, t: Tensor, total: Tensor) -> Tensor:
        return self.by ** (t // self.every)


@dataclass(frozen=True)
class Cosine(_Shaped):
    """``floor + (1 - floor) (1 + cos(pi t / T)) / 2`` over T positions (Loshchilov and Hutter 2017, no restarts)."""

    floor: Fraction = 0.0

    def shape(self, t: Tensor, total: Tensor) -> Tensor:
        return self.floor + (1 - self.floor) * (1 + torch.cos(math.pi * t / total)) / 2


@dataclass(frozen=True)
class Warmup(_Shaped):
    """Rises linearly to 1 over ``length`` positions, and stays there."""

    length: Count

    def shape(self, t: Tensor, total: Tensor) -> Tensor:
        return ((t + 1) / self.length).clamp(max=1)
