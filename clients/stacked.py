"""Many clients at once: one ``vmap`` over the stack, each parameter a strided view of the block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from clients.hooks import Variables
from clients.objective import Buffers, Objective
from clients.task import Batch
from clients.weights import Layout


class StackedExecutor:
    """Gradients of ``k`` clients in one forward and one backward pass.

    Args:
        objective: what each client minimises; must be traceable by ``vmap`` (the probe finds out).
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.layout = objective.layout.all
        self._leaves = self._places = _Views()

    def gradients(
        self,
        rows: Tensor,
        grads: Tensor,
        batch: Batch,
        mask: Tensor | None,
        v: Variables,
        statistics: Buffers = MappingProxyType({}),
    ) -> Tensor:
        leaves = self._leaves = self._leaves.of(rows, self.layout, requires_grad=True)
        places = self._places = self._places.of(grads, self.layout)

        def one(
            leaf: Mapping[str, Tensor],
            buffers: Buffers,
            columns: Batch,
            real: Tensor | None,
            client: Mapping[str, Tensor],
        ) -> tuple[Tensor, Tensor]:
            tensors = {slot.name: leaf[slot.name].to(slot.dtype) for slot in self.layout}
            outputs = self.objective.module.with_weights({**tensors, **buffers}, columns)
            return self.objective(outputs, columns, real, replace(v, client=client))

        with torch.enable_grad():
            loss, reported = torch.vmap(one, (0, 0, 0, None if mask is None else 0, 0), randomness="different")(
                leaves.tensors, dict(statistics), batch, mask, dict(v.client)
            )
            found = torch.autograd.grad(loss.sum(), list(leaves.tensors.values()), allow_unused=True)
        for place, gradient in zip(places.tensors.values(), found, strict=True):
            place.zero_() if gradient is None else place.copy_(gradient)
        return reported


@dataclass(frozen=True)
class _Views:
    """A block's parameters as views ``[k, *shape]``; made once and used for every step on the same memory."""

    key: tuple = ()
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def of(self, block: Tensor, layout: Layout, requires_grad: bool = False) -> _Views:
        # The views keep the memory alive, so the same address is the same block.
        key = (block.data_ptr(), block.shape, block.stride())
        if key == self.key:
            return self
        views = {slot.name: block[:, slot.slice].view(len(block), *slot.shape).detach() for slot in layout}
        return _Views(key, {name: view.requires_grad_(requires_grad) for name, view in views.items()})
