"""A round as rows of ``run.db``. Values may be numpy's or tensors: SQLite takes Python's own only."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedsim.records import CLIENT_FIELDS, Event, RoundRecord
from fedsim.runs import database as db
from fedsim.runs.directory import checkpoint_name


def insert_round(database: sqlite3.Connection, record: RoundRecord, sha256: str) -> None:
    """Inserts a round and all that belongs to it, inside the caller's transaction."""
    number = int(record.round)
    database.execute(
        "INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            number,
            int(record.cohort),
            int(record.completed),
            int(record.bytes_up),
            int(record.bytes_down),
            int(record.bytes_saved),
            _whole(record.malicious),
            _real(record.epsilon),
            _real(record.simulated_seconds),
            float(record.seconds),
            float(record.train_seconds),
            checkpoint_name(number),
            sha256,
            time.time(),
            os.getpid(),
        ),
    )
    database.executemany(
        "INSERT INTO clients VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", [_client(number, c) for c in record.clients]
    )
    database.executemany(
        "INSERT INTO chunks VALUES (?, ?, ?, ?, ?)",
        [(number, int(c["chunk"]), int(c["pid"]), int(c["clients"]), float(c["seconds"])) for c in record.chunks],
    )
    database.executemany(
        "INSERT INTO metrics VALUES (?, ?, ?, ?)",
        [
            (number, split, name, _real(value))
            for split, metrics in record.metrics.items()
            for name, value in metrics.items()
        ],
    )
    database.executemany("INSERT INTO client_metrics VALUES (?, ?, ?, ?, ?, ?)", _client_metrics(record))
    insert_events(database, record.events, "round")


def population_rows(clients: Iterable[Mapping[str, Any]]) -> Iterator[tuple]:
    """Recorded clients (:attr:`fedsim.census.Census.rows`) as rows of the table ``population``."""
    for client in clients:
        yield (
            int(client["client"]),
            int(client["train"]),
            _whole(client["validation"]),
            _whole(client["test"]),
            int(client["held_out"]),
            None if client["attack"] is None else db.text(client["attack"]),
            None if client["labels"] is None else db.to_json(client["labels"]),
        )


def _client(round: int, client: Mapping[str, Any]) -> tuple:
    info = {
        key: db.text(value) if isinstance(value, str) else value
        for key, value in client.items()
        if key not in CLIENT_FIELDS
    }
    return (
        round,
        int(client["client"]),
        _whole(client.get("chunk")),
        _whole(client.get("examples")),
        _whole(client.get("steps")),
        _real(client.get("weight")),
        _real(client.get("loss")),
        _real(client.get("update_norm")),
        db.to_json(info) if info else None,
    )


def _client_metrics(record: RoundRecord) -> Iterator[tuple]:
    for row in record.client_metrics:
        for name, value in row.items():
            if name not in ("client", "split", "examples"):
                yield int(record.round), int(row["client"]), row["split"], name, _real(value), int(row["examples"])


def insert_events(database: sqlite3.Connection, events: Iterable[Event], scope: str) -> None:
    """Inserts events: of a ``round``, which go with it, or of the ``run``, which stay."""
    database.executemany(
        "INSERT INTO events (round, kind, client, stage, message, traceback, scope) VALUES (?, ?, ?, ?, ?, ?, ?)",
        [
            (
                int(event.round),
                event.kind,
                _whole(event.client),
                event.stage,
                db.text(event.message),
                db.text(event.traceback),
                scope,
            )
            for event in events
        ],
    )


def _real(value: Any) -> float | None:
    return None if value is None else float(value)


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)
