"""Early stopping of clients in a stack, each by its own validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from clients.recipe import EarlyStopping


class Watch:
    """Watches a stack of ``k`` clients: who has stopped, and the best weights that each has had (Prechelt 1998).

    A client that has stopped stays in the block and what happens to it there is undone by :meth:`restore`, so that
    nothing depends on who else is in the stack. A client without validation examples never stops.

    Args:
        settings: patience and least improvement.
        per_epoch: ``int64 [k]`` steps an epoch takes each client.
        blocks: the blocks ``[k, ...]`` that training changes in place, by name; ``rows`` among them.
        loss: client's place -> its validation loss now, None where it has no validation example.
    """

    def __init__(
        self,
        settings: EarlyStopping,
        per_epoch: Tensor,
        blocks: Mapping[str, Tensor],
        loss: Callable[[int], float | None],
    ):
        self.settings, self.per_epoch, self.blocks, self.loss = settings, per_epoch, blocks, loss
        k = len(per_epoch)
        self.best = [math.inf] * k
        self.waited = [0] * k
        self.stopped = torch.zeros(k, dtype=torch.bool)
        self.steps = torch.zeros(k, dtype=torch.int64)
        self.kept: dict[int, dict[str, Tensor]] = {}

    def look(self, step: int, active: int) -> bool:
        """After a step, which counts from 0: judges who has ended an epoch; returns whether all have stopped."""
        self.steps[:active] += ~self.stopped[:active]
        ended = ((step + 1) % self.per_epoch[:active] == 0) & ~self.stopped[:active]
        for client in ended.nonzero()[:, 0].tolist():
            self._judge(client)
        return bool(self.stopped[:active].all())

    def _judge(self, client: int) -> None:
        loss = self.loss(client)
        if loss is None:
            return
        if loss < self.best[client] - self.settings.min_improvement or client not in self.kept:
            self.best[client], self.waited[client] = loss, 0
            self.kept[client] = {name: block[client].clone() for name, block in self.blocks.items()}
            return
        self.waited[client] += 1
        if self.waited[client] >= self.settings.patience:
            self.stopped[client] = True

    def restore(self) -> None:
        """Puts the best weights of each client, and what belongs to them, back into the blocks."""
        for client, best in self.kept.items():
            for name, block in self.blocks.items():
                block[client] = best[name]
