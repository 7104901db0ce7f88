"""The local loop: one for every recipe, correction and execution.

A block ``[k, D]`` holds the clients' weights, a second one their gradients; ``D`` is the shared parameters followed by
the personal ones. An *executor* fills the gradients (``loop``: one client, plain autograd; ``stacked``: all at once
under ``vmap``; ``private``: one client through Opacus); clipping, corrections, penalties and the optimiser then work on
the whole block.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clients import randomness
from clients.augmentation import Transforms
from clients.batches import Schedule as Batches
from clients.batches import Work, schedule, work
from clients.descent import Descent, Rates
from clients.embedding import keep_padding
from clients.errors import RequestError, RunError
from clients.examples import Examples, in_precision
from clients.hooks import ClientData, ClientFailure, Correction, LocalContext, LocalTraining, Variables
from clients.local_state import CORRECTION, MOMENTS, PERSONAL, RELEASES, STEPS, Stack, kept_state, under
from clients.loop import LoopExecutor
from clients.normalization import batch_norms, without_running_statistics
from clients.objective import Buffers, Executor, Objective, TaskModule
from clients.optimizers import Optimizer
from clients.recipe import Recipe
from clients.recurrent import unroll_recurrent
from clients.schedules import Constant, Schedule
from clients.stacked import StackedExecutor
from clients.statistics import STATISTICS, Statistics
from clients.task import Task
from clients.transfer import rate_factors
from clients.updates import Updates
from clients.weights import Layout

if TYPE_CHECKING:
    from clients.adversarial import Adversary
    from clients.dp_sgd import PrivateExecutor


#: Why an update is left out.
NOT_USABLE = "the update holds NaN or infinite values; left out"


def usable_rows(rows: Tensor) -> Tensor:
    """Which rows ``[k, d]`` are finite, and their norms too, ``bool [k]``."""
    # The sum of a row is finite only if every entry is; an overflow of the sum is looked at closely.
    if bool(torch.isfinite(rows.sum(1)).all()) and rows.dtype != torch.float64:
        return torch.ones(len(rows), dtype=torch.bool)
    return torch.isfinite(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))


@dataclass
class Trained:
    """What training a chunk gave.

    Attributes:
        updates: the clients whose training succeeded.
        loss: ``float64 [k]`` mean training loss over the examples each saw: the task's own, without penalties.
        state: new client state by name, ``[k, m]`` each, in the order of ``updates.clients``.
        report: further numbers for the record by name, ``float64 [k]`` each.
        failures: the clients that failed.
    """

    updates: Updates
    loss: Tensor
    state: dict[str, Tensor] = field(default_factory=dict)
    report: dict[str, Tensor] = field(default_factory=dict)
    failures: list[ClientFailure] = field(default_factory=list)

    def finite(self) -> Trained:
        """The same without the updates that hold NaN or infinite values; each is a failure."""
        return self.only(usable_rows(self.updates.rows), "training")

    def only(self, usable: Tensor, stage: str) -> Trained:
        """The same with the clients alone whose updates are usable, ``bool [k]``; the others failed at that stage."""
        if bool(usable.all()):
            return self
        lost = self.updates.clients[~usable].tolist()
        failures = [*self.failures, *(ClientFailure(c, "dropped_update", stage, NOT_USABLE) for c in lost)]
        state, report = ({n: value[usable] for n, value in part.items()} for part in (self.state, self.report))
        return Trained(self.updates.select(usable), self.loss[usable], state, report, failures)


class Trainer:
    """Trains chunks of clients from given weights. One lives in every worker and is reused for the whole run.

    Args:
        model: the model; copied.
        task: what is learnt.
        recipe: how clients train.
        layout: the shared parameters (and, as its ``personal`` part, those that stay).
        examples: the pool that clients' examples lie in.
        members: client id -> ``int64 [n]`` positions in the pool.
        validation: the same for each client's validation examples; early stopping reads them.
        validated: where those lie, if not in the pool.
        optimizer: the local optimiser.
        schedule: factor on the learning rate by round.
        step_schedule: factor on the learning rate by local step.
        correction: what the strategy changes in the loop.
        loss_before: whether clients send the loss of the weights that they start from.
        local_training: replaces the loop, where given.
        statistics: batch norm's running statistics, where they are tracked.
        transforms: changes of the inputs drawn anew for every batch.
        input: the column of inputs, which adversarial training changes.
        input_range: ``(low, high)`` of the inputs, which adversarial ones stay in.
        stacked: which execution.
        by_length: in stacked execution, whether short batches train in stacks of their own instead of being masked.
        seed: the experiment's seed.
        rounds: how many rounds there are in all.
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
        validation: Callable[[int], np.ndarray] | None = None,
        validated: Examples | None = None,
        schedule: Schedule | None = None,
        step_schedule: Schedule | None = None,
        correction: Correction | None = None,
        loss_before: bool = False,
        local_training: LocalTraining | None = None,
        statistics: Statistics | None = None,
        transforms: Transforms | None = None,
        input: str = "x",
        input_range: tuple[float, float] | None = None,
        stacked: bool = False,
        by_length: bool | None = None,
        seed: int = 0,
        rounds: int = 1,
    ):
        self.model = without_running_statistics(copy.deepcopy(model)).train()
        self.task, self.recipe, self.layout, self.seed = task, recipe, layout, seed
        self.examples, self.members, self.statistics = examples, members, statistics
        self.loss_before = loss_before
        self.optimizer, self.correction, self.local_training = optimizer, correction or Correction(), local_training
        if statistics is not None:
            statistics.attach(self.model)
        self.stacked = stacked
        self.spare = 1 if batch_norms(self.model) else 0
        self.block = layout.all
        self.start_personal = layout.personal.flatten(model) if layout.personal.size else None
        self.kept = kept_state(recipe, layout, optimizer, statistics)
        module = TaskModule(self.model, task, recipe.precision == "bfloat16")
        objective = Objective(module, layout, self.correction, recipe.regularization.label_smoothing)
        self.private: PrivateExecutor | None = None
        adversary = self._adversary(objective, input, input_range)
        self.executor = self._executor(objective)
        # One client's short batch needs no mask; a stack's batch norm cannot have one.
        alone = bool(self.spare) if by_length is None else by_length
        by_length = alone or not isinstance(self.executor, StackedExecutor)
        factors = rate_factors(recipe.lr_factors, self.block)
        rates = Rates(recipe.learning_rate, schedule or Constant(), step_schedule or Constant(), rounds, factors)
        self.transforms = transforms
        self.descent = Descent(
            objective,
            self.executor,
            recipe,
            optimizer,
            rates,
            examples,
            validation,
            by_length,
            validated=validated,
            transforms=transforms,
            adversary=adversary,
        )

    def _adversary(self, objective: Objective, input: str, input_range: tuple[float, float] | None) -> Adversary | None:
        said = self.recipe.adversarial
        if said is None:
            return None
        from clients.adversarial import Adversary

        module = objective.module
        if self.recipe.dp_sgd is not None:  # Opacus' hooks would count the attack's passes
            module = copy.deepcopy(module)
        stacked = self.stacked and self.recipe.dp_sgd is None
        return Adversary(module, self.block, said, stacked, input_range, self.seed, input)

    def _executor(self, objective: Objective) -> Executor:
        if self.recipe.dp_sgd is not None:
            from clients.dp_sgd import PrivateExecutor  # Opacus takes long to import

            self.private = PrivateExecutor(objective, self.recipe.dp_sgd)
            return self.private
        if not self.stacked:
            return LoopExecutor(objective)
        keep_padding(unroll_recurrent(self.model))
        return StackedExecutor(objective)

    def _attention(self) -> AbstractContextManager[None]:
        """vmap has a rule for attention written out, and none for its fused kernel on a CPU."""
        return sdpa_kernel(SDPBackend.MATH) if isinstance(self.executor, StackedExecutor) else nullcontext()

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

        Args:
            clients: ids.
            weights: the global weights.
            round: the round.
            client_state: name -> ``[k, m]``; names that are missing start from zeros.
            server_state: name -> ``[m]``, likewise.
        """
        state, server = self._all_state(len(clients), client_state or {}, server_state or {})
        parts: list[Trained] = []
        failures: list[ClientFailure] = []
        for group in self._groups(clients, round, failures):
            chosen = {name: value[group] for name, value in state.items()}
            found, failed = self._attempt(clients[group], weights, round, chosen, server)
            parts += found
            failures += failed
        return self._collect(parts, failures)

    def _all_state(
        self, k: int, client: Mapping[str, Tensor], server: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        dtype, correction, length = self.layout.dtype, self.correction, self.layout.length
        mine = {f"{CORRECTION}{name}": length(size) for name, size in correction.client_state.items()} | self.kept
        theirs = {f"{CORRECTION}{name}": length(size) for name, size in correction.server_state.items()}
        if self.statistics is not None and self.recipe.batch_norm == "share_all":
            theirs[STATISTICS] = self.statistics.kept_size
        state = {name: torch.zeros(k, size, dtype=dtype) for name, size in mine.items() if name not in client}
        held = {name: torch.zeros(size, dtype=dtype) for name, size in theirs.items() if name not in server}
        return {**state, **client}, {**held, **server}

    def _groups(self, clients: np.ndarray, round: int, failures: list[ClientFailure]) -> Sequence[np.ndarray]:
        """Places of the clients that train at once; those with too few examples for a step are failures."""
        places = np.arange(len(clients))
        if self.local_training is not None:
            return [places[i : i + 1] for i in range(len(places))]
        done = self.work(clients, round)
        for place in np.flatnonzero(done.steps == 0).tolist():
            held = f"client {clients[place]} holds {done.examples[place]} training examples, too few for a local step"
            message = held + (": batch norm needs two" if self.spare else "")
            failures.append(ClientFailure(int(clients[place]), "too_few_examples", "training", message))
        places = np.flatnonzero(done.steps)
        together = isinstance(self.executor, StackedExecutor)
        return [places] if together and len(places) else [places[i : i + 1] for i in range(len(places))]

    def _attempt(
        self, clients: np.ndarray, weights: Tensor, round: int, state: dict[str, Tensor], server: dict[str, Tensor]
    ) -> tuple[list[Trained], list[ClientFailure]]:
        try:
            with torch.random.fork_rng(devices=[]), self._attention():
                # Dropout and the like draw from torch's own generator: one key a stack.
                torch.default_generator.manual_seed(randomness.key(self.seed, "model", round, int(clients[0])))
                return [self._train(clients, weights, round, state, server)], []
        except RequestError:
            raise  # the data, or what the experiment says of them, are wrong for everybody
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
            return self._train_own(int(clients[0]), weights, round, state, server)
        done = self.work(clients, round)
        order = np.argsort(-done.steps, kind="stable")
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        done = Work(done.examples[order], done.per_epoch[order], done.steps[order])
        stack = self._stack(
            clients[order], weights, {name: value[torch.from_numpy(order)] for name, value in state.items()}, server
        )
        lr = self.descent.rates.of(round)
        v = Variables(weights, under(CORRECTION, stack.state), under(CORRECTION, server), round, lr)
        before = self._before(stack)
        loss, steps = self.descent.run(stack, done, self._plan(stack.clients, done, round), v)

        steps = steps[back]
        updates = Updates(
            rows=stack.rows[:, : self.layout.size][back].sub_(weights),
            clients=torch.from_numpy(clients),
            examples=torch.from_numpy(done.examples)[back],
            steps=steps,
            weights=torch.ones(len(clients), dtype=torch.float64),
            sends={name: value[back] for name, value in before.items()},
        )
        updates, own = self.correction.finish(updates, replace(v, client=under(CORRECTION, state)))
        fresh = {f"{CORRECTION}{name}": value for name, value in own.items()}
        if self.start_personal is not None:
            fresh[PERSONAL] = stack.rows[:, self.layout.size :][back].sub_(self.start_personal)
        if STEPS in self.kept:
            fresh |= {f"{MOMENTS}{name}": block[back] for name, block in stack.moments.items()}
            fresh[STEPS] = state[STEPS] + steps[:, None]
        report = {name: value[back] for name, value in stack.report.items()}
        if self.recipe.dp_sgd is not None:
            fresh[RELEASES], report["epsilon"] = self._privacy(done, state[RELEASES])
        updates, fresh = self._with_statistics(updates, fresh, stack.buffers, back, state)
        return Trained(updates, loss[back], fresh, report)

    def _stack(
        self, clients: np.ndarray, weights: Tensor, state: dict[str, Tensor], server: dict[str, Tensor]
    ) -> Stack:
        """The blocks that these clients start from, sorted as they are."""
        rows, k = self.descent.scratch("rows", len(clients)), len(clients)
        rows[:, : self.layout.size] = weights
        if self.start_personal is not None:
            rows[:, self.layout.size :] = self.start_personal + state[PERSONAL]
        moments = self.optimizer.init(rows)
        if STEPS in self.kept:
            moments = {name: state[f"{MOMENTS}{name}"].clone() for name in moments}
        return Stack(clients, rows, self._first_statistics(k, state, server), moments, state)

    def _before(self, stack: Stack) -> dict[str, Tensor]:
        """The statistics that clients send of the weights they start from."""
        if not self.loss_before:
            return {}
        losses = [self.descent.loss(stack, place, self.examples, self.members) for place in range(len(stack.rows))]
        return {"loss_before": torch.tensor(losses, dtype=torch.float64)}

    def _first_statistics(self, k: int, state: Mapping[str, Tensor], server: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Batch norm's running statistics by buffer, ``[k, channels]`` each: the client's own or the server's."""
        if self.statistics is None:
            return {}
        kept = state[STATISTICS] if STATISTICS in state else server[STATISTICS].expand(k, -1)
        return self.statistics.spread(self.statistics.in_work(kept))

    def _with_statistics(
        self, u: Updates, fresh: dict[str, Tensor], buffers: Buffers, back: Tensor, state: Mapping[str, Tensor]
    ) -> tuple[Updates, dict[str, Tensor]]:
        """What becomes of the clients' running statistics: they are sent, or stay with the client."""
        if self.statistics is None:
            return u, fresh
        block = self.statistics.gathered(buffers)[back]
        if self.recipe.batch_norm == "share_all":
            return u.send(**{STATISTICS: block}), fresh
        return u, {**fresh, STATISTICS: self.statistics.kept(block, state[STATISTICS][:, -1] + u.steps)}

    def _privacy(self, done: Work, before: Tensor) -> tuple[Tensor, Tensor]:
        """The one client's releases so far ``[1, 1]``, and the epsilon that they come to ``[1]``."""
        from clients.dp_sgd import releases, spent

        assert self.recipe.dp_sgd is not None
        rate, count = releases(self.recipe.dp_sgd, done, self.recipe.batch_size)
        total = before + count
        return total, torch.tensor([spent(self.recipe.dp_sgd, rate, int(total))], dtype=torch.float64)

    def _plan(self, clients: np.ndarray, done: Work, round: int) -> Batches:
        members = [self.members(client) for client in clients.tolist()]
        dp = self.recipe.dp_sgd
        if dp is not None:
            held, size = int(done.examples[0]), self.recipe.batch_size
            assert self.private is not None
            self.private.begin(int(clients[0]), round, self.seed, float(min(held, size)))
        poisson = dp is not None and dp.sampling == "poisson"
        return schedule(done, members, clients, self.recipe.batch_size, self.seed, round, poisson=poisson)

    def _train_own(
        self, client: int, weights: Tensor, round: int, state: dict[str, Tensor], server: dict[str, Tensor]
    ) -> Trained:
        """Trains one client by the user's own :class:`LocalTraining`."""
        assert self.local_training is not None
        # A copy, so that what one client's training freezes, hooks or switches does not reach the next client's.
        model = copy.deepcopy(self.model)
        stack = self._stack(np.array([client]), weights, state, server)
        self.block.load(model, stack.rows[0])
        if self.statistics is not None:
            self.statistics.load(model, self.statistics.gathered(stack.buffers)[0])
        before = self._before(stack)
        members = torch.from_numpy(self.members(client))
        data = ClientData(
            in_precision(self.examples.take(members), self.block.dtype),
            randomness.generator(self.seed, "local_training", round, client),
            None if self.transforms is None else partial(self.transforms, client=client, round=round),
        )
        told = dict(self.local_training.train(model, data, self._local_context(round, client, data)) or {})
        loss, steps = float(told.pop("loss", float("nan"))), int(told.pop("steps", 0))
        try:
            row = self.layout.flatten(model)
        except RequestError as error:  # this client's training changed the model's parameters
            raise RunError(f"{type(self.local_training).__name__}: {error}") from None
        updates = Updates(
            rows=(row - weights)[None],
            clients=torch.tensor([client]),
            examples=torch.tensor([len(data)]),
            steps=torch.tensor([steps]),
            weights=torch.ones(1, dtype=torch.float64),
            sends={**before, **{n: torch.as_tensor(value, dtype=torch.float64)[None] for n, value in told.items()}},
        )
        new_state = {}
        if self.start_personal is not None:
            new_state[PERSONAL] = (self.layout.personal.flatten(model) - self.start_personal)[None]
        if self.statistics is not None:
            buffers = self.statistics.spread(self.statistics.of(model)[None])
            updates, new_state = self._with_statistics(updates, new_state, buffers, torch.tensor([0]), state)
        return Trained(updates, torch.tensor([loss], dtype=torch.float64), new_state)

    def _local_context(self, round: int, client: int, data: ClientData) -> LocalContext:
        names, personal = tuple(self.layout.names), tuple(self.layout.personal.names)
        lr = self.descent.rates.of(round)
        return LocalContext(round, client, self.recipe, self.task, data.generator, names, personal, lr)

    def _collect(self, parts: list[Trained], failures: list[ClientFailure]) -> Trained:
        """One result in client order, without the updates that are not finite."""
        if not parts:
            return Trained(self._nothing(), torch.zeros(0, dtype=torch.float64), failures=failures)
        if len(parts) == 1:
            whole = parts[0]
        else:
            order = torch.cat([part.updates.clients for part in parts]).argsort()
            whole = Trained(
                Updates.join([part.updates for part in parts]),
                torch.cat([part.loss for part in parts])[order],
                {name: torch.cat([part.state[name] for part in parts])[order] for name in parts[0].state},
                {name: torch.cat([part.report[name] for part in parts])[order] for name in parts[0].report},
            )
        whole.failures = failures
        return whole.finite()

    def _nothing(self) -> Updates:
        none = torch.zeros(0, dtype=torch.int64)
        rows = torch.zeros(0, self.layout.size, dtype=self.layout.dtype)
        return Updates(rows, none, none, none, torch.zeros(0, dtype=torch.float64))
