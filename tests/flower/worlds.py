"""One small experiment, as fedsim runs it and as a Flower app."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

import fedsim
from clients.flower_app import client_app
from clients.recipe import Recipe
from fedsim.assembly import Assembly, assemble
from fedsim.engines import Inline
from fedsim.simulation import InMemory, Simulation
from strategies.client_hooks import ClientHooks
from strategies.flower import MessageStrategy
from tests.flower.small_grid import SmallGrid

CLIENTS, ROUNDS, SEED = 7, 3, 5


class Net(nn.Module):
    """Two layers, with batch norm and dropout where asked for."""

    def __init__(self, norm: bool = False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 12), nn.BatchNorm1d(12) if norm else nn.Identity(), nn.ReLU())
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1)))


class NormNet(Net):
    def __init__(self) -> None:
        super().__init__(norm=True)


def assembled(strategy: Any = "fedavg", model: type[nn.Module] = Net, **changes: Any) -> Assembly:
    """The experiment, its parts built. ``client`` and ``data`` are tables of changes."""
    client = {"lr": 0.1, "epochs": 1, "batch_size": 16, "execution": "loop", **changes.pop("client", {})}
    data = {"clients": CLIENTS, "client_test_fraction": 0.2, **changes.pop("data", {})}
    made = fedsim.Experiment(
        **{"seed": SEED, "rounds": ROUNDS, "strategy": strategy, "model": model, "client": client, "data": data}
        | changes
    )
    return assemble(made)


def fused(assembly: Assembly) -> Simulation:
    """The experiment after its last round, by fedsim's own path."""
    engine = Inline()
    engine.start(assembly.setup)
    simulation = Simulation(assembly.experiment, assembly.setup, engine, InMemory())
    for _ in range(assembly.experiment.rounds):
        simulation.commit(simulation.step())
    return simulation


def app_of(assembly: Assembly, *, hooks: Any = None, **options: Any):
    """The experiment's clients as a ClientApp."""
    population = assembly.setup.population

    def data(partition: int) -> dict[str, Any]:
        return {
            split: population.columns_of(split).take(torch.from_numpy(csr.of(partition).copy()))
            for split, csr in population.splits.items()
        }

    options = {"task": assembly.setup.task, "seed": assembly.setup.seed, "hooks": hooks, **options}
    options = {"input_range": population.input_range, "rounds": assembly.experiment.rounds, **options}
    return client_app(recipe_of(assembly), assembly.setup.model, data, **options)


def recipe_of(assembly: Assembly) -> Recipe:
    return assembly.setup.recipe


def start_of(assembly: Assembly) -> ArrayRecord:
    return ArrayRecord(assembly.setup.model.state_dict())


def by_messages(
    assembly: Assembly, grid: SmallGrid | None = None, **options: Any
) -> tuple[MessageStrategy, Tensor, Any]:
    """The experiment by messages: the adapter, its final weights ``[d]``, and Flower's result."""
    setup = assembly.setup
    grid = SmallGrid(app_of(assembly, hooks=ClientHooks(setup.strategy)), CLIENTS) if grid is None else grid
    adapter = MessageStrategy(setup.strategy, seed=setup.seed, task=setup.task, **options)
    result = adapter.start(grid, start_of(assembly), num_rounds=assembly.experiment.rounds)
    return adapter, adapter.weights, result
