"""Robust rules against attackers, as a user holds them against one another."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import fedsim
from clients.errors import RequestError
from clients.hooks import LocalTraining
from strategies import Plugin
from tests.end_to_end.commands import query

#: Rule -> what its accuracy must be above under inner-product manipulation, mean of three seeds.
RULES = {
    "multi_krum": ({"name": "multi_krum", "num_malicious": 20}, 0.93),
    "dnc": ({"name": "dnc", "num_malicious": 20}, 0.93),
    "mixing and median": (
        {"aggregator": {"name": "nearest_neighbor_mixing", "num_malicious": 20, "inner": "median"}},
        0.93,
    ),
    "bulyan": ({"name": "bulyan", "num_malicious": 20}, 0.88),
    "geometric_median": ({"name": "geometric_median"}, 0.88),
    "centered_clipping": ({"name": "centered_clipping"}, 0.88),
    "norm_bounding": ({"name": "norm_bounding"}, 0.88),
    "median": ({"name": "median"}, 0.82),
    "trimmed_mean": ({"name": "trimmed_mean", "num_malicious": 20}, 0.82),
    "signsgd": ({"name": "signsgd"}, 0.82),
    "krum": ({"name": "krum", "num_malicious": 20}, 0.7),
}


def accuracy(folder, rule, seed, rounds=100):
    """20 of 100 clients send -100 times the honest mean in every round, in which all take part."""
    experiment = fedsim.Experiment(
        seed=seed,
        rounds=rounds,
        data={"partition": "iid"},
        client={"epochs": 5, "lr": 0.3},
        strategy={**rule, "clients_per_round": 100},
        attacks=[{"name": "ipm", "eps": 100.0, "fraction": 0.2}],
        evaluation={"every": 100},
    )
    return fedsim.run(experiment, out=folder).metrics["test"]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_a_robust_rule_learns_where_a_fifth_of_the_clients_manipulate_the_mean(name, tmp_path):
    rule, least = RULES[name]
    assert np.mean([accuracy(tmp_path / str(seed), rule, seed) for seed in range(3)]) > least


@pytest.mark.slow
def test_the_mean_does_not_and_the_run_ends_all_the_same(tmp_path):
    found = [accuracy(tmp_path / str(seed), {"name": "fedavg"}, seed) for seed in range(3)]
    assert not any(value >= 0.3 for value in found)
    assert query(tmp_path / "0", "SELECT count(*) FROM rounds")[0][0] == 101


def test_the_ledger_counts_attackers_and_the_rounds_in_which_there_were_more_than_assumed(tmp_path):
    experiment = fedsim.Experiment(
        rounds=12,
        client={"epochs": 1},
        strategy={"name": "krum", "num_malicious": 2, "clients_per_round": 10},
        attacks=[{"name": "sign_flip", "fraction": 0.3}],
    )
    fedsim.run(experiment, out=tmp_path / "run")
    ledger = fedsim.load(tmp_path / "run").ledger.set_index("round")["malicious"].loc[1:]
    rounds = query(tmp_path / "run", "SELECT round FROM events WHERE kind = 'assumption_exceeded' ORDER BY round")
    assert [number for (number,) in rounds] == ledger[ledger > 2].index.tolist()
    assert 0 < len(rounds) < 12
    attackers = query(
        tmp_path / "run", "SELECT round, count(*) FROM clients WHERE info LIKE '%sign_flip%' GROUP BY round"
    )
    assert dict(attackers) == ledger[ledger > 0].to_dict()


@pytest.mark.parametrize("attack", ["alie", "min_max", "mimic", "model_replacement", "scaled"])
def test_crafted_updates_are_the_same_on_every_engine_and_reach_every_kind_of_rule(attack, tmp_path):
    for strategy in ("fedavg", {"name": "trimmed_mean", "num_malicious": 3}):
        ends = set()
        for engine, workers in (("inline", None), ("processes", 2)):
            experiment = fedsim.Experiment(
                rounds=2, client={"epochs": 1}, strategy=strategy, attacks=[{"name": attack, "fraction": 0.3}]
            )
            out = tmp_path / f"{engine}{strategy if isinstance(strategy, str) else 'rows'}"
            ends.add(fedsim.run(experiment, out=out, engine=engine, workers=workers).summary["weights_sha256"])
        honest = fedsim.Experiment(rounds=2, client={"epochs": 1}, strategy=strategy)
        plain = fedsim.run(honest, out=tmp_path / f"honest{len(list(tmp_path.iterdir()))}")
        assert len(ends) == 1
        assert plain.summary["weights_sha256"] not in ends


def test_the_record_says_what_was_sent_and_which_attackers_a_rule_kept(tmp_path):
    experiment = fedsim.Experiment(
        rounds=3,
        data={"partition": "iid"},
        client={"epochs": 1},
        strategy={"name": "multi_krum", "num_malicious": 8, "clients_per_round": 20},
        attacks=[{"name": "scaled", "kappa": 50.0, "fraction": 0.2}],
    )
    fedsim.run(experiment, out=tmp_path / "run")
    clients = fedsim.load(tmp_path / "run").clients
    attackers = clients[clients["attack"].notna()]
    assert len(attackers) > 0
    assert attackers["update_norm"].min() > 10 * clients[clients["attack"].isna()]["update_norm"].median()
    assert attackers["kept"].sum() == 0
    assert clients["kept"].sum() == 3 * 12


class Halving(Plugin):
    """A codec that sends halves, and doubles them on arrival."""

    def client(self, u, state, ctx):
        return u.replace(rows=u.rows / 2), state

    def server_each(self, u, state, ctx):
        return u.replace(rows=u.rows * 2)


class Breaking(Plugin):
    """Client 3's update does not arrive as it was sent."""

    def client(self, u, state, ctx):
        return u.replace(rows=torch.where(u.clients[:, None] == 3, torch.nan, u.rows)), state


def rows_of(folder, **settings):
    base = {"rounds": 1, "data": {"clients": 6, "partition": "iid"}, "client": {"epochs": 1}}
    return fedsim.run(fedsim.Experiment(**{**base, **settings}), out=folder)


def test_what_attackers_craft_goes_through_a_codec_once(tmp_path):
    attack = {"name": "sign_flip", "of": "own", "clients": [2]}
    plain = rows_of(tmp_path / "plain", attacks=[attack])
    coded = rows_of(tmp_path / "coded", attacks=[attack], plugins=[Halving()])
    assert torch.allclose(plain.row, coded.row, atol=1e-6)
    honest = rows_of(tmp_path / "honest")
    assert not torch.allclose(plain.row, honest.row, atol=1e-3)


@pytest.mark.parametrize("strategy", ["fedavg", {"name": "krum", "num_malicious": 1}, "median"])
@pytest.mark.parametrize("fault", ["attack", "plug-in"])
def test_an_update_that_became_unusable_on_its_way_is_left_out_and_the_others_count(strategy, fault, tmp_path):
    attacks = [{"name": "scaled", "kappa": 1e42, "clients": [3]}] if fault == "attack" else []
    plugins = [Breaking()] if fault == "plug-in" else []
    result = rows_of(tmp_path / "run", strategy=strategy, attacks=attacks, plugins=plugins)
    assert torch.isfinite(result.row).all()
    assert query(tmp_path / "run", "SELECT kind, client FROM events") == [("dropped_update", 3)]
    assert query(tmp_path / "run", "SELECT completed FROM rounds WHERE round = 1") == [(5,)]


def test_two_attacks_of_a_name_draw_apart_and_count_each_other(tmp_path):
    attacks = [{"name": "gaussian", "std": 0.5, "clients": [1]}, {"name": "gaussian", "std": 0.5, "clients": [2]}]
    rows_of(tmp_path / "run", attacks=attacks)
    norms = dict(query(tmp_path / "run", "SELECT client, update_norm FROM clients"))
    assert norms[1] != norms[2]
    boost = [{"name": "model_replacement", "clients": [0]}, {"name": "sign_flip", "of": "own", "clients": [1, 2]}]
    rows_of(tmp_path / "alone", attacks=boost[:1])
    rows_of(tmp_path / "beside", attacks=boost)
    found = [dict(query(tmp_path / name, "SELECT client, update_norm FROM clients"))[0] for name in ("alone", "beside")]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


class Reshaping(LocalTraining):
    """Client 3's training changes the shape of a parameter."""

    def train(self, model, data, ctx):
        if ctx.client == 3:
            layer = model.hidden1
            layer.weight = torch.nn.Parameter(layer.weight[:-1])
        return {"steps": 1}


def test_a_client_that_changes_the_model_is_a_failure_of_its_own(tmp_path):
    rows_of(tmp_path / "run", client={"local_training": Reshaping()})
    events = query(tmp_path / "run", "SELECT kind, client, message FROM events")
    assert [event[:2] for event in events] == [("client_failed", 3)]
    assert "has shape (63, 64)" in events[0][2]


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"name": "fedbuff", "sampling": "poisson"}, r"strategy.sampling: poisson chooses whole cohorts"),
        ({"aggregator": {"name": "mean", "weighting": "uniform"}, "weighting": "examples"}, r"strategy.weighting"),
        ({"aggregator": {"name": "bucketing", "inner": "normalized"}}, r"client.optimizer"),
    ],
    ids=["sampling", "weighting", "inner"],
)
def test_what_would_be_ignored_or_fail_later_is_refused(strategy, said, tmp_path):
    experiment = fedsim.Experiment(rounds=1, strategy=strategy, client={"optimizer": "adam"})
    with pytest.raises(RequestError, match=said):
        fedsim.run(experiment, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ({"name": "krum", "num_malicious": 1}, r"Attackers sent 4 updates in 2 rounds; the rule kept 0 of them\."),
        ("geometric_median", r"Attackers sent 4 updates in 2 rounds; together they had \d+\.\d% of a round"),
        ("fedavg", r"Attackers sent 4 updates in 2 rounds\."),
    ],
    ids=["kept", "share", "nothing told"],
)
def test_the_report_says_what_a_rule_made_of_attackers(strategy, said, tmp_path):
    attack = {"name": "scaled", "kappa": 50.0, "clients": [1, 2]}
    rows_of(tmp_path / "run", rounds=2, data={"clients": 10, "partition": "iid"}, strategy=strategy, attacks=[attack])
    assert re.search(said, (tmp_path / "run" / "report.html").read_text())
