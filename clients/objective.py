"""What a local step minimises, whichever way it is executed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from clients.hooks import Correction, Variables
from clients.statistics import untracked
from clients.task import Batch, Task, loss_and_weights, one_each
from clients.weights import Layout

Buffers = Mapping[str, Tensor]


class TaskModule(nn.Module):
    """A model seen through its task: called with a batch, it returns the task's outputs.

    Args:
        model: the model.
        task: how it is called.
        autocast: whether it runs in bfloat16 where that is safe; outputs are float32 again, so that losses are.
    """

    def __init__(self, model: nn.Module, task: Task, autocast: bool = False):
        super().__init__()
        self.model = model
        self.task = task
        self.autocast = autocast

    def forward(self, batch: Batch) -> Any:
        if not self.autocast:
            return self.task.forward(self.model, batch)
        with torch.autocast("cpu", dtype=torch.bfloat16), _LowUnderVmap():
            outputs = self.task.forward(self.model, batch)
        return tree_map(_widened, outputs)

    def with_weights(self, tensors: Mapping[str, Tensor], batch: Batch) -> Any:
        """Outputs with other parameters (and buffers) in the model's place; the module itself is unchanged."""
        return functional_call(self, {f"model.{name}": tensor for name, tensor in tensors.items()}, (batch,))


class _LowUnderVmap(TorchFunctionMode):
    """Lowers the arguments of linear and convolutional layers, which vmap takes apart before autocast sees them."""

    _LOWERED = frozenset(
        {F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d}
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._LOWERED:
            args, kwargs = tree_map(_lowered, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _lowered(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


@dataclass(frozen=True)
class Objective:
    """What a local step minimises: the task's loss, and what a correction adds to it.

    Attributes:
        module: the model, seen through its task.
        layout: the shared parameters, and the personal ones.
        correction: what the strategy adds.
        smoothing: label smoothing of the loss that is descended; the reported loss never has it.
    """

    module: TaskModule
    layout: Layout
    correction: Correction
    smoothing: float = 0.0

    def __call__(self, outputs: Any, batch: Batch, mask: Tensor | None, v: Variables) -> tuple[Tensor, Tensor]:
        """``(loss to descend, loss to report)`` of one client's batch; ``mask`` ``[B]`` marks real examples."""
        values, weights = loss_and_weights(self.module.task, outputs, batch)
        reported = descended = _mean(values, _times(mask, weights))
        if self.smoothing:
            values, weights = loss_and_weights(self.module.task, outputs, batch, self.smoothing)
            descended = _mean(values, _times(mask, weights))
        if self.correction.adds_loss:
            descended = descended + _mean(self.added(outputs, batch, v), _times(mask, None))
        return descended, reported.detach()

    def each(self, outputs: Any, batch: Batch, v: Variables) -> tuple[Tensor, Tensor]:
        """The same by example, ``[B]`` each, every example counting alike."""
        task = self.module.task
        reported = descended = loss_and_weights(task, outputs, batch)[0]
        if self.smoothing:
            descended = loss_and_weights(task, outputs, batch, self.smoothing)[0]
        if self.correction.adds_loss:
            descended = descended + self.added(outputs, batch, v)
        return descended, reported.detach()

    def added(self, outputs: Any, batch: Batch, v: Variables) -> Tensor:
        """What the correction adds, ``[B]``."""
        extra = self.correction.loss(self._call, batch, outputs, v)
        one_each(extra, f"{type(self.correction).__name__}.loss")
        return extra

    def _call(self, row: Tensor, batch: Batch) -> Any:
        layout = self.layout if row.shape[-1] == self.layout.size else self.layout.all
        with untracked(self.module):
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

    def gradients(
        self,
        rows: Tensor,
        grads: Tensor,
        batch: Batch,
        mask: Tensor | None,
        v: Variables,
        statistics: Buffers = ...,
    ) -> Tensor:
        """Writes ``grads`` ``[k, D]`` at the weights ``rows`` ``[k, D]``; returns the losses ``[k]``.

        Args:
            rows: the clients' weights.
            grads: where their gradients go.
            batch: columns ``[k, B, ...]``.
            mask: ``bool [k, B]`` of the real examples, or None where all are.
            v: what a correction reads.
            statistics: buffer name -> ``[k, channels]`` running statistics of batch norm, updated in place; empty where
                none are tracked.
        """
        ...
