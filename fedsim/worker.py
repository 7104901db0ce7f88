"""What runs in a worker: training and evaluating chunks of clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clients.evaluation import Evaluator, Total
from clients.hooks import ClientFailure, LocalTraining
from clients.optimizers import Optimizer
from clients.recipe import Recipe
from clients.task import Batch, Task
from clients.training import PERSONAL, Trained, Trainer
from clients.updates import Updates
from clients.weights import Layout
from fedsim.data.population import Population
from fedsim.engines.engine import Answer
from strategies.context import Context
from strategies.strategy import Strategy

_PROXY_BATCH = 4096


@dataclass(frozen=True)
class Chunk:
    """Clients that are trained together: the unit of retry and of partial sums.

    Attributes:
        number: its place in the round's order of addition.
        clients: ``int64 [k]`` ids, ascending.
        slots: ``int64 [k]`` their rows in the round's matrix, where there is one.
        state: client state by name, ``[k, m]`` each.
    """

    number: int
    clients: np.ndarray
    slots: np.ndarray
    state: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clients)

    def split(self) -> list[Chunk]:
        """Two halves, to find out which client ends its worker; none of a single client."""
        middle = len(self) // 2
        if not middle:
            return []
        return [self._part(slice(None, middle)), self._part(slice(middle, None))]

    def _part(self, which: slice) -> Chunk:
        state = {name: value[which] for name, value in self.state.items()}
        return Chunk(self.number, self.clients[which], self.slots[which], state)


@dataclass(frozen=True)
class Piece:
    """A range of examples to evaluate: of a server split, or of some clients' own split."""

    split: str
    start: int = 0
    stop: int = 0
    clients: np.ndarray | None = None
    state: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return 1 if self.clients is None else len(self.clients)


@dataclass(frozen=True)
class TrainedChunk:
    """What the server learns of a chunk beside the tensors: numbers and failures."""

    updates: Updates
    loss: Tensor
    norms: Tensor
    failures: list[ClientFailure]


@dataclass(frozen=True)
class Setup:
    """All that a worker is made of; calling it makes one."""

    model: nn.Module
    task: Task
    recipe: Recipe
    layout: Layout
    strategy: Strategy
    population: Population
    optimizer: Optimizer
    local_training: LocalTraining | None
    stacked: bool
    seed: int
    batch_size: int
    batch_norm: Literal["recalibrate", "batch"]

    def __call__(self) -> Worker:
        return Worker(self)

    def trainer(self, *, stacked: bool | None = None, **changes: Any) -> Trainer:
        """A trainer on the clients' training examples."""
        of = self.population.splits["train"].of
        made: dict[str, Any] = {
            "recipe": self.recipe,
            "members": of,
            "correction": self.strategy.correction,
            "local_training": self.local_training,
            "stacked": self.stacked if stacked is None else stacked,
            **changes,
        }
        model, task, layout, examples = self.model, self.task, self.layout, self.population.columns
        return Trainer(model, task, layout=layout, examples=examples, optimizer=self.optimizer, seed=self.seed, **made)


class Worker:
    """One for each process; every task is a method that takes a chunk and the round's broadcast."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.strategy, self.layout, self.population = setup.strategy, setup.layout, setup.population
        self.trainer = setup.trainer()
        self.evaluator = Evaluator(
            setup.model, setup.task, setup.layout, setup.batch_size, setup.batch_norm, self._proxy
        )
        self.loaded: object = None

    def _proxy(self) -> Iterator[Batch]:
        columns = self.population.server.get("proxy")
        if columns is not None:
            for index in torch.arange(len(columns)).split(_PROXY_BATCH):
                yield columns.take(index)

    def _context(self, broadcast: Mapping[str, Any]) -> Context:
        return Context(
            broadcast["round"], self.layout, broadcast["weights"], self.population, self.setup.task, self.setup.seed
        )

    def train(self, chunk: Chunk, broadcast: Mapping[str, Any]) -> Answer:
        """Trains a chunk and prepares what it contributes: its rows, or their weighted sum, and new client state."""
        ctx = self._context(broadcast)
        trained = self._trained(chunk, broadcast)
        u = trained.updates
        kept = {name: value[self._places(chunk, u)] for name, value in chunk.state.items()}
        norms = u.rows.norm(dim=1)
        if len(u):
            u, fresh = self.strategy.contribute(u, broadcast["state"], kept, ctx)
            state = {**{_kept_name(name): value for name, value in trained.state.items()}, **fresh}
        else:
            state = {}
        tensors = {f"state:{name}": value.contiguous() for name, value in state.items()}
        if broadcast["rows"] is not None:
            broadcast["rows"][torch.from_numpy(chunk.slots)[self._places(chunk, u)]] = u.rows
        if self.strategy.aggregator.needs == "sum" and len(u):
            total = self.strategy.reduce(u)
            tensors["sum"] = total.rows
            tensors |= {f"send:{name}": value for name, value in total.sends.items()}
        small = u.replace(rows=u.rows.new_empty(len(u), 0), sends=u.sends if broadcast["rows"] is not None else {})
        return Answer(TrainedChunk(small, trained.loss, norms, trained.failures), tensors)

    def _trained(self, chunk: Chunk, broadcast: Mapping[str, Any]) -> Trained:
        correction = {name: chunk.state[f"correction/{name}"] for name in self.strategy.correction.client_state}
        if PERSONAL in chunk.state:
            correction[PERSONAL] = chunk.state[PERSONAL]
        server = {name[11:]: value for name, value in broadcast["state"].items() if name.startswith("correction/")}
        return self.trainer.train(chunk.clients, broadcast["weights"], broadcast["round"], correction, server)

    @staticmethod
    def _places(chunk: Chunk, u: Updates) -> Tensor:
        """Where the clients that are left stand in the chunk."""
        return torch.from_numpy(np.searchsorted(chunk.clients, u.clients.numpy()))

    def evaluate(self, piece: Piece, broadcast: Mapping[str, Any]) -> Answer:
        """Summed statistics: of a range of a server split, or for each of some clients on its own split."""
        if piece.clients is None:
            self._load(broadcast)
            index = torch.arange(piece.start, piece.stop)
            return Answer([self.evaluator.totals(self.population.server[piece.split], index)])
        return Answer([self._client(piece, i, broadcast) for i in range(len(piece.clients))])

    def _client(self, piece: Piece, i: int, broadcast: Mapping[str, Any]) -> Total:
        assert piece.clients is not None
        personal = piece.state.get(PERSONAL)
        if personal is None:
            self._load(broadcast)
        else:
            start = self.trainer.start_personal
            assert start is not None
            self.evaluator.load(torch.cat([broadcast["weights"], start + personal[i]]), self.layout.all)
            self.loaded = None
        members = self.population.splits[piece.split].of(int(piece.clients[i]))
        return self.evaluator.totals(self.population.columns, torch.from_numpy(members))

    def _load(self, broadcast: Mapping[str, Any]) -> None:
        if self.loaded != broadcast["version"]:
            self.evaluator.load(broadcast["weights"])
            self.loaded = broadcast["version"]

    def train_on_server(self, row: Tensor, split: str, round: int) -> Tensor:
        """The clients' recipe on a server split, as if the server were a client of its own."""
        columns = self.population.server[split]
        members = np.arange(len(columns))
        trainer = self.setup.trainer(stacked=False, members=lambda _: members, correction=None, local_training=None)
        trainer.examples = columns
        trained = trainer.train(np.array([-1]), row, round)
        if trained.failures:
            raise RuntimeError(f"round {round}, server training on {split!r}: {trained.failures[0].message}")
        return row + trained.updates.rows[0]


def _kept_name(name: str) -> str:
    return name if name == PERSONAL else f"correction/{name}"
