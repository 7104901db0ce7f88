"""Running an experiment's checks on its final model."""

from __future__ import annotations

import csv
import json
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients import catalog
from clients.errors import RequestError
from fedsim.assembly import expect
from fedsim.experiment import Experiment
from fedsim.records import Event
from fedsim.simulation import Simulation
from strategies.checks.check import Check, Findings
from strategies.strategy import Strategy

CHECKS = "checks"


@dataclass
class Checked:
    """What an experiment's checks found.

    Attributes:
        metrics: check -> name -> number.
        events: one for each check that failed.
    """

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(event.stage or "" for event in self.events)


def build(experiment: Experiment, strategy: Strategy) -> dict[str, Check]:
    """Name -> check, in the experiment's order; refuses those that do not go with the strategy."""
    made = {}
    for part in experiment.checks:
        key = f"checks.{part.name}"
        check = catalog.build(part, "checks", experiment.base, key=key)
        expect(check, Check, key, "a strategies.Check")
        name = part.name.rpartition(":")[2].lower()
        if name in made:
            raise RequestError(f"{key}: is given twice; give each check once")
        made[name] = check
    if problems := [line for check in made.values() for line in check.fits(strategy)]:
        raise RequestError(problems)
    return made


def run(checks: dict[str, Check], simulation: Simulation, directory: Path) -> Checked:
    """Runs each check and writes its tables and figures under ``checks/NAME``; a failure does not stop the others."""
    found = Checked()
    for name, check in checks.items():
        try:
            findings = check.run(simulation.check_context())
            found.metrics[name] = {key: float(value) for key, value in findings[0].items()}
            _write(directory / CHECKS / name, findings)
        except Exception as error:
            message = f"{name}: {type(error).__name__}: {error}"
            found.events.append(Event(simulation.round, "check_failed", message, None, name, traceback.format_exc()))
    return found


def _write(folder: Path, findings: Findings) -> None:
    _, tables, figures = findings
    if tables or figures:
        folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with open(folder / f"{_plain(name)}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    for name, figure in figures.items():
        (folder / f"{_plain(name)}.json").write_text(json.dumps(figure, default=_number), encoding="utf-8")


def _plain(name: str) -> str:
    """A check's name for a table, fit to be a file's."""
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in name)


def _number(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)
