"""The examples run as they stand, and do what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedsim
from fedsim import cli

HOME = Path(__file__).resolve().parents[1]
EXAMPLES = HOME / "examples"
REACHED = {
    "quickstart": ("accuracy", 0.85),
    "own_rule": ("Reputation.*accuracy", 0.85),
    "own_task": ("Dice", 0.8),
    "transfer": ("fine-tuned: accuracy", 0.7),
}


def test_every_example_is_tried_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(REACHED)


@pytest.mark.parametrize("name", REACHED)
def test_an_example_runs_in_an_empty_folder(name: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HOME)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    what, least = REACHED[name]
    found = re.search(rf"{what} (\d\.\d+)", ended.stdout)
    assert found, ended.stdout
    assert float(found[1]) > least
    assert list(tmp_path.glob("runs/*/report.html"))


def test_the_command_that_an_example_names_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(EXAMPLES / "own_rule.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    command = re.search(r"fedsim (run .*)", (tmp_path / "own_rule.py").read_text())
    assert command
    assert cli.main([*command[1].split(), "--set", "rounds=2", "--out", "run", "--quiet"]) == 0
    aggregator = fedsim.load(tmp_path / "run").experiment["strategy"]["aggregator"]
    assert aggregator["name"].endswith("own_rule.py:Reputation")
    assert aggregator["memory"] == 0.8


def test_an_example_that_defines_an_experiment_can_be_given_to_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "own_task"):
        file = EXAMPLES / f"{name}.py"
        assert cli.main(["run", str(file), "--set", "rounds=1", "--out", name, "--quiet"]) == 0
        assert (tmp_path / name / "report.html").exists()


def test_the_readmes_local_training_runs_as_written(tmp_path: Path) -> None:
    text = (HOME / "README.md").read_text()
    block = re.search(r"```toml\n(\[client\].*?)```", text, re.DOTALL)
    assert block
    (tmp_path / "experiment.toml").write_text(f"rounds = 1\n{block[1]}")
    result = fedsim.run(tmp_path / "experiment.toml", out=tmp_path / "run")
    assert result.summary["rounds"] == 1


def test_every_experiment_in_the_readme_is_accepted_and_written_down_as_it_was_read(tmp_path: Path) -> None:
    (tmp_path / "resnet18.pt").touch()
    blocks = re.findall(r"```toml\n(.*?)```", (HOME / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        (tmp_path / "experiment.toml").write_text(block)
        experiment = fedsim.Experiment.load(tmp_path / "experiment.toml")
        (tmp_path / "resolved.toml").write_text(experiment.to_toml())
        assert fedsim.Experiment.load(tmp_path / "resolved.toml").differences(experiment) == []
