"""An own aggregation rule with memory, a plug-in with halves and state on both sides, and a whole strategy."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from safetensors.torch import load_file

import fedsim
from tests.contracts.contract import Contract


class TestRuleWithMemory(Contract):
    """Ten clients, of which three send five times the reverse of their update."""

    table = {
        "name": "trust",
        "rounds": 6,
        "data": {"clients": 10, "partition": "iid"},
        "client": {"epochs": 1},
        "strategy": {"clients_per_round": 9, "aggregator": {"name": "trust.py:Trust", "memory": 0.5}},
        "plugins": [{"name": "trust.py:Reverse", "attackers": 3}],
    }

    def test_it_learns_where_the_mean_cannot(self, result: fedsim.Result, tmp_path: Path) -> None:
        mean = fedsim.run(self.experiment(strategy={"aggregator": "mean"}), out=tmp_path / "mean", engine="inline")
        assert mean.metrics["test"]["accuracy"] < 0.3
        assert result.metrics["test"]["accuracy"] > 0.8  # chance is 0.1

    def test_it_remembers_whom_it_trusts(self, result: fedsim.Result) -> None:
        told = fedsim.load(result.out).clients
        last = told[told["round"] == 6].set_index("client")["trust"]
        assert last[last.index < 3].max() < 0.1
        assert last[last.index >= 3].min() > 0.3


class TestPluginWithTwoHalves(Contract):
    table = {
        "name": "clipping",
        "rounds": 8,
        "data": {"clients": 12},
        "client": {"epochs": 2},
        "strategy": {"clients_per_round": 6},
        "plugins": [{"name": "clipping.py:AdaptiveClip", "bound": 0.3, "rate": 1.0}],
        "evaluation": {"every": 4},
    }

    def test_it_learns(self, result: fedsim.Result) -> None:
        assert result.metrics["test"]["accuracy"] > 0.6  # chance is 0.1

    def test_the_server_s_half_moves_the_bound_to_the_norms(self, result: fedsim.Result) -> None:
        norms = fedsim.load(result.out).clients["update_norm"]
        assert norms.min() > 0.5  # the first bound, 0.3, is far below all of them
        state = load_file(max((result.out / "checkpoints").iterdir()))
        assert norms.min() < float(state["state/plugin/0-AdaptiveClip/bound"]) < 2 * norms.max()

    def test_a_client_keeps_back_what_is_cut_off(self, result: fedsim.Result) -> None:
        with sqlite3.connect(result.out / "run.db") as database:
            (kept,) = database.execute("SELECT count(DISTINCT client) FROM client_state").fetchone()
        assert kept == fedsim.load(result.out).clients["client"].nunique()


class TestStrategy(Contract):
    table = {
        "name": "strategy",
        "rounds": 8,
        "data": {"clients": 16},
        "client": {"epochs": 3},
        "strategy": {"name": "strategy.py:SlowAndRandom", "share": 0.5},
        "evaluation": {"every": 4},
    }

    def test_it_learns(self, result: fedsim.Result) -> None:
        assert result.metrics["test"]["accuracy"] > 0.6  # chance is 0.1

    def test_its_own_sampling_is_kept(self, result: fedsim.Result) -> None:
        assert fedsim.load(result.out).clients.groupby("round").size().nunique() > 1
