"""What a strategy's parts may read: a round's circumstances, read-only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clients import randomness
from clients.errors import RunError
from clients.recipe import Recipe
from clients.task import Task
from clients.weights import Layout


class People(Protocol):
    """The population as a strategy sees it."""

    @property
    def clients(self) -> int:
        """How many clients there are; ids are ``0 .. clients - 1``."""
        ...

    @property
    def trainable(self) -> np.ndarray:
        """``int64`` ids of those that can be asked to train: with data, and not held out."""
        ...

    @property
    def examples(self) -> np.ndarray:
        """``int64 [clients]``, how many training examples each holds."""
        ...


@dataclass(frozen=True)
class Context:
    """Read-only circumstances of a round.

    Attributes:
        round: the round, from 1; 0 while state is set up.
        layout: names -> slices of a row.
        weights: ``[d]`` the global weights the round starts from.
        population: how many clients there are, and which can train.
        task: what is learnt.
        seed: the experiment's seed; use :meth:`generator` and :meth:`uniform` to draw.
        server: what only the server has (``data``, ``train``, ``evaluate``, ``outputs``); empty in a worker.
        recipe: how clients train.
        staleness: in a worker, how many steps the server has taken since these clients were sent their weights; above 0
            in asynchronous training only.
        rounds: how many rounds the run has at most.
        cohort: ``int64 [n]`` ids of all clients that began the round, ascending, whether they answer or not; ``None``
            where nobody has.
        strategy: the strategy that the reader is a part of.
        sensitivity: in ``server_total``, how far adding or removing one client, whatever it sends, moves the aggregate
            (Euclidean norm); ``None`` where nothing bounds that.
        scope: what the keys of generators begin with, so that two plug-ins of a kind do not share their draws.
    """

    round: int
    layout: Layout
    weights: Tensor
    population: People
    task: Task
    seed: int = 0
    server: Mapping[str, Callable[..., Any]] | None = None
    recipe: Recipe | None = None
    staleness: int = 0
    rounds: int = 0
    cohort: Tensor | None = None
    strategy: Any = None
    sensitivity: float | None = None
    scope: str = ""

    @property
    def expected(self) -> float:
        """The expected number of clients in a round, which does not depend on who was chosen."""
        return float(self.strategy.sampling.expected(len(self.population.trainable)))

    def generator(self, purpose: str, client: int = 0) -> torch.Generator:
        """A generator of this round's own for one purpose (and one client)."""
        return randomness.generator(self.seed, f"{self.scope}{purpose}", self.round, client)

    def uniform(self, purpose: str, clients: Tensor | np.ndarray, size: int = 1) -> Tensor:
        """``float64 [k, size]`` uniform draws, one keyed stream a client, the same whoever else is in the block."""
        ids = clients.numpy() if isinstance(clients, Tensor) else clients
        keys = randomness.keys(self.seed, f"{self.scope}{purpose}", self.round, ids)
        return torch.from_numpy(randomness.uniforms(keys, size))

    def data(self, split: str) -> dict[str, Tensor]:
        """A server split (``"proxy"``, ``"root"``, ``"validation"``), whole: column -> ``[n, ...]``."""
        return self._of_server("data")(split)

    def train(self, row: Tensor, split: str) -> Tensor:
        """Trains ``row`` ``[d]`` on a server split by the clients' recipe; returns the trained row."""
        return self._of_server("train")(row, split, self.round)

    def evaluate(self, row: Tensor, split: str) -> dict[str, float]:
        """Metrics of ``row`` ``[d]`` on a server split."""
        return self._of_server("evaluate")(row, split)

    def outputs(self, row: Tensor, split: str) -> Any:
        """What the model with the weights ``row`` ``[d]`` gives for a server split, ``[n, ...]``.

        A client's row is the round's weights plus its update: so its outputs on the unlabelled ``"proxy"``, which
        distillation needs (Lin et al. 2020, "Ensemble distillation for robust model fusion").
        """
        return self._of_server("outputs")(row, split)

    def _of_server(self, name: str) -> Callable[..., Any]:
        if self.server is None:
            raise RunError(
                f"round {self.round}: ctx.{name} is the server's; the client half of a plug-in cannot call it"
            )
        return self.server[name]
