"""The local steps of a stack of clients, from gradients to weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from clients.augmentation import Transforms
from clients.batches import Schedule as Batches
from clients.batches import Work
from clients.early_stopping import Watch
from clients.examples import Examples, in_precision
from clients.hooks import Variables
from clients.local_state import STEPS, Stack
from clients.normalization import batch_norms
from clients.objective import Executor, Objective
from clients.optimizers import Optimizer
from clients.recipe import Recipe
from clients.regularization import Penalties, clip_norm
from clients.schedules import Constant, Schedule
from clients.task import weighted_loss

if TYPE_CHECKING:
    from clients.adversarial import Adversary

_EVALUATED_AT_ONCE = 1024


@dataclass(frozen=True)
class Rates:
    """The learning rate of every local step.

    Attributes:
        lr: before schedules.
        by_round: factor by round.
        by_step: factor by local step, over each client's own steps of the round.
        rounds: how many rounds there are in all.
        factors: factor by parameter ``[D]``, or None where all have the same rate.
    """

    lr: float
    by_round: Schedule
    by_step: Schedule
    rounds: int
    factors: Tensor | None = None

    def of(self, round: int) -> float:
        """The round's rate."""
        return self.lr * float(self.by_round.factor(max(round - 1, 0), self.rounds))

    def at(self, step: int, steps: Tensor, of_round: float, dtype: torch.dtype) -> float | Tensor:
        """One rate for all, or ``[k, 1]``, ``[1, D]``, ``[k, D]`` where clients (by their number of steps) or
        parameters differ.
        """
        rate: float | Tensor = of_round
        if not self.constant:
            rate = of_round * torch.as_tensor(self.by_step.factor(step, steps), dtype=dtype).reshape(-1, 1)
        return rate if self.factors is None else rate * self.factors[None]

    @cached_property
    def constant(self) -> bool:
        """Whether all local steps have the round's rate."""
        return self.by_step == Constant()


@dataclass(frozen=True)
class _Phases:
    """Trains the personal parameters alone for a client's first steps, and the shared ones alone for the others.

    Attributes:
        first: ``int64 [k]`` steps of the first phase.
        shared: how many columns, the first ones, are shared.
        held: ``[k, D]``: the shared columns as they began; the personal ones as the first phase left them.
    """

    first: Tensor
    shared: int
    held: Tensor

    def number(self, step: int, active: int) -> Tensor:
        """Which step of its phase each client takes, ``[active, 1]``: each phase is training of its own."""
        first = self.first[:active]
        return torch.where(step < first, step, step - first)[:, None]

    def before(self, g: Tensor, step: int) -> None:
        """Takes from the gradients ``[active, D]`` what is held."""
        personal = (step < self.first[: len(g)])[:, None]
        g[:, : self.shared].masked_fill_(personal, 0)
        g[:, self.shared :].masked_fill_(~personal, 0)

    def after(self, w: Tensor, step: int) -> None:
        """Puts back what is held, since decay and moments move weights without a gradient."""
        personal, held = (step < self.first[: len(w)])[:, None], self.held[: len(w)]
        w[:, : self.shared] = torch.where(personal, held[:, : self.shared], w[:, : self.shared])
        held[:, self.shared :] = torch.where(personal, w[:, self.shared :], held[:, self.shared :])
        w[:, self.shared :] = held[:, self.shared :]


class Descent:
    """Runs the steps of stacks. An executor fills the gradients; all else works on the whole block.

    Args:
        objective: what is minimised.
        executor: how gradients are found.
        recipe: how clients train.
        optimizer: the local optimiser.
        rates: learning rates.
        examples: the pool that examples are taken from.
        validation: client id -> positions of its validation examples, for early stopping.
        by_length: whether short batches train in stacks of their own instead of being masked.
        validated: where validation examples are taken from, if not from the pool.
        transforms: changes inputs at random, where given.
        adversary: changes inputs for the worse, where given.
    """

    def __init__(
        self,
        objective: Objective,
        executor: Executor,
        recipe: Recipe,
        optimizer: Optimizer,
        rates: Rates,
        examples: Examples,
        validation: Callable[[int], np.ndarray] | None,
        by_length: bool,
        *,
        validated: Examples | None = None,
        transforms: Transforms | None = None,
        adversary: Adversary | None = None,
    ):
        self.transforms, self.adversary = transforms, adversary
        self.objective, self.executor, self.recipe, self.optimizer = objective, executor, recipe, optimizer
        self.rates, self.examples, self.validation, self.by_length = rates, examples, validation, by_length
        self.validated = examples if validated is None else validated
        self.model, self.correction = objective.module.model, objective.correction
        self.layout, self.block = objective.layout, objective.layout.all
        self.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.penalties = Penalties(recipe.regularization, self.model, self.block)
        self.cumulative = [norm for norm in batch_norms(self.model) if norm.num_batches_tracked is not None]
        self._blocks: dict[str, Tensor] = {}

    def scratch(self, name: str, k: int) -> Tensor:
        """A block ``[k, D]`` for work in progress, the same memory each time: fresh pages are costly."""
        if name not in self._blocks or len(self._blocks[name]) < k:
            self._blocks[name] = torch.empty(k, self.block.size, dtype=self.block.dtype)
        return self._blocks[name][:k]

    def run(self, stack: Stack, done: Work, plan: Batches, v: Variables) -> tuple[Tensor, Tensor]:
        """Runs a stack's steps, in place.

        Args:
            stack: the clients' blocks.
            done: their work.
            plan: their batches.
            v: what a correction reads.

        Returns:
            Each client's mean loss ``float64 [k]`` and the steps that it took ``int64 [k]``.
        """
        for name, buffer in self.model.named_buffers():
            if name not in stack.buffers:
                buffer.copy_(self.buffers[name])
        rows, k = stack.rows, len(stack.rows)
        grads = self.scratch("grads", k)
        watch = self._watch(stack, done)
        total, seen = torch.zeros(k, dtype=torch.float64), plan.count.sum(0)
        taken, lr = torch.from_numpy(done.steps), self.rates.of(v.round)
        phases = self._phases(stack, done)
        with torch.no_grad():
            for step, active in enumerate(plan.active):
                w, g = rows[:active], grads[:active]
                here = v.select(slice(active))
                buffers = {name: buffer[:active] for name, buffer in stack.buffers.items()}
                losses = self._gradients(w, g, plan, step, here, buffers, stack.clients[:active])
                count = plan.count[step, :active]
                if watch is not None:
                    count = count * ~watch.stopped[:active]
                    seen[:active] += count - plan.count[step, :active]
                total[:active] += losses * count
                if phases is not None:
                    phases.before(g, step)
                number = step if phases is None else phases.number(step, active)
                self._step(w, g, stack, here, step, number, self.rates.at(step, taken[:active], lr, w.dtype))
                if phases is not None:
                    phases.after(w, step)
                if watch is not None and watch.look(step, active):
                    seen -= plan.count[step + 1 :].sum(0)
                    break
        if watch is not None:
            watch.restore()
            taken = watch.steps
        return total / seen.clamp(min=1), taken

    def _step(
        self, w: Tensor, g: Tensor, stack: Stack, v: Variables, step: int, number: int | Tensor, lr: float | Tensor
    ) -> None:
        """From the gradients of a step to the weights after it, in place; the optimiser counts it as ``number``."""
        active, shared, penalties = len(w), self.layout.size, self.penalties
        if self.recipe.gradient_clip is not None:
            clip_norm(g, self.recipe.gradient_clip)
        if self.correction.changes_gradient:
            changed = self.correction.gradient(g[:, :shared], w[:, :shared], v, step)
            if changed.data_ptr() != g.data_ptr():
                g[:, :shared] = changed
        penalties.gradient(g, w, v.weights, shared)
        penalties.before(w, lr)
        count = stack.state[STEPS][:active] + number if STEPS in stack.state else number
        self.optimizer.step(w, g, {name: block[:active] for name, block in stack.moments.items()}, lr, count)
        penalties.after(w, lr)

    def _phases(self, stack: Stack, done: Work) -> _Phases | None:
        if self.recipe.personal_epochs is None:
            return None
        first = torch.from_numpy(self.recipe.personal_epochs * done.per_epoch)
        return _Phases(first, self.layout.size, stack.rows.clone())

    def _watch(self, stack: Stack, done: Work) -> Watch | None:
        if self.recipe.early_stopping is None or self.validation is None:
            return None
        blocks = {"rows": stack.rows, **stack.buffers, **stack.moments}
        per_epoch, losses = torch.from_numpy(done.per_epoch), torch.full((len(stack.rows),), torch.nan).double()
        stack.report["validation_loss"] = losses

        def loss(place: int) -> float | None:
            assert self.validation is not None
            found = self.loss(stack, place, self.validated, self.validation)
            if found is not None:
                losses[place] = found if torch.isnan(losses[place]) else min(found, float(losses[place]))
            return found

        return Watch(self.recipe.early_stopping, per_epoch, blocks, loss)

    @torch.no_grad()
    def loss(
        self, stack: Stack, place: int, examples: Examples, members_of: Callable[[int], np.ndarray]
    ) -> float | None:
        """The task's mean loss of one client's weights on examples of its own, dropout off; None where it has none."""
        members = torch.from_numpy(members_of(int(stack.clients[place])))
        if not len(members):
            return None
        buffers = {name: buffer[place] for name, buffer in stack.buffers.items()}
        total, weight = 0.0, 0.0
        self.model.eval()
        try:
            for part in members.split(_EVALUATED_AT_ONCE):
                batch = in_precision(examples.take(part), self.block.dtype)
                outputs = self.objective.module.with_weights(
                    {**self.block.unflatten(stack.rows[place]), **buffers}, batch
                )
                weighted, weights = weighted_loss(self.objective.module.task, outputs, batch)
                total += float(weighted.sum(dtype=torch.float64))
                weight += float(weights.sum(dtype=torch.float64))
        finally:
            self.model.train()
        return total / weight if weight else None

    def _count_from(self, step: int) -> None:
        """Tells batch norms with a cumulative average which step of the round this is."""
        for norm in self.cumulative:
            cast(Tensor, norm.num_batches_tracked).fill_(step)

    def _gradients(
        self,
        w: Tensor,
        g: Tensor,
        plan: Batches,
        step: int,
        v: Variables,
        buffers: dict[str, Tensor],
        clients: np.ndarray,
    ) -> Tensor:
        active, count = len(w), plan.count[step, : len(w)]
        index, mask = plan.index[step, :active], plan.mask(step, active)
        if mask is None or not self.by_length or active == 1:
            if mask is not None and self.by_length:
                index, mask = index[:, : int(count[0])], None
            batch = self._batch(w, index, count, v.round, step, clients)
            self._count_from(step)
            return self.executor.gradients(w, g, batch, mask, v, buffers)
        losses = torch.empty(active, dtype=w.dtype)
        for length in count.unique().tolist():
            these = (count == length).nonzero()[:, 0]
            part = torch.empty(len(these), w.shape[1], dtype=w.dtype)
            some = {name: buffer[these] for name, buffer in buffers.items()}
            batch = self._batch(w[these], index[these, :length], count[these], v.round, step, clients[these.numpy()])
            self._count_from(step)
            losses[these] = self.executor.gradients(w[these], part, batch, None, v.select(these), some)
            g[these] = part
            for name, buffer in some.items():
                buffers[name][these] = buffer
        return losses

    def _batch(
        self,
        w: Tensor,
        index: Tensor,
        count: Tensor,
        round: int,
        step: int,
        clients: np.ndarray,
    ) -> dict[str, Tensor]:
        """The examples at ``index`` ``[k, B]`` as they are trained on: transformed, then attacked."""
        batch = self._take(index)
        if self.transforms is not None:
            batch = in_precision(self.transforms.stack(batch, count, clients, round, step), self.block.dtype)
        if self.adversary is not None and index.shape[1]:
            batch = dict(self.adversary(w, batch, count, round, clients, step))
        return batch

    def _take(self, index: Tensor) -> dict[str, Tensor]:
        return in_precision(self.examples.take(index), self.block.dtype)
