"""A run read again: its tables as DataFrames, its weights as tensors. Read-only, beside a running writer too."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.errors import RunError
from fedsim.runs import database as db
from fedsim.runs.resolved import parse_experiment

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

_LEDGER = (
    "round", "cohort", "completed", "bytes_up", "bytes_down", "bytes_saved", "malicious", "epsilon",
    "simulated_seconds",    "seconds", "train_seconds", "committed_at",
)  # fmt: skip
_TOTALS = ("bytes_up", "bytes_down", "bytes_saved", "seconds")
_TRAIN_LOSS = """
SELECT round, sum(loss * examples) / sum(examples) AS train_loss FROM clients JOIN rounds USING (round)
WHERE loss NOTNULL GROUP BY round
"""

_METRICS = "SELECT round, split, name, value FROM metrics JOIN rounds USING (round) ORDER BY split, name"


def load(directory: Path | str) -> Run:
    """Reads a run.

    Raises:
        RequestError: if there is no run in ``directory``.
        RunError: if its ``run.db`` is damaged.
    """
    return Run(Path(directory))


class Run:
    """A run on disk. Everything is read when it is asked for, once, and nothing is locked.

    Attributes:
        out: the run's directory.
        experiment: the resolved experiment as a table.
        manifest: versions, seed, machine, execution.
        summary: what the run came to, ``None`` while it is unfinished.
        layout: parameter name -> shape, in the row's order.
        census: what was counted of the clients and their examples (:attr:`fedsim.census.Census.summary`), ``None``
            where nothing was.
    """

    def __init__(self, directory: Path):
        self.out = directory
        with db.open_to_read(directory) as database:
            meta = db.read_meta(database, directory)
        self.experiment_toml = meta["experiment"]
        self.experiment: dict[str, Any] = parse_experiment(meta["experiment"], directory)
        self.manifest: dict[str, Any] = db.from_json(meta["manifest"], directory)
        self.layout: dict[str, list[int]] = db.from_json(meta["layout"], directory)
        self.summary: dict[str, Any] | None = db.from_json(meta["summary"], directory) if "summary" in meta else None
        self.census: dict[str, Any] | None = db.from_json(meta["census"], directory) if "census" in meta else None

    def __repr__(self) -> str:
        return f"Run({str(self.out)!r}, {'finished' if self.summary is not None else 'unfinished'})"

    def query(self, sql: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[dict[str, Any]]:
        """Rows of a SELECT on ``run.db``, one dict a row.

        Raises:
            RunError: if ``run.db`` is damaged.
        """
        with db.open_to_read(self.out) as database:
            return _select(database, sql, values)

    def rounds(self) -> list[dict[str, Any]]:
        """The history as plain rows: the ledger, its totals so far, ``train_loss`` and ``SPLIT_METRIC`` where known.

        ``train_loss`` is the mean over the cohort's examples of the clients' own training loss.
        """
        with db.open_to_read(self.out) as database:  # one snapshot: a writer may add a round in between
            rows = _select(database, f"SELECT {', '.join(_LEDGER)} FROM rounds ORDER BY round")
            losses = _select(database, _TRAIN_LOSS)
            metrics = _select(database, _METRICS)
        by_round = {row["round"]: row for row in rows}
        totals = dict.fromkeys(_TOTALS, 0)
        for row in rows:
            for name in _TOTALS:
                totals[name] += row[name]
                row[f"{name}_total"] = totals[name]
        for loss in losses:
            by_round[loss["round"]]["train_loss"] = loss["train_loss"]
        for metric in metrics:
            by_round[metric["round"]][f"{metric['split']}_{metric['name']}"] = metric["value"]
        return rows

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row a round: the ledger, totals so far, ``train_loss`` and one column for each split and metric."""
        return _frame(self.rounds(), [*_LEDGER, *(f"{name}_total" for name in _TOTALS)])

    @cached_property
    def ledger(self) -> pd.DataFrame:
        """One row a round: cohort, completed clients, bytes up, down and not sent, epsilon, real and simulated time."""
        return self.history[[*_LEDGER, *(f"{name}_total" for name in _TOTALS)]]

    def holdings(self, ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The recorded clients, or some of them, by id: rows of the table ``population``, ``labels`` as lists."""
        chosen = "" if ids is None else f"WHERE client IN ({', '.join('?' * len(ids))})"
        rows = self.query(f"SELECT * FROM population {chosen} ORDER BY client", ids or ())
        for row in rows:
            row["held_out"] = bool(row["held_out"])
            row["labels"] = None if row["labels"] is None else db.from_json(row["labels"], self.out)
        return rows

    @cached_property
    def population(self) -> pd.DataFrame:
        """One row a client: its examples, whether it is held out, its attack, the counts of its training labels.

        All clients up to some thousands; above that an even selection of them by size.
        """
        return _frame(self.holdings(), ("client", "train", "validation", "test", "held_out", "attack", "labels"))

    @cached_property
    def clients(self) -> pd.DataFrame:
        """One row a round and client that took part; what a rule reports stands in columns of its own."""
        import pandas as pd

        columns = ("round", "client", "chunk", "examples", "steps", "weight", "loss", "update_norm")
        rows = self.query(f"SELECT {', '.join(columns)}, info FROM clients ORDER BY round, client")
        info = [db.from_json(text, self.out) if (text := row.pop("info")) else {} for row in rows]
        frame = _frame(rows, columns)
        return pd.concat([frame, pd.DataFrame(info)], axis=1) if any(info) else frame

    @cached_property
    def client_metrics(self) -> pd.DataFrame:
        """One row a round, client and split of the client-level evaluations, one column a metric."""
        rows: dict[tuple, dict[str, Any]] = {}
        for row in self.query("SELECT * FROM client_metrics ORDER BY round, split, client, name"):
            key = {name: row[name] for name in ("round", "client", "split", "examples")}
            rows.setdefault(tuple(key.values()), key)[row["name"]] = row["value"]
        return _frame(list(rows.values()), ("round", "client", "split", "examples"))

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a round, split and metric."""
        return self._table("metrics", ("round", "split", "name", "value"))

    @cached_property
    def events(self) -> pd.DataFrame:
        """What happened: one row an event, in the order in which they were recorded."""
        return self._table("events", ("round", "kind", "client", "stage", "message", "traceback"), order="id")

    @cached_property
    def chunks(self) -> pd.DataFrame:
        """One row a chunk of a round, with the process that trained it."""
        return self._table("chunks", ("round", "chunk", "pid", "clients", "seconds"))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The newest whole checkpoint's tensors.

        Raises:
            RunError: if there is none.
        """
        from fedsim.runs import checkpoints

        kept = "SELECT checkpoint, checkpoint_sha256 FROM rounds WHERE checkpoint NOTNULL ORDER BY round DESC"
        problems = ["no round is committed"]
        # A running writer may replace a checkpoint between the query and the read; then there is a newer one.
        for _ in range(3):
            for row in self.query(kept):
                found = checkpoints.read(self.out / row["checkpoint"], row["checkpoint_sha256"])
                if not isinstance(found, str):
                    return found
                problems.append(f"{row['checkpoint']} {found}")
        raise RunError(f"{self.out} has no whole checkpoint: {problems[-1]}")

    @property
    def row(self) -> Tensor:
        """The newest global weights ``[d]``."""
        return self.tensors["row"]

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> tensor: the newest global weights by name."""
        from fedsim.runs import checkpoints

        return checkpoints.unpack(self.row, self.layout)

    def _table(self, name: str, columns: Sequence[str], order: str = "rowid") -> pd.DataFrame:
        order = "round, split, name" if name == "metrics" else order
        return _frame(self.query(f"SELECT {', '.join(columns)} FROM {name} ORDER BY {order}"), columns)


def _select(database: sqlite3.Connection, sql: str, values: Any = ()) -> list[dict[str, Any]]:
    found = database.execute(sql, values)
    names = [column[0] for column in found.description]
    return [dict(zip(names, row, strict=True)) for row in found]


def _frame(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    """A DataFrame with at least ``columns``; a column of numbers with gaps is a column of floats."""
    import pandas as pd

    frame = pd.DataFrame(list(rows))
    for name in columns:
        if name not in frame:
            frame[name] = None
    frame = frame[[*columns, *(name for name in frame if name not in columns)]]
    empty = [name for name in frame if len(frame) and frame[name].isna().all()]
    return frame.astype(dict.fromkeys(empty, "float64"))
