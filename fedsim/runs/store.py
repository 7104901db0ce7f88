"""The run store: one transaction a round, from which a killed run goes on to the same bits."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clients.errors import RequestError, RunError
from fedsim.records import Event, RoundRecord
from fedsim.runs import checkpoints
from fedsim.runs import client_state as states
from fedsim.runs import database as db
from fedsim.runs.directory import (
    CHECKPOINTS,
    EXPERIMENT,
    FIRST,
    MANIFEST,
    Lock,
    holds_run,
    no_run,
    remove_unfinished,
    write_whole,
)
from fedsim.runs.rows import insert_events, insert_round, population_rows

if TYPE_CHECKING:
    from fedsim.census import Census

_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A committed round and the tensors that the next one starts from."""

    round: int
    tensors: dict[str, Tensor]


class RunStore:
    """A run's directory, held by one process at a time. A context manager; leaving it gives the directory free.

    A round is committed by writing its checkpoint under its own name and then everything else, with the checkpoint's
    sha256, in one transaction: a kill at any moment leaves the round before or the round itself, and at most a
    checkpoint file that no round names, which the next commit or resume removes.

    Attributes:
        directory: where the run is.
        layout: parameter name -> shape, in the row's order.
        damage: what :meth:`resume` found damaged, or ``None``.
    """

    def __init__(self, directory: Path, lock: Lock, database: sqlite3.Connection):
        self.directory = directory
        self.damage: Event | None = None
        self._lock = lock
        self._database = database
        self._meta = db.read_meta(database, directory)
        self.layout: dict[str, list[int]] = db.from_json(self._meta["layout"], directory)

    @classmethod
    def create(
        cls,
        directory: Path | str,
        experiment_toml: str,
        manifest: Mapping[str, Any],
        layout: Mapping[str, Sequence[int]] | None = None,
        census: Census | None = None,
        first: Mapping[str, Tensor] | None = None,
        personal: Sequence[str] = (),
    ) -> RunStore:
        """Makes a new run in ``directory``, which is made where it does not exist.

        Args:
            directory: where; empty, or at least without a run and without files of a run's names.
            experiment_toml: the resolved experiment.
            manifest: versions, seed, machine, execution: plain values.
            layout: parameter name -> shape in the row's order (``Layout.shapes``), for reading weights by name.
            census: who holds what; recorded here, in the step that makes the run, and never again.
            first: tensors of the model that have no place in a row, as they begin: what is frozen, buffers, and what
                stays with clients. Kept in a file of their own.
            personal: the names of those that stay with clients, which another run does not start from.

        Raises:
            RequestError: if the directory cannot be made, holds a run or such files, or another process uses it.
            RunError: if the disk is full.
        """
        path = Path(directory)
        lock = _locked(path, make=True)
        try:
            if holds_run(path):
                raise RequestError(f"{path} holds a run already; continue it with --resume or give another --out")
            taken = [name for name in (EXPERIMENT, MANIFEST) if (path / name).exists()]
            if taken:
                raise RequestError(f"{path} holds {' and '.join(taken)} of something else; give an empty --out")
            meta = {
                "experiment": db.text(experiment_toml),
                "manifest": db.to_json(manifest, indent=2),
                "layout": db.to_json({name: list(shape) for name, shape in (layout or {}).items()}),
            }
            if census is not None:
                meta["census"] = db.to_json(census.summary)
            if first:
                with db.failing(path, "writing the first weights"):
                    meta["first"] = checkpoints.write_tensors(path / FIRST, first, personal)
            db.create(path, meta, population_rows(census.rows if census is not None else ()))
            return cls._opened(path, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def open(cls, directory: Path | str) -> RunStore:
        """Opens an existing run to go on with it.

        Raises:
            RequestError: if there is no run, or another process uses it.
            RunError: if ``run.db`` is damaged or missing.
        """
        path = Path(directory)
        if not holds_run(path):
            raise RequestError(no_run(path))
        lock = _locked(path, make=False)
        try:
            return cls._opened(path, lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def _opened(cls, path: Path, lock: Lock) -> RunStore:
        database = db.open_to_write(path)
        try:
            store = cls(path, lock, database)
            store._write_copies()
            return store
        except BaseException:
            database.close()
            raise

    def _write_copies(self) -> None:
        """The text files beside run.db, where they are missing: it was killed before they were written."""
        with db.failing(self.directory, "writing the experiment"):
            (self.directory / CHECKPOINTS).mkdir(exist_ok=True)
            remove_unfinished(self.directory)
            for name, content in ((EXPERIMENT, self._meta["experiment"]), (MANIFEST, self._meta["manifest"])):
                if not (self.directory / name).exists():
                    write_whole(self.directory / name, content.encode())

    def __enter__(self) -> RunStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the database and gives the directory free. May be called twice."""
        self._database.close()
        self._lock.release()

    @property
    def experiment_toml(self) -> str:
        """The resolved experiment as it was given to :meth:`create`."""
        return self._meta["experiment"]

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest as it was given to :meth:`create`."""
        return db.from_json(self._meta["manifest"], self.directory)

    def first(self) -> dict[str, Tensor]:
        """The tensors that :meth:`create` was given as ``first``.

        Raises:
            RunError: where the file is missing or damaged.
        """
        if "first" not in self._meta:
            return {}
        found = checkpoints.read(self.directory / FIRST, self._meta["first"])
        if isinstance(found, str):
            raise RunError(f"{self.directory / FIRST} {found}; it holds what the run's checkpoints do not")
        return found

    @property
    def census(self) -> dict[str, Any] | None:
        """What was counted of the clients and their examples; ``None`` where nothing was."""
        text = self._meta.get("census")
        return None if text is None else db.from_json(text, self.directory)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What :meth:`finish` was given; ``None`` while the run is unfinished."""
        text = db.read_meta(self._database, self.directory).get("summary")
        return None if text is None else db.from_json(text, self.directory)

    def commit(self, record: RoundRecord, checkpoint: Mapping[str, Tensor], state: states.Writes | None = None) -> None:
        """Commits a round: all of it, or on any failure none of it.

        Args:
            record: the round.
            checkpoint: what the next round starts from, name -> tensor; the global weights under ``"row"``.
            state: the clients' new state, name -> (ids int64 ``[k]``, rows ``[k, m]``).

        Raises:
            RunError: if it could not be written (a full disk) or is committed already; the earlier rounds are kept.
        """
        newest = self._newest_round()
        if newest is not None and record.round <= newest:
            raise RunError(f"{self.directory}: round {record.round} cannot follow round {newest}, which is saved")
        doing = f"saving round {record.round}"
        try:
            with db.failing(self.directory, doing):
                sha256 = checkpoints.write(self.directory, record.round, checkpoint, self.layout)
            with self._transaction(doing) as database:
                insert_round(database, record, sha256)
                states.write(database, record.round, state or {})
                self._let_go_of_old(database)
        finally:
            self._clean()

    def _let_go_of_old(self, database: sqlite3.Connection) -> None:
        """Within a commit: only the two newest checkpoints, and the client state they need, are kept."""
        kept = self._checkpoints()
        if len(kept) >= _KEPT:
            oldest = kept[_KEPT - 1][0]
            database.execute("UPDATE rounds SET checkpoint = NULL WHERE round < ? AND checkpoint NOTNULL", (oldest,))
            states.prune(database, oldest)

    def client_state(
        self, name: str, ids: Tensor | Iterable[int], width: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The clients' newest state.

        Args:
            name: which.
            ids: client ids ``[k]``.
            width: values a client.
            dtype: their dtype.

        Returns:
            ``[k, width]``, zeros where a client has none.

        Raises:
            RunError: if what is stored has another dtype or width.
        """
        clients = ids.tolist() if isinstance(ids, Tensor) else ids
        with db.failing(self.directory, f"reading client state {name!r}"):
            return states.read(self._database, self.directory, name, clients, width, dtype)

    def resume(self) -> Checkpoint | None:
        """Goes back to the newest committed round whose checkpoint file is whole.

        Later rounds are removed with all that belongs to them, in one transaction, and :attr:`damage` says so (a
        ``checkpoint_damaged`` event, recorded too). Files of unfinished commits are removed.

        Returns:
            The round and its tensors; ``None`` if no round is committed or none is whole: the run starts anew.
        """
        damaged: list[str] = []
        newest = self._newest_round()
        found = None
        for round, name, sha256 in self._checkpoints():
            tensors = checkpoints.read(self.directory / name, sha256)
            if not isinstance(tensors, str):
                found = Checkpoint(round, tensors)
                break
            damaged.append(f"{name} {tensors}")
        last = found.round if found else -1
        if newest is not None and newest > last:
            self.damage = self._fall_back(newest, last, damaged)
        self._clean()
        return found

    def event(self, event: Event) -> None:
        """Records something that belongs to the run and not to a round's commit; a later fall-back keeps it."""
        with self._transaction("recording an event") as database:
            insert_events(database, [event], "run")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Marks the run as finished, with what it came to. May be called again; the last one counts."""
        with self._transaction("finishing") as database:
            database.execute("INSERT OR REPLACE INTO meta VALUES ('summary', ?)", (db.to_json(summary),))

    def totals(self) -> dict[str, Any]:
        """Sums of ``bytes_up``, ``bytes_down``, ``bytes_saved`` and ``seconds``; ``epsilon``; how many ``events``."""
        with db.failing(self.directory, "reading"):
            row = self._database.execute(
                "SELECT total(bytes_up), total(bytes_down), total(bytes_saved), total(seconds), max(epsilon)"
                " FROM rounds"
            ).fetchone()
            events = self._database.execute("SELECT count(*) FROM events").fetchone()[0]
        return {
            "bytes_up": int(row[0]),
            "bytes_down": int(row[1]),
            "bytes_saved": int(row[2]),
            "seconds": row[3],
            "epsilon": row[4],
            "events": events,
        }

    def last_metrics(self) -> dict[str, dict[str, float]]:
        """Split -> name -> value of the newest committed evaluation."""
        with db.failing(self.directory, "reading"):
            rows = self._database.execute(
                "SELECT split, name, value FROM metrics WHERE round = (SELECT max(round) FROM metrics)"
            ).fetchall()
        found: dict[str, dict[str, float]] = {}
        for split, name, value in rows:
            found.setdefault(split, {})[name] = float("nan") if value is None else value
        return found

    def _newest_round(self) -> int | None:
        with db.failing(self.directory, "reading"):
            return self._database.execute("SELECT max(round) FROM rounds").fetchone()[0]

    def _checkpoints(self) -> list[tuple[int, str, str]]:
        """(round, file, sha256) of the rounds whose checkpoint is kept, newest first."""
        with db.failing(self.directory, "reading"):
            return self._database.execute(
                "SELECT round, checkpoint, checkpoint_sha256 FROM rounds WHERE checkpoint NOTNULL ORDER BY round DESC"
            ).fetchall()

    def _fall_back(self, newest: int, last: int, damaged: Sequence[str]) -> Event:
        """Removes the rounds after ``last`` (-1: all of them) and records why."""
        why = "; ".join(damaged) or f"the checkpoints of rounds up to {newest} are gone"
        where = f"going on from round {last}, the last whole one" if last >= 0 else "no round is whole; starting anew"
        event = Event(newest, "checkpoint_damaged", f"{why}; {where}")
        with self._transaction("falling back") as database:
            for table in db.ROUND_TABLES:
                database.execute(f"DELETE FROM {table} WHERE round > ?", (last,))
            database.execute("DELETE FROM events WHERE round > ? AND scope = 'round'", (last,))
            database.execute("DELETE FROM meta WHERE key = 'summary'")
            insert_events(database, [event], "run")
        return event

    def _clean(self) -> None:
        """Removes checkpoint files that no round names. What cannot be removed now is tried again next time."""
        with suppress(OSError, RunError):
            checkpoints.keep_only(self.directory, {name for _, name, _ in self._checkpoints()})

    @contextmanager
    def _transaction(self, doing: str) -> Iterator[sqlite3.Connection]:
        with db.failing(self.directory, doing):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                # A full disk makes SQLite roll back by itself.
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                raise


def _locked(path: Path, make: bool) -> Lock:
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        return Lock(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be written to: {error.strerror}; give another --out") from error
