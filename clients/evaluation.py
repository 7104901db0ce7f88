"""Judging weights on data: per-example statistics of the task, summed in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clients.errors import RunError
from clients.examples import Examples, in_precision
from clients.normalization import batch_norms, batch_statistics, recalibrate
from clients.objective import TaskModule
from clients.recipe import BatchNorm
from clients.statistics import Statistics
from clients.task import Batch, Task, weighted_loss
from clients.weights import Layout

Total = dict[str, Tensor]


class Evaluator:
    """Runs a model over examples in evaluation mode. One lives in every worker and is reused.

    Args:
        model: the model; copied.
        task: gives loss and statistics.
        layout: where rows go.
        batch_size: examples a forward pass.
        batch_norm: where batch norm's statistics come from, whenever weights are loaded. ``recalibrate`` estimates them
            on the proxy inputs, ``batch`` normalises by each evaluated batch (transductive), ``shared`` takes those
            that clients sent, ``clients`` and ``clients_stored`` have none but a client's own.
        statistics: how running statistics stand in a row.
        proxy: the proxy split's inputs in batches, for ``recalibrate``.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        layout: Layout,
        batch_size: int,
        batch_norm: BatchNorm = "recalibrate",
        statistics: Statistics | None = None,
        proxy: Callable[[], Iterable[Batch]] | None = None,
    ):
        self.model = copy.deepcopy(model).eval()
        self.module = TaskModule(self.model, task).eval()
        self.task, self.layout, self.batch_size = task, layout, batch_size
        self.batch_norm, self.statistics, self.proxy = batch_norm, statistics, proxy
        self.normalizes = bool(batch_norms(self.model))

    def load(
        self,
        row: Tensor,
        layout: Layout | None = None,
        *,
        statistics: Tensor | None = None,
        inputs: Iterable[Batch] | None = None,
    ) -> None:
        """Puts weights ``[d]`` in place and, where the model has batch norm, its statistics in order.

        Args:
            row: the weights.
            layout: their layout, where it is not the shared one.
            statistics: running statistics ``[2 c]`` to judge by.
            inputs: batches to estimate the statistics on, where there are none.

        Raises:
            RunError: where batch norm would be left with the statistics that it was made with.
        """
        (layout or self.layout).load(self.model, row)
        if not self.normalizes or (self.batch_norm == "batch" and statistics is None and inputs is None):
            return
        if statistics is not None and self.statistics is not None:
            self.statistics.load(self.model, statistics)
        elif inputs is not None or self.batch_norm == "recalibrate":
            batches = (self.proxy or list)() if inputs is None else inputs
            recalibrate(self.module, (in_precision(dict(batch), self.layout.dtype) for batch in batches))
        else:
            raise RunError(
                f"evaluation.batch_norm: {self.batch_norm!r} has no statistics for these weights; those that batch norm"
                " is made with (mean 0, variance 1) would give a number without meaning"
            )

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

    @torch.no_grad()
    def loss(self, batch: Batch) -> float:
        """The mean loss of a batch."""
        weighted, weights = weighted_loss(self.task, self.outputs(batch), batch)
        return float(weighted.sum() / weights.sum())

    @torch.no_grad()
    def outputs(self, batch: Batch) -> Any:
        """What the loaded model gives for a batch."""
        if self.batch_norm == "batch":
            with batch_statistics(self.model):
                return self.module(batch)
        return self.module(batch)

    def _statistics(self, batch: Batch) -> dict[str, Tensor]:
        outputs = self.outputs(batch)
        weighted, weights = weighted_loss(self.task, outputs, batch)
        statistics = {"examples": torch.ones_like(weighted), "loss": weighted, "loss_weight": weights}
        statistics |= self.task.statistics(outputs, batch)
        for name, value in statistics.items():
            if value.shape[:1] != weighted.shape:
                raise RunError(
                    f"{type(self.task).__name__}.statistics: {name!r} has shape {list(value.shape)} for"
                    f" {len(weighted)} examples; give one value or several for each, [B] or [B, m]"
                )
        return {name: value[:, None] if value.dim() == 1 else value for name, value in statistics.items()}


def add_totals(total: Total, part: Total) -> Total:
    """The sum of two; a name that one lacks counts as zero there."""
    return {
        name: total[name] + part[name] if name in total and name in part else total.get(name, part.get(name))  # type: ignore[misc]
        for name in [*total, *(name for name in part if name not in total)]
    }
