"""What a local step minimises, whichever way it is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clients.hooks import Correction, Variables
from clients.task import Batch, Task, loss_and_weights, one_each
from clients.weights import Layout


class TaskModule(nn.Module):
    """A model seen through its task: called with a batch, it returns the task's outputs."""

    def __init__(self, model: nn.Module, task: Task):
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Batch) -> Any:
        return self.task.forward(self.model, batch)

    def with_weights(self, tensors: Mapping[str, Tensor], batch: Batch) -> Any:
        """Outputs with other parameters in the model's place; the module itself is unchanged."""
        return functional_call(self, {f"model.{name}": tensor for name, tensor in tensors.items()}, (batch,))


@dataclass(frozen=True)
class Objective:
    """What a local step minimises: the task's loss, and what a correction adds to it."""

    module: TaskModule
    layout: Layout
    correction: Correction

    def __call__(self, outputs: Any, batch: Batch, mask: Tensor | None, v: Variables) -> tuple[Tensor, Tensor]:
        """``(loss to descend, loss to report)`` of one client's batch; ``mask`` ``[B]`` marks real examples."""
        values, weights = loss_and_weights(self.module.task, outputs, batch)
        reported = _mean(values, _times(mask, weights))
        if not self.correction.adds_loss:
            return reported, reported.detach()
        extra = self.correction.loss(self._call, batch, outputs, v)
        one_each(extra, f"{type(self.correction).__name__}.loss")
        return reported + _mean(extra, _times(mask, None)), reported.detach()

    def _call(self, row: Tensor, batch: Batch) -> Any:
        layout = self.layout if row.shape[-1] == self.layout.size else self.layout.all
        return self.module.with_weights(layout.unflatten(row), batch)


def _times(mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
    if mask is None or weights is None:
        return mask if weights is None else weights
    return mask * weights


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean()
    weights = weights.to(values.dtype)
    # A batch with nothing that counts (padding only) has no loss and no gradient.
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(values.dtype).tiny)


class Executor(Protocol):
    """Fills the gradients of a block of clients at one local step."""

    def gradients(self, rows: Tensor, grads: Tensor, batch: Batch, mask: Tensor | None, v: Variables) -> Tensor:
        """Writes ``grads`` ``[k, D]`` at the weights ``rows`` ``[k, D]``; returns the losses ``[k]``."""
        ...
