"""Strategies on any Flower grid: the server's half of a round, by messages."""

from __future__ import annotations

import logging
import math
import uuid
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clients.errors import RequestError
from clients.local_state import shared_layout
from clients.messages import (
    ADOPTED,
    ARRAYS,
    BROADCAST,
    CONFIG,
    ROUND,
    ROUNDS,
    RUN,
    STRATEGY,
    record_of,
)
from clients.recipe import Recipe
from clients.sent_weights import aliases
from clients.task import Classification, Task
from clients.training import NOT_USABLE, usable_rows
from clients.updates import Updates
from clients.weights import Layout
from strategies.aggregation import add_sums
from strategies.client_hooks import (
    CLIENTS,
    COHORT,
    STEPS,
    TRAINABLE,
    WEIGHT,
    ClientHooks,
    hides,
    told,
)
from strategies.composition import Composition
from strategies.context import Context
from strategies.guarantees import Guarantee
from strategies.message_weights import MessageWeights
from strategies.replies import (
    Dropped,
    contribution,
    examples_of,
    finite_state,
    first_line,
    judged,
    kind_of,
    last_line,
    moved,
    numbers_of,
    only,
    pooled,
)
from strategies.roll_call import Node, People, RollCall, layout_of_arrays

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict  # isort: skip
from flwr.serverapp import Grid  # isort: skip
from flwr.serverapp.strategy import Result  # isort: skip
from flwr.serverapp.strategy import Strategy as FlowerStrategy  # isort: skip

_log = logging.getLogger("flwr")


class MessageStrategy(FlowerStrategy):
    """A strategy that exchanges messages, on fedsim's grid or any other of Flower's.

    The same experiment gives the same weights as :func:`fedsim.run`: clients are known by the partitions that they
    hold, which they are asked for once, and every draw is keyed by them. Clients are :func:`clients.client_app` with
    the strategy as ``hooks``; a strategy that needs nothing of clients but their weights, such as FedAdam or Krum,
    runs with any ClientApp that follows Flower's conventions too, and knows its clients by the order of their nodes.

    Whatever a node sends that is no usable update is dropped, with a line in the log and in ``dropped``; so are nodes
    that do not say who they are, in round 0. A client counts as the rule weighs the examples that it told before the
    first round, except where a plug-in adds the updates or the rule asks clients for more than their number.

    Args:
        strategy: what the server does.
        seed: keys the server's draws; the same as the clients' where a draw is for both.
        rounds: how many rounds there are, where :meth:`start` does not say it.
        model: the clients' model, which tells parameters from other arrays. Left out, clients of fedsim's are asked;
            for others, all arrays of real numbers count as parameters.
        recipe: how clients train, which says what of the model they share.
        task: what is learnt, for metrics that are no plain means.
        server: what rules may ask of the server: functions ``data``, ``train``, ``evaluate`` and ``outputs``, see
            :class:`strategies.Context`.
        min_clients: a round with fewer updates keeps the weights; left out, 1, or 0 under central noise.
        min_available_nodes: how many nodes to wait for before the first round.
        evaluate_every: rounds between evaluations by clients on their own examples; 0 for none.
        ask_timeout: seconds to wait for answers when nodes are asked who they are.

    Raises:
        RequestError: for a strategy that messages cannot carry out.
    """

    def __init__(
        self,
        strategy: Composition,
        *,
        seed: int = 0,
        rounds: int | None = None,
        model: nn.Module | None = None,
        recipe: Recipe | None = None,
        task: Task | None = None,
        server: Mapping[str, Callable[..., Any]] | None = None,
        min_clients: int | None = None,
        min_available_nodes: int = 1,
        evaluate_every: int = 1,
        ask_timeout: float = 600.0,
    ):
        if not isinstance(strategy, Composition):
            raise RequestError(f"strategy: {strategy!r} is no strategies.Strategy")
        _refuse(strategy, min_clients)
        self.strategy, self.half, self.seed, self.recipe = strategy, ClientHooks(strategy), seed, recipe
        self.rounds = self._last = rounds or 0
        self.task = Classification() if task is None else task
        self.server = {**{name: _absent(name) for name in _SERVERS}, **(server or {})}
        self.min_clients, self.min_available_nodes = min_clients, min_available_nodes
        self.evaluate_every, self.ask_timeout = evaluate_every, ask_timeout
        self._given = None if model is None else shared_layout(recipe or Recipe(), model)
        self._tied = {} if model is None or self._given is None else aliases(model, self._given)
        self.reset()

    def reset(self) -> None:
        """Forgets nodes, weights and state; another run begins."""
        self.roll = RollCall(
            self.strategy, self.seed, self._given, self._tied, self.min_available_nodes, self.ask_timeout
        )
        self.weights = torch.zeros(0)
        self.state: dict[str, Any] | None = None
        self.dropped: list[Dropped] = []
        self._run = uuid.uuid4().hex  # tells the run from others on the same nodes; nothing is drawn by it
        self._spent = 0.0
        self._sent = torch.zeros(0)
        self._cohort: Tensor | None = None
        self._names = MessageWeights(Layout.of((), torch.float32), {})
        self._asked: dict[int, Node] = {}
        self._adopted: dict[int, int] = {}
        self._weighs: bool | None = None
        self._quiet = False
        self._split = "test"

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Runs the rounds, as Flower's strategies do; fewer where a privacy budget would be exceeded."""
        self.reset()
        self.rounds = self._last = num_rounds
        self._call(grid, 0)
        guarantee = self.strategy.guarantee(len(People(self.roll.nodes).trainable), num_rounds)
        if guarantee is not None and guarantee.budget is not None:
            num_rounds = max(1, bisect_right(range(1, num_rounds + 1), guarantee.budget, key=guarantee.spent))
            self._last = num_rounds
            if num_rounds < self.rounds:
                _log.warning("epsilon %g allows %d of %d rounds", guarantee.budget, num_rounds, self.rounds)
        return super().start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def summary(self) -> None:
        _log.info("\t├──> %r", self.strategy)
        _log.info("\t└──> seed %d", self.seed)

    # ------------------------------------------------------------------------------------------ training

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The round's messages: weights, what of the server's state clients read, and the config."""
        self._call(grid, server_round)
        self._adopt_arrays(arrays)
        ctx = self._context(server_round)
        if self.state is None:
            self.state = self.strategy.init(replace(ctx, round=0))
        cohort = self.strategy.sampling.cohort(ctx)
        self._cohort = torch.from_numpy(cohort)
        self._sent, _ = self.strategy.down(self.state, ctx)
        self._asked = {self.roll.nodes[client].id: self.roll.nodes[client] for client in cohort.tolist()}
        sent = self._names.record(self._sent)
        broadcast = record_of({**self.strategy.broadcast(self.state), COHORT: self._cohort})
        whole = {**config, ROUND: server_round, RUN: self._run, ROUNDS: self.rounds, CLIENTS: ctx.population.clients}
        whole[TRAINABLE] = len(ctx.population.trainable)
        mark, messages = told(self.strategy), []
        for node in self._asked.values():
            mine = {**whole, ADOPTED: self._adopted.get(node.client, 0)}
            content: dict[str, Any] = {ARRAYS: sent}
            if node.hooks:
                mine[STRATEGY], content[BROADCAST] = mark, broadcast
            content[CONFIG] = ConfigRecord(mine)
            messages.append(Message(RecordDict(content), node.id, MessageType.TRAIN, group_id=str(server_round)))
        _log.info("configure_train: Sampled %d nodes (out of %d)", len(messages), len(self.roll.nodes))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Moves the weights; None where they are kept, with the reason in the log."""
        assert self.state is not None
        ctx = replace(self._context(server_round), cohort=self._cohort)
        found: dict[int, Updates] = {}
        numbers: dict[int, dict[str, Any]] = {}
        for node, reply in self._usable_replies(server_round, replies):
            try:
                u, said = self._read(node, reply, ctx)
                if not bool(usable_rows(u.rows).all()):
                    raise ValueError(NOT_USABLE)
                found[node.client], numbers[node.client] = u, said
            except Exception as error:  # what another machine sends may be wrong in any way
                self._drop(server_round, node, f"{error}" if isinstance(error, ValueError) else first_line(error))
        self._only_alike(found, ctx)
        metrics = pooled({client: numbers[client] for client in found})
        metrics["clients"], metrics["dropped"] = len(found), len(self._asked) - len(found)
        if (spent := self._epsilon(numbers.values(), ctx)) is not None:
            metrics["epsilon"] = spent
        arrays = self._names.record(self.weights) if self._combine(found, ctx) else None
        return arrays, MetricRecord(metrics)

    def _epsilon(self, told: Iterable[Mapping[str, Any]], ctx: Context) -> float | None:
        """What the run has spent; where clients account for themselves, the most that one of them has."""
        each = [said["epsilon"] for said in told if isinstance(said.get("epsilon"), int | float)]
        guarantee = self._guarantee(ctx)
        if guarantee is not None and guarantee.trust == "central":
            return guarantee.spent(ctx.round)
        self._spent = max([self._spent, *each])
        return self._spent or None

    def _guarantee(self, ctx: Context) -> Guarantee | None:
        return self.strategy.guarantee(len(ctx.population.trainable), self.rounds)

    def _combine(self, found: Mapping[int, Updates], ctx: Context) -> bool:
        assert self.state is not None
        guarantee = self._guarantee(ctx)
        least = 0 if guarantee is not None and guarantee.trust == "central" else 1
        needed = max(least if self.min_clients is None else self.min_clients, self.strategy.aggregator.min_rows)
        if len(found) < needed:
            _log.warning(
                "round %d: %d of %d clients' updates are usable and %d are needed; the weights are kept",
                *(ctx.round, len(found), len(self._asked), needed),
            )
            return False
        row, state, _ = self.strategy.aggregate(self._reduced(found, ctx), self.state, ctx)
        if not bool(torch.isfinite(row).all()) or not finite_state(self.state, state):
            _log.warning("round %d: NaN or infinite values of finite updates; weights and state are kept", ctx.round)
            return False
        self.weights, self.state = row, state
        self._adopted |= dict.fromkeys(found, ctx.round)
        return True

    def _reduced(self, found: Mapping[int, Updates], ctx: Context) -> Updates:
        """The cohort's rows, or their weighted sum: those with most steps are added first, of equals by client."""
        if not found:
            return self.strategy.nothing(ctx)
        parts = [found[client] for client in sorted(found)]
        if self.strategy.aggregator.needs == "rows":
            return Updates.join(parts)
        total = None
        for part in sorted(parts, key=lambda part: -int(part.steps)):
            total = add_sums(total, self.strategy.reduce(part))
        assert total is not None
        return total

    # ------------------------------------------------------------------------------------------ replies

    def _call(self, grid: Grid, round: int) -> None:
        """Asks new nodes who they are; those that cannot take part are among the dropped."""
        for node, why in self.roll.call(grid).items():
            self.dropped.append(Dropped(round, node, -1, why))

    def _usable_replies(self, round: int, replies: Iterable[Message]) -> Iterable[tuple[Node, Message]]:
        """Each node's reply with content; says of all others, and of nodes that did not answer, why they are not."""
        waited = dict(self._asked)
        for reply in replies:
            node = waited.pop(reply.metadata.src_node_id, None)
            if node is None:
                stranger = Node(reply.metadata.src_node_id, -1)
                self._drop(round, stranger, "it was not asked, or has answered already")
            elif reply.has_error():
                self._drop(round, node, last_line(reply.error.reason))
            else:
                yield node, reply
        for node in waited.values():
            self._drop(round, node, "no answer came in time")

    def _drop(self, round: int, node: Node, why: str) -> None:
        self.dropped.append(Dropped(round, node.id, node.client, why))
        _log.warning("round %d: the reply of node %d (client %d) is dropped: %s", round, node.id, node.client, why)

    def _read(self, node: Node, reply: Message, ctx: Context) -> tuple[Updates, dict[str, Any]]:
        """A client's update as it enters the reduction.

        Raises:
            ValueError: for a reply that is none.
        """
        arrays, metrics = only(reply.content.array_records, "ArrayRecord"), numbers_of(reply)
        examples = examples_of(metrics, node.held.get("train"))
        row, sends = contribution(arrays, self.strategy, self._known) if node.hooks else self._moved(arrays)
        steps, weight = metrics.get(STEPS, 0), metrics.get(WEIGHT, examples)
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ValueError(f"its metrics say {WEIGHT} = {weight}; a number from 0 is needed")
        u = Updates(
            rows=row[None],
            clients=torch.tensor([node.client]),
            examples=torch.tensor([examples]),
            steps=torch.tensor([int(steps) if isinstance(steps, int | float) else 0]),
            weights=torch.tensor([weight], dtype=torch.float64),
            sends=sends,
        )
        if not node.hooks:
            u = self.strategy.aggregator.prepare(u, ctx)
        elif self._weighs_by_itself(ctx):
            u = u.replace(weights=self.strategy.aggregator.prepare(u, ctx).weights)
        assert self.state is not None
        return self.strategy.receive(u, self.strategy.broadcast(self.state), ctx), metrics

    def _moved(self, arrays: ArrayRecord) -> tuple[Tensor, dict[str, Tensor]]:
        return moved(arrays, self._sent, self._known), {}

    def _weighs_by_itself(self, ctx: Context) -> bool:
        """Whether a client's weight is the rule's alone, so that no client need be asked for its own.

        It is not where a plug-in owns the sum or weighs, nor where the rule looks at what only the client knows.
        """
        if self._weighs is None:
            self._weighs = not hides(self.strategy) and self.half.weighs_only
            if self._weighs:
                sent = self._example(ctx)
                self._weighs = torch.equal(sent.weights, self.strategy.aggregator.prepare(sent, ctx).weights)
        return self._weighs

    def _only_alike(self, found: dict[int, Updates], ctx: Context) -> None:
        """Drops the clients that send other statistics than most do, since these would not add.

        Under noise it is the strategy that says what is sent: no client may decide whether another is counted.
        """
        kinds = {client: kind_of(u) for client, u in found.items()}
        if self.strategy.noised and found:
            usual = kind_of(self._example(ctx))
        elif len(set(kinds.values())) > 1:
            usual = Counter(kinds[client] for client in sorted(kinds)).most_common(1)[0][0]
        else:
            return
        for client in [client for client, kind in kinds.items() if kind != usual]:
            told = f"it sends {kinds[client]} and not {usual}, as it should"
            self._drop(ctx.round, self.roll.nodes[client], told)
            del found[client]

    def _example(self, ctx: Context) -> Updates:
        """What arrives of a client that has not moved."""
        assert self.state is not None
        one, row = torch.ones(1, dtype=torch.int64), torch.zeros(1, len(ctx.weights), dtype=ctx.weights.dtype)
        u = Updates(row, torch.tensor([min(self.roll.nodes)]), one, one, one.to(torch.float64))
        kept = {name: row.new_zeros(1, size) for name, size in self.strategy.client_state(ctx).items()}
        return self.strategy.contribute(u, self.strategy.broadcast(self.state), kept, ctx)[0]

    # ------------------------------------------------------------------------------------------ evaluation

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Asks every client that holds test examples."""
        every, self._asked = self.evaluate_every, {}
        if every and self.half.local_noise:
            if not self._quiet:
                _log.warning("clients are not asked to evaluate: exact metrics would tell what local noise hides")
            self._quiet = True
            return []
        if not every or (server_round % every and server_round != self._last):
            return []
        self._split = str(config.get("split", "test"))
        able = [node for node in self.roll.nodes.values() if not node.held or node.held.get(self._split, 0)]
        self._asked = {node.id: node for node in sorted(able, key=lambda node: node.client)}
        whole = ConfigRecord({**config, ROUND: server_round, RUN: self._run, STRATEGY: told(self.strategy)})
        content = RecordDict({ARRAYS: arrays, CONFIG: whole})
        return [Message(content, node, MessageType.EVALUATE, group_id=str(server_round)) for node in self._asked]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Metrics pooled by example and, as ``*_client_mean``, over clients."""
        found: dict[int, dict[str, Any]] = {}
        for node, reply in self._usable_replies(server_round, replies):
            try:
                said = numbers_of(reply)
                examples_of(said, node.held.get(self._split))
                found[node.client] = said
            except ValueError as error:
                self._drop(server_round, node, str(error))
        if not found:
            return None
        return MetricRecord(judged(found, self.task))

    # ------------------------------------------------------------------------------------------ weights

    @property
    def _known(self) -> Layout:
        assert self.roll.layout is not None
        return self.roll.layout

    def _adopt_arrays(self, arrays: ArrayRecord) -> None:
        """Takes the round's weights from the arrays."""
        if self.roll.layout is None:
            self.roll.layout = layout_of_arrays(arrays)
        self._names = MessageWeights(self._known, self.roll.aliases)
        self.weights = self._names.take(arrays)

    def _context(self, round: int) -> Context:
        return Context(
            round,
            self._known,
            self.weights,
            People(self.roll.nodes),
            self.task,
            self.seed,
            self.server,
            self.recipe,
            rounds=self.rounds,
            strategy=self.strategy,
        )


def on_grid(strategy: Composition, **options: Any) -> MessageStrategy:
    """A strategy for Flower's ``ServerApp``: it has ``start(grid=..., initial_arrays=..., num_rounds=...)``.

    Args:
        strategy: what the server does.
        **options: see :class:`MessageStrategy`.
    """
    return MessageStrategy(strategy, **options)


def start(
    strategy: Composition,
    grid: Grid,
    initial_arrays: ArrayRecord,
    num_rounds: int = 3,
    timeout: float = 3600,
    train_config: ConfigRecord | None = None,
    evaluate_config: ConfigRecord | None = None,
    evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    **options: Any,
) -> Result:
    """Runs a strategy on a grid: what Flower's strategies take in ``start``, and the options of :func:`on_grid`."""
    adapter = on_grid(strategy, **options)
    return adapter.start(grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn)


_SERVERS = ("data", "train", "evaluate", "outputs")


def _absent(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise RequestError(
            f"server: the strategy asks for ctx.{name}, and this server has no examples of its own; give"
            f' server = {{"{name}": ...}}'
        )

    return refuse


def _refuse(strategy: Composition, min_clients: int | None) -> None:
    if strategy.noised and min_clients:
        raise RequestError(
            f"min_clients: {min_clients} would show, by a round that keeps the weights, how many clients were chosen;"
            " under noise every round is a release, so leave it out"
        )
