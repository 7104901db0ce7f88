"""What clients and servers say to each other in Flower's messages: keys, records, and a strategy's half on a client."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError
from clients.hooks import Correction
from clients.recipe import Recipe
from clients.task import Task
from clients.updates import Updates
from clients.weights import Layout

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from flwr.app import Array, ArrayRecord, Context, Message

#: Keys of a message's content, as Flower's strategies have them, and of the state that is broadcast beside.
ARRAYS, CONFIG, METRICS, BROADCAST = "arrays", "config", "metrics", "broadcast"

#: Flower's keys of the round in the config, and of the examples in the metrics.
ROUND, EXAMPLES = "server-round", "num-examples"

#: Keys of the config that a server with a fedsim strategy adds: which strategy it is, which run, how many rounds there
#: are, and the last round in which it adopted what this client sent.
STRATEGY, RUN, ROUNDS, ADOPTED = "fedsim-strategy", "fedsim-run", "fedsim-rounds", "fedsim-adopted"

#: Where the metrics of an evaluation hold the sums that they were made of, for a server that asked for them.
TOTAL = "total/"

#: The action of the query by which a server learns who there is.
ROLL_CALL = "roll_call"

#: Keys of its answer: why the client cannot take part, and whether nobody can by that; whether the client's half of its
#: strategy changes nothing; and the other names of tied parameters, with those that they have among the shared ones.
PROBLEM, REFUSED, PLAIN, ALIASES, ALIAS_OF = "problem", "refused", "plain", "aliases", "alias-of"


@dataclass(frozen=True)
class Circumstances:
    """Where a client's contribution is made.

    Attributes:
        round: the round.
        layout: names -> slices of a row.
        weights: ``[d]`` what the client was sent.
        task: what is learnt.
        recipe: how it trained.
        seed: of the client's draws.
        config: what the server's strategy says beside.
    """

    round: int
    layout: Layout
    weights: Tensor
    task: Task
    recipe: Recipe
    seed: int
    config: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Hooks(Protocol):
    """A strategy's half on a client: what it changes in the local loop, and what it makes of the update."""

    @property
    def correction(self) -> Correction:
        """What changes in the local loop."""
        ...

    @property
    def loss_before(self) -> bool:
        """Whether clients send the loss of the weights that they start from."""
        ...

    @property
    def told(self) -> str:
        """Tells this half from that of another strategy."""
        ...

    @property
    def alone(self) -> bool:
        """Whether it needs nothing of the server, so that any server's clients can have it."""
        ...

    @property
    def plain(self) -> bool:
        """Whether it changes nothing, so that a server of any strategy may do without it."""
        ...

    @property
    def discreet(self) -> bool:
        """Whether nothing may leave beside what it gives: no losses, and no numbers of the update."""
        ...

    @property
    def local_noise(self) -> bool:
        """Whether it hides the client from the server by noise, which exact metrics would undo."""
        ...

    @property
    def stands(self) -> frozenset[str]:
        """Names of client state that is kept even where the server did not adopt the update."""
        ...

    def check(self, recipe: Recipe) -> list[str]:
        """What of local training does not go with it, one line a key."""
        ...

    def client_state(self, layout: Layout) -> dict[str, int]:
        """Name -> length of what it keeps with every client."""
        ...

    def contribute(
        self, u: Updates, state: Mapping[str, Tensor], kept: Mapping[str, Tensor], here: Circumstances
    ) -> tuple[dict[str, Tensor], dict[str, float], dict[str, Tensor]]:
        """What one client sends, arrays and numbers by name, and its new state."""
        ...


def named(layout: Layout, row: Tensor) -> dict[str, Tensor]:
    """A row ``[d]`` as named tensors in the row's own dtype, which arrays can hold where a parameter's own cannot."""
    return {slot.name: row[slot.slice].view(slot.shape) for slot in layout}


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as arrays, by name."""
    return ArrayRecord({name: Array(tensor.detach().contiguous().numpy()) for name, tensor in tensors.items()})


def tensors_of(record: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Arrays as tensors, by name; of those ``names`` alone that are there."""
    wanted = record if names is None else [name for name in names if name in record]
    return {name: torch.from_numpy(np.asarray(record[name].numpy(), order="C")) for name in wanted}


def partition_of(context: Context) -> int:
    """Whose examples the node has."""
    if "partition-id" not in context.node_config:
        raise RequestError(
            "node_config: has no 'partition-id', which says whose examples these are; start the node with"
            ' --node-config "partition-id=0 num-partitions=10"'
        )
    client, number = int(context.node_config["partition-id"]), context.node_config.get("num-partitions")
    if client < 0 or (number is not None and client >= int(number)):
        among = "" if number is None else f" below num-partitions, which is {number}"
        raise RequestError(f"node_config.partition-id: {client} given; give one from 0{among}")
    return client


def config_of(message: Message) -> Mapping[str, Any]:
    """What the server says beside the arrays."""
    found = message.content.config_records
    return found.get(CONFIG) or next(iter(found.values()), {})


def arrays_key(message: Message) -> str:
    """Where the weights are: under ``arrays``, or the only arrays there are."""
    keys = [key for key in message.content.array_records if key != BROADCAST]
    if ARRAYS in keys:
        return ARRAYS
    if len(keys) != 1:
        raise RequestError(f"arrays: the message has {len(keys)} ArrayRecords and none is called {ARRAYS!r}; send one")
    return keys[0]
