"""What clients answer: replies that are no updates are dropped and told, and what is hidden stays so."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from torch import nn

import strategies
from clients.hooks import Correction
from strategies.client_hooks import ClientHooks
from strategies.flower import on_grid
from tests.flower.small_grid import SmallGrid
from tests.flower.worlds import (
    CLIENTS,
    ROUNDS,
    app_of,
    assembled,
    by_messages,
    fused,
    start_of,
)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower prints every round; tests that look at the log see it through caplog."""
    logger = logging.getLogger("flwr")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)


def changed(change):
    """A grid's ``after`` that changes what partition 2 trains."""

    def after(partition: int, message: Message, reply: Message) -> Message | None:
        return change(reply) if partition == 2 and message.metadata.message_type == "train" else reply

    return after


def with_arrays(arrays: dict[str, np.ndarray]):
    def change(reply: Message) -> Message:
        reply.content["arrays"] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
        return reply

    return change


def with_metrics(**metrics: Any):
    def change(reply: Message) -> Message:
        reply.content["metrics"] = MetricRecord({**reply.content["metrics"], **metrics})
        return reply

    return change


def without(key: str):
    def change(reply: Message) -> Message:
        del reply.content[key]
        return reply

    return change


def erred(reply: Message) -> Message:
    made = Message(Error(2, "Traceback ...\nValueError: no disk"), reply_to=reply)
    made.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    return made


def beside(reply: Message) -> Message:
    reply.content["more"] = reply.content["arrays"].copy()
    return reply


SIZE = 64 * 12 + 12 + 12 * 10 + 10
BAD = {
    "an error": (erred, "ValueError: no disk"),
    "no answer": (lambda reply: None, "no answer came in time"),
    "no arrays": (without("arrays"), "0 ArrayRecords"),
    "two records of arrays": (beside, "2 ArrayRecords"),
    "no metrics": (without("metrics"), "0 MetricRecords"),
    "other keys": (with_arrays({"weights": np.zeros(SIZE, np.float32)}), "neither 'update' nor a payload, but weights"),
    "another shape": (with_arrays({"update": np.zeros(SIZE - 1, np.float32)}), f"real numbers [{SIZE}]"),
    "whole numbers": (with_arrays({"update": np.zeros(SIZE, np.int64)}), "int64"),
    "NaN": (with_arrays({"update": np.full(SIZE, np.nan, np.float32)}), "NaN or infinite"),
    "what no tensor can hold": (with_arrays({"update": np.array(["a"] * SIZE)}), "TypeError"),
    "statistics of its own": (
        with_arrays({"update": np.zeros(SIZE, np.float32), "send/x": np.ones(3)}),
        "as it should",
    ),
    "no examples": (with_metrics(**{"num-examples": 0}), "num-examples = 0"),
    "more examples than it holds": (with_metrics(**{"num-examples": 100_000}), "and in the roll call it held"),
    "complex statistics": (
        with_arrays({"update": np.zeros(SIZE, np.float32), "send/x": np.ones(3, np.complex64)}),
        "'x' is complex",
    ),
    "an infinite weight": (with_metrics(weight=float("inf")), "weight = inf"),
    "a negative weight": (with_metrics(weight=-1.0), "weight = -1.0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_reply_that_is_no_update_is_dropped_and_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    change, why = BAD[kind]
    assembly = assembled({"name": "fedavg", "clients_per_round": CLIENTS}, rounds=1)
    grid = SmallGrid(app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS, changed(change))
    with caplog.at_level(logging.WARNING, "flwr"):
        adapter, weights, result = by_messages(assembly, grid, evaluate_every=0)
    assert [(lost.round, lost.node, lost.client) for lost in adapter.dropped] == [(1, 1002, 2)]
    assert why in adapter.dropped[0].why
    assert f"round 1: the reply of node 1002 (client 2) is dropped: {adapter.dropped[0].why}" in caplog.text
    assert result.train_metrics_clientapp[1]["dropped"] == 1
    others = SmallGrid(app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS, changed(lambda _: None))
    assert torch.equal(weights, by_messages(assembly, others, evaluate_every=0)[1])


def test_a_client_counts_as_the_rule_says_and_not_as_it_says_itself() -> None:
    for strategy in ({"name": "fedavg"}, {"name": "fedavg", "weighting": "uniform"}, {"name": "krum"}):
        assembly = assembled({**strategy, "clients_per_round": CLIENTS})
        grid = SmallGrid(
            app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS, changed(with_metrics(weight=1e6))
        )
        adapter, weights, _ = by_messages(assembly, grid, evaluate_every=0)
        assert torch.equal(weights, fused(assembly).weights)
        assert adapter.dropped == []


def test_a_statistic_that_the_servers_state_cannot_hold_is_dropped() -> None:
    assembly = assembled({"name": "scaffold", "clients_per_round": CLIENTS})

    def huge(value: float, dtype: type):
        def change(reply: Message) -> Message:
            arrays = reply.content["arrays"]
            arrays["send/control"] = Array(np.full(SIZE, value, dtype))
            return reply

        return changed(change)

    def run(after: Any) -> Any:
        return by_messages(
            assembly, SmallGrid(app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS, after)
        )

    adapter, weights, _ = run(huge(1e300, np.float64))
    assert {(lost.client, lost.why) for lost in adapter.dropped} == {(2, "'control' holds NaN or infinite values")}
    assert torch.isfinite(adapter.state["correction/control"]).all()
    assert torch.equal(weights, run(changed(lambda _: None))[1])


def test_state_that_is_no_longer_finite_is_kept_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    class Overflows(Correction):
        server_state = {"total": "row"}

        def server(self, u: Any, server_state: Any, ctx: Any) -> Any:
            return {"total": server_state["total"] + (torch.inf if ctx.round == 2 else 1)}

    assembly = assembled(strategies.Strategy(correction=Overflows()))
    with caplog.at_level(logging.WARNING, "flwr"):
        adapter, _, _ = by_messages(assembly, evaluate_every=0)
    assert adapter.state["correction/total"].unique().tolist() == [2.0]
    assert "round 2: NaN or infinite values of finite updates; weights and state are kept" in caplog.text


@pytest.mark.parametrize("plugin", [{"name": "local_noise", "epsilon": 2.0}, "secure_sum"])
def test_what_hides_an_update_lets_no_exact_number_of_it_leave(plugin: Any, caplog: pytest.LogCaptureFixture) -> None:
    assembly = assembled({"name": "fedavg", "clients_per_round": 3}, plugins=[plugin])
    grid = SmallGrid(app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS)
    with caplog.at_level(logging.WARNING, "flwr"):
        by_messages(assembly, grid)
    told = {name for reply in grid.replies if "arrays" in reply.content for name in reply.content["metrics"]}
    local = plugin != "secure_sum"
    assert told == {"num-examples", "steps", "weight"} | ({"epsilon"} if local else set())
    evaluated = [r for r in grid.replies if "accuracy" in r.content.get("metrics", {})]
    assert not any(name.startswith("total/") for reply in evaluated for name in reply.content["metrics"])
    assert bool(evaluated) == (not local)
    assert caplog.text.count("clients are not asked to evaluate") == int(local)


def test_what_a_client_has_spent_goes_on_in_the_next_run() -> None:
    assembly = assembled(
        {"name": "fedavg", "clients_per_round": CLIENTS}, plugins=[{"name": "local_noise", "epsilon": 2.0}]
    )
    grid = SmallGrid(app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS)
    first, second = (by_messages(assembly, grid)[2].train_metrics_clientapp for _ in range(2))
    spent = [metrics["epsilon"] for metrics in (*first.values(), *second.values())]
    assert spent == sorted(set(spent))


@pytest.mark.slow
def test_what_a_clients_examples_have_spent_goes_on_in_the_next_run() -> None:
    assembly = assembled(client={"dp_sgd": {"noise_multiplier": 1.0}})
    grid = SmallGrid(app_of(assembly), CLIENTS)
    first, second = (by_messages(assembly, grid, evaluate_every=0)[2].train_metrics_clientapp for _ in range(2))
    assert second[1]["epsilon"] > first[ROUNDS]["epsilon"] > first[1]["epsilon"]


def test_an_evaluation_of_more_examples_than_a_client_holds_is_dropped() -> None:
    def boasts(partition: int, message: Message, reply: Message) -> Message:
        if partition == 2 and message.metadata.message_type == "evaluate":
            reply.content["metrics"]["num-examples"] = 10**6
        return reply

    assembly = assembled(rounds=1)
    adapter, _, result = by_messages(assembly, SmallGrid(app_of(assembly), CLIENTS, boasts))
    assert [(lost.client, "in the roll call it held" in lost.why) for lost in adapter.dropped] == [(2, True)]
    assert result.evaluate_metrics_clientapp[1]["clients"] == CLIENTS - 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))


def test_tied_weights_are_moved_under_both_names() -> None:
    assembly = assembled({"name": "fedavg", "clients_per_round": CLIENTS}, model=Tied)
    _, weights, result = by_messages(assembly)
    assert torch.equal(weights, fused(assembly).weights)
    model = Tied()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    assert torch.equal(assembly.setup.layout.flatten(model), weights)


def test_an_answer_counts_once_and_only_from_who_was_asked() -> None:
    assembly = assembled({"name": "fedavg", "clients_per_round": 2}, rounds=1)
    setup = assembly.setup
    grid = SmallGrid(app_of(assembly), CLIENTS)
    adapter = on_grid(setup.strategy, seed=setup.seed)
    messages = list(adapter.configure_train(1, start_of(assembly), {}, grid))
    replies = list(grid.send_and_receive(messages))
    first, second = replies
    stranger = Message(RecordDict(second.content), reply_to=messages[0])
    stranger.metadata.__dict__["_src_node_id"] = 4711
    adapter.aggregate_train(1, [first, first, stranger, second])
    assert [lost.node for lost in adapter.dropped] == [first.metadata.src_node_id, 4711]


def test_weights_are_kept_where_too_few_answer(caplog: pytest.LogCaptureFixture) -> None:
    assembly = assembled({"name": "krum", "clients_per_round": 5}, rounds=1)
    grid = SmallGrid(app_of(assembly), CLIENTS)
    adapter = on_grid(assembly.setup.strategy, seed=assembly.setup.seed)
    messages = adapter.configure_train(1, start_of(assembly), {}, grid)
    with caplog.at_level(logging.WARNING, "flwr"):
        arrays, metrics = adapter.aggregate_train(1, list(grid.send_and_receive(messages))[:1])
    assert arrays is None
    assert (metrics["clients"], metrics["dropped"]) == (1, 4)
    assert "round 1: 1 of 5 clients' updates are usable" in caplog.text
    assert torch.equal(adapter.weights, assembly.setup.layout.flatten(assembly.setup.model))


def test_a_lost_updates_control_variate_is_forgotten() -> None:
    """SCAFFOLD's c is the mean of the clients' c_i (Karimireddy et al. 2020), whoever's update was lost on its way."""
    assembly = assembled({"name": "scaffold", "clients_per_round": CLIENTS}, rounds=4)

    def lost(partition: int, message: Message, reply: Message) -> Message | None:
        training = message.metadata.message_type == "train"
        gone = training and partition == 2 and message.content["config"]["server-round"] in (1, 3)
        return None if gone else reply

    grid = SmallGrid(app_of(assembly, hooks=ClientHooks(assembly.setup.strategy)), CLIENTS, lost)
    adapter, _, _ = by_messages(assembly, grid, evaluate_every=0)
    assert len(adapter.dropped) == 2
    # One more round makes every client decide about its last.
    c = adapter.state["correction/control"]
    list(grid.send_and_receive(adapter.configure_train(5, start_of(assembly), {}, grid)))
    kept = [context.state["fedsim-state"]["correction/control"].numpy() for context in grid.contexts.values()]
    np.testing.assert_allclose(np.mean(kept, axis=0, dtype=np.float64), c.numpy(), atol=1e-6)
