"""Own models and data: two input columns, and images with a mask to predict."""

from __future__ import annotations

import fedsim
from tests.contracts.contract import Contract


class TestTwoInputColumns(Contract):
    table = {
        "name": "siamese",
        "rounds": 6,
        "data": {"proxy": 0, "clients": 8, "partition": "iid", "source": {"name": "siamese.py:pairs", "examples": 320}},
        "model": {"name": "siamese.py:Siamese", "width": 16},
        "task": "siamese.py:Verification",
        "client": {"lr": 0.3, "epochs": 3},
        "strategy": {"clients_per_round": 6},
        "evaluation": {"every": 3},
    }

    def test_it_learns(self, result: fedsim.Result) -> None:
        assert result.metrics["test"]["accuracy"] > 0.95  # half of the pairs are of one shape
        assert result.metrics["test"]["loss"] < 0.3 * result.history["test_loss"].iloc[0]

    def test_the_source_s_own_test_split_is_what_is_tested_on(self, result: fedsim.Result) -> None:
        assert result.metrics["test"]["examples"] == 200


class TestSegmentation(Contract):
    table = {
        "name": "discs",
        "rounds": 5,
        "data": {"proxy": 0, "partition": "natural", "source": "segmentation.py:discs"},
        "model": "segmentation.py:ConvNet",
        "task": "segmentation.py:Dice",
        "client": {"optimizer": "adam", "lr": 0.02, "epochs": 3},
        "strategy": {"clients_per_round": 4},
    }

    def test_it_learns(self, result: fedsim.Result) -> None:
        first = result.history.iloc[0]
        assert first["test_dice"] < 0.5
        assert result.metrics["test"]["dice"] > 0.75  # naming every pixel a disc gives 0.24
        assert result.metrics["test"]["mean_iou"] > 0.75
        assert result.summary["metric_name"] == "dice"

    def test_convolutions_are_trained_in_a_loop_unless_asked_for_otherwise(self, result: fedsim.Result) -> None:
        assert "convolutions on a CPU" in fedsim.load(result.out).manifest["execution"]["reason"]
