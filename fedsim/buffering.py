"""Asynchronous rounds: clients train at the same time and begin at different versions of the weights."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from clients import randomness
from fedsim.devices import Devices

#: How often a client is drawn at random before all are gone through.
_DRAWS = 64


@dataclass(frozen=True)
class Batch:
    """What a step of the server is made of.

    Attributes:
        clients: ``int64 [k]`` ids, ascending.
        versions: ``int64 [k]`` how many steps the server had taken when each began.
        dropped: clients that ended without an answer meanwhile.
        began: how many clients were sent the weights meanwhile.
        time: seconds on the virtual clock when the last update arrived.
    """

    clients: np.ndarray
    versions: np.ndarray
    dropped: list[int]
    began: int
    time: float


class Queue:
    """The events of asynchronous training, in order of time (ties in order of beginning): a function of its arguments.

    ``concurrency`` clients train at any time. When one ends, its update goes into the buffer and another client begins,
    from the weights as they are; with ``size`` updates in the buffer the server takes a step (FedBuff; Nguyen et al.
    2022, "Federated learning with buffered asynchronous aggregation"). A client is never at work twice, and gives one
    update to a buffer.

    Args:
        clients: ``int64`` ids of those that can be trained.
        size: updates a step of the server takes.
        concurrency: clients at work at a time.
        devices: how long work takes, and who drops out.
        duration: client and version -> seconds from beginning to arrival.
        seed: draws who begins.
    """

    def __init__(
        self,
        clients: np.ndarray,
        size: int,
        concurrency: int,
        devices: Devices,
        duration: Callable[[int, int], float],
        seed: int,
    ):
        self.clients, self.size, self.concurrency = clients, size, concurrency
        self.devices, self.duration, self.seed = devices, duration, seed
        self.time, self.version, self.begun = 0.0, 0, 0
        self.events: list[tuple[float, int, int, int]] = []  # time, number of the beginning, client, version
        self.working: set[int] = set()
        self.given: dict[int, int] = {}

    @property
    def versions(self) -> set[int]:
        """The versions of the weights that clients at work began from."""
        return {version for _, _, _, version in self.events}

    def next(self) -> Batch:
        """Goes on until the next step of the server."""
        dropped: list[int] = []
        first = self.begun
        while len(self.given) < self.size:
            # Not after the last update: who begins then is sent the weights of the step that it makes.
            self._fill()
            if not self.events:
                break
            self.time, number, client, version = heapq.heappop(self.events)
            self.working.discard(client)
            # By the number of the beginning: who drops out and begins again must not drop out for ever.
            if self.devices.drops_out(np.array([client]), number)[0]:
                dropped.append(client)
            else:
                self.given[client] = version
        clients = np.array(sorted(self.given), dtype=np.int64)
        versions = np.array([self.given[client] for client in clients.tolist()], dtype=np.int64)
        self.given, self.version = {}, self.version + 1
        return Batch(clients, versions, dropped, self.begun - first, self.time)

    def _fill(self) -> None:
        """Lets clients begin until so many are at work, or nobody is free."""
        while len(self.working) < self.concurrency:
            client = self._free()
            if client is None:
                if self.events or self.given or not self._wait():
                    return
                continue
            self.working.add(client)
            ends = self.time + self.duration(client, self.version)
            heapq.heappush(self.events, (ends, self.begun, client, self.version))
            self.begun += 1

    def _wait(self) -> bool:
        """Lets time pass until somebody is there, where nobody is and nothing else will happen."""
        for _ in range(1000):
            self.time += self.devices.said.period / 1000
            if self._free() is not None:
                return True
        return False

    def _free(self) -> int | None:
        """A client drawn at random among those that are there, not at work and not in the buffer."""
        key = randomness.keys(self.seed, "begins", self.version, self.begun)
        for place in (randomness.uniforms(key, _DRAWS)[0] * len(self.clients)).astype(np.int64).tolist():
            client = int(self.clients[place])
            if self._can(client):
                return client
        able = self.clients[self.devices.present(self.clients, self.time)]
        free = [client for client in able.tolist() if client not in self.working and client not in self.given]
        if not free:
            return None
        return free[int(randomness.uniforms(key, 1, _DRAWS)[0, 0] * len(free))]

    def _can(self, client: int) -> bool:
        taken = client in self.working or client in self.given
        return not taken and bool(self.devices.present(np.array([client]), self.time)[0])
