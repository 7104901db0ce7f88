"""Three clients with F_k(x) = a_k/2 (x - e_k)^2 in float64, as a user's own source, model and task: all is closed form.

Every example of a client is (a_k, e_k), so any mini-batch has the client's own gradient, and a client's examples only
say how much it weighs and, per epoch, how many steps it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fedsim
import strategies
from clients.recipe import Recipe
from clients.task import Task
from clients.updates import Updates
from fedsim.assembly import assemble, make_engine
from fedsim.records import RoundRecord
from fedsim.simulation import InMemory, Simulation
from strategies.context import Context
from tests.strategies import problems
from tests.strategies.problems import ETA, A, E

#: The optima of the mean of the F_k, and of their mean by 5, 3 and 2 examples.
UNIFORM_OPTIMUM = 22 / 7
EXAMPLES = (5, 3, 2)
WEIGHTED_OPTIMUM = 2.421052631578947

#: grad F_k at the uniform optimum.
GRADIENTS_THERE = [22 / 7, 30 / 7, -52 / 7]


class Quadratics(Task):
    """``a/2 (x - e)^2`` for each example (a, e)."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch["e"])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return batch["a"] / 2 * outputs.square()


class Point(nn.Module):
    """One number x, zero at first; gives x - e."""

    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(1))

    def forward(self, e: Tensor) -> Tensor:
        return self.x - e


def clients_apart(*, examples: tuple[int, ...] = (1, 1, 1)) -> fedsim.Source:
    """So many examples of each client, which are all the same."""
    owner = torch.repeat_interleave(torch.arange(len(A)), torch.tensor(examples))
    return fedsim.Source(
        train={"e": E[owner], "a": A[owner]}, test={"e": E, "a": A}, proxy={"e": E, "a": A}, clients=owner, label="a"
    )


def experiment(strategy: Any, *, rounds: int, examples: tuple[int, ...] = (1, 1, 1), **client: Any) -> Any:
    """Full-batch local gradient descent, ten steps of rate 0.05 unless told otherwise.

    Args:
        strategy: its table.
        rounds: how many.
        examples: of each client.
        **client: further keys of ``client``.
    """
    trained = {"steps": 10} | client if "epochs" not in client else client
    return fedsim.Experiment(
        rounds=rounds,
        task=f"{__name__}:Quadratics",
        model=f"{__name__}:Point",
        data={
            "clients": 3,
            "source": {"name": f"{__name__}:clients_apart", "examples": list(examples)},
            "partition": "natural",
        },
        client={"lr": ETA, "batch_size": max(examples), "precision": "float64", "execution": "loop", **trained},
        strategy=strategy,
        evaluation={"every": rounds},
    )


@dataclass(frozen=True)
class Played:
    """A round that was committed: its record, the weights x, and what server and clients keep ``[3, ...]``."""

    record: RoundRecord
    x: float
    state: dict[str, Tensor]
    clients: dict[str, Tensor]


def rounds_of(said: Any, strategy: strategies.Strategy | None = None) -> Iterator[Played]:
    """Plays an experiment inline, in memory, round by round; with another strategy where one is given."""
    assembly = assemble(said)
    setup = assembly.setup if strategy is None else replace(assembly.setup, strategy=strategy)
    engine, store = make_engine(said, "inline"), InMemory()
    engine.start(setup)
    simulation = Simulation(said, setup, engine, store)
    for _ in range(said.rounds):
        record = simulation.step()
        simulation.commit(record)
        kept = {name: store.client_state(name, range(3), size, torch.float64) for name, size in simulation.kept.items()}
        yield Played(record, float(simulation.weights), dict(simulation.state), kept)
    engine.close()


def last_of(said: Any, strategy: strategies.Strategy | None = None) -> Played:
    """The last round of an experiment."""
    *_, last = rounds_of(said, strategy)
    return last


# The pieces alone, without a simulation.


@dataclass(frozen=True)
class People(problems.People):
    """A population with examples."""

    examples: np.ndarray


def context(x: Tensor, recipe: Recipe | None = None, examples: tuple[int, ...] = (1, 1, 1)) -> Context:
    """A round from weights ``[1]``, with clients that train by this recipe."""
    plain = problems.context(x)
    people = People(len(examples), np.array(examples))
    return replace(plain, population=people, recipe=recipe or Recipe(batch_size=1, lr=ETA))


def updates(rows: Tensor, examples: tuple[int, ...], steps: Any = 1, **sends: Tensor) -> Updates:
    """Updates ``[k, d]`` of clients with so many examples that took so many steps."""
    plain = problems.updates(rows, torch.tensor(examples))
    return plain.replace(steps=torch.as_tensor(steps).expand(len(rows))).send(**sends)


def play(
    strategy: strategies.Strategy,
    u: Updates,
    x: Tensor,
    state: dict[str, Tensor] | None = None,
    recipe: Recipe | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the server makes of updates: new weights and state."""
    ctx = context(x, recipe, tuple(u.examples.tolist()))
    state = strategy.init(ctx) if state is None else state
    u, _ = strategy.contribute(u, strategy.broadcast(state), {}, ctx)
    row, state, _ = strategy.aggregate(strategy.reduce(u), state, ctx)
    return row, state


def descended(x: Tensor, steps: Any, momentum: float = 0.0, mu: float = 0.0, nesterov: bool = False) -> Tensor:
    """Each client's weights ``[3, 1]`` after so many of its own steps from ``x`` ``[1]``, written out."""
    rows = []
    for a, e, count in zip(A, E, torch.as_tensor(steps).expand(3).tolist(), strict=True):
        y, m = x.clone(), torch.zeros_like(x)
        for _ in range(count):
            g = a * (y - e) + mu * (y - x)
            m = momentum * m + g
            y = y - ETA * (g + momentum * m if nesterov else m)
        rows.append(y)
    return torch.stack(rows)
