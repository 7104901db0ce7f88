"""The round loop: choose clients, train them on the engine, combine what they send, move the weights, judge them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from clients import randomness
from clients.batches import work
from clients.errors import RunError
from clients.evaluation import Total, add_totals
from clients.examples import in_precision
from clients.local_state import PERSONAL
from clients.statistics import STATISTICS
from clients.training import NOT_USABLE, usable_rows
from clients.updates import Updates
from fedsim.engines.engine import Engine, Result
from fedsim.execution import chunk_sizes
from fedsim.experiment import Experiment
from fedsim.records import Event, RoundRecord
from fedsim.scheduling import Scheduler, Work
from fedsim.worker import Chunk, Piece, Setup, TrainedChunk, Worker
from strategies.aggregation import add_sums
from strategies.checks.check import CheckContext
from strategies.context import Context

if TYPE_CHECKING:
    from fedsim.attacking import Malicious

_EXAMPLES_A_PIECE = 4096
_CLIENTS_A_PIECE = 64

#: The largest epsilon that any client has spent, among the state that is checkpointed.
_EPSILON = "dp_sgd/epsilon"

#: How many evaluations of clients were released with noise.
_EVALUATIONS = "metrics/evaluations"

#: Seconds on the clients' devices so far.
_CLOCK = "clock"

#: Client state that goes with the server's, and advances only in rounds in which that does; less what a strategy says
#: stands in any case.
_WITH_SERVER = ("correction/", "plugin/")

ClientState = dict[str, tuple[Tensor, Tensor]]


class StateStore(Protocol):
    """Where client state lives between rounds, and rounds are committed."""

    def client_state(self, name: str, ids: Tensor | Iterable[int], width: int, dtype: torch.dtype = ...) -> Tensor:
        """``[k, width]``, zeros where a client has none."""
        ...

    def commit(self, record: RoundRecord, checkpoint: Mapping[str, Tensor], state: ClientState | None = None) -> None:
        """Adopts a round, all of it or nothing."""
        ...


class InMemory:
    """A state store without a directory: nothing survives the process."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[int, Tensor]] = {}

    def client_state(
        self, name: str, ids: Tensor | Iterable[int], width: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        known = self.rows.get(name, {})
        nothing = torch.zeros(width, dtype=dtype)
        return torch.stack([known.get(int(client), nothing) for client in ids]) if len(list(ids)) else nothing[None][:0]

    def commit(self, record: RoundRecord, checkpoint: Mapping[str, Tensor], state: ClientState | None = None) -> None:
        for name, (ids, rows) in (state or {}).items():
            self.rows.setdefault(name, {}).update(zip(ids.tolist(), rows.clone(), strict=True))


@dataclass
class _Collected:
    """What a round's chunks gave, in the order of addition."""

    total: Updates | None
    parts: list[Updates]
    clients: list[dict[str, Any]]
    chunks: list[dict[str, Any]]
    events: list[Event]
    state: dict[str, list[tuple[Tensor, Tensor]]]
    slots: list[np.ndarray]


class Simulation:
    """One experiment under way: the weights, the strategy's state, and the step from one round to the next.

    Args:
        experiment: the settings.
        setup: what the workers are made of.
        engine: started with ``setup``.
        store: holds client state; :meth:`commit` writes to it.
        keep_rows: whether the last round's rows are kept, for checks that look at them.
    """

    def __init__(
        self, experiment: Experiment, setup: Setup, engine: Engine, store: StateStore, *, keep_rows: bool = False
    ):
        self.experiment, self.setup, self.engine, self.store = experiment, setup, engine, store
        self.strategy, self.population, self.layout = setup.strategy, setup.population, setup.layout
        self.round = 0
        self.weights = self.layout.flatten(setup.model)
        self.guarantee = setup.guarantee
        self.state = self.strategy.init(self._context(0))
        self.kept = self.strategy.client_state(self._context(0)) | setup.kept
        if setup.shared_statistics is not None:
            self.state[STATISTICS] = torch.zeros(setup.shared_statistics.kept_size, dtype=self.layout.dtype)
        if setup.recipe.dp_sgd is not None or (self.guarantee is not None and self.guarantee.trust == "local"):
            self.state[_EPSILON] = torch.zeros((), dtype=torch.float64)
        self._unsent = setup.unsent * self.layout.dtype.itemsize
        self.attacks = {client: group.name for group in setup.malicious for client in group.clients.tolist()}
        self.scheduler = Scheduler(experiment, setup)
        self._row_bytes = 0
        self._versions = {0: self._sent()}
        if self.scheduler.keeps_time:
            self.state[_CLOCK] = torch.zeros((), dtype=torch.float64)
        if experiment.evaluation.noise is not None:
            self.state[_EVALUATIONS] = torch.zeros((), dtype=torch.float64)
        self._staged: ClientState = {}
        self._local: Worker | None = None
        self._version = 0
        self._keep_rows = keep_rows
        self._cohort_rows: Updates | None = None

    # ------------------------------------------------------------------------------------------ checkpoints

    def checkpoint(self) -> dict[str, Tensor]:
        """What the next round starts from: the weights ``row`` and the strategy's state."""
        versions = {
            f"version/{v}/{name}": value for v in self.scheduler.versions for name, value in self._versions[v].items()
        }
        return {"row": self.weights, **versions, **{f"state/{name}": value for name, value in self.state.items()}}

    def restore(self, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Goes on after a committed round."""
        self.round = round
        self.weights = tensors["row"].clone()
        self.state = {name[6:]: value.clone() for name, value in tensors.items() if name.startswith("state/")}
        self.scheduler.go_on_after(round)
        self._versions = {}
        for name, value in tensors.items():
            if name.startswith("version/"):
                _, version, of = name.split("/", 2)
                self._versions.setdefault(int(version), {})[of] = value.clone()
        self._versions[round] = self._sent()

    def commit(self, record: RoundRecord) -> None:
        """Makes a round's result the run's: record, checkpoint and client state together."""
        self.store.commit(record, self.checkpoint(), self._staged)
        self._staged = {}

    # ------------------------------------------------------------------------------------------ rounds

    def first(self) -> RoundRecord:
        """Round 0: the initial weights, judged."""
        begun = time.perf_counter()
        record = RoundRecord(round=0, cohort=0, completed=0)
        self.judge(record)
        record.seconds = time.perf_counter() - begun
        return record

    def step(self) -> RoundRecord:
        """Plays the next round and moves the weights; the result is not committed yet."""
        begun = time.perf_counter()
        number = self.round + 1
        ctx = self._context(number)
        work = self.scheduler.next(ctx, float(self.state.get(_CLOCK, 0.0)))
        cohort = work.clients
        began = np.sort(np.concatenate([cohort, np.array(work.dropped, dtype=np.int64)]))
        ctx = self._context(number, began)
        found = self._train(work, ctx)
        record = RoundRecord(
            round=number,
            cohort=len(cohort) + len(work.dropped),
            completed=len(found.clients),
            clients=found.clients,
            chunks=found.chunks,
            events=found.events,
            bytes_up=sum(client.pop("bytes_up") for client in found.clients),
            bytes_down=work.began * self._bytes_down(),
            malicious=sum(client in self.attacks for client in cohort.tolist()) if self.attacks else None,
            bytes_saved=(work.began + len(found.clients)) * self._unsent,
            simulated_seconds=work.seconds,
            train_seconds=sum(chunk["seconds"] for chunk in found.chunks),
        )
        if _EPSILON in self.state:
            each = [client["epsilon"] for client in found.clients]
            self.state[_EPSILON] = torch.tensor(max([float(self.state[_EPSILON]), *each]), dtype=torch.float64)
            record.epsilon = float(self.state[_EPSILON])
        elif self.guarantee is not None:
            record.epsilon = self.guarantee.spent(number)
            if self.budget_spent(number):
                message = (
                    f"epsilon {record.epsilon:.4g} of {self.guarantee.budget:g} is spent, and another round would"
                    f" exceed it; the run ends after round {number}"
                )
                record.events.append(Event(number, "budget_spent", message))
        raised = [event for event in found.events if event.kind in ("client_failed", "too_few_examples")]
        if number == 1 and len(cohort) and len(raised) == len(cohort):
            raise RunError(f"round 1: all {len(cohort)} clients failed; client {raised[0].client}: {raised[0].message}")
        assumed = self.strategy.aggregator.assumes
        if record.malicious is not None and assumed is not None and record.malicious > assumed:
            message = f"{record.malicious} of {record.cohort} clients attacked, and the rule assumes at most {assumed}"
            record.events.append(Event(number, "assumption_exceeded", message))
        if work.seconds is not None:
            self.state[_CLOCK] = self.state[_CLOCK] + work.seconds
        if work.dropped:
            listed = ", ".join(map(str, work.dropped[:5])) + (", ..." if len(work.dropped) > 5 else "")
            clients = "client" if len(work.dropped) == 1 else "clients"
            message = f"{len(work.dropped)} {clients} began and never answered: {listed}"
            record.events.append(Event(number, "dropped_out", message, work.dropped[0], "training"))
        self._tell_clamped(record)
        moved = self._combine(found, ctx, record)
        self.round = number
        needed = self.scheduler.versions
        self._versions = {v: sent for v, sent in self._versions.items() if v in needed} | {number: self._sent()}
        self._staged = {
            name: (torch.cat([ids for ids, _ in parts]), torch.cat([rows for _, rows in parts]))
            for name, parts in found.state.items()
            if moved or not name.startswith(_WITH_SERVER) or name in self.strategy.stands
        }
        last = number == self.experiment.rounds or self.budget_spent(number)
        if last or number % self.experiment.evaluation.every == 0:
            self.judge(record)
        record.seconds = time.perf_counter() - begun
        return record

    def _tell_clamped(self, record: RoundRecord) -> None:
        """Says so where a masked sum cuts off more than a thousandth of what clients send."""
        clamped = sum(client.get("clamped", 0) for client in record.clients)
        share = clamped / max(1, record.completed * self.layout.size)
        if share > 1e-3:
            message = f"{share:.1%} of all coordinates were beyond secure_sum's clip and cut off; give it a larger one"
            record.events.append(Event(record.round, "clamped", message))

    def budget_spent(self, round: int) -> bool:
        """Whether another round after this one would exceed the privacy budget."""
        told = self.guarantee
        if told is None or told.budget is None or round >= self.experiment.rounds:
            return False
        return told.spent(round + 1) > told.budget

    def _context(self, round: int, cohort: np.ndarray | None = None) -> Context:
        server: dict[str, Any] = {
            "data": self._data,
            "train": self._train_on_server,
            "evaluate": self.evaluate,
            "outputs": self._outputs,
        }
        began = None if cohort is None else torch.from_numpy(cohort)
        return self.setup.context(round, self.weights, server=server, cohort=began)

    def _sent(self) -> dict[str, Tensor]:
        """What clients that begin now are sent: the weights as ``row``, and state by name."""
        statistics = {STATISTICS: self.state[STATISTICS]} if STATISTICS in self.state else {}
        row, self._row_bytes = self.strategy.down(self.state, self._context(self.round + 1))
        return {"row": row, **self.strategy.broadcast(self.state), **statistics}

    def _bytes_down(self) -> int:
        """Of a client that begins now."""
        beside = (value.nbytes for name, value in self._versions[self.round].items() if name != "row")
        return self._row_bytes + sum(beside)

    def _statistics(self) -> dict[str, Tensor | None]:
        """Batch norm's statistics as they are broadcast, where clients share them."""
        return {"statistics": self.state.get(STATISTICS)}

    # ------------------------------------------------------------------------------------------ training

    def _train(self, work: Work, ctx: Context) -> _Collected:
        found, cohort = _Collected(None, [], [], [], [], {}, []), work.clients
        rows = None
        last = self._keep_rows and ctx.round == self.experiment.rounds
        crafting = [group for group in self.setup.malicious if group.crafts]
        if (self.strategy.aggregator.needs == "rows" or last or crafting) and len(cohort):
            rows = self.engine.buffer("rows", (len(cohort), self.layout.size), self.layout.dtype)
        numbers = 0
        for version, clients in work.groups.items():
            chunks = self._chunks(clients, version + 1, np.searchsorted(cohort, clients), numbers)
            numbers += len(chunks)
            broadcast = {
                "round": version + 1,
                "staleness": ctx.round - 1 - version,
                "cohort": ctx.cohort,
                "weights": self._broadcast_weights(self._versions[version]["row"]),
                "state": self.strategy.broadcast(self._versions[version]),
                "rows": rows,
                "receive": not crafting,
                "statistics": self._versions[version].get(STATISTICS),
            }
            for result in self.engine.map("train", chunks, broadcast):
                self._collect(result, found, ctx)
        if rows is not None and found.parts:
            slots = np.sort(np.concatenate(found.slots))
            matrix = rows if len(slots) == len(cohort) else rows[torch.from_numpy(slots)]
            self._cohort_rows = Updates.join(found.parts, matrix)
            if crafting:
                self._cohort_rows = self._crafted(self._cohort_rows, crafting, found, ctx)
            if self.strategy.aggregator.needs == "rows":
                found.total = self._cohort_rows
            elif crafting:
                found.total = self.strategy.reduce(self._cohort_rows)
        return found

    def _crafted(self, u: Updates, crafting: list[Malicious], found: _Collected, ctx: Context) -> Updates:
        """The cohort with the rows that attackers make of what the honest clients sent."""
        u = u.replace(rows=u.rows.clone())
        sent: dict[int, float] = {}
        honest = u.replace(rows=u.rows.clone())
        for group in crafting:
            mine = torch.from_numpy(np.isin(u.clients.numpy(), group.clients))
            if not bool(mine.any()):
                continue
            server_lr = float(getattr(self.strategy.server_optimizer, "lr", 1.0))
            rows, kept = group.craft(honest, mine, self.attacks, server_lr, self.state, ctx)
            self.state |= kept
            u.rows[mine.nonzero()[:, 0]] = rows
            sent |= dict(zip(u.clients[mine].tolist(), rows.norm(dim=1).tolist(), strict=True))
        u = self.strategy.receive(u, self.state, ctx)
        usable = usable_rows(u.rows)
        for client in u.clients[~usable].tolist():
            found.events.append(Event(ctx.round, "dropped_update", NOT_USABLE, client, "aggregation"))
        left = set(u.clients[usable].tolist())
        found.clients = [client for client in found.clients if client["client"] in left]
        for client in found.clients:
            client["update_norm"] = sent.get(client["client"], client["update_norm"])
        return u if bool(usable.all()) else u.select(usable)

    def _broadcast_weights(self, row: Tensor) -> Tensor:
        shared = self.engine.buffer("weights", row.shape, row.dtype)
        shared.copy_(row)
        return shared

    def _chunks(self, cohort: np.ndarray, round: int, places: np.ndarray, first: int) -> list[Chunk]:
        """Longest clients first (ties by id), cut into chunks; within a chunk by id.

        Args:
            cohort: the clients that begin from the same weights.
            round: the round that they train for.
            places: their rows in the round's matrix.
            first: the first chunk's number.
        """
        recipe = self.setup.recipe
        sizes = self.population.splits["train"].sizes[cohort]
        steps = work(recipe, sizes, cohort, self.setup.seed, round).steps
        if recipe.stragglers == "drop" and len(steps):
            amount = work(recipe, np.full_like(sizes, recipe.batch_size), cohort, self.setup.seed, round).steps
            kept = amount == amount.max()
            cohort, steps, places = cohort[kept], steps[kept], places[kept]
        order = np.argsort(-steps, kind="stable")
        size = chunk_sizes(self.setup, self.setup.stacked, len(cohort), self.experiment.engine.stack_memory_mib)
        chunks: list[Chunk] = []
        for start in range(0, len(cohort), size):
            chosen = np.sort(order[start : start + size])
            clients = cohort[chosen]
            state = {
                name: self.store.client_state(name, clients.tolist(), width, self.layout.dtype)
                for name, width in self.kept.items()
            }
            chunks.append(Chunk(first + len(chunks), clients, places[chosen], state))
        return chunks

    def _collect(self, result: Result, found: _Collected, ctx: Context) -> None:
        """Adds one chunk's result; called in the chunks' order."""
        chunk: Chunk = result.chunk
        for line in result.retries:
            found.events.append(Event(ctx.round, "worker_lost", f"chunk {chunk.number}, {line}; tried again"))
        if result.answer is None:
            for client in chunk.clients.tolist():
                message = f"client {client} was left out: its worker was lost every time ({result.lost})"
                found.events.append(Event(ctx.round, "client_lost", message, client, "training"))
            return
        trained: TrainedChunk = result.answer.value
        u = trained.updates
        for failure in trained.failures:
            found.events.append(
                Event(ctx.round, failure.kind, failure.message, failure.client, failure.stage, failure.traceback)
            )
        found.chunks.append(
            {"chunk": chunk.number, "pid": result.pid, "clients": len(chunk), "seconds": result.seconds}
        )
        if not len(u):
            return
        assert u.nbytes is not None
        columns = {
            "client": u.clients,
            "examples": u.examples,
            "steps": u.steps,
            "weight": u.weights,
            "loss": trained.loss,
            "update_norm": trained.norms,
            "bytes_up": u.nbytes,
            **trained.report,
            **u.report,
        }
        for values in zip(*(column.tolist() for column in columns.values()), strict=True):
            found.clients.append({"chunk": chunk.number, **dict(zip(columns, values, strict=True))})
            if values[0] in self.attacks:
                found.clients[-1]["attack"] = self.attacks[values[0]]
        tensors = result.answer.tensors
        for name, value in tensors.items():
            if name.startswith("state:"):
                found.state.setdefault(name[6:], []).append((u.clients, value.clone()))
        if "sum" in tensors:
            sends = {name[5:]: value for name, value in tensors.items() if name.startswith("send:")}
            part = u.replace(
                rows=tensors["sum"],
                examples=u.examples.sum(0, keepdim=True),
                steps=u.steps.sum(0, keepdim=True),
                weights=u.weights.sum(0, keepdim=True),
                sends=sends,
                nbytes=None,
                report={},
            )
            found.total = add_sums(found.total, part)
        found.parts.append(u)
        found.slots.append(chunk.slots[np.searchsorted(chunk.clients, u.clients.numpy())])

    # ------------------------------------------------------------------------------------------ combining

    def _combine(self, found: _Collected, ctx: Context, record: RoundRecord) -> bool:
        """Moves the weights; or keeps them, and says why. Whether it moved them."""
        needed = max(self._min_clients(), self.strategy.aggregator.min_rows)
        if found.total is None and needed == 0:
            found.total = self.strategy.nothing(ctx)
        if record.completed < needed or found.total is None:
            message = f"{record.completed} of {record.cohort} clients' updates are usable and {needed} are needed"
            record.events.append(Event(ctx.round, "cohort_too_small", f"{message}; the weights are kept"))
            return False
        row, state, info = self.strategy.aggregate(found.total, self._pooled(found.total), ctx)
        if not bool(torch.isfinite(row).all()):
            message = f"{self.strategy!r} made NaN or infinite weights of finite updates; the weights are kept"
            record.events.append(Event(ctx.round, "weights_not_finite", message))
            return False
        self.weights, self.state = row, state
        for name, values in info.items():
            by_client = values.tolist() if isinstance(values, Tensor) else list(values)
            told = dict(zip(found.total.clients.tolist(), by_client, strict=True))
            for client in record.clients:
                client[name] = told.get(client["client"])
        return True

    def _min_clients(self) -> int:
        said = self.experiment.strategy.min_clients
        if said is not None:
            return said
        return 0 if self.guarantee is not None and self.guarantee.trust == "central" else 1

    def _pooled(self, total: Updates) -> dict[str, Any]:
        """The state with the cohort's batch-norm statistics, where clients shared them and their weights allow it."""
        known, weight = self.setup.shared_statistics, total.weights.sum()
        if known is None or STATISTICS not in total.sends or not float(weight) > 0:
            return self.state
        row = known.pooled(total.sends[STATISTICS].sum(0), weight).to(self.layout.dtype)
        return {**self.state, STATISTICS: known.kept(row[None], total.steps.sum(0, keepdim=True))[0]}

    # ------------------------------------------------------------------------------------------ judging

    def judge(self, record: RoundRecord) -> None:
        """Metrics on the server's test and validation splits, and on the clients' own where asked for."""
        metrics: dict[str, dict[str, float]] = {}
        kept = self.state.get(STATISTICS)
        if self.setup.batch_norm == "shared" and kept is not None and not float(kept[-1]):
            # No client has sent statistics yet, and those that batch norm is made with would give no meaningful number.
            return
        if self.setup.server_has_all:
            for split in ("test", "validation", "attack"):
                if split in self.population.server:
                    metrics[split] = self.evaluate(self.weights, split)
        if self.experiment.clients_evaluate or not self.setup.server_has_all:
            for split in ("test", "validation"):
                if split in self.population.splits:
                    metrics[f"client_{split}"] = self._judge_clients(split, record)
        record.metrics = metrics

    def evaluate(self, row: Tensor, split: str) -> dict[str, float]:
        """Metrics of weights ``[d]`` on a server split, with the number of ``examples``."""
        if split not in self.population.server:
            raise RunError(f"evaluation: the server has no {split!r} split; it has {', '.join(self.population.server)}")
        count = len(self.population.server[split])
        starts = range(0, count, _EXAMPLES_A_PIECE)
        pieces = [Piece(split, start, min(start + _EXAMPLES_A_PIECE, count)) for start in starts]
        total: Total = {}
        for result in self.engine.map("evaluate", pieces, self._evaluated(row)):
            part = self._totals(result)[0]
            assert part is not None
            total = add_totals(total, part)
        return {**self.setup.task.metrics(total), "examples": int(total["examples"][0])}

    def _judge_clients(self, split: str, record: RoundRecord) -> dict[str, float]:
        """Each client's metrics on its own split, recorded; returns them pooled and averaged over clients."""
        ids = np.flatnonzero(self.population.splits[split].sizes)
        pieces = []
        for start in range(0, len(ids), _CLIENTS_A_PIECE):
            some = ids[start : start + _CLIENTS_A_PIECE]
            state = {name: self._newest(name, some) for name in (PERSONAL, STATISTICS) if name in self.kept}
            pieces.append(Piece(split, clients=some, state=state))
        pooled: Total = {}
        means: dict[str, list[float]] = {}
        without: list[int] = []
        hidden: list[Total] | None = None if self.experiment.evaluation.noise is None else []
        for result in self.engine.map("evaluate", pieces, self._evaluated(self.weights)):
            for client, total in zip(result.chunk.clients.tolist(), self._totals(result), strict=True):
                if total is None:
                    without.append(client)
                    continue
                if hidden is not None:
                    hidden.append(total)
                    continue
                pooled = add_totals(pooled, total)
                found = self.setup.task.metrics(total)
                count = int(total["examples"][0])
                record.client_metrics.append({"client": client, "split": f"client_{split}", "examples": count, **found})
                for name, value in found.items():
                    means.setdefault(name, []).append(value)
        if without:
            few = f"{len(without)} clients hold too few training examples to estimate batch norm's statistics on"
            listed = ", ".join(map(str, without[:5])) + (", ..." if len(without) > 5 else "")
            message = f"{few} and are left out of {split}: {listed}"
            record.events.append(Event(record.round, "not_evaluated", message, without[0], "evaluation"))
        if hidden:
            return self._noised_metrics(split, hidden)
        if not pooled:
            return {"examples": 0, "clients": 0}
        whole: dict[str, float] = {**self.setup.task.metrics(pooled), "examples": int(pooled["examples"][0])}
        whole |= {f"{name}_client_mean": float(np.mean(values)) for name, values in means.items()}
        return {**whole, "clients": len(ids) - len(without)}

    def _noised_metrics(self, split: str, totals: list[Total]) -> dict[str, float]:
        """The clients' metrics with noise, and the epsilon that all evaluations of clients have come to."""
        from fedsim.private_metrics import noised
        from strategies.accounting import epsilon

        said = self.experiment.evaluation.noise
        assert said is not None
        generator = randomness.generator(self.setup.seed, f"metrics/{split}", self.round)
        total = noised(totals, said, generator)
        self.state[_EVALUATIONS] = self.state[_EVALUATIONS] + 1
        spent = epsilon(
            noise_multiplier=said.noise_multiplier,
            rounds=int(self.state[_EVALUATIONS]),
            delta=said.delta or len(totals) ** -1.1,
        )
        return {**self.setup.task.metrics(total), "examples": len(totals), "clients": len(totals), "epsilon": spent}

    def _newest(self, name: str, ids: np.ndarray) -> Tensor:
        """What the clients keep under that name, ``[k, m]``, this round's included."""
        rows = self.store.client_state(name, ids.tolist(), self.kept[name], self.layout.dtype)
        if name in self._staged:
            fresh_ids, fresh = self._staged[name]
            places = {int(client): i for i, client in enumerate(ids)}
            for client, row in zip(fresh_ids.tolist(), fresh, strict=True):
                if client in places:
                    rows[places[client]] = row
        return rows

    def _evaluated(self, row: Tensor) -> dict[str, Any]:
        self._version += 1
        weights = self._broadcast_weights(row)
        return {"round": self.round, "weights": weights, "version": self._version, **self._statistics()}

    def _totals(self, result: Result) -> Sequence[Total | None]:
        if result.answer is None:
            raise RunError(f"round {self.round}, evaluation: the worker was lost every time ({result.lost})")
        return result.answer.value

    # ------------------------------------------------------------------------------------------ the server's own

    def check_context(self) -> CheckContext:
        """What a check sees after the last round."""
        model = self.server_model()
        return CheckContext(**vars(self._context(self.round)), model=model, updates=self._cohort_rows)

    def server_model(self) -> nn.Module:
        """The server's model as it is judged; where each batch's own statistics judge, recalibrated on the proxy.

        Raises:
            RequestError: where there are no statistics for it to go on with.
        """
        worker = self._own_worker()
        worker.load(self._evaluated(self.weights))
        model = copy.deepcopy(worker.evaluator.model)
        if self.setup.batch_norm == "batch" and self.setup.statistics is not None:
            evaluator = self.setup.evaluator("recalibrate")
            evaluator.load(self.weights)
            model = evaluator.model
        return model

    def client_model(self, client: int) -> nn.Module:
        """A client's own model as it stands now: the global weights with what the client keeps in their place.

        Batch norm's running statistics are its stored ones where clients are judged by them, else those of its
        training inputs.
        """
        worker, ids = self._own_worker(), np.array([client])
        state = {name: self._newest(name, ids)[0] for name in (PERSONAL, STATISTICS) if name in self.kept}
        worker.load_client(client, state, batch_norm_of_client=True, broadcast=self._evaluated(self.weights))
        return copy.deepcopy(worker.evaluator.model)

    def _own_worker(self) -> Worker:
        if self._local is None:
            self._local = Worker(self.setup)
        return self._local

    def _data(self, split: str) -> dict[str, Tensor]:
        columns = self.population.server[split]
        return columns.take(torch.arange(len(columns)))

    def _outputs(self, row: Tensor, split: str) -> Any:
        """The model's outputs on a server split, in evaluation mode, ``[n, ...]``."""
        worker, columns = self._own_worker(), self.population.server[split]
        worker.load(self._evaluated(row))
        evaluator = worker.evaluator
        parts = [
            evaluator.outputs(in_precision(columns.take(index), self.layout.dtype))
            for index in torch.arange(len(columns)).split(evaluator.batch_size)
        ]
        return tree_map(lambda *tensors: torch.cat(tensors), *parts)

    def _train_on_server(self, row: Tensor, split: str, round: int) -> Tensor:
        return self._own_worker().train_on_server(row, split, round)
