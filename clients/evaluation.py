"""Judging weights on data: per-example statistics of the task, summed in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from clients.errors import RunError
from clients.normalization import batch_norms, batch_statistics, recalibrate
from clients.objective import TaskModule
from clients.task import Batch, Task, loss_and_weights
from clients.training import Examples, in_precision
from clients.weights import Layout

Total = dict[str, Tensor]


class Evaluator:
    """Runs a model over examples in evaluation mode. One lives in every worker and is reused.

    Args:
        model: the model; copied.
        task: gives loss and statistics.
        layout: where rows go.
        batch_size: examples a forward pass.
        batch_norm: ``recalibrate`` estimates statistics on the proxy inputs whenever weights are loaded, ``batch``
            normalises by each evaluation batch (transductive).
        proxy: the proxy split's inputs in batches, for ``recalibrate``.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        layout: Layout,
        batch_size: int,
        batch_norm: Literal["recalibrate", "batch"] = "recalibrate",
        proxy: Callable[[], Iterable[Batch]] | None = None,
    ):
        self.model = copy.deepcopy(model).eval()
        self.module = TaskModule(self.model, task).eval()
        self.task, self.layout, self.batch_size = task, layout, batch_size
        self.batch_norm, self.proxy = batch_norm, proxy

    def load(self, row: Tensor, layout: Layout | None = None) -> None:
        """Puts weights ``[d]`` in place and, where the model has batch norm, its statistics in order."""
        (layout or self.layout).load(self.model, row)
        if batch_norms(self.model) and self.batch_norm == "recalibrate":
            dtype = self.layout.dtype
            recalibrate(self.module, (in_precision(dict(batch), dtype) for batch in (self.proxy or list)()))

    @torch.no_grad()
    def totals(self, examples: Examples, index: Tensor) -> Total:
        """Summed statistics over the examples at these positions ``[n]``, in order.

        Returns:
            ``examples``, ``loss`` and ``loss_weight`` ``[1]``, and each statistic ``[m]``, all float64.
        """
        total: Total = {}
        for part in index.split(self.batch_size):
            for name, value in self._statistics(in_precision(examples.take(part), self.layout.dtype)).items():
                summed = value.to(torch.float64).sum(0)
                total[name] = total[name] + summed if name in total else summed
        return total

    def _statistics(self, batch: Batch) -> dict[str, Tensor]:
        if self.batch_norm == "batch":
            with batch_statistics(self.model):
                outputs = self.module(batch)
        else:
            outputs = self.module(batch)
        values, weights = loss_and_weights(self.task, outputs, batch)
        weights = torch.ones_like(values) if weights is None else weights
        statistics = {"examples": torch.ones_like(values), "loss": values * weights, "loss_weight": weights}
        statistics |= self.task.statistics(outputs, batch)
        for name, value in statistics.items():
            if value.shape[:1] != values.shape:
                raise RunError(
                    f"{type(self.task).__name__}.statistics: {name!r} has shape {list(value.shape)} for"
                    f" {len(values)} examples; give one value or several for each, [B] or [B, m]"
                )
        return {name: value[:, None] if value.dim() == 1 else value for name, value in statistics.items()}


def add_totals(total: Total, part: Total) -> Total:
    """The sum of two; a name that one lacks counts as zero there."""
    return {
        name: total[name] + part[name] if name in total and name in part else total.get(name, part.get(name))  # type: ignore[misc]
        for name in [*total, *(name for name in part if name not in total)]
    }
