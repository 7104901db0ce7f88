"""The smaller things: source, partition, initialisation, sampling, optimisers, check, callback and engine."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

import fedsim
import strategies
from tests.contracts.contract import Contract, as_objects, changed, command_line, write
from tests.contracts.things.engine import Backwards
from tests.contracts.things.parts import Patience


class TestEveryPart(Contract):
    """All of them in one experiment."""

    table = {
        "name": "parts",
        "rounds": 8,
        "data": {
            "source": {"name": "parts.py:blobs", "classes": 4},
            "clients": 6,
            "partition": {"name": "parts.py:growing", "ratio": 1.5},
            "validation_fraction": 0.1,
        },
        "model": {"name": "mlp", "hidden": [8]},
        "client": {
            "initialization": {"name": "parts.py:narrow", "width": 0.2},
            "optimizer": {"name": "parts.py:Lion", "b1": 0.8},
            "lr": 0.01,
        },
        "strategy": {
            "sampling": {"name": "parts.py:Neighbours", "block": 3},
            "server_optimizer": {"name": "parts.py:Warming", "rounds": 4},
        },
        "checks": [{"name": "parts.py:Worst", "at_least": 0.2}],
        "evaluation": {"every": 1},
    }

    def test_it_learns(self, result: fedsim.Result) -> None:
        assert result.metrics["test"]["accuracy"] > 0.75  # chance is 0.25

    def test_the_partition_and_the_sampling_are_followed(self, result: fedsim.Result) -> None:
        told = fedsim.load(result.out).clients
        examples = told.groupby("client")["examples"].first()
        assert [b / a for a, b in itertools.pairwise(examples)] == pytest.approx([1.5] * 5, rel=0.05)
        cohorts = told.groupby("round")["client"].apply(frozenset)
        blocks = {frozenset((start + i) % 6 for i in range(3)) for start in range(6)}
        assert len(cohorts) == 8
        assert set(cohorts) <= blocks
        assert len(set(cohorts)) > 1

    def test_the_initialisation_is_used(self, result: fedsim.Result, tmp_path: Path) -> None:
        """Nothing is learnt from a learning rate of almost zero, so the final weights are the first ones."""
        still = fedsim.run(self.experiment(rounds=1, client={"lr": 1e-9}), out=tmp_path / "run", engine="inline")
        spread = [weight.abs().max() for name, weight in still.weights.items() if name.endswith("weight")]
        assert all(0.15 < float(most) <= 0.2 + 1e-6 for most in spread)

    def test_the_check_is_reported(self, result: fedsim.Result) -> None:
        assert result.checks_failed == ()
        assert 0.2 <= result.summary["checks"]["worst"]["worst"] <= 1
        assert len((result.out / "checks" / "worst" / "classes.csv").read_text().splitlines()) == 5


def test_a_check_that_fails_is_exit_code_3_and_the_run_is_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = changed(TestEveryPart.table, {"rounds": 1, "checks": [{"name": "parts.py:Worst", "at_least": 1.0}]})
    summary = command_line(capfd, "run", write(table, tmp_path), "--out", tmp_path / "run", code=3)
    assert summary["checks_failed"] == ["worst"]
    assert (tmp_path / "run" / "report.html").exists()


def test_a_callback_stops_a_run_early(tmp_path: Path) -> None:
    """A learning rate that jumps about: the validation loss soon rises again."""
    restless = changed(TestEveryPart.table, {"rounds": 40, "client": {"lr": 0.3}})
    found = fedsim.run(
        fedsim.Experiment(**as_objects(restless)), out=tmp_path / "run", engine="inline", callbacks=[Patience(2)]
    )
    stopped = found.summary["rounds"]
    losses = found.history["validation_loss"]
    assert 2 <= stopped < 40
    assert losses.iloc[-2:].min() >= losses.iloc[:-2].min()
    assert list(found.history.index) == list(range(stopped + 1))
    assert "a callback ended the run" in fedsim.load(found.out).events["message"].iloc[-1]
    again = fedsim.run(out=found.out, resume=True)
    assert again.summary == found.summary


def test_an_engine_is_used_however_it_is_given_and_changes_no_bit(tmp_path: Path) -> None:
    """Eight chunks a round, the last one first."""
    plain = {
        "name": "engine",
        "rounds": 3,
        "data": {"source": "parts.py:blobs", "clients": 8},
        "client": {"execution": "loop"},
        "strategy": {"clients_per_round": 8},
        "engine": "inline",
    }
    own = {**plain, "engine": "engine.py:Backwards"}
    inline = fedsim.Experiment(**as_objects(plain))
    found = [
        fedsim.run(fedsim.Experiment(**as_objects(own)), out=tmp_path / "class"),
        fedsim.run(fedsim.Experiment(**as_objects({**plain, "engine": Backwards()})), out=tmp_path / "object"),
        fedsim.run(write(own, tmp_path), out=tmp_path / "file"),
        fedsim.run(inline, engine=Backwards(), out=tmp_path / "call"),
    ]
    expected = fedsim.run(inline, out=tmp_path / "inline").summary["weights_sha256"]
    for one in found:
        assert one.summary["weights_sha256"] == expected
        assert fedsim.load(one.out).manifest["execution"]["engine"] == "backwards"


def test_a_built_in_thing_serves_by_name_and_as_an_object(tmp_path: Path) -> None:
    few = {"rounds": 3, "data": {"clients": 20}}
    by_name = fedsim.Experiment(**few, strategy={"name": "fedavgm", "momentum": 0.5, "clients_per_round": 5})
    preset = strategies.FedAvgM(momentum=0.5, sampling=strategies.Fixed(clients_per_round=5))
    composed = strategies.Strategy(
        sampling=strategies.Fixed(clients_per_round=5), server_optimizer=strategies.server_optimizers.SGD(momentum=0.5)
    )
    hashes = {
        fedsim.run(experiment, out=tmp_path / str(i), engine="inline").summary["weights_sha256"]
        for i, experiment in enumerate(
            [by_name, fedsim.Experiment(**few, strategy=preset), fedsim.Experiment(**few, strategy=composed)]
        )
    }
    assert len(hashes) == 1


def test_a_file_may_import_what_lies_beside_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In worker processes too, which start before the file is read."""
    (tmp_path / "layers_of_mine.py").write_text("from torch import nn\n\n\nclass Layer(nn.Linear):\n    pass\n")
    (tmp_path / "net.py").write_text("from layers_of_mine import Layer\n\n\ndef net():\n    return Layer(64, 10)\n")
    file = tmp_path / "experiment.toml"
    file.write_text('rounds = 1\nmodel = "net.py:net"\n')
    hashes = [
        command_line(capfd, "run", file, "--out", tmp_path / engine, "--engine", engine)["weights_sha256"]
        for engine in ("inline", "processes")
    ]
    assert hashes[0] == hashes[1]


class Unreadable:
    """Something in a thing of one's own that is pickled and cannot be read again."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def test_what_a_worker_cannot_read_ends_the_run_and_says_why(tmp_path: Path) -> None:
    rule = strategies.Mean()
    object.__setattr__(rule, "extra", Unreadable())
    experiment = fedsim.Experiment(rounds=1, data={"clients": 20}, strategy={"aggregator": rule})
    with pytest.raises(fedsim.clients.RunError, match="could not be set up: ValueError: invalid literal"):
        fedsim.run(experiment, out=tmp_path / "run", engine="processes", workers=1)
