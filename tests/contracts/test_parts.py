"""The smaller things: source, partition, initialisation, sampling, optimisers, check, callback and engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedsim
from tests.contracts.contract import Contract, command_line, write
from tests.contracts.things.engine import Backwards
from tests.contracts.things.parts import Patience, Worst


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
        "engine": "engine.py:Backwards",
    }

    def test_it_learns(self, result: fedsim.Result) -> None:
        assert result.metrics["test"]["accuracy"] > 0.75  # chance is 0.25

    def test_the_partition_and_the_sampling_are_followed(self, result: fedsim.Result) -> None:
        told = fedsim.load(result.out).clients
        examples = told.groupby("client")["examples"].first()
        assert [b / a for a, b in zip(examples, examples[1:], strict=False)] == pytest.approx([1.5] * 5, rel=0.05)
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


class TestCheckThatFails:
    def test_it_is_exit_code_3_and_the_run_is_kept(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        table = {**TestEveryPart.table, "rounds": 1, "checks": [{"name": "parts.py:Worst", "at_least": 1.0}]}
        summary = command_line(capfd, "run", write(table, tmp_path), "--out", tmp_path / "run", code=3)
        assert summary["checks_failed"] == ["worst"]
        assert (tmp_path / "run" / "report.html").exists()
