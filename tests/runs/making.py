"""Small runs for the tests of what reads and writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim.records import Event, RoundRecord
from fedsim.runs import RunStore

EXPERIMENT = """
name = "digits"
rounds = 5
[data]
clients = 20
[strategy]
name = "fedavg"
"""
MANIFEST = {"versions": {"torch": "2.14"}, "seed": 0}
LAYOUT = {"weight": [2, 3], "bias": [2]}


def row(round: int) -> Tensor:
    """The global weights ``[8]`` after a round."""
    return torch.arange(8, dtype=torch.float32) + 100 * round


def record(round: int, **changes: Any) -> RoundRecord:
    """A round of two clients with an evaluation."""
    clients = [
        {"client": c, "chunk": 0, "examples": 10 * (c + 1), "steps": 4, "weight": 1.0, "loss": 0.5, "update_norm": 2.0}
        for c in (0, round % 20 + 1)
    ]
    made = {
        "cohort": 2,
        "completed": 2,
        "clients": clients,
        "chunks": [{"chunk": 0, "pid": 42, "clients": 2, "seconds": 0.1}],
        "bytes_up": 64,
        "bytes_down": 80,
        "seconds": 0.25,
        "train_seconds": 0.2,
        "metrics": {"test": {"accuracy": 0.5 + round / 20, "loss": 1.0 / (round + 1), "examples": 40}},
    }
    return RoundRecord(round=round, **(made | changes))


def create(directory: Path, rounds: int = 0) -> RunStore:
    """A run's store with rounds 1 to ``rounds`` committed."""
    store = RunStore.create(directory, EXPERIMENT, MANIFEST, LAYOUT)
    commit(store, *range(1, rounds + 1))
    return store


def commit(store: RunStore, *rounds: int) -> None:
    """Commits rounds, each with an event and a version of client 7's state."""
    for number in rounds:
        state = {"residual": (torch.tensor([7]), torch.full((1, 3), float(number)))}
        store.commit(
            record(number, events=[Event(number, "client_failed", "boom", client=3)]), {"row": row(number)}, state
        )
