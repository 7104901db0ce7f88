"""One client at a time, plain autograd."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor, nn

from clients.hooks import Variables
from clients.objective import Buffers, Objective
from clients.task import Batch


class LoopExecutor:
    """One client, plain autograd: the model's parameters are views of the row.

    Images and filters of a convolutional model are in channels-last order, which its CPU kernels prefer; those filters,
    and parameters of another dtype than the row, are copies that follow it.
    """

    def __init__(self, objective: Objective):
        self.objective = objective
        self.layout = objective.layout.all
        self.parameters = dict(objective.module.model.named_parameters())
        self.images = _is_convolutional(objective.module.model)
        self.copied = {
            slot.name
            for slot in self.layout
            if slot.dtype != self.layout.dtype or (self.images and len(slot.shape) == 4)
        }
        for name in self.copied:
            self.parameters[name].data = self._arrange(self.parameters[name].data.clone())
        for parameter in self.parameters.values():
            if not parameter.requires_grad:
                parameter.data = self._arrange(parameter.data)
        self.modules = dict(objective.module.model.named_modules())

    def gradients(
        self,
        rows: Tensor,
        grads: Tensor,
        batch: Batch,
        mask: Tensor | None,
        v: Variables,
        statistics: Buffers = MappingProxyType({}),
    ) -> Tensor:
        for slot in self.layout:
            parameter, view = self.parameters[slot.name], rows[0, slot.slice].view(slot.shape)
            parameter.grad = None
            if slot.name in self.copied:
                parameter.data.copy_(view)
            else:
                parameter.data = view
        for buffer_name, buffer in statistics.items():
            module, _, last = buffer_name.rpartition(".")
            setattr(self.modules[module], last, buffer[0])
        one = {name: self._arrange(column[0]) for name, column in batch.items()}
        here = v.select(0)
        with torch.enable_grad():
            loss, reported = self.objective(self.objective.module(one), one, None if mask is None else mask[0], here)
            loss.backward()
        for slot in self.layout:
            place, gradient = grads[0, slot.slice].view(slot.shape), self.parameters[slot.name].grad
            if gradient is None:
                place.zero_()
            else:
                place.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
        return reported.reshape(1)

    def _arrange(self, column: Tensor) -> Tensor:
        if self.images and column.dim() == 4 and column.is_floating_point():
            return column.contiguous(memory_format=torch.channels_last)
        return column


def _is_convolutional(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())
