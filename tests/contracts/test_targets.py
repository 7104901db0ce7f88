"""Own losses and metrics: token classification with padding, and regression."""

from __future__ import annotations

import fedsim
from tests.contracts.contract import Contract


class TestTokenClassification(Contract):
    table = {
        "name": "tokens",
        "rounds": 6,
        "data": {"proxy": 0, "clients": 8, "partition": "iid", "source": "tokens.py:sentences"},
        "model": "tokens.py:Transformer",
        "task": "tokens.py:Tagging",
        "client": {"optimizer": "adam", "lr": 0.01, "epochs": 3},
        "strategy": {"clients_per_round": 4},
    }

    def test_it_learns(self, result: fedsim.Result) -> None:
        assert result.metrics["test"]["accuracy"] > 0.85  # "not larger", always, gives 0.66
        assert result.metrics["test"]["loss"] < 0.5 * result.history["test_loss"].iloc[0]

    def test_padding_does_not_count(self, result: fedsim.Result) -> None:
        """A metric over padded places too would give the untrained model far more than what guessing can."""
        assert result.history["test_accuracy"].iloc[0] < 0.7


class TestRegression(Contract):
    table = {
        "name": "curve",
        "rounds": 6,
        "data": {"proxy": 0, "partition": "natural", "source": "regression.py:curve"},
        "model": "regression.py:network",
        "task": {"name": "regression.py:Robust", "delta": 0.5},
        "client": {"optimizer": "adam", "lr": 0.03, "epochs": 5},
        "strategy": {"clients_per_round": 5},
        "evaluation": {"every": 3},
    }

    def test_it_learns(self, result: fedsim.Result) -> None:
        assert result.history["test_r2"].iloc[0] < 0.2
        assert result.metrics["test"]["r2"] > 0.8  # the mean target, always, gives 0
        assert result.summary["accuracy"] is None
