"""The robust rules as aggregators, behind wrappers, and as presets in whole runs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import fedsim
from clients import catalog
from clients.errors import RequestError
from clients.parts import Part
from strategies import centres, coordinates, robust_presets, selection
from strategies.aggregation import Mean
from strategies.mixing import buckets, nearest_neighbor_mixing
from strategies.robust import (
    BulyanRule,
    CenteredClippingRule,
    DnCRule,
    FLTrustRule,
    GeometricMedianRule,
    KrumRule,
    MedianRule,
    MultiKrumRule,
    NormBoundingRule,
    SignMajorityRule,
    TrimmedMeanRule,
)
from strategies.robust_wrappers import Bucketing, NearestNeighborMixing
from strategies.server_optimizers import SGD
from strategies.strategy import Strategy
from tests.strategies.problems import context, play, updates

WEIGHTS = torch.zeros(6, dtype=torch.float64)


def drawn(n, seed=0):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def combine(rule, rows, examples=None, state=None, ctx=None):
    ctx = context(WEIGHTS) if ctx is None else ctx
    return rule.combine(rule.prepare(updates(rows, examples), ctx), rule.init(ctx) if state is None else state, ctx)


@pytest.mark.parametrize(
    ("rule", "function", "told"),
    [
        (MedianRule(), coordinates.median, {}),
        (TrimmedMeanRule(2), lambda rows: coordinates.trimmed_mean(rows, 2), {}),
        (KrumRule(2), lambda rows: selection.krum(rows, 2), {"kept": 1}),
        (MultiKrumRule(2), lambda rows: selection.multi_krum(rows, 2), {"kept": 9}),
        (MultiKrumRule(2, 4), lambda rows: selection.multi_krum(rows, 2, 4), {"kept": 4}),
        (BulyanRule(2), lambda rows: selection.bulyan(rows, 2), {"kept": 7}),
        (DnCRule(2), lambda rows: selection.dnc(rows, 2), {"kept": 9}),
        (NormBoundingRule(0.5), lambda rows: centres.norm_bounding(rows, 0.5), {"share": None}),
        (SignMajorityRule(), coordinates.sign_majority, {}),
        (GeometricMedianRule("uniform"), centres.geometric_median, {"share": 1.0}),
    ],
)
def test_an_aggregator_is_its_function_and_tells_of_every_client(rule, function, told):
    rows = drawn(11)
    row, _, info = combine(rule, rows, torch.arange(1, 12))
    assert torch.equal(row, function(rows))
    assert set(info) == set(told)
    for name, total in told.items():
        assert len(info[name]) == 11
        assert total is None or float(info[name].sum()) == pytest.approx(total)


@pytest.mark.parametrize(
    ("rule", "needed"),
    [
        (MedianRule(), 1),
        (TrimmedMeanRule(2), 5),
        (KrumRule(2), 7),
        (MultiKrumRule(2), 7),
        (MultiKrumRule(2, 8), 10),
        (BulyanRule(2), 11),
        (DnCRule(2), 5),
        (DnCRule(2, fraction=3.0), 7),
        (Bucketing(KrumRule(2), size=3), 19),
        (NearestNeighborMixing(KrumRule(2)), 7),
        (NearestNeighborMixing(MedianRule(), num_malicious=4), 9),
    ],
)
def test_min_rows_is_the_least_that_a_rule_takes(rule, needed):
    assert rule.min_rows == needed
    combine(rule, drawn(needed))
    if needed > 1:
        with pytest.raises(RequestError):
            combine(rule, drawn(needed - 1))


def test_a_rule_for_one_counts_examples_only_where_it_says_so():
    rows, examples = drawn(5), torch.tensor([1, 1, 1, 1, 50])
    row, _, info = combine(GeometricMedianRule(), rows, examples)
    assert torch.equal(row, rows[4])
    assert info["share"].tolist() == [0, 0, 0, 0, 1]
    uniform = combine(NormBoundingRule(), rows, examples)[0]
    weighted = combine(NormBoundingRule(weigh_by="examples"), rows, examples)[0]
    assert torch.equal(uniform, centres.norm_bounding(rows))
    assert torch.equal(weighted, centres.norm_bounding(rows, weights=examples))


def test_centred_clipping_goes_on_from_its_last_result():
    strategy = robust_presets.CenteredClipping(radius=0.5, iterations=2)
    x, state, center = WEIGHTS, strategy.init(context(WEIGHTS)), WEIGHTS
    assert {name: tuple(value.shape) for name, value in state.items()} == {"aggregator/center": (6,)}
    for round in range(1, 4):
        rows = 1 + drawn(7, round)
        center = centres.centered_clipping(rows, center, 0.5, iterations=2)
        expected = x + center
        x, state = play(strategy, rows, state, context(x, round=round))
        assert torch.equal(state["aggregator/center"], center)
        assert torch.allclose(x, expected, rtol=0, atol=1e-15)


def test_fltrust_trains_the_global_weights_on_the_root_split():
    weights = torch.arange(6.0, dtype=torch.float64)
    asked = []

    def train(row, split, round):
        asked.append((row.clone(), split, round))
        return row + 2.0

    ctx = dataclasses.replace(context(weights, round=3), server={"train": train, "data": lambda split: {}})
    rows = drawn(5)
    row, _, info = combine(FLTrustRule(), rows, ctx=ctx)
    expected, shares = centres.fltrust_shares(rows, torch.full((6,), 2.0, dtype=torch.float64))
    assert torch.equal(row, expected)
    assert torch.equal(info["share"], shares)
    assert [(split, round) for _, split, round in asked] == [("root", 3)]
    assert torch.equal(asked[0][0], weights)

    without = dataclasses.replace(ctx, server={"data": lambda split: {}[split]})
    with pytest.raises(RequestError, match=r"data\.root: FLTrust trains on examples of the server's own"):
        FLTrustRule().init(without)


def test_a_sign_vote_moves_every_coordinate_by_the_servers_rate():
    strategy = robust_presets.SignSGD(lr=0.25)
    rows = torch.tensor([[1.0, -3.0, 0.0], [1e9, -1.0, 2.0], [-5.0, 4.0, 0.0]], dtype=torch.float64)
    x = torch.zeros(3, dtype=torch.float64)
    row, _ = play(strategy, rows, strategy.init(context(x)), context(x))
    assert row.tolist() == [0.25, -0.25, 0.25]
    assert robust_presets.SignSGD().server_optimizer == SGD(0.01)


# ------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("inner", [KrumRule(1), MultiKrumRule(1), MedianRule(), GeometricMedianRule(), Mean()])
def test_buckets_of_one_are_the_rule_itself(inner):
    rows, examples = drawn(9), torch.arange(1, 10)
    row, _, info = combine(Bucketing(inner, size=1), rows, examples)
    u = inner.prepare(updates(rows, examples), context(WEIGHTS))
    if inner.needs == "sum":
        expected, told = (u.rows * u.weights[:, None]).sum(0) / u.weights.sum(), {}
    else:
        expected, _, told = inner.combine(u, {}, context(WEIGHTS))
    assert torch.allclose(row, expected, rtol=0, atol=1e-9)
    assert set(info) == set(told)
    for name in told:
        assert torch.allclose(info[name], told[name], rtol=0, atol=1e-6)


def test_one_bucket_of_all_is_the_mean_and_shares_are_divided_among_its_clients():
    rows, examples = drawn(5), torch.tensor([1, 2, 3, 4, 10])
    row, _, info = combine(Bucketing(GeometricMedianRule(), size=5), rows, examples)
    assert torch.allclose(row, (examples.double() / 20) @ rows, rtol=0, atol=1e-12)
    assert torch.allclose(info["share"], examples.double() / 20, rtol=0, atol=1e-6)


def test_a_rule_behind_buckets_tells_of_all_clients_in_one():
    rows = drawn(14)
    rows[3] = 1e3
    ctx = context(WEIGHTS, round=5, seed=7)
    row, _, info = combine(Bucketing(KrumRule(1), size=2), rows, ctx=ctx)
    kept = info["kept"].nonzero().flatten()
    assert kept.tolist() in [bucket.tolist() for bucket in buckets(14, 2, ctx.generator("bucketing"))]
    assert torch.allclose(row, rows[kept].mean(0), rtol=0, atol=1e-12)
    assert 3 not in kept
    assert torch.equal(row, combine(Bucketing(KrumRule(1), size=2), rows, ctx=ctx)[0])
    others = [combine(Bucketing(KrumRule(1), size=2), rows, ctx=context(WEIGHTS, round=r, seed=7))[0] for r in range(6)]
    assert len({tuple(other.tolist()) for other in others}) > 1  # every round draws its own


def test_mixing_hands_mixed_rows_to_its_rule_with_the_rules_f():
    rows = drawn(9)
    row, _, info = combine(NearestNeighborMixing(KrumRule(2)), rows)
    expected, kept = selection.krum_selection(nearest_neighbor_mixing(rows, 2), 2)
    assert torch.equal(row, expected)
    assert torch.equal(info["kept"].bool(), kept)
    row, _, _ = combine(NearestNeighborMixing(Mean(), num_malicious=3), rows)
    assert torch.allclose(row, nearest_neighbor_mixing(rows, 3).mean(0), rtol=0, atol=1e-12)


def test_a_wrapper_keeps_its_rules_state():
    rule = NearestNeighborMixing(Bucketing(CenteredClippingRule(radius=0.5), size=2), num_malicious=1)
    state = rule.init(context(WEIGHTS))
    assert set(state) == {"center"}
    row, state, _ = combine(rule, drawn(8), state=state)
    assert torch.equal(state["center"], row)


def test_what_is_behind_a_wrapper_is_named_as_any_part():
    named = {"name": "multi_krum", "num_malicious": 2, "num_selected": 3}
    part = Part.of({"name": "bucketing", "size": 3, "inner": named})
    built = catalog.build(part, "aggregators", key="strategy.aggregator")
    assert built == Bucketing(MultiKrumRule(2, 3), 3)
    assert Bucketing("median") == Bucketing(MedianRule())
    for wrong, said in [
        ("krm", r"strategy\.aggregator\.inner: unknown aggregator 'krm'.*did you mean 'krum'"),
        ({"name": "krum", "malicious": 2}, r"strategy\.aggregator\.inner\.malicious: .*'num_malicious'"),
        ({"name": "krum", "num_malicious": -1}, r"strategy\.aggregator\.inner\.num_malicious: "),
        ({"num_malicious": 1}, r"strategy\.aggregator\.inner: a table here needs name"),
        (SGD(), r"strategy\.aggregator\.inner: .* is no Aggregator"),
        (3, r"strategy\.aggregator\.inner: 3 is not a name"),
    ]:
        with pytest.raises(RequestError, match=said):
            Bucketing(wrong)


# ------------------------------------------------------------------------------------------------- whole runs

PRESETS = {
    "krum": robust_presets.Krum,
    "multi_krum": robust_presets.MultiKrum,
    "bulyan": robust_presets.Bulyan,
    "median": robust_presets.Median,
    "trimmed_mean": robust_presets.TrimmedMean,
    "geometric_median": robust_presets.GeometricMedian,
    "centered_clipping": robust_presets.CenteredClipping,
    "fltrust": robust_presets.FLTrust,
    "norm_bounding": robust_presets.NormBounding,
    "dnc": robust_presets.DnC,
    "signsgd": robust_presets.SignSGD,
}


def test_presets_and_their_rules_go_by_the_same_names():
    assert {name: entry.attribute for entry in catalog.entries("strategies") if (name := entry.name) in PRESETS} == {
        name: preset.__name__ for name, preset in PRESETS.items()
    }
    rules = {entry.name for entry in catalog.entries("aggregators")}
    assert (set(PRESETS) - {"signsgd"}) | {"sign_majority", "bucketing", "nearest_neighbor_mixing"} <= rules
    assert robust_presets.Krum(2) == Strategy(aggregator=KrumRule(2))
    assert robust_presets.MultiKrum(2, 3) == Strategy(aggregator=MultiKrumRule(2, 3))


def test_every_preset_runs_and_says_what_became_of_each_client():
    for name in PRESETS:
        data = {"clients": 12, "partition": "iid", **({"root": 20} if name == "fltrust" else {})}
        experiment = fedsim.Experiment(rounds=1, strategy=name, data=data, client={"epochs": 1})
        records = list(fedsim.rounds(experiment, engine="inline"))
        events = [event.kind for record in records for event in record.events]
        assert not events, (name, events)
        clients = records[-1].clients
        told = {"kept", "share"} & set(clients[0])
        expected = "kept" if name in ("krum", "multi_krum", "bulyan", "dnc") else "share"
        assert told == (set() if name in ("median", "trimmed_mean", "signsgd") else {expected}), name
        if told == {"kept"}:
            assert {client["kept"] for client in clients} <= {0, 1}
            assert sum(client["kept"] for client in clients) >= 1


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "krum", "num_malicious": 2},
        {"aggregator": {"name": "bucketing", "inner": {"name": "centered_clipping", "iterations": 2}}},
    ],
    ids=["krum", "centred clipping of buckets"],
)
def test_every_engine_gives_the_same_weights(strategy, tmp_path):
    experiment = fedsim.Experiment(rounds=2, strategy=strategy, client={"epochs": 1})
    found = {
        fedsim.run(experiment, out=tmp_path / f"{engine}-{workers}", engine=engine, workers=workers).summary[
            "weights_sha256"
        ]
        for engine, workers in (("inline", None), ("processes", 2))
    }
    assert len(found) == 1


def test_a_cohort_too_small_for_the_rule_keeps_the_weights_and_says_so():
    strategy = {"name": "bulyan", "num_malicious": 2, "clients_per_round": 10}
    records = list(fedsim.rounds(fedsim.Experiment(rounds=1, strategy=strategy), engine="inline"))
    events = [(event.kind, event.message) for event in records[-1].events]
    assert events == [
        ("cohort_too_small", "10 of 10 clients' updates are usable and 11 are needed; the weights are kept")
    ]


def test_fltrust_without_a_root_is_refused():
    with pytest.raises(RequestError, match=r"data\.root: FLTrust"):
        list(fedsim.rounds(fedsim.Experiment(rounds=1, strategy="fltrust"), engine="inline"))
