"""What a report says of one run, read once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import strategies.kinds  # noqa: F401  (declares the kind that is looked up here)
from clients.catalog import find
from clients.errors import RequestError
from fedsim.report.numbers import metric, thinned, wilson
from fedsim.runs.history import Run, load

_PARTICIPATION = """
SELECT times, count(*) AS clients FROM (SELECT count(*) AS times FROM clients GROUP BY client)
GROUP BY times ORDER BY times
"""
_ATTACKERS = """
SELECT count(*) AS updates, sum(json_extract(info, '$.kept')) AS kept, sum(json_extract(info, '$.share')) AS share,
    count(DISTINCT round) AS rounds
FROM clients WHERE json_extract(info, '$.attack') NOTNULL
"""
_LAST_CLIENT_EVALUATION = """
SELECT client, value, examples FROM client_metrics WHERE split = :split AND name = :name AND round =
    (SELECT max(round) FROM client_metrics WHERE split = :split AND name = :name)
ORDER BY value, client
"""
_SPLITS = ("test", "validation", "client_test", "client_validation")

#: The split whose accuracy is an attack's success; a run is never judged by it.
ATTACK = "attack"

#: Clients that a page shows one by one.
_MOST_CLIENTS = 100


@dataclass(frozen=True)
class ClientValues:
    """One metric of every client in the last evaluation of clients.

    Attributes:
        split: ``client_test`` or ``client_validation``.
        values: ascending; clients and examples in the same order.
    """

    split: str
    clients: list[int]
    values: list[float]
    examples: list[int]

    @property
    def mean(self) -> float:
        """The mean over clients."""
        return sum(self.values) / len(self.values)

    @property
    def pooled(self) -> float:
        """The mean over the clients' examples."""
        weighted = sum(value * n for value, n in zip(self.values, self.examples, strict=True))
        return weighted / max(sum(self.examples), 1)

    def quantile(self, share: float) -> float:
        """The value that a share of the clients does not exceed (the nearest rank)."""
        return self.values[max(math.ceil(share * len(self.values)) - 1, 0)]


class Facts:
    """A run's facts as the report tells them.

    Attributes:
        run: the run.
        rounds: its history, one dict a round.
        label: what the run is called beside others.
    """

    def __init__(self, directory: Path):
        self.run: Run = load(directory)
        self.rounds: list[dict[str, Any]] = self.run.rounds()
        self.name = str(self.run.experiment.get("name", directory.name))
        self.label = self.name
        self.directory = directory

    @property
    def finished(self) -> bool:
        return self.run.summary is not None

    @cached_property
    def done(self) -> int:
        """Training rounds committed."""
        return max((row["round"] for row in self.rounds), default=0)

    @property
    def planned(self) -> int:
        """Training rounds that the experiment asks for."""
        return int(self.run.experiment.get("rounds", self.done))

    @cached_property
    def strategy(self) -> str:
        """The strategy's name as its paper writes it, or the name of a user's own."""
        return spelled("strategies", part_name(self.run.experiment.get("strategy", "fedavg"), "fedavg"))

    @cached_property
    def population(self) -> int | None:
        """Clients there are, where the record or the experiment says."""
        if self.run.census is not None:
            return self.run.census["clients"]
        clients = section(self.run.experiment, "data").get("clients")
        return clients if isinstance(clients, int) else None

    @cached_property
    def splits(self) -> list[str]:
        """The splits that were evaluated, test first."""
        known = {row["split"] for row in self.run.query("SELECT DISTINCT split FROM metrics")} - {ATTACK}
        return sorted(known, key=lambda split: (_SPLITS.index(split) if split in _SPLITS else len(_SPLITS), split))

    @property
    def split(self) -> str:
        """The split that the summary speaks of."""
        told = (self.run.summary or {}).get("split")
        return told if told in self.splits else (self.splits[0] if self.splits else "test")

    @cached_property
    def primary(self) -> str:
        """The metric that the run is judged by."""
        told = section(self.run.manifest, "task").get("primary")
        names = [key.removeprefix(f"{self.split}_") for row in self.rounds for key in row if key.startswith(self.split)]
        if told in names:
            return told
        others = [name for name in names if name not in ("loss", "examples")]
        if not names or "accuracy" in names:
            return "accuracy"
        return others[0] if others else "loss"

    def last(self, name: str, split: str | None = None) -> float | None:
        """A metric in the last round that has it."""
        key = f"{split or self.split}_{name}"
        return next((row[key] for row in reversed(self.rounds) if row.get(key) is not None), None)

    @property
    def evaluated(self) -> int:
        """The round of the last evaluation."""
        key = f"{self.split}_{self.primary}"
        return next((row["round"] for row in reversed(self.rounds) if row.get(key) is not None), 0)

    @property
    def examples(self) -> int | None:
        """Examples in the split that the summary speaks of."""
        found = self.last("examples")
        return None if found is None else int(found)

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of a classification accuracy for a test set of that size."""
        return self._interval(self.split) if self.primary == "accuracy" else None

    @cached_property
    def attack_interval(self) -> tuple[float, float] | None:
        """The same of an attack's success."""
        return self._interval(ATTACK)

    def _interval(self, split: str) -> tuple[float, float] | None:
        value, examples = self.last("accuracy", split), self.last("examples", split)
        one_each = part_name(self.run.experiment.get("task", "classification"), "classification") == "classification"
        if not one_each or value is None or not examples or not 0 <= value <= 1:
            return None
        return wilson(value, int(examples))

    @cached_property
    def attacked(self) -> bool:
        """Whether an attack's success was measured."""
        return self.last("accuracy", ATTACK) is not None

    def total(self, name: str) -> float:
        """A column of the ledger, summed over the rounds."""
        return sum(row[name] or 0 for row in self.rounds)

    @cached_property
    def sent_share(self) -> float | None:
        """Which share of the model's parameters clients send, ``None`` where they send all of it."""
        kept = self.parameters["frozen"] + self.parameters["personal"]
        return self.parameters["sent"] / (self.parameters["sent"] + kept) if kept else None

    @cached_property
    def parameters(self) -> dict[str, int]:
        """How many parameters clients send, how many are frozen, and how many stay with the clients."""
        names = {"sent": "parameters", "frozen": "frozen_parameters", "personal": "personal_parameters"}
        found = {name: self.run.manifest.get(key) for name, key in names.items()}
        return {name: value if isinstance(value, int) else 0 for name, value in found.items()}

    @property
    def epsilon(self) -> float | None:
        """Epsilon spent so far; ``None`` without privacy."""
        return next((row["epsilon"] for row in reversed(self.rounds) if row["epsilon"] is not None), None)

    @property
    def privacy(self) -> Mapping[str, Any]:
        """What kind of epsilon it is: unit, relation, trust, delta, accountant, covers; empty without privacy."""
        found = self.run.manifest.get("privacy")
        return found if isinstance(found, Mapping) else {}

    @property
    def privacy_kind(self) -> str:
        """Unit, relation, trust, delta and accountant: epsilons of different kinds cannot be compared."""
        told = self.privacy
        delta = told.get("delta")
        words = [str(told.get(name, "?")) for name in ("unit", "relation", "trust")]
        known = f"{delta:.3g}" if isinstance(delta, float) else str(delta)
        return f"{', '.join(words)} trust, delta {known}, {told.get('accountant', '?')} accountant"

    @cached_property
    def cohort(self) -> float:
        """Clients a round, on average."""
        trained = [row["cohort"] for row in self.rounds if row["round"] > 0]
        return sum(trained) / len(trained) if trained else 0.0

    @cached_property
    def shown_clients(self) -> list[dict[str, Any]]:
        """The clients that a page shows one by one, those with most training examples first; evenly chosen by size."""
        ids = [row["client"] for row in self.run.query("SELECT client FROM population ORDER BY train DESC, client")]
        found = self.run.holdings([ids[i] for i in thinned(len(ids), _MOST_CLIENTS)])
        return sorted(found, key=lambda row: (-row["train"], row["client"]))

    @cached_property
    def participation(self) -> dict[int, int]:
        """Rounds taken part in -> clients that took part in so many, 0 among them where the population is known."""
        found = {row["times"]: row["clients"] for row in self.run.query(_PARTICIPATION)}
        never = (self.population or 0) - sum(found.values())
        return {0: never, **found} if found and never > 0 else found

    @cached_property
    def attackers(self) -> dict[str, Any] | None:
        """How many updates attackers sent, and what a rule that tells made of them; ``None`` where nobody attacked."""
        found = self.run.query(_ATTACKERS)[0]
        return found if found["updates"] else None

    @cached_property
    def client_values(self) -> ClientValues | None:
        """The primary metric of every client in the last evaluation of clients, ``None`` where there was none."""
        for split in ("client_test", "client_validation"):
            rows = self.run.query(_LAST_CLIENT_EVALUATION, {"split": split, "name": self.primary})
            rows = [row for row in rows if row["value"] is not None]
            if rows:
                return ClientValues(split, *([row[key] for row in rows] for key in ("client", "value", "examples")))
        return None

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What happened, in order."""
        return self.run.query("SELECT round, kind, client, stage, message, traceback FROM events ORDER BY id")

    @property
    def event_counts(self) -> Counter[str]:
        """Events by kind."""
        return Counter(event["kind"] for event in self.events)

    @property
    def result(self) -> str:
        """``96.1 % test accuracy``, or that there is none yet."""
        value = self.last(self.primary)
        if value is None:
            return f"no {words(self.split)} evaluation yet"
        return f"{metric(self.primary, value)} {words(self.split)} {words(self.primary)}"


def section(experiment: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A table of the experiment, empty where there is none."""
    found = experiment.get(name)
    return found if isinstance(found, Mapping) else {}


def part_name(part: Any, default: str) -> str:
    """The name of a part, which stands in an experiment as a string or as a table."""
    found = part.get("name", default) if isinstance(part, Mapping) else part
    return str(found)


def words(name: str) -> str:
    """``client_test`` as ``client test``."""
    return name.replace("_", " ")


def measure(split: str, name: str) -> str:
    """``client_test`` and ``accuracy`` as ``client test accuracy``; that of ``attack`` as ``attack success``."""
    return "attack success" if (split, name) == (ATTACK, "accuracy") else f"{words(split)} {words(name)}"


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat.update(flattened(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def spelled(kind: str, name: str) -> str:
    """A part's name as its class spells it: ``FedAvg`` for ``fedavg``, ``Agreement`` for ``rules.py:Agreement``."""
    if ":" in name:
        return name.rpartition(":")[2]
    try:
        return find(kind, name).attribute
    except RequestError:  # of a package that is not installed here
        return name
