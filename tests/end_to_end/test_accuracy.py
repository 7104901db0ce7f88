"""What the main job reaches on real data; minutes, so in the second stage."""

from __future__ import annotations

from pathlib import Path

import pytest

import fedsim
from clients.recipe import DEFAULT_LR

pytestmark = pytest.mark.slow

SEEDS = range(5)


def mean_accuracy(folder: Path, seeds=SEEDS, **settings) -> float:
    """Mean test accuracy over seeds of the embedded experiment with some keys changed."""
    found = []
    for seed in seeds:
        experiment = fedsim.Experiment.load().override([f"seed={seed}", *(f"{k}={v}" for k, v in settings.items())])
        found.append(fedsim.run(experiment, out=folder / str(seed)).metrics["test"]["accuracy"])
    return sum(found) / len(found)


@pytest.mark.parametrize("optimizer", DEFAULT_LR)
def test_every_optimizer_learns_digits_with_nothing_else_given(optimizer, tmp_path):
    at_least = 0.94 if optimizer == "sgd" else 0.90
    assert mean_accuracy(tmp_path, **{"client.optimizer": optimizer}) >= at_least


@pytest.mark.parametrize("strategy", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_every_strategy_learns_digits_with_nothing_else_given(strategy, tmp_path):
    assert mean_accuracy(tmp_path, seeds=range(3), strategy=strategy) >= 0.90


@pytest.mark.parametrize(
    ("partition", "rounds", "expected"),
    [("iid", 50, 0.956), ("iid", 200, 0.975), ("shards", 50, 0.937), ("shards", 200, 0.970)],
)
def test_softmax_regression_under_poisson_sampling(partition, rounds, expected, tmp_path):
    """100 clients, q = 0.1, 5 epochs, batch 10, lr 0.5: an independent implementation reached these means."""
    settings = {
        "rounds": rounds,
        "data.partition": partition,
        "data.proxy": 0,
        "data.test_fraction": 297 / 1797,
        "model": "logistic",
        "client.lr": 0.5,
        "client.regularization.l2": 0.0,
        "strategy.sampling": "poisson",
    }
    assert abs(mean_accuracy(tmp_path, seeds=range(3), **settings) - expected) <= 0.02
