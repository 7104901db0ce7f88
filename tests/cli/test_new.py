"""``fedsim new`` writes files that run, and ``fedsim list`` shows what can be named in them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from clients import catalog
from fedsim.experiment import Experiment
from tests.cli.conftest import Command


@pytest.mark.parametrize("task", ["classification", "segmentation", "regression", "tokens"])
def test_every_template_learns(fedsim: Command, folder: Path, task: str) -> None:
    from fedsim import rounds

    assert fedsim("new", f"my_{task}", "--task", task).out == (
        f"wrote my_{task}.py; run it with: fedsim run my_{task}.py\n"
    )
    experiment = catalog.load_file(Path(f"my_{task}.py")).experiment.override(["rounds=3", "evaluation.every=3"])
    losses = [record.metrics["test"]["loss"] for record in rounds(experiment, engine="inline") if record.metrics]
    assert len(losses) == 2
    assert math.isfinite(losses[1])
    assert losses[1] < losses[0]


def test_the_toml_template_is_an_experiment(fedsim: Command, folder: Path) -> None:
    assert fedsim("new", "--toml").code == 0
    assert Experiment.load(folder / "my.toml").name == "my"


def test_nothing_is_overwritten(fedsim: Command, folder: Path) -> None:
    (folder / "my.py").write_text("precious")
    ended = fedsim("new")
    assert (ended.code, ended.lines) == (2, ["my.py exists already; give another name: fedsim new NAME"])
    assert (folder / "my.py").read_text() == "precious"
    assert fedsim("new", "--task", "segmentaton").lines[0].endswith("did you mean 'segmentation'?")
    assert fedsim("new", "nowhere/my.py").lines == ["nowhere/my.py cannot be written: No such file or directory"]


def test_list_shows_names_settings_and_what_they_are(fedsim: Command) -> None:
    said = fedsim("list", "partitions")
    assert said.code == 0
    assert "  dirichlet(alpha=0.3, variant='per_class', min_examples=1)\n      Label skew" in said.out
    assert fedsim("list", "datasets").out == fedsim("list", "sources").out
    whole = fedsim("list").out
    for heading in ("strategies", "models", "optimizers", "plugins", "checks"):
        assert f"\n{heading}\n" in f"\n{whole}"


def test_help_names_every_command(fedsim: Command) -> None:
    said = fedsim("--help")
    assert said.code == 0
    assert fedsim().out == said.out
    for command in ("run", "new", "list", "report", "export"):
        assert f"\n  {command} " in said.out
