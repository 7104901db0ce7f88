"""What ``fedsim run`` does with the request, the result and the exit code; the run itself is replaced."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from clients.errors import RunError
from fedsim.experiment import Experiment
from fedsim.runs.database import create
from tests.cli.conftest import Command, sets

SUMMARY = {
    "out": "runs/digits", "rounds": 3, "metric_name": "accuracy", "metric": 0.9625, "split": "test", "accuracy": 0.9625,
    "loss": float("nan"), "weights_sha256": "ab", "bytes_up": 1, "bytes_down": 2, "epsilon": None, "seconds": 1.25,
}  # fmt: skip


class Result:
    summary = SUMMARY
    checks_failed: tuple[str, ...] = ()


class Running(ModuleType):
    """Stands for the module that runs; remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__("fedsim.running")
        self.asked: list[tuple[Experiment, dict[str, Any]]] = []
        self.error: BaseException | None = None

    def run(self, experiment: Experiment, **options: Any) -> Result:
        self.asked.append((experiment, options))
        print("a model prints")
        os.write(1, b"a worker prints\n")
        if self.error is not None:
            raise self.error
        return Result()

    def plan(self, experiment: Experiment) -> dict[str, Any]:
        return {"execution": "stacked", "bytes_up_per_round": 5, "epsilon": None, "experiment": experiment.resolved()}


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Running:
    import fedsim

    made = Running()
    monkeypatch.setitem(sys.modules, "fedsim.running", made)
    monkeypatch.setattr(fedsim, "running", made, raising=False)
    return made


def store(out: Path, experiment: Experiment, rounds: int = 1, finished: bool = False) -> None:
    """A run's directory as a killed run leaves it."""
    import sqlite3

    out.mkdir(parents=True)
    create(out, {"experiment": experiment.to_toml(), "manifest": "{}", "layout": "{}"})
    (out / "experiment.toml").write_text(experiment.to_toml())
    with sqlite3.connect(out / "run.db") as database:
        for number in range(rounds):
            row = (number, 1, 1, 0, 0, 0.0, 0.0, "", 0.0, 1)
            database.execute(
                "INSERT INTO rounds (round, cohort, completed, bytes_up, bytes_down, seconds, train_seconds,"
                " checkpoint_sha256, committed_at, pid) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
        if finished:
            database.execute("INSERT INTO meta VALUES ('summary', '{}')")


def test_nothing_given_runs_the_embedded_experiment(fedsim: Command, running: Running) -> None:
    ended = fedsim("run")
    ((experiment, options),) = running.asked
    assert experiment.difference(Experiment.load()) == []
    assert (options["out"], options["resume"]) == (None, False)
    assert ended.code == 0
    assert ended.out.splitlines()[-2:] == [
        "test accuracy 0.9625, loss nan after 3 rounds in 1.2 s", f"run: {Path('runs/digits')}"
    ]  # fmt: skip


def test_json_is_one_object_whatever_else_prints(fedsim: Command, running: Running) -> None:
    ended = fedsim("run", "--json", "--quiet")
    assert json.loads(ended.out) == {**SUMMARY, "loss": None}
    assert ended.out.count("\n") == 1
    assert "a worker prints" in ended.lines
    assert "a model prints" in ended.lines
    assert running.asked[0][1]["progress"] is None


def test_options_reach_the_experiment(fedsim: Command, running: Running, folder: Path) -> None:
    (folder / "mine.toml").write_text("name = 'mine'\nrounds = 7\n")
    options = ["--workers", "3", "--engine", "inline", "--out", "here", "--resume", *sets(["client.lr=.1"])]
    assert fedsim("run", "mine.toml", *options).code == 0
    ((experiment, asked),) = running.asked
    assert (experiment.name, experiment.rounds, experiment.client.lr) == ("mine", 7, 0.1)
    assert (experiment.engine.part.name, experiment.engine.workers) == ("inline", 3)
    assert (asked["out"], asked["resume"]) == (Path("here"), True)


def test_a_python_file_is_run_and_overridden(fedsim: Command, running: Running, folder: Path) -> None:
    (folder / "my.py").write_text(
        "import fedsim\nclass Net: ...\nexperiment = fedsim.Experiment(name='my', model=Net)\n"
    )
    assert fedsim("run", "my.py", "--set", "rounds=2").code == 0
    experiment = running.asked[0][0]
    assert (experiment.name, experiment.rounds, experiment.model.thing.__name__) == ("my", 2, "Net")
    assert experiment.resolved()["model"] == f"{folder}/my.py:Net"


def test_exit_codes(fedsim: Command, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    running.error = RunError("round 3, client 7, train: too bad")
    ended = fedsim("run")
    assert (ended.code, ended.lines[-1]) == (1, "round 3, client 7, train: too bad")
    running.error = KeyError("gone")
    ended = fedsim("run", "--json")
    assert (ended.code, ended.out) == (1, "")
    assert ended.lines[-1] == "KeyError: 'gone' (FEDSIM_DEBUG=1 shows where)"
    monkeypatch.setenv("FEDSIM_DEBUG", "1")
    assert any("Traceback" in line for line in fedsim("run").lines)
    running.error = None
    monkeypatch.setattr(Result, "checks_failed", ("robustness",))
    ended = fedsim("run")
    assert (ended.code, ended.lines[-1]) == (3, "check failed: robustness")


def test_interrupted_says_how_to_go_on(fedsim: Command, running: Running, folder: Path) -> None:
    running.error = KeyboardInterrupt()
    ended = fedsim("run", "--set", "client.lr=0.1", "--engine", "inline")
    assert (ended.code, ended.lines[-1]) == (130, "interrupted; go on with: fedsim run --set client.lr=0.1 --resume")
    (folder / "a b.toml").write_text("rounds = 3\n")
    ended = fedsim("run", "a b.toml", "--out", "x", "--json")
    assert (ended.code, ended.out) == (130, "")
    assert ended.lines[-1] == "interrupted; go on with: fedsim run 'a b.toml' --resume --out x"


def test_an_out_that_holds_a_run_needs_resume(fedsim: Command, running: Running, folder: Path) -> None:
    store(folder / "x", Experiment.load())
    ended = fedsim("run", "--out", "x")
    assert (ended.code, ended.lines) == (
        2, ["--out: x holds a run; give --resume to go on with it, or another folder"]
    )  # fmt: skip
    assert not running.asked


def test_a_resume_without_a_file_takes_the_runs_own_experiment(fedsim: Command, running: Running, folder: Path) -> None:
    stored = Experiment.load(overrides=["client.lr=.05", "seed=3", "name=mine"])
    store(folder / "x", stored)
    assert fedsim("run", "--resume", "--out", "x", "--engine", "inline").code == 0
    ((experiment, options),) = running.asked
    assert experiment.difference(stored) == []
    assert experiment.engine.part.name == "inline"
    assert (options["out"], options["resume"]) == (Path("x"), True)


def test_a_resume_with_a_different_experiment_says_which_keys(fedsim: Command, running: Running, folder: Path) -> None:
    store(folder / "x", Experiment.load(overrides=["client.lr=.05"]))
    assert fedsim("run", "--resume", "--out", "x", *sets(["client.lr=0.05", "engine.workers=2"])).code == 0
    ended = fedsim("run", "--resume", "--out", "x", *sets(["client.lr=0.1", "model.hidden=[8]"]))
    assert ended.code == 2
    assert [line.split(" in the run")[0] for line in ended.lines] == [
        "model.hidden: [8] here, but [64]", "client.lr: 0.1 here, but 0.05"
    ]  # fmt: skip
    assert len(running.asked) == 1


def test_a_resume_where_nothing_is_begins(fedsim: Command, running: Running) -> None:
    assert fedsim("run", "--resume", "--out", "x", "--set", "rounds=2").code == 0
    assert running.asked[0][0].rounds == 2


def test_resume_alone_takes_the_newest_unfinished_run(fedsim: Command, running: Running, folder: Path) -> None:
    assert fedsim("run", "--resume").code == 0
    assert running.asked.pop()[1]["out"] is None
    for number, finished in ((1, False), (2, False), (3, True)):
        name = "digits" if number == 1 else f"digits-{number}"
        store(folder / "runs" / name, Experiment.load(overrides=[f"seed={number}"]), finished=finished)
        os.utime(folder / "runs" / name / "run.db", (number, number))
    store(folder / "runs" / "digits-4", Experiment.load(overrides=["name=digits-4"]))
    assert fedsim("run", "--resume").code == 0
    experiment, options = running.asked[0]
    assert (options["out"], experiment.seed) == (Path("runs/digits-2"), 2)
    store(folder / "runs" / "done", Experiment.load(overrides=["name=done"]), finished=True)
    assert fedsim("run", "--resume", "--set", "name=done").lines == [
        f"--resume: every run {Path('runs/done')} is finished; leave --resume out to start another"
    ]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(fedsim: Command, running: Running, folder: Path) -> None:
    ended = fedsim("run", "--dry-run", "--set", "rounds=3")
    assert ended.code == 0
    assert "rounds = 3" in ended.out
    assert "bytes up per round  5" in ended.out
    assert json.loads(fedsim("run", "--dry-run", "--json").out)["execution"] == "stacked"
    assert not running.asked
    assert not list(folder.iterdir())
