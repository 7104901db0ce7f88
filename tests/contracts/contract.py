"""What holds for everything that a user brings, however it is brought."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tomlkit

import fedsim
from fedsim import cli

THINGS = Path(__file__).with_name("things")
PACKAGE = f"{__package__}.things"


class KilledError(Exception):
    """Ends a run in the middle of a round."""


class Contract:
    """The base of each test class: an experiment whose things come from a file in ``things/``.

    Attributes:
        table: the experiment, as in an experiment file.
        obstacle: why its clients cannot be trained stacked, as the record says it; empty where they can.
    """

    table: ClassVar[Mapping[str, Any]]
    obstacle: ClassVar[str] = ""

    @classmethod
    def experiment(cls, **changes: Any) -> fedsim.Experiment:
        """The experiment with the things themselves, some keys changed: a table's keys are added to it."""
        return fedsim.Experiment(**as_objects(changed(cls.table, changes)))

    def test_a_file_beside_the_experiment_gives_the_same_bits_in_worker_processes(
        self, result: fedsim.Result, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        file = write(self.table, tmp_path)
        summary = command_line(capfd, "run", file, "--out", tmp_path / "run", "--engine", "processes", "--workers", "2")
        assert summary["weights_sha256"] == result.summary["weights_sha256"]

    def test_a_module_gives_the_same_bits_even_in_a_run_that_is_cut_off_and_resumed(
        self, result: fedsim.Result, tmp_path: Path
    ) -> None:
        def kill(record: fedsim.RoundRecord) -> None:
            if record.round == 3:
                raise KilledError

        named = replaced(self.table, lambda name: f"{PACKAGE}.{name.replace('.py:', ':')}")
        with pytest.raises(KilledError):
            fedsim.run(fedsim.Experiment(**named), out=tmp_path / "run", engine="inline", callbacks=[kill])
        assert list(fedsim.load(tmp_path / "run").history.index) == [0, 1, 2]
        again = fedsim.run(out=tmp_path / "run", engine="inline", resume=True)
        assert again.summary["weights_sha256"] == result.summary["weights_sha256"]
        assert list(again.history.index) == list(result.history.index)

    def test_stacked_and_loop_agree_or_the_record_says_why_not(self, result: fedsim.Result, tmp_path: Path) -> None:
        if self.obstacle:
            assert self.obstacle in fedsim.load(result.out).manifest["execution"]["reason"]
            with pytest.raises(fedsim.clients.RequestError, match=self.obstacle):
                fedsim.run(self.experiment(client={"execution": "stacked"}), out=tmp_path / "stacked", engine="inline")
            return
        loop, stacked = (
            fedsim.run(
                self.experiment(rounds=3, client=client), out=tmp_path / client["execution"], engine="inline"
            ).row
            for client in ({"execution": way, "precision": "float64"} for way in ("loop", "stacked"))
        )
        # In float32 rounding alone can set them apart: Adam makes steps of it where a gradient is zero.
        assert float((stacked - loop).norm() / loop.norm()) < 1e-10


def write(table: Mapping[str, Any], folder: Path) -> Path:
    """The experiment as a file in ``folder``, the user's files beside it."""
    for name in names(table):
        shutil.copy(THINGS / name.partition(":")[0], folder)
    file = folder / "experiment.toml"
    file.write_text(tomlkit.dumps(table), encoding="utf-8")
    return file


def command_line(capfd: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> dict[str, Any]:
    """What a ``fedsim`` command prints with ``--json``."""
    capfd.readouterr()
    ended = cli.main([*map(str, arguments), "--json", "--quiet"])
    said = capfd.readouterr()
    assert ended == code, said.err
    return json.loads(said.out)


def as_objects(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table with the things themselves where it names them: settings still stand beside them."""
    return replaced(table, thing)


def thing(name: str) -> Any:
    """What ``"file.py:Thing"`` names in ``things/``."""
    file, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"{PACKAGE}.{file.removesuffix('.py')}"), attribute)


def names(value: Any) -> list[str]:
    """Every ``"file.py:Thing"`` in a table."""
    found: list[str] = []
    replaced(value, found.append)
    return found


def replaced(value: Any, change: Any) -> Any:
    """The table with ``change`` applied to every ``"file.py:Thing"``."""
    if isinstance(value, Mapping):
        return {name: replaced(item, change) for name, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, change) for item in value]
    return change(value) if isinstance(value, str) and ".py:" in value else value


def changed(table: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The table with some keys changed; those of an inner table are added to it."""
    whole = dict(table)
    for name, value in changes.items():
        before = table.get(name, {})
        whole[name] = {**before, **value} if isinstance(value, Mapping) and isinstance(before, Mapping) else value
    return whole
