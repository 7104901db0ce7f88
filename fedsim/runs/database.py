"""The run database: its tables, how it is opened, and what its errors mean. Imports no torch.

Kept in WAL mode with ``synchronous=NORMAL``: a transaction survives the death of the process at any moment and costs no
flush; a power cut may take the last rounds, which then train again to the same bits.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clients.errors import RequestError, RunError
from fedsim.runs.directory import DATABASE, disk_full, holds_run, no_run

SCHEMA = 2

#: What :func:`create` does, in words.
CREATING = "creating run.db"

#: Tables whose rows belong to a round, and go with it when a resume has to fall back behind it.
ROUND_TABLES = ("rounds", "clients", "chunks", "metrics", "client_metrics", "client_state")

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE population (
    client INTEGER PRIMARY KEY, train INTEGER NOT NULL, validation INTEGER, test INTEGER,
    held_out INTEGER NOT NULL, attack TEXT, labels TEXT
);
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY, cohort INTEGER NOT NULL, completed INTEGER NOT NULL,
    bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL, bytes_saved INTEGER NOT NULL DEFAULT 0, malicious INTEGER,
    epsilon REAL, simulated_seconds REAL, seconds REAL NOT NULL, train_seconds REAL NOT NULL,
    checkpoint TEXT, checkpoint_sha256 TEXT NOT NULL, committed_at REAL NOT NULL, pid INTEGER NOT NULL
);
CREATE INDEX rounds_kept ON rounds (round) WHERE checkpoint NOTNULL;
CREATE TABLE clients (
    round INTEGER NOT NULL, client INTEGER NOT NULL, chunk INTEGER, examples INTEGER, steps INTEGER,
    weight REAL, loss REAL, update_norm REAL, info TEXT
);
CREATE TABLE chunks (
    round INTEGER NOT NULL, chunk INTEGER NOT NULL, pid INTEGER, clients INTEGER, seconds REAL
);
CREATE TABLE metrics (
    round INTEGER NOT NULL, split TEXT NOT NULL, name TEXT NOT NULL, value REAL, PRIMARY KEY (round, split, name)
) WITHOUT ROWID;
CREATE TABLE client_metrics (
    round INTEGER NOT NULL, client INTEGER NOT NULL, split TEXT NOT NULL, name TEXT NOT NULL, value REAL,
    examples INTEGER
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, round INTEGER NOT NULL, kind TEXT NOT NULL, client INTEGER, stage TEXT,
    message TEXT NOT NULL, traceback TEXT NOT NULL, scope TEXT NOT NULL
);
CREATE TABLE client_state (
    client INTEGER NOT NULL, name TEXT NOT NULL, round INTEGER NOT NULL, dtype TEXT NOT NULL, data BLOB NOT NULL
);
CREATE UNIQUE INDEX client_state_versions ON client_state (name, client, round);
CREATE INDEX client_state_rounds ON client_state (round);
"""


def create(directory: Path, meta: dict[str, str], population: Iterable[tuple] = ()) -> None:
    """Makes ``run.db`` with its tables, ``meta`` and rows of ``population``; it has its name only once it is whole."""
    temporary = directory / (DATABASE + ".writing")
    for leftover in (temporary, Path(f"{temporary}-journal"), Path(f"{temporary}-wal")):
        leftover.unlink(missing_ok=True)
    with failing(directory, CREATING):
        database = sqlite3.connect(temporary, isolation_level=None)
        try:
            database.executescript(f"BEGIN; {_TABLES} COMMIT;")
            rows = [("schema", str(SCHEMA)), *meta.items()]
            database.execute("BEGIN")
            database.executemany("INSERT INTO meta VALUES (?, ?)", rows)
            database.executemany("INSERT INTO population VALUES (?, ?, ?, ?, ?, ?, ?)", population)
            database.execute("COMMIT")
        finally:
            database.close()
        os.replace(temporary, directory / DATABASE)


def open_to_write(directory: Path) -> sqlite3.Connection:
    """Opens ``run.db`` for its one writer, replays what a killed writer left in the log, and checks it.

    Raises:
        RunError: if it is damaged, missing, or of another fedsim's schema.
    """
    path = directory / DATABASE
    with failing(directory, "opening"):
        # A run may be driven from a generator that another thread consumes; the connection itself is serialised.
        database = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=30, check_same_thread=False
        )
        try:
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "journal_size_limit=67108864"):
                database.execute(f"PRAGMA {pragma}")
            found = database.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise RunError(_damaged(directory, found))
            read_meta(database, directory)
        except BaseException:
            database.close()
            raise
    return database


@contextmanager
def open_to_read(directory: Path) -> Iterator[sqlite3.Connection]:
    """Opens ``run.db`` read-only, beside a writer or on a read-only disk, in one consistent snapshot.

    Raises:
        RequestError: where there is no run.
        RunError: if it is damaged, missing, or of another fedsim's schema.
    """
    if not holds_run(directory):
        raise RequestError(no_run(directory))
    uri = (directory / DATABASE).absolute().as_uri() + "?mode=ro"
    if not os.access(directory, os.W_OK) and not (directory / (DATABASE + "-wal")).exists():
        uri += "&immutable=1"  # SQLite would want to make its index of the log beside the database
    with failing(directory, "reading"):
        database = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=30)
        try:
            database.execute("BEGIN")
            read_meta(database, directory)
            yield database
        finally:
            database.close()


def read_meta(database: sqlite3.Connection, directory: Path) -> dict[str, str]:
    """The ``meta`` table: ``schema``, ``experiment``, ``manifest``, ``layout``, ``census`` where clients were
    counted and, once finished, ``summary``.

    Raises:
        RunError: if what must be there is not.
    """
    with failing(directory, "reading"):
        meta = dict(database.execute("SELECT key, value FROM meta").fetchall())
    missing = {"schema", "experiment", "manifest", "layout"} - set(meta)
    if missing:
        raise RunError(_damaged(directory, f"no {', '.join(sorted(missing))} in it"))
    if not meta["schema"].isdecimal():
        raise RunError(_damaged(directory, f"schema {meta['schema']!r}"))
    if int(meta["schema"]) > SCHEMA:
        raise RunError(f"{directory / DATABASE} was written by a newer fedsim; install that version to read it")
    if int(meta["schema"]) < SCHEMA:
        raise RunError(f"{directory / DATABASE} was written by an older fedsim; read it with that one, or run it anew")
    return meta


@contextmanager
def failing(directory: Path, doing: str) -> Iterator[None]:
    """Turns what SQLite and the file system raise into a :class:`RunError` that names the file and says what to do."""
    try:
        yield
    except sqlite3.Error as error:
        raise RunError(_explain(error, directory, doing)) from error
    except OSError as error:
        if disk_full(error):
            raise RunError(_full(directory, doing, error.strerror or str(error))) from error
        raise RunError(f"{directory}: {doing} failed: {error}") from error


def text(value: Any) -> str:
    """A string that SQLite and UTF-8 files take: lone surrogates (undecodable file names in messages) are replaced."""
    return str(value).encode("utf-8", "replace").decode("utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of plain values and of what has ``tolist()`` (numpy, tensors); anything else as its text."""
    return json.dumps(value, default=_plain, ensure_ascii=True, indent=indent)


def from_json(value: str, directory: Path) -> Any:
    """The value of a JSON text that stands in ``run.db``.

    Raises:
        RunError: if it is damaged.
    """
    try:
        return json.loads(value)
    except ValueError as error:
        raise RunError(_damaged(directory, str(error))) from error


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _explain(error: sqlite3.Error, directory: Path, doing: str) -> str:
    path = directory / DATABASE
    # Only errors that SQLite itself reports carry a name; sqlite3's own (a closed connection) do not.
    name = getattr(error, "sqlite_errorname", "")
    if not path.exists() and doing != CREATING:
        return f"{path} is missing; put it back from a copy, or start the run anew in another directory"
    if name == "SQLITE_FULL" or name.startswith(("SQLITE_IOERR_WRITE", "SQLITE_IOERR_SHMSIZE")):
        return _full(directory, doing, str(error))
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or "no such table" in str(error):
        return _damaged(directory, str(error))
    return f"{path}: {doing} failed: {error}"


def _damaged(directory: Path, reason: str) -> str:
    return (
        f"{directory / DATABASE} is damaged ({' '.join(reason.split())}); "
        "put it back from a copy, or start the run anew in another directory"
    )


def _full(directory: Path, doing: str, reason: str) -> str:
    return (
        f"{directory}: {doing} failed, nothing more can be written there ({reason}); "
        "the rounds before it are kept: free some space and continue with --resume"
    )
