"""What runs in a worker: training and evaluating chunks of clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from clients.augmentation import Transforms
from clients.errors import RequestError
from clients.evaluation import Evaluator, Total
from clients.hooks import ClientFailure, LocalTraining
from clients.local_state import CORRECTION, PERSONAL, kept_state
from clients.normalization import batch_norms
from clients.optimizers import Optimizer
from clients.recipe import BatchNorm, Recipe
from clients.schedules import Schedule
from clients.statistics import STATISTICS, Statistics
from clients.task import Batch, Task
from clients.training import Trained, Trainer, usable_rows
from clients.transfer import frozen_size
from clients.updates import Updates
from clients.weights import Layout
from fedsim.data.population import Population
from fedsim.engines.engine import Answer
from strategies.context import Context
from strategies.guarantees import Guarantee
from strategies.strategy import Strategy

if TYPE_CHECKING:
    from fedsim.attacking import Malicious

_RECALIBRATED_AT_ONCE = 2048


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
    report: dict[str, Tensor]
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
    schedule: Schedule
    step_schedule: Schedule
    local_training: LocalTraining | None
    statistics: Statistics | None
    transforms: Transforms | None
    malicious: tuple[Malicious, ...]
    stacked: bool
    seed: int
    rounds: int
    batch_size: int
    batch_norm: BatchNorm

    def __call__(self) -> Worker:
        return Worker(self)

    @property
    def tracked(self) -> Statistics | None:
        """Batch norm's running statistics, where training has to track them: they are kept or shared."""
        tracks = self.recipe.batch_norm != "share_affine" or self.batch_norm == "clients_stored"
        return self.statistics if tracks else None

    @property
    def shared_statistics(self) -> Statistics | None:
        """Batch norm's running statistics, where clients send them."""
        return self.statistics if self.recipe.batch_norm == "share_all" else None

    @property
    def by_client(self) -> bool:
        """Whether batch norm is judged by each client's own statistics."""
        return self.batch_norm in ("clients", "clients_stored") and bool(batch_norms(self.model))

    @property
    def server_has_all(self) -> bool:
        """Whether the server has a whole model to judge: no parameters, and no needed statistics, are clients' own."""
        return not self.layout.personal.size and not self.by_client

    @cached_property
    def guarantee(self) -> Guarantee | None:
        """The differential privacy that the strategy gives the clients."""
        return self.strategy.guarantee(len(self.population.trainable), self.rounds)

    def context(self, round: int, weights: Tensor, **more: Any) -> Context:
        """A round's circumstances, as far as the setup knows them."""
        return Context(
            round,
            self.layout,
            weights,
            self.population,
            self.task,
            self.seed,
            recipe=self.recipe,
            rounds=self.rounds,
            strategy=self.strategy,
            **more,
        )

    @property
    def kept(self) -> dict[str, int]:
        """Name -> length of what local training keeps for every client between rounds."""
        return kept_state(self.recipe, self.layout, self.optimizer, self.tracked)

    @property
    def unsent(self) -> int:
        """Parameters of the model that a client does not send: frozen, or its own."""
        return frozen_size(self.model) + self.layout.personal.size

    def trainer(self, **changes: Any) -> Trainer:
        """A trainer on the clients' training examples."""
        splits = self.population.splits
        made: dict[str, Any] = {
            "model": self.model,
            "task": self.task,
            "recipe": self.recipe,
            "layout": self.layout,
            "examples": self.population.columns,
            "members": splits["train"].of,
            "validation": splits["validation"].of if "validation" in splits else None,
            "validated": self.population.columns_of("validation"),
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "step_schedule": self.step_schedule,
            "correction": self.strategy.correction,
            "loss_before": self.strategy.aggregator.needs_loss_before or self.strategy.correction.needs_loss_before,
            "local_training": self.local_training,
            "statistics": self.tracked,
            "transforms": self.transforms,
            "input": self.population.input,
            "input_range": self.population.input_range,
            "stacked": self.stacked,
            "seed": self.seed,
            "rounds": self.rounds,
        }
        return Trainer(**{**made, **changes})

    def evaluator(self, batch_norm: BatchNorm | None = None) -> Evaluator:
        """An evaluator of the server's weights, or of clients'."""
        return Evaluator(
            self.model,
            self.task,
            self.layout,
            self.batch_size,
            batch_norm or self.batch_norm,
            self.statistics,
            self._proxy,
        )

    def _proxy(self) -> Iterator[Batch]:
        columns = self.population.server.get("proxy")
        if columns is not None:
            for index in torch.arange(len(columns)).split(_RECALIBRATED_AT_ONCE):
                yield columns.take(index)


class Worker:
    """One for each process; every task is a method that takes a chunk and the round's broadcast."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.strategy, self.layout, self.population = setup.strategy, setup.layout, setup.population
        self.trainer = setup.trainer()
        self.evaluator, self.by_client = setup.evaluator(), setup.by_client
        self.loaded: object = None

    def _context(self, broadcast: Mapping[str, Any]) -> Context:
        more = {"staleness": broadcast.get("staleness", 0), "cohort": broadcast.get("cohort")}
        return self.setup.context(broadcast["round"], broadcast["weights"], **more)

    def train(self, chunk: Chunk, broadcast: Mapping[str, Any]) -> Answer:
        """Trains a chunk and prepares what it contributes: its rows, or their weighted sum, and new client state."""
        ctx = self._context(broadcast)
        trained = self._trained(chunk, broadcast)
        u = trained.updates
        kept = {name: value[self._places(chunk, u)] for name, value in chunk.state.items()}
        norms = u.rows.norm(dim=1)
        state = {}
        if len(u):
            u, fresh = self.strategy.contribute(u, broadcast["state"], kept, ctx, broadcast.get("receive", True))
            if self.strategy.plugins and not bool((usable := usable_rows(u.rows)).all()):
                trained, u, norms = trained.only(usable, "plugins"), u.select(usable), norms[usable]
                fresh = {name: value[usable] for name, value in fresh.items()}
            state = {**trained.state, **fresh}
            if STATISTICS in u.sends and self.setup.statistics is not None:
                # Billed as they were sent; from here on they travel as moments, which add.
                u = u.send(**{STATISTICS: self.setup.statistics.moments(u.sends[STATISTICS], u.weights)})
        tensors = {f"state:{name}": value.contiguous() for name, value in state.items()}
        if broadcast["rows"] is not None:
            broadcast["rows"][torch.from_numpy(chunk.slots)[self._places(chunk, u)]] = u.rows
        if self.strategy.aggregator.needs == "sum" and len(u):
            total = self.strategy.reduce(u)
            tensors["sum"] = total.rows
            tensors |= {f"send:{name}": value for name, value in total.sends.items()}
        small = u.replace(rows=u.rows.new_empty(len(u), 0), sends=u.sends if broadcast["rows"] is not None else {})
        return Answer(TrainedChunk(small, trained.loss, norms, trained.report, trained.failures), tensors)

    def _trained(self, chunk: Chunk, broadcast: Mapping[str, Any]) -> Trained:
        mine = {name for name in chunk.state if name.startswith(CORRECTION)} | set(self.trainer.kept)
        server = {name: value for name, value in broadcast["state"].items() if name.startswith(CORRECTION)}
        if broadcast["statistics"] is not None:
            server[STATISTICS] = broadcast["statistics"]
        state = {name: chunk.state[name] for name in mine}
        trained = self.trainer.train(chunk.clients, broadcast["weights"], broadcast["round"], state, server)
        for group in self.setup.malicious:
            group.falsify(trained.updates, broadcast["round"])
        return trained.finite() if self.setup.malicious else trained

    @staticmethod
    def _places(chunk: Chunk, u: Updates) -> Tensor:
        """Where the clients that are left stand in the chunk."""
        return torch.from_numpy(np.searchsorted(chunk.clients, u.clients.numpy()))

    def evaluate(self, piece: Piece, broadcast: Mapping[str, Any]) -> Answer:
        """Summed statistics: of a range of a server split, or for each of some clients on its own split."""
        if piece.clients is None:
            self.load(broadcast)
            index = torch.arange(piece.start, piece.stop)
            return Answer([self.evaluator.totals(self.population.server[piece.split], index)])
        return Answer([self._client(piece, i, broadcast) for i in range(len(piece.clients))])

    def _client(self, piece: Piece, i: int, broadcast: Mapping[str, Any]) -> Total | None:
        """One client's totals; None where batch norm has nothing to take its statistics from."""
        assert piece.clients is not None
        client = int(piece.clients[i])
        state = {name: value[i] for name, value in piece.state.items()}
        if PERSONAL not in state and not self.by_client:
            self.load(broadcast)
        elif not self.load_client(client, state, self.by_client, broadcast):
            return None
        members = self.population.splits[piece.split].of(client)
        return self.evaluator.totals(self.population.columns_of(piece.split), torch.from_numpy(members))

    def load_client(
        self, client: int, state: Mapping[str, Tensor], batch_norm_of_client: bool, broadcast: Mapping[str, Any]
    ) -> bool:
        """Puts a client's own model into the evaluator; False where batch norm has too few inputs to estimate on.

        Args:
            client: its id.
            state: what it keeps, ``[m]`` each.
            batch_norm_of_client: whether statistics are its own: stored ones where it is judged by them, else those of
                its training inputs.
            broadcast: the weights.
        """
        self.loaded = None
        row, layout, statistics, inputs = broadcast["weights"], self.layout, self._shared(broadcast), None
        if PERSONAL in state:
            assert self.trainer.start_personal is not None
            row, layout = torch.cat([row, self.trainer.start_personal + state[PERSONAL]]), self.layout.all
        if batch_norm_of_client and self.evaluator.normalizes:
            known, stored = self.setup.statistics, state.get(STATISTICS)
            wanted = self.setup.batch_norm == "clients_stored"
            if wanted and known is not None and stored is not None and known.known(stored):
                statistics = known.in_work(stored)
            else:
                members = torch.from_numpy(self.population.splits["train"].of(client))
                columns = self.population.columns_of("train")
                inputs = [columns.take(part) for part in members.split(_RECALIBRATED_AT_ONCE)]
        try:
            self.evaluator.load(row, layout, statistics=statistics, inputs=inputs)
        except RequestError:
            return False  # too few inputs to estimate on
        return True

    def _shared(self, broadcast: Mapping[str, Any]) -> Tensor | None:
        """The cohort's pooled statistics ``[2 c]``, where clients share them, some have, and they are what judges."""
        kept, known = broadcast["statistics"], self.setup.statistics
        if self.setup.batch_norm != "shared":
            return None
        return known.in_work(kept) if kept is not None and known is not None and known.known(kept) else None

    def load(self, broadcast: Mapping[str, Any]) -> None:
        """Puts the server's weights into the evaluator, once for each version of them."""
        if self.loaded != broadcast["version"]:
            self.evaluator.load(broadcast["weights"], statistics=self._shared(broadcast))
            self.loaded = broadcast["version"]

    def train_on_server(self, row: Tensor, split: str, round: int) -> Tensor:
        """The clients' recipe on a server split, as if the server were a client of its own."""
        columns = self.population.server[split]
        members = np.arange(len(columns))
        recipe = self.setup.recipe.model_copy(
            update={"dp_sgd": None, "early_stopping": None, "optimizer_state": "reset", "batch_norm": "share_affine"}
        )
        trainer = self.setup.trainer(
            recipe=recipe,
            stacked=False,
            examples=columns,
            members=lambda _: members,
            correction=None,
            loss_before=False,
            local_training=None,
            statistics=None,
            transforms=None,
        )
        trained = trainer.train(np.array([-1]), row, round)
        if trained.failures:
            raise RuntimeError(f"round {round}, server training on {split!r}: {trained.failures[0].message}")
        return row + trained.updates.rows[0]
