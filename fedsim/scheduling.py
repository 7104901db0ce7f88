"""Who trains in a round, from which version of the weights, and how long that takes on their devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from clients.batches import work
from clients.errors import RunError
from fedsim.buffering import Queue
from fedsim.devices import Devices
from fedsim.experiment import DeviceSettings, Experiment
from fedsim.worker import Setup
from strategies.context import Context

#: Where nothing is said of devices, asynchronous clients take as long as they have steps.
_ALIKE = DeviceSettings(step_seconds=1.0)


@dataclass(frozen=True)
class Work:
    """What the clients of a round are to do.

    Attributes:
        clients: ``int64`` ids, ascending.
        groups: version of the weights -> the clients that begin from it.
        dropped: ids of those that were sent the weights and will not answer.
        began: how many were sent the weights.
        seconds: what all of it takes on the clients' devices; None where that is not simulated.
    """

    clients: np.ndarray
    groups: dict[int, np.ndarray]
    dropped: list[int]
    began: int
    seconds: float | None


@dataclass(frozen=True)
class Present:
    """The population as a strategy sees it at a time: those that are there.

    Attributes:
        clients: how many clients there are in all.
        trainable: ``int64`` ids of those that can be asked to train now.
        examples: ``int64 [clients]``, how many training examples each holds.
    """

    clients: int
    trainable: np.ndarray
    examples: np.ndarray


class Scheduler:
    """Hands out the rounds' work, a function of the experiment alone.

    Args:
        experiment: says whether there are devices.
        setup: population, recipe, and a strategy that samples clients or lets them train asynchronously.
    """

    def __init__(self, experiment: Experiment, setup: Setup):
        self.setup, self.strategy, self.population = setup, setup.strategy, setup.population
        self.devices = None if experiment.devices is None else Devices(experiment.devices, setup.seed)
        self.queue: Queue | None = None
        if self.strategy.concurrency is not None:
            self.devices = self.devices or Devices(_ALIKE, setup.seed)
            self.queue = self._new_queue(self.strategy.concurrency, self.devices)

    @property
    def keeps_time(self) -> bool:
        """Whether rounds take time on devices."""
        return self.devices is not None

    @property
    def versions(self) -> set[int]:
        """The versions of the weights that clients at work began from."""
        return set() if self.queue is None else self.queue.versions

    def go_on_after(self, round: int) -> None:
        """Brings asynchronous training to where it was after a round."""
        while self.queue is not None and self.queue.version < round:
            self.queue.next()

    def next(self, ctx: Context, clock: float) -> Work:
        """The work of a round.

        Args:
            ctx: the round.
            clock: seconds on the devices' clock when it begins.
        """
        if self.queue is None:
            return self._asked(ctx, clock)
        before, batch = self.queue.time, self.queue.next()
        groups = {int(v): batch.clients[batch.versions == v] for v in np.unique(batch.versions)}
        return Work(batch.clients, groups, batch.dropped, batch.began, batch.time - before)

    def _new_queue(self, concurrency: int, devices: Devices) -> Queue:
        """The events of asynchronous training, from the beginning."""
        trainable = self.population.trainable
        size = round(self.strategy.sampling.expected(len(trainable)))

        def duration(client: int, version: int) -> float:
            return float(self._durations(devices, np.array([client]), version + 1)[0])

        return Queue(trainable, size, concurrency, devices, duration, self.setup.seed)

    def _asked(self, ctx: Context, clock: float) -> Work:
        """The work of a synchronous round: the cohort's, less those that drop out."""
        devices = self.devices
        if devices is None:
            cohort = self._cohort(ctx)
            return Work(cohort, {ctx.round - 1: cohort}, [], len(cohort), None)
        trainable = self.population.trainable
        there = trainable[devices.present(trainable, clock)]
        present = Present(self.population.clients, there, self.population.examples)
        asked = self._cohort(replace(ctx, population=present))
        out = devices.drops_out(asked, ctx.round)
        cohort = asked[~out]
        seconds = float(self._durations(devices, cohort, ctx.round).max(initial=0.0))
        if not len(asked):  # nobody is there: time passes
            seconds = devices.said.period / 100
        return Work(cohort, {ctx.round - 1: cohort}, asked[out].tolist(), len(asked), seconds)

    def _durations(self, devices: Devices, clients: np.ndarray, number: int) -> np.ndarray:
        """How long the work of a round takes each client, ``float64 [k]``; a row is sent as it is."""
        sizes = self.population.splits["train"].sizes[clients]
        steps = work(self.setup.recipe, sizes, clients, self.setup.seed, number).steps
        size = self.setup.layout.size * self.setup.layout.dtype.itemsize
        return devices.seconds(clients, number, steps, size, np.full(len(clients), size))

    def _cohort(self, ctx: Context) -> np.ndarray:
        ids, able = np.unique(np.asarray(self.strategy.sampling.cohort(ctx))), ctx.population.trainable
        # Of an empty cohort the dtype says nothing.
        whole = ids.dtype.kind in "iu" or not len(ids)
        strange = ids[~np.isin(ids, able)] if whole else ids
        if len(strange):
            raise RunError(
                f"round {ctx.round}, sampling: {self.strategy.sampling!r} chose client {strange[0]}, which cannot be"
                " trained; choose from ctx.population.trainable (clients with examples that are not held out)"
            )
        return ids.astype(np.int64)
