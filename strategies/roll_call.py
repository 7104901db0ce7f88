"""Who there is on a Flower grid: the nodes, the partitions that they hold, and what of the model they share."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clients.errors import RequestError
from clients.messages import ALIAS_OF, ALIASES, CONFIG, PLAIN, PROBLEM, REFUSED, ROLL_CALL, STRATEGY
from clients.weights import Layout, Slot
from strategies.client_hooks import ClientHooks, hides, told
from strategies.composition import Composition
from strategies.replies import first_line, last_line, numbers_of, only

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict  # isort: skip
from flwr.serverapp import Grid  # isort: skip

_log = logging.getLogger("flwr")

#: Partitions from here on are a mistake: what is kept of clients would fill the memory.
_MOST = 1 << 26


@dataclass(frozen=True)
class Node:
    """A node that can be asked.

    Attributes:
        id: Flower's.
        client: fedsim's, the partition it holds.
        held: how many examples it holds by split; empty where it does not say.
        hooks: whether the strategy's client half runs there.
    """

    id: int
    client: int
    held: Mapping[str, int] = field(default_factory=dict)
    hooks: bool = False


@dataclass(frozen=True)
class People:
    """The population as the roll call has it; whoever does not say what it holds counts as one example."""

    nodes: Mapping[int, Node]

    @property
    def clients(self) -> int:
        return max(self.nodes, default=-1) + 1

    @property
    def trainable(self) -> np.ndarray:
        able = [client for client, node in self.nodes.items() if not node.held or node.held.get("train", 0)]
        return np.array(sorted(able), dtype=np.int64)

    @property
    def examples(self) -> np.ndarray:
        counts = np.zeros(self.clients, dtype=np.int64)
        for client, node in self.nodes.items():
            counts[client] = node.held.get("train", 0) if node.held else 1
        return counts


class RollCall:
    """Asks nodes once who they are.

    Args:
        strategy: what the server does.
        seed: of the server's draws.
        layout: what clients share, where it is known.
        aliases: other names of tied parameters -> their names in the layout, likewise.
        least: how many nodes to wait for.
        timeout: seconds to wait for answers.

    Attributes:
        nodes: client -> the node that has its examples; those that are there.
        layout: what clients share, once one of them has said so.
        aliases: the other names of that.
    """

    def __init__(
        self,
        strategy: Composition,
        seed: int,
        layout: Layout | None,
        aliases: Mapping[str, str],
        least: int,
        timeout: float,
    ):
        self.strategy, self.seed, self.layout, self.least, self.timeout = strategy, seed, layout, least, timeout
        self.aliases = dict(aliases)
        self.nodes: dict[int, Node] = {}
        self._needs_hooks = not ClientHooks(strategy).plain
        self._lost: dict[int, str] = {}
        self._asked: set[int] = set()

    def call(self, grid: Grid) -> dict[int, str]:
        """Asks the nodes that are new who they are; those that have gone are not asked to train.

        Returns:
            Nodes that cannot take part -> why, those that are new among them. Those that did not answer are asked again
            the next time.

        Raises:
            RequestError: where nobody can, and for clients that do not go with the strategy.
        """
        ids = sorted(grid.get_node_ids())
        while len(ids) < self.least:
            _log.info("Waiting for nodes to connect: %d of %d.", len(ids), self.least)
            time.sleep(1)
            ids = sorted(grid.get_node_ids())
        here = set(ids)
        self.nodes = {client: node for client, node in self.nodes.items() if node.id in here}
        known = {node.id for node in self.nodes.values()}
        new = [node for node in ids if node not in known and node not in self._asked]
        if not new:
            return {}
        content = RecordDict({CONFIG: ConfigRecord({STRATEGY: told(self.strategy)})})
        messages = [Message(content, node, f"{MessageType.QUERY}.{ROLL_CALL}") for node in new]
        strangers: dict[int, str] = {}
        lost = {node: f"no answer to the roll call within {self.timeout:g} s" for node in new}
        for reply in grid.send_and_receive(messages, timeout=self.timeout):
            node = reply.metadata.src_node_id
            lost.pop(node, None)
            self._asked.add(node)
            if reply.has_error():
                strangers[node] = last_line(reply.error.reason)
                continue
            try:
                if (problem := _problem(node, reply)) is not None:
                    lost[node] = problem
                else:
                    self._enrol(node, reply)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                strangers[node] = f"its answer is none: {first_line(error)}"
        lost |= self._enrol_strangers(strangers, ids)
        fresh = {node: why for node, why in lost.items() if self._lost.get(node) != why}
        self._lost |= fresh
        for node, why in fresh.items():
            _log.warning("node %d cannot take part: %s", node, why)
        if not self.nodes:
            node, why = next(iter(self._lost.items()))
            raise RequestError(f"nodes: none of {len(ids)} can take part; node {node}: {why}")
        return fresh

    def _enrol(self, node: int, reply: Message) -> None:
        """Adds a client of fedsim's.

        Raises:
            RequestError: for one that does not go with the strategy, or with the others.
        """
        numbers, said = numbers_of(reply), only(reply.content.config_records, "ConfigRecord")
        client, theirs = int(numbers["partition-id"]), str(said[STRATEGY])
        if not 0 <= client < _MOST:
            raise RequestError(f"nodes: {node} holds partition {client}; give partition-ids from 0 to {_MOST - 1}")
        if client in self.nodes:
            raise RequestError(
                f"nodes: {self.nodes[client].id} and {node} both hold partition {client}; give each a partition-id of"
                " its own"
            )
        hooks = theirs == told(self.strategy)
        if not hooks and (self._needs_hooks or not said[PLAIN]):
            other = f"have {theirs}" if theirs else "have no hooks"
            raise RequestError(
                f"hooks: the clients {other}, and this server's strategy is {told(self.strategy)}, and clients carry"
                " out a part; give client_app(hooks = ...) the same strategy"
            )
        if hides(self.strategy) and numbers["seed"] != self.seed:
            raise RequestError(
                f"seed: clients draw their masks by {numbers['seed']}, and the server would take off those of"
                f" {self.seed}; give both the same"
            )
        layout = _told_layout(said)
        if self.layout is None:
            self.layout = layout
            self.aliases = dict(zip(said[ALIASES], said[ALIAS_OF], strict=True))
        elif layout != self.layout:
            raise RequestError(f"nodes: client {client} shares {layout!r} where others share {self.layout!r}")
        held = {name.removesuffix("-examples"): int(n) for name, n in numbers.items() if name.endswith("-examples")}
        if any(not 0 <= count < 2**53 for count in held.values()):
            raise ValueError(f"it says that it holds {held}")
        self.nodes[client] = Node(node, client, held, hooks)

    def _enrol_strangers(self, strangers: Mapping[int, str], ids: list[int]) -> Mapping[int, str]:
        """Nodes with another ClientApp are clients in the order of their ids; among fedsim's own they are left out.

        Returns:
            Those that are left out, and why.
        """
        if not strangers:
            return {}
        node, why = next(iter(strangers.items()))
        if any(node.held for node in self.nodes.values()):
            return strangers
        if self._needs_hooks:
            raise RequestError(
                f"hooks: clients carry out a part of {told(self.strategy)}, and node {node} does not answer as one of"
                f" clients.client_app ({why}); use that for the ClientApp, with hooks = the strategy"
            )
        _log.info(
            "%d nodes do not say who they are and are known by their order; node %d: %s", len(strangers), node, why
        )
        places = {node: place for place, node in enumerate(ids)}
        taken = set(self.nodes)
        for node in strangers:
            client = places[node] if places[node] not in taken else max(taken) + 1
            self.nodes[client] = Node(node, client)
            taken.add(client)
        return {}


def _problem(node: int, reply: Message) -> str | None:
    """Why a client of fedsim's cannot take part.

    Raises:
        RequestError: where it is the experiment that is wrong, and not the client.
    """
    said = only(reply.content.config_records, "ConfigRecord")
    if PROBLEM not in said:
        return None
    if said[REFUSED]:
        raise RequestError(f"{said[PROBLEM]} (node {node})")
    return str(said[PROBLEM])


def _told_layout(said: Mapping[str, Any]) -> Layout:
    """The layout that a client told."""
    shapes = [tuple(int(n) for n in shape.split(",") if n) for shape in said["shapes"]]
    dtypes = [getattr(torch, name) for name in said["dtypes"]]
    return _made_layout(list(zip(said["names"], shapes, dtypes, strict=True)))


def layout_of_arrays(arrays: ArrayRecord) -> Layout:
    """All arrays of real numbers, where nobody says which are parameters."""
    kinds = {name: np.dtype(array.dtype) for name, array in arrays.items()}
    real = [name for name, kind in kinds.items() if kind.kind == "f"]
    if not real:
        raise RequestError("initial_arrays: no array of real numbers, so there is nothing to average")
    _log.info("Nobody says which arrays are parameters: all %d of real numbers are averaged", len(real))
    dtypes = {name: torch.float64 if kinds[name].itemsize > 4 else torch.float32 for name in real}
    return _made_layout([(name, tuple(arrays[name].shape), dtypes[name]) for name in real])


def _made_layout(tensors: list[tuple[str, tuple[int, ...], torch.dtype]]) -> Layout:
    slots, start = [], 0
    for name, shape, dtype in tensors:
        slots.append(Slot(name, shape, dtype, start))
        start += slots[-1].size
    dtype = torch.float64 if any(slot.dtype == torch.float64 for slot in slots) else torch.float32
    made = Layout.of(tuple(slots), dtype)
    made.personal = Layout.of((), dtype)
    return made
