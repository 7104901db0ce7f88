"""What whoever drives a strategy needs of it, whichever way its parts came together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from clients.hooks import Correction
from clients.updates import Updates
from strategies.aggregation import Aggregator
from strategies.context import Context
from strategies.guarantees import Guarantee
from strategies.plugins import Plugin
from strategies.sampling import Sampling
from strategies.server_optimizers import ServerOptimizer

State = dict[str, Any]


@runtime_checkable
class Composition(Protocol):
    """A strategy as it is driven, see :class:`strategies.Strategy`."""

    sampling: Sampling
    correction: Correction
    plugins: tuple[Plugin, ...]
    aggregator: Aggregator
    server_optimizer: ServerOptimizer
    concurrency: int | None

    @property
    def stands(self) -> frozenset[str]: ...

    @property
    def noised(self) -> bool: ...

    def init(self, ctx: Context) -> State: ...

    def client_state(self, ctx: Context) -> dict[str, int]: ...

    def broadcast(self, state: State) -> State: ...

    def down(self, state: State, ctx: Context) -> tuple[Tensor, int]: ...

    def guarantee(self, clients: int, rounds: int) -> Guarantee | None: ...

    def contribute(
        self, u: Updates, state: State, kept: Mapping[str, Tensor], ctx: Context, receive: bool = True
    ) -> tuple[Updates, State]: ...

    def receive(self, u: Updates, state: State, ctx: Context) -> Updates: ...

    def reduce(self, u: Updates) -> Updates: ...

    def nothing(self, ctx: Context) -> Updates: ...

    def aggregate(self, u: Updates, state: State, ctx: Context) -> tuple[Tensor, State, dict[str, Any]]: ...
