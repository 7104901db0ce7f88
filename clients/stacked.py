"""Many clients at once: one ``vmap`` over the stack, each parameter a strided view of the block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from clients.hooks import Variables
from clients.objective import Objective
from clients.task import Batch
from clients.weights import Slot


class StackedExecutor:
    """Gradients of ``k`` clients in one forward and one backward pass.

    Args:
        objective: what each client minimises; must be traceable by ``vmap`` (the probe finds out).
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.layout = objective.layout.all
        self.names = self.layout.names

    def gradients(self, rows: Tensor, grads: Tensor, batch: Batch, mask: Tensor | None, v: Variables) -> Tensor:
        leaves = {slot.name: self._view(rows, slot).requires_grad_() for slot in self.layout}

        def one(
            leaf: Mapping[str, Tensor], columns: Batch, real: Tensor | None, client: Mapping[str, Tensor]
        ) -> tuple[Tensor, Tensor]:
            tensors = {slot.name: leaf[slot.name].to(slot.dtype) for slot in self.layout}
            outputs = self.objective.module.with_weights(tensors, columns)
            return self.objective(outputs, columns, real, replace(v, client=client))

        with torch.enable_grad():
            loss, reported = torch.vmap(one, in_dims=(0, 0, None if mask is None else 0, 0), randomness="different")(
                leaves, batch, mask, dict(v.client)
            )
            found = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
        for slot, gradient in zip(self.layout, found, strict=True):
            place = self._view(grads, slot)
            place.zero_() if gradient is None else place.copy_(gradient)
        return reported

    @staticmethod
    def _view(block: Tensor, slot: Slot) -> Tensor:
        return block[:, slot.slice].view(len(block), *slot.shape).detach()
