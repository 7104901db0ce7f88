"""Server optimisers: what the server does with the pseudo-gradient, update = mean(local) - global.

Reddi et al. 2021, "Adaptive federated optimization", Algorithm 2, with D_t the update, x the weights:

    m_t = b1 m_{t-1} + (1 - b1) D_t,    x_{t+1} = x_t + lr m_t / (sqrt(v_t) + tau)

and v_t by each rule's own line. The paper has no bias correction (its authors' code has Keras'): ``bias_correction``
switches to that of Kingma and Ba 2015, ``lr m/(1-b1^t) / (sqrt(v/(1-b2^t)) + tau)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clients.described import Described
from clients.errors import RequestError
from clients.recipe import NonNegative, Positive, Rate

State = dict[str, Any]


class ServerOptimizer(Described):
    """The base of every server optimiser. State is returned, never kept on ``self``."""

    def init(self, row: Tensor) -> State:
        """The first state for weights ``[d]``: a dict of tensors."""
        return {}

    def step(self, row: Tensor, update: Tensor, state: State) -> tuple[Tensor, State]:
        """New weights ``[d]`` and state from weights, update and state; the arguments stay as they are."""
        raise NotImplementedError


@dataclass(frozen=True)
class SGD(ServerOptimizer):
    """x <- x + lr D, or with momentum (Hsu et al. 2019): m <- momentum m + D, x <- x + lr m.

    Args:
        lr: server learning rate; 1 without momentum is FedAvg.
        momentum: no dampening, as torch.optim.SGD.
        nesterov: x <- x + lr (D + momentum m).
    """

    lr: Positive = 1.0
    momentum: Rate = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _refuse(self)

    def init(self, row: Tensor) -> State:
        return {"m": torch.zeros_like(row)} if self.momentum else {}

    def step(self, row: Tensor, update: Tensor, state: State) -> tuple[Tensor, State]:
        if not self.momentum:
            return row + self.lr * update, state
        m = self.momentum * state["m"] + update
        return row + self.lr * (update + self.momentum * m if self.nesterov else m), {"m": m}


class _Adaptive(ServerOptimizer):
    """Algorithm 2's common part; each rule adds its second moment."""

    lr: float
    b1: float
    tau: float
    bias_correction: bool
    initial_accumulator: float

    def __post_init__(self) -> None:
        _refuse(self)

    def init(self, row: Tensor) -> State:
        return {
            "m": torch.zeros_like(row),
            "v": torch.full_like(row, self.initial_accumulator),
            "t": torch.zeros((), dtype=torch.int64),
        }

    def step(self, row: Tensor, update: Tensor, state: State) -> tuple[Tensor, State]:
        m = self.b1 * state["m"] + (1 - self.b1) * update
        v = self._second(state["v"], update * update)
        t = state["t"] + 1
        one, two = self._corrections(int(t)) if self.bias_correction else (1.0, 1.0)
        return row + self.lr * (m / one) / ((v / two).sqrt() + self.tau), {"m": m, "v": v, "t": t}

    def _second(self, v: Tensor, squared: Tensor) -> Tensor:
        raise NotImplementedError

    def _corrections(self, t: int) -> tuple[float, float]:
        return 1 - self.b1**t, 1.0


@dataclass(frozen=True)
class Adam(_Adaptive):
    """v_t = b2 v_{t-1} + (1 - b2) D_t^2.

    Args:
        lr: server learning rate, the paper's eta.
        b1: first-moment decay, below 1.
        b2: second-moment decay, below 1.
        tau: degree of adaptivity, added to the root.
        bias_correction: off in the paper.
        initial_accumulator: v before the first round; the paper asks for tau^2 or more.
    """

    lr: Positive = 0.1
    b1: Rate = 0.9
    b2: Rate = 0.99
    tau: Positive = 1e-3
    bias_correction: bool = False
    initial_accumulator: NonNegative = 0.0

    def _second(self, v: Tensor, squared: Tensor) -> Tensor:
        return self.b2 * v + (1 - self.b2) * squared

    def _corrections(self, t: int) -> tuple[float, float]:
        return 1 - self.b1**t, 1 - self.b2**t


@dataclass(frozen=True)
class Yogi(Adam):
    """v_t = v_{t-1} - (1 - b2) D_t^2 sign(v_{t-1} - D_t^2); arguments as :class:`Adam`."""

    def _second(self, v: Tensor, squared: Tensor) -> Tensor:
        return v - (1 - self.b2) * squared * torch.sign(v - squared)


@dataclass(frozen=True)
class Adagrad(_Adaptive):
    """v_t = v_{t-1} + D_t^2, by default without first moment (b1 = 0), as in the paper; arguments as :class:`Adam`."""

    lr: Positive = 0.1
    b1: Rate = 0.0
    tau: Positive = 1e-3
    bias_correction: bool = False
    initial_accumulator: NonNegative = 0.0

    def _second(self, v: Tensor, squared: Tensor) -> Tensor:
        return v + squared


_RATE = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_POSITIVE = ("a finite number above 0", lambda value: 0 < value < math.inf)
_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": _POSITIVE,
    "tau": _POSITIVE,
    "momentum": _RATE,
    "b1": _RATE,
    "b2": _RATE,
    "initial_accumulator": ("a finite number of at least 0", lambda value: 0 <= value < math.inf),
}


def _refuse(optimizer: ServerOptimizer) -> None:
    """Refuses numbers with which a rule has no meaning, in Python too, where no schema looks at them."""
    problems = [
        f"server_optimizer.{name}: {value!r} given; give {_ALLOWED[name][0]}"
        for name, value in vars(optimizer).items()
        if name in _ALLOWED and not _ALLOWED[name][1](value)
    ]
    if problems:
        raise RequestError(problems)
