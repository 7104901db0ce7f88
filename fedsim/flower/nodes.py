"""The nodes of a simulation: who they are, how many messages each has had, and the state that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from clients.errors import RequestError
from fedsim.flower.parcels import Packed

#: Partition 0's node. Large, so that a node's id is not taken for a partition's; in order, so that samples repeat.
FIRST = 1_000_000

_OWN = ("partition-id", "num-partitions")

NodeConfig = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]


class Nodes:
    """Nodes ``FIRST, FIRST + 1, ...``, one for each partition.

    A node's state is kept as it was packed: it is unpacked where a ClientApp is called, and only there.

    Args:
        count: how many.
        config: what a node's configuration holds beside ``partition-id`` and ``num-partitions``: the same for all, or
            made by the partition's number.
    """

    def __init__(self, count: int, config: NodeConfig | None = None):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise RequestError(f"num_supernodes: {count!r} is not a whole number of at least 1")
        self.ids = range(FIRST, FIRST + count)
        self.config = config
        self.extra(FIRST)  # what is wrong with the first node's is said at once
        self.numbers: dict[int, int] = {}
        self.states: dict[int, Packed] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, node: int) -> bool:
        return node in self.ids

    def partition(self, node: int) -> int:
        """The partition that a node holds."""
        return node - FIRST

    def extra(self, node: int) -> dict[str, Any]:
        """A node's own part of its configuration."""
        if self.config is None:
            return {}
        found = self.config(self.partition(node)) if callable(self.config) else self.config
        if not isinstance(found, Mapping):
            raise RequestError(f"node_config: {type(found).__name__} is not a mapping of settings")
        for name in _OWN:
            if name in found:
                raise RequestError(f"node_config: {name!r} is the simulation's own setting; take another name")
        return dict(found)

    def count(self, node: int) -> int:
        """The number of the node's next message, from 1."""
        self.numbers[node] = self.numbers.get(node, 0) + 1
        return self.numbers[node]

    def keep(self, node: int, state: Packed) -> None:
        """Keeps what a ClientApp left in its context."""
        if state.records:
            self.states[node] = state
        else:
            self.states.pop(node, None)

    def __str__(self) -> str:
        return f"{self.ids[0]} to {self.ids[-1]}" if len(self) > 1 else str(self.ids[0])
