"""The local loop: one for every recipe, correction and execution.

A block ``[k, D]`` holds the clients' weights, a second one their gradients; ``D`` is the shared parameters followed by
the personal ones. An *executor* fills the gradients (``loop``: one client, plain autograd; ``stacked``: all at once
under ``vmap``); corrections, regularisation and the optimiser then work on the whole block.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from clients import randomness
from clients.batches import Schedule, Work, schedule, work
from clients.hooks import ClientData, ClientFailure, Correction, LocalContext, LocalTraining, Variables
from clients.loop import LoopExecutor
from clients.normalization import batch_norms, without_running_statistics
from clients.objective import Executor, Objective, TaskModule
from clients.optimizers import Optimizer
from clients.recipe import Recipe
from clients.stacked import StackedExecutor
from clients.task import Task
from clients.updates import Updates
from clients.weights import Layout

PERSONAL = "personal"


class Examples(Protocol):
    """Where training examples come from: positions of any shape in, columns of that shape out."""

    def take(self, index: Tensor) -> dict[str, Tensor]: ...


@dataclass
class Trained:
    """What training a chunk gave.

    Attributes:
        updates: the clients whose training succeeded.
        loss: ``float64 [k]`` mean training loss over the examples each saw.
        state: new client state by name, ``[k, m]`` each, in the order of ``updates.clients``.
        failures: the clients that failed.
    """

    updates: Updates
    loss: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    failures: list[ClientFailure] = field(default_factory=list)


class Trainer:
    """Trains chunks of clients from given weights. One lives in every worker and is reused for the whole run.

    Args:
        model: the model; copied.
        task: what is learnt.
        recipe: how clients train.
        layout: the shared parameters (and, as its ``personal`` part, those that stay).
        examples: the pool that clients' examples lie in.
        members: client id -> ``int64 [n]`` positions in the pool.
        optimizer: the local optimiser.
        correction: what the strategy changes in the loop.
        local_training: replaces the loop, where given.
        stacked: which execution.
        by_length: in stacked execution, whether short batches train in stacks of their own instead of being masked.
        seed: the experiment's seed.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        layout: Layout,
        examples: Examples,
        members: Callable[[int], np.ndarray],
        *,
        optimizer: Optimizer,
        correction: Correction | None = None,
        local_training: LocalTraining | None = None,
        stacked: bool = False,
        by_length: bool | None = None,
        seed: int = 0,
    ):
        self.model = without_running_statistics(copy.deepcopy(model)).train()
        self.task, self.recipe, self.layout, self.seed = task, recipe, layout, seed
        self.examples, self.members = examples, members
        self.optimizer, self.correction, self.local_training = optimizer, correction or Correction(), local_training
        self.stacked = stacked
        self.spare = 1 if batch_norms(self.model) else 0
        self.by_length = bool(self.spare) if by_length is None else by_length
        self.block = layout.all
        self.start_personal = layout.personal.flatten(model) if layout.personal.size else None
        self.buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.executor = self._executor()
        self._blocks: dict[str, Tensor] = {}

    def _executor(self) -> Executor:
        objective = Objective(TaskModule(self.model, self.task), self.layout, self.correction)
        return StackedExecutor(objective) if self.stacked else LoopExecutor(objective)

    def work(self, clients: np.ndarray, round: int) -> Work:
        """How much these clients train in this round."""
        sizes = np.array([len(self.members(client)) for client in clients.tolist()], dtype=np.int64)
        return work(self.recipe, sizes, clients, self.seed, round, self.spare)

    def train(
        self,
        clients: np.ndarray,
        weights: Tensor,
        round: int,
        client_state: Mapping[str, Tensor] | None = None,
        server_state: Mapping[str, Tensor] | None = None,
    ) -> Trained:
        """Trains these clients (``int64 [k]``, ascending) from ``weights`` ``[d]``; the result is ordered by client id.

        A client whose own code raises is a failure in the result, and the others are unaffected.
        """
        state = dict(client_state or {})
        parts, failures = [], []
        for group in self._groups(clients):
            chosen = {name: value[group] for name, value in state.items()}
            found, failed = self._attempt(clients[group], weights, round, chosen, dict(server_state or {}))
            parts += found
            failures += failed
        return self._collect(parts, failures)

    def _groups(self, clients: np.ndarray) -> Sequence[np.ndarray]:
        places = np.arange(len(clients))
        together = self.stacked and self.local_training is None
        return [places] if together and len(clients) else np.split(places, len(clients))[: len(clients)]

    def _attempt(
        self, clients: np.ndarray, weights: Tensor, round: int, state: dict[str, Tensor], server: dict[str, Tensor]
    ) -> tuple[list[Trained], list[ClientFailure]]:
        try:
            with torch.random.fork_rng(devices=[]):
                # Dropout and the like draw from torch's own generator: one key a stack.
                torch.default_generator.manual_seed(randomness.key(self.seed, "model", round, int(clients[0])))
                return [self._train(clients, weights, round, state, server)], []
        except Exception as error:
            if len(clients) == 1:
                text = "".join(traceback.format_exception(error))
                message = f"{type(error).__name__}: {error}".splitlines()[0]
                return [], [ClientFailure(int(clients[0]), "client_failed", "training", message, text)]
        # Somebody in this stack raises: one at a time, the others still count.
        parts, failures = [], []
        for i in range(len(clients)):
            alone = {name: value[i : i + 1] for name, value in state.items()}
            found, failed = self._attempt(clients[i : i + 1], weights, round, alone, server)
            parts += found
            failures += failed
        return parts, failures

    def _train(
        self, clients: np.ndarray, weights: Tensor, round: int, state: dict[str, Tensor], server: dict[str, Tensor]
    ) -> Trained:
        if self.local_training is not None:
            return self._train_own(int(clients[0]), weights, round, state)
        done = self.work(clients, round)
        if (done.steps == 0).any():
            few = clients[done.steps == 0]
            raise ValueError(
                f"client {few[0]} holds {done.examples[done.steps == 0][0]} examples, too few for a local step"
                + (" (batch norm needs two)" if self.spare else "")
            )
        order = np.argsort(-done.steps, kind="stable")
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        sorted_clients = clients[order]
        done = Work(done.examples[order], done.per_epoch[order], done.steps[order])
        sorted_state = {name: value[torch.from_numpy(order)] for name, value in state.items()}
        personal = sorted_state.pop(PERSONAL, None)
        v = Variables(weights, sorted_state, server, round)

        rows = self._first_rows(len(clients), weights, personal)
        members = [self.members(client) for client in sorted_clients.tolist()]
        plan = schedule(done, members, sorted_clients, self.recipe.batch_size, self.seed, round)
        loss = self._descend(rows, plan, v)[back]

        updates = Updates(
            rows=rows[:, : self.layout.size][back].sub_(weights),
            clients=torch.from_numpy(clients),
            examples=torch.from_numpy(done.examples)[back],
            steps=torch.from_numpy(done.steps)[back],
            weights=torch.ones(len(clients), dtype=torch.float64),
        )
        updates, new_state = self.correction.finish(updates, replace(v, client=state))
        if self.start_personal is not None:
            new_state = {**new_state, PERSONAL: rows[:, self.layout.size :][back].sub_(self.start_personal)}
        return Trained(updates, loss, new_state)

    def _first_rows(self, k: int, weights: Tensor, personal: Tensor | None) -> Tensor:
        rows = self._scratch("rows", k)
        rows[:, : self.layout.size] = weights
        if self.start_personal is not None:
            rows[:, self.layout.size :] = self.start_personal if personal is None else self.start_personal + personal
        return rows

    def _scratch(self, name: str, k: int) -> Tensor:
        """A block ``[k, D]`` for work in progress, the same memory each time: fresh pages are costly."""
        if name not in self._blocks or len(self._blocks[name]) < k:
            self._blocks[name] = torch.empty(k, self.block.size, dtype=self.block.dtype)
        return self._blocks[name][:k]

    def _descend(self, rows: Tensor, plan: Schedule, v: Variables) -> Tensor:
        """Runs the steps of the plan on the block, in place; returns the mean loss of each client, ``float64 [k]``."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(self.buffers[name])
        grads = self._scratch("grads", len(rows))
        state = self.optimizer.init(rows)
        lr, l2 = self.recipe.learning_rate, self.recipe.regularization.l2
        total = torch.zeros(len(rows), dtype=torch.float64)
        with torch.no_grad():
            for step, active in enumerate(plan.active):
                w, g = rows[:active], grads[:active]
                here = replace(v, client={name: value[:active] for name, value in v.client.items()}) if v.client else v
                losses = self._gradients(w, g, plan, step, here)
                total[:active] += losses * plan.count[step, :active]
                if self.correction.changes_gradient:
                    shared = self.layout.size
                    changed = self.correction.gradient(g[:, :shared], w[:, :shared], here, step)
                    if changed.data_ptr() != g.data_ptr():
                        g[:, :shared] = changed
                if l2:
                    g.add_(w, alpha=l2)
                self.optimizer.step(w, g, {name: block[:active] for name, block in state.items()}, lr, step)
        return total / plan.count.sum(0).clamp(min=1)

    def _gradients(self, w: Tensor, g: Tensor, plan: Schedule, step: int, v: Variables) -> Tensor:
        active = len(w)
        index, mask = plan.index[step, :active], plan.mask(step, active)
        if mask is None or not (self.by_length or not self.stacked):
            return self.executor.gradients(w, g, self._take(index), mask, v)
        if active == 1:
            return self.executor.gradients(w, g, self._take(index[:, : int(plan.count[step, 0])]), None, v)
        losses = torch.empty(active, dtype=w.dtype)
        for length in plan.count[step, :active].unique().tolist():
            these = (plan.count[step, :active] == length).nonzero()[:, 0]
            part = torch.empty(len(these), w.shape[1], dtype=w.dtype)
            here = replace(v, client={name: value[these] for name, value in v.client.items()})
            losses[these] = self.executor.gradients(w[these], part, self._take(index[these, :length]), None, here)
            g[these] = part
        return losses

    def _take(self, index: Tensor) -> dict[str, Tensor]:
        return in_precision(self.examples.take(index), self.block.dtype)

    def _train_own(self, client: int, weights: Tensor, round: int, state: dict[str, Tensor]) -> Trained:
        """Trains one client by the user's own :class:`LocalTraining`."""
        assert self.local_training is not None
        personal = state.get(PERSONAL)
        # A copy, so that what one client's training freezes, hooks or switches does not reach the next client's.
        model = copy.deepcopy(self.model)
        self.block.load(model, self._first_rows(1, weights, personal)[0])
        members = torch.from_numpy(self.members(client))
        data = ClientData(self._take(members), randomness.generator(self.seed, "local_training", round, client))
        told = dict(self.local_training.train(model, data, self._local_context(round, client, data)) or {})
        loss, steps = float(told.pop("loss", float("nan"))), int(told.pop("steps", 0))
        updates = Updates(
            rows=(self.layout.flatten(model) - weights)[None],
            clients=torch.tensor([client]),
            examples=torch.tensor([len(data)]),
            steps=torch.tensor([steps]),
            weights=torch.ones(1, dtype=torch.float64),
            sends={name: torch.as_tensor(value, dtype=torch.float64)[None] for name, value in told.items()},
        )
        new_state = {}
        if self.start_personal is not None:
            new_state[PERSONAL] = (self.layout.personal.flatten(model) - self.start_personal)[None]
        return Trained(updates, torch.tensor([loss], dtype=torch.float64), new_state)

    def _local_context(self, round: int, client: int, data: ClientData) -> LocalContext:
        names, personal = tuple(self.layout.names), tuple(self.layout.personal.names)
        return LocalContext(round, client, self.recipe, self.task, data.generator, names, personal)

    def _collect(self, parts: list[Trained], failures: list[ClientFailure]) -> Trained:
        """One result in client order, without the updates that are not finite."""
        if not parts:
            return Trained(self._nothing(), torch.zeros(0, dtype=torch.float64), {}, failures)
        if len(parts) == 1:
            whole = parts[0]
        else:
            order = torch.cat([part.updates.clients for part in parts]).argsort()
            whole = Trained(
                Updates.join([part.updates for part in parts]),
                torch.cat([part.loss for part in parts])[order],
                {name: torch.cat([part.state[name] for part in parts])[order] for name in parts[0].state},
            )
        # The sum of a row is finite only if every entry is; an overflow of the sum is looked at closely.
        finite = torch.isfinite(whole.updates.rows.sum(1))
        if not bool(finite.all()):
            finite = torch.isfinite(whole.updates.rows).all(1)
        for client in whole.updates.clients[~finite].tolist():
            failures.append(
                ClientFailure(client, "dropped_update", "training", "the update holds NaN or infinite values; left out")
            )
        if not bool(finite.all()):
            state = {name: value[finite] for name, value in whole.state.items()}
            whole = Trained(whole.updates.select(finite), whole.loss[finite], state)
        whole.failures = failures
        return whole

    def _nothing(self) -> Updates:
        none = torch.zeros(0, dtype=torch.int64)
        rows = torch.zeros(0, self.layout.size, dtype=self.layout.dtype)
        return Updates(rows, none, none, none, torch.zeros(0, dtype=torch.float64))


def in_precision(columns: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point columns in the rows' dtype; all others as they are."""
    return {
        name: column.to(dtype) if column.is_floating_point() and column.dtype != dtype else column
        for name, column in columns.items()
    }
