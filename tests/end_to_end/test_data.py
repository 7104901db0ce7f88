"""Data as a run rests on them: a resume of other examples is refused, and a run says who holds what."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

import fedsim
from clients.errors import RequestError


def written(path, shift=0.0):
    x, y = load_digits(return_X_y=True)
    np.savez(path, x=(x / 16 + shift).astype(np.float32), y=y)
    return {"name": "arrays", "path": str(path)}


def test_a_run_does_not_go_on_with_other_examples_than_it_began_with(tmp_path):
    experiment = fedsim.Experiment(rounds=3, data={"source": written(tmp_path / "x.npz")}, client={"epochs": 1})
    played = fedsim.rounds(experiment, out=tmp_path / "run")
    next(played), next(played)
    played.close()
    written(tmp_path / "x.npz", shift=0.5)
    with pytest.raises(
        RequestError, match="data: the examples, or how they are dealt, have changed since the run began"
    ):
        fedsim.run(out=tmp_path / "run", resume=True)
    written(tmp_path / "x.npz")
    assert fedsim.run(out=tmp_path / "run", resume=True).summary["rounds"] == 3


def test_clients_that_hold_test_examples_test_on_them(tmp_path):
    for clients, wanted in ((None, True), (False, False)):
        evaluation = {} if clients is None else {"clients": clients}
        experiment = fedsim.Experiment(rounds=1, data={"client_test_fraction": 0.3}, evaluation=evaluation)
        result = fedsim.run(experiment, out=tmp_path / str(clients))
        assert ("client_test" in result.metrics) is wanted


def test_matched_tests_leave_clients_their_own_examples(tmp_path):
    data = {"partition": "shards", "client_test_fraction": 0.5}
    found = {}
    for kind in ("own", "matched"):
        experiment = fedsim.Experiment(rounds=2, data={**data, "client_test": kind})
        result = fedsim.run(experiment, out=tmp_path / kind)
        held = fedsim.load(tmp_path / kind).population
        found[kind] = held["train"].sum(), held["test"].sum(), result.metrics["client_test"]["examples"]
    assert found["matched"][0] > 1.8 * found["own"][0]
    assert all(tests == judged for _, tests, judged in found.values())
