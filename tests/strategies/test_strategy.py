from __future__ import annotations

import pytest
import torch

import strategies
from clients.errors import RequestError, RunError
from clients.hooks import Correction
from strategies import Aggregator, Fixed, Mean, Plugin, Strategy, server_optimizers
from tests.strategies.problems import context, play, updates


def test_a_preset_equals_its_composition():
    composed = Strategy(aggregator=Mean(), server_optimizer=server_optimizers.Adam(lr=0.1))
    assert strategies.FedAdam(lr=0.1) == composed
    assert strategies.FedAdam(lr=0.2) != composed
    assert strategies.FedAvg() == Strategy()
    assert repr(strategies.FedAvg()) == "FedAvg()"
    assert "lr=0.2" in repr(strategies.FedAdam(lr=0.2))


class Doubles(Plugin):
    """Doubles what a client sends, halves it on arrival, and counts."""

    client_state = {"seen": 1}

    def init(self, ctx):
        return {"rounds": 0}

    def client(self, u, state, ctx):
        return u.replace(rows=2 * u.rows), {"seen": state["seen"] + 1}

    def server_each(self, u, state, ctx):
        return u.replace(rows=u.rows / 2)

    def server_total(self, u, state, ctx):
        return u.replace(rows=u.rows + 1), {"rounds": state["rounds"] + 1}


class AddsOne(Plugin):
    def client(self, u, state, ctx):
        return u.replace(rows=u.rows + 1), {}

    def server_each(self, u, state, ctx):
        return u.replace(rows=u.rows - 1)


def test_plug_ins_act_in_order_and_are_undone_in_reverse():
    strategy = Strategy(plugins=[Doubles(), AddsOne()])
    weights = torch.zeros(2, dtype=torch.float64)
    ctx = context(weights)
    state = strategy.init(ctx)
    assert strategy.client_state(ctx) == {"plugin/0-Doubles/seen": 1}
    kept = {"plugin/0-Doubles/seen": torch.tensor([[3.0], [0.0]])}
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    u, fresh = strategy.contribute(updates(rows), strategy.broadcast(state), kept, ctx)
    assert torch.equal(u.rows, rows)
    assert fresh["plugin/0-Doubles/seen"].tolist() == [[4.0], [1.0]]
    row, state, _ = strategy.aggregate(strategy.reduce(u), state, ctx)
    assert row.tolist() == [3.0, 4.0]  # the mean, plus one from the server's half
    assert float(state["plugin/0-Doubles/rounds"]) == 1


class Reports(Correction):
    client_state = {"c": "row"}
    server_state = {"total": "row"}

    def server(self, u, server_state, ctx):
        return {"total": server_state["total"] + u.sends["delta"][0]}


class SendsDelta(Plugin):
    def client(self, u, state, ctx):
        return u.send(delta=u.rows.double()), {}


def test_named_statistics_are_summed_billed_and_reach_the_server_half():
    strategy = Strategy(correction=Reports(), plugins=[SendsDelta()])
    weights = torch.zeros(2, dtype=torch.float64)
    ctx = context(weights)
    state = strategy.init(ctx)
    assert set(strategy.broadcast(state)) == {"correction/total"}
    assert strategy.client_state(ctx) == {"correction/c": 2}
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    u, _ = strategy.contribute(updates(rows), strategy.broadcast(state), {}, ctx)
    assert u.nbytes.tolist() == [2 * 8 + 8 + 2 * 8] * 2  # the row, the number of examples, the statistic
    _, state, _ = strategy.aggregate(strategy.reduce(u), state, ctx)
    assert state["correction/total"].tolist() == [4.0, 6.0]


class Remembers(Aggregator):
    """A rule with memory: the running mean of all rounds' means, with numbers of its own for the record."""

    needs = "rows"

    def init(self, ctx):
        return {"sum": torch.zeros_like(ctx.weights), "rounds": 0}

    def combine(self, u, state, ctx):
        state = {"sum": state["sum"] + u.rows.mean(0), "rounds": state["rounds"] + 1}
        return state["sum"] / state["rounds"], state, {"kept": torch.ones(len(u))}


def test_a_rule_with_memory_gets_the_rows_and_its_state_back():
    strategy = Strategy(aggregator=Remembers())
    x = torch.zeros(1, dtype=torch.float64)
    state = strategy.init(context(x))
    for value, expected in ((1.0, 1.0), (3.0, 2.0), (8.0, 4.0)):
        row, state = play(strategy, torch.full((3, 1), value, dtype=torch.float64), state, context(x))
        assert float(row) == expected


def test_parts_of_the_wrong_kind_are_all_named():
    with pytest.raises(RequestError) as refused:
        Strategy(sampling=Mean(), aggregator=Fixed(2), plugins=[Mean()])
    assert len(refused.value.problems) == 3
    assert f"strategy.sampling: {Mean()!r} is no Sampling" in str(refused.value)


class HidesRows(Plugin):
    owns_sum = True


def test_a_secure_sum_and_a_rule_that_needs_rows_are_refused():
    with pytest.raises(RequestError, match="needs every row; use an aggregator that needs only the sum"):
        Strategy(plugins=[HidesRows()], aggregator=Remembers())


def test_only_the_server_has_data_and_evaluation():
    with pytest.raises(RunError, match=r"ctx\.evaluate is the server's"):
        context().evaluate(torch.zeros(1), "test")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Strategy(plugins=[strategies.Clip(-1.0)]), "plugins.clip.norm: -1.0 is out of range"),
        (lambda: Strategy(plugins=[strategies.TopK(k=0)]), "plugins.top_k.k: 0 is out of range"),
        (
            lambda: Strategy(plugins=[strategies.Quantize(rounding="stochastc")]),
            "plugins.quantize.rounding: 'stochastc'",
        ),
        (
            lambda: Strategy(plugins=[strategies.Downlink(strategies.Quantize(bits=0))]),
            "plugins.downlink.codec.bits: 0 is out of range",
        ),
        (lambda: Strategy(aggregator=Mean("exmples")), "strategy.aggregator.weighting: 'exmples'"),
        (lambda: strategies.DPFedAvg(1.0, clipping_norm=-1.0), "plugins.clip.norm: -1.0 is out of range"),
    ],
)
def test_settings_of_parts_made_in_python_are_checked_as_those_of_a_file_are(make, said):
    with pytest.raises(RequestError) as refused:
        make()
    assert said in str(refused.value)
