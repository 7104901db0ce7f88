"""Clients whose own code raises: recorded one by one, and the end of the run where it is all of them from the start."""

from __future__ import annotations

import pytest

import fedsim
from clients import Classification, RunError


class Picky(Classification):
    """Raises in training wherever a batch holds this label."""

    def __init__(self, label: int):
        self.label = label

    def loss(self, outputs, batch):
        if outputs.requires_grad and (self.label < 0 or bool((batch["y"] == self.label).any())):
            raise ArithmeticError(f"no {self.label} here")
        return super().loss(outputs, batch)


SETTINGS = {"rounds": 2, "data": {"clients": 50, "partition": "shards"}, "client": {"execution": "loop", "epochs": 1}}


@pytest.mark.parametrize("engine", ["inline", "processes"])
def test_some_that_raise_are_recorded_and_the_others_count(engine, tmp_path):
    result = fedsim.run(fedsim.Experiment(task=Picky(3), **SETTINGS), out=tmp_path / "run", engine=engine)
    run = fedsim.load(result.out)
    failed = run.events[run.events["kind"] == "client_failed"]
    assert 0 < len(failed) < 20
    assert "ArithmeticError: no 3 here" in failed["message"].iloc[0]
    assert "in loss" in failed["traceback"].iloc[0]
    completed = run.history.set_index("round")["completed"]
    for number in (1, 2):
        assert completed[number] == 10 - (failed["round"] == number).sum()
    trained = set(run.clients[["round", "client"]].itertuples(index=False, name=None))
    assert not trained & set(failed[["round", "client"]].itertuples(index=False, name=None))


def test_all_that_raise_from_the_start_end_the_run_with_the_reason(tmp_path):
    with pytest.raises(RunError, match=r"round 1: all 10 clients failed; client \d+: ArithmeticError: no -1 here"):
        fedsim.run(fedsim.Experiment(task=Picky(-1), **SETTINGS), out=tmp_path / "run", engine="inline")
