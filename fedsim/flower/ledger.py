"""The record of a Flower app's run: a directory like that of ``fedsim run``, so that reports and exports read it alike.

A round is what the app calls one: the number under ``server-round`` in a message's configuration, or that of a legacy
message. Where an app numbers nothing, a round is a group of messages, or lasts until a message type is sent again.

Metrics are those of the clients' own replies and, where the server's strategy aggregates or evaluates, what it came to
(:mod:`fedsim.flower.listening`). What the server evaluated is the split ``test``, what clients evaluated
``client_test``.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedsim.flower.apps import App
from fedsim.records import Event, RoundRecord

if TYPE_CHECKING:
    import numpy as np
    from flwr.app import ArrayRecord, Message, RecordDict

    from fedsim.runs import RunStore

TEST, CLIENT_TEST, TRAIN = "test", "client_test", "train"

#: Beginnings of a metric's name that say only where it was measured, as its split does.
_PLACES = ("eval", "evaluate", "test", "val", "valid", "validation", "train", "global", "central", "centralized")
_SHORT = {"acc": "accuracy"}
#: Beginnings of the records' names in messages of the API of ``client_fn`` and of its secure aggregation.
_LEGACY = ("fitins", "evaluateins", "getparametersins", "getpropertiesins", "secaggplus")
_RESERVED = ("client", "chunk", "split", "examples")
_EXAMPLES = ("num-examples", "num_examples")
_PACKAGES = ("fedsim", "flwr", "torch", "numpy", "scikit-learn")


class Shown(Protocol):
    """Shows a run under way."""

    def answered(self, round: int, done: int, asked: int) -> None: ...

    def round(self, record: RoundRecord) -> None: ...


@dataclass
class _Asked:
    """Who was asked in a round for one thing: clients, those of them that failed, and their answers' numbers."""

    clients: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Open:
    """A round that is under way. ``asked`` is by the message type's first word; spans are (begin, end) of phases."""

    number: int
    label: str | None = None  # the messages' group, where the app does not number them
    asked: dict[str, _Asked] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    chunks: list[dict[str, Any]] = field(default_factory=list)
    types: set[str] = field(default_factory=set)
    spans: list[tuple[float, float]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0


class Ledger:
    """Writes a Flower app's run. Thread-safe: a legacy server sends its messages from a pool of threads.

    The directory is made with the first round, when it is known what is sent. Rounds are committed when the next one
    begins, the last one by :meth:`finish`.

    Args:
        directory: where the run goes; free, or empty.
        app: the app.
        engine: the engine as it was asked for.
        workers: how many workers, where it was said.
        seed: the run's seed.
        show: shows the run under way.
    """

    def __init__(
        self,
        directory: Path,
        app: App,
        *,
        engine: str = "auto",
        workers: int | None = None,
        seed: int = 0,
        show: Shown | None = None,
    ):
        # Absolute, for the app may change the current folder; shown as it was given.
        self.directory, self.shown, self.app = Path(os.path.abspath(directory)), directory, app
        self.planned: int | None = None
        self.strategy: str | None = None
        self.messages = 0
        self.look: Callable[[], None] = lambda: None  # finds strategies defined since (:mod:`fedsim.flower.listening`)
        self._engine, self._workers, self._seed, self._show = engine, workers, seed, show
        self._clients: dict[int, int] = {}
        self._store: RunStore | None = None
        self._layout: dict[str, list[int]] = {}
        self._arrays: list[tuple[str, np.ndarray]] = []
        self._open: _Open | None = None
        self._last = -1  # the newest round committed
        self._before = 0  # rounds of the strategies that ran before, where an app runs several
        self._failures: dict[str, tuple[str, str]] = {}  # message id -> what its phase will tell of it
        self._unheard: set[str] = set()
        self._evaluated: dict[str, tuple[int, dict[str, float]]] = {}
        self._epsilon: float | None = None  # privacy spent so far
        self._totals = Counter[str]()
        self._lock = threading.RLock()
        self._started = self._mark = time.monotonic()

    # ---------------------------------------------------------------------------------------- what the grid tells

    def begin(self, nodes: Sequence[int], engine: str, workers: int | None) -> None:
        """The simulation is about to start.

        Args:
            nodes: the nodes' ids, in the order of their partitions; a client is recorded under its partition's number.
            engine: the engine's name, as it was chosen.
            workers: how many workers it has, where it was said.
        """
        self._clients = {node: client for client, node in enumerate(nodes)}
        self._engine, self._workers = engine, workers
        self._mark = time.monotonic()

    def answered(self, message: Message, done: int, asked: int) -> None:
        """A message of the phase under way was answered: ``done`` of ``asked`` are."""
        if self._show is not None:
            with self._lock:
                number, _ = self._place([message])
            self._show.answered(number, done, asked)

    def failed(self, message: Message, text: str, traceback: str = "") -> None:
        """A client's own code raised over ``message``, or its process did not outlive it.

        Args:
            message: the message that was sent.
            text: what happened, in one line.
            traceback: where.
        """
        with self._lock:
            self._failures[message.metadata.message_id] = (text, traceback)

    def dropped(self, message: Message, why: str) -> None:
        """A message went nowhere."""
        with self._lock:
            current = self._of(*self._place([message]))
            meta = message.metadata
            text = f"node {meta.dst_node_id}, {meta.message_type}: not sent: {' '.join(why.split())}"
            current.events.append(Event(current.number, "not_sent", text, None, meta.message_type))

    def phase(self, sent: Sequence[Message], replies: Sequence[Message], seconds: float, pids: Sequence[int]) -> None:
        """One exchange is over: a ``send_and_receive``, or what was pulled of one push.

        Args:
            sent: the messages, as they went to the clients.
            replies: what came back, errors among them.
            seconds: how long it took.
            pids: the processes that handled the replies.
        """
        if not sent:
            return
        with self._lock:
            self.look()
            now = time.monotonic()
            self._learn(sent)
            current = self._of(*self._place(sent), now - seconds)
            current.types |= {message.metadata.message_type for message in sent}
            if any(_trains(message) for message in sent):
                current.spans.append((now - seconds, now))
            answers = {reply.metadata.reply_to_message_id: reply for reply in replies}
            for message in sent:
                self.messages += 1
                current.bytes_down += size(message.content)
                self._exchange(current, message, answers.get(message.metadata.message_id))
            for pid, count in sorted(Counter(pids).items()):
                chunk = {"chunk": len(current.chunks), "pid": pid, "clients": count, "seconds": seconds}
                current.chunks.append(chunk)

    def _exchange(self, current: _Open, message: Message, reply: Message | None) -> None:
        """Enters one message and its reply."""
        client, stage = self._client(message.metadata.dst_node_id), message.metadata.message_type
        asked = current.asked.setdefault(stage.partition(".")[0], _Asked())
        asked.clients.add(client)
        problem = _problem(reply)
        if problem is None:
            assert reply is not None
            current.bytes_up += size(reply.content)
            examples, metrics = values(reply.content)
            row = asked.rows.setdefault(client, {"client": client})
            if _trains(message):
                self._spend(metrics)
            row |= metrics if examples is None else {"examples": examples, **metrics}
            return
        asked.failed.add(client)
        told = self._failures.pop(message.metadata.message_id, None)
        kind = "no_reply" if reply is None and told is None else "client_failed"
        text, traceback = told or (problem, "")
        text = f"client {client}, {stage}: {' '.join(text.split())}"
        self._totals["failures"] += 1
        current.events.append(Event(current.number, kind, text, client, stage, traceback))

    # ------------------------------------------------------------------------------------- what the server tells

    def strategy_starts(self, name: str, rounds: int | None) -> None:
        """A strategy begins its rounds: further rounds count on from those of the one before."""
        with self._lock:
            if self.strategy is None:
                self.strategy, self.planned = name, rounds
                return
            self._commit()
            self._before = max(self._last, 0)
            self.planned = None if rounds is None or self.planned is None else self.planned + rounds

    def metrics(self, split: str, number: int, found: Mapping[str, Any]) -> None:
        """What the server aggregated or evaluated in a round; the last word on a split counts."""
        numbers = canonical(found)
        if numbers:
            with self._lock:
                number += self._before
                if self._open is not None and self._open.label is not None and number > self._last:
                    self._open.number = min(number, self._open.number)  # what was asked before the rounds began
                current = self._of(number)
                if split == TRAIN:
                    self._spend(numbers)
                current.metrics[split] = {**current.metrics.get(split, {}), **numbers}

    def _spend(self, numbers: Mapping[str, float]) -> None:
        """Takes an epsilon that somebody reports: the largest counts, for a mean over clients says too little."""
        if "epsilon" in numbers:
            self._epsilon = max(numbers["epsilon"], self._epsilon or 0.0)

    def unheard(self, method: str, error: Exception) -> None:
        """What a method of the server's returned is nothing that can be recorded; said once for each."""
        with self._lock:
            if method not in self._unheard:
                self._unheard.add(method)
                current = self._of(self._last + 1) if self._open is None else self._open
                text = f"what {method} returned is not in the record: {type(error).__name__}: {error}"
                current.events.append(Event(current.number, "not_recorded", text, stage="server"))

    def arrays(self, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        """The server's weights, as they stand after an aggregation."""
        with self._lock:
            self._arrays = list(arrays)

    # -------------------------------------------------------------------------------------------------- rounds

    def _place(self, sent: Sequence[Message]) -> tuple[int, str | None]:
        """The round that the messages of a phase belong to, and the group that it goes by where it has no number."""
        current = self._open
        number = next((known for message in sent if (known := _number(message)) is not None), None)
        if number is not None:
            if number == 0 and self._last < 0 and any(_trains(message) for message in sent):
                self._before = 1  # an app that counts from 0; round 0 is the one in which nobody trains
            return self._before + number, None
        label = sent[0].metadata.group_id
        if current is None or current.number == 0:
            return max(self._last + 1, 1), label
        again = current.types & {message.metadata.message_type for message in sent}
        same = label == current.label if label or current.label else not again
        return current.number + (not same), label

    def _of(self, number: int, label: str | None = None, begin: float | None = None) -> _Open:
        """The round of that number, which ends an earlier one. A later round is not gone back from."""
        if self._open is not None and number <= self._open.number:
            return self._open
        self._commit(begin)
        self._open = _Open(max(number, self._last + 1), label)
        return self._open

    def _commit(self, end: float | None = None) -> None:
        """Writes the round under way, which lasted until ``end``: the next one's first message, else now."""
        if self._open is None:
            return
        current, self._open = self._open, None
        end = time.monotonic() if end is None else max(end, self._mark)
        record = self._record(current, end - self._mark)
        self._mark, self._last = end, current.number
        self._kept().commit(record, self._tensors())
        for split, found in record.metrics.items():
            self._evaluated[split] = (record.round, dict(found))
        self._totals.update(bytes_up=record.bytes_up, bytes_down=record.bytes_down, events=len(record.events))
        if self._show is not None:
            self._show.round(record)

    def _record(self, current: _Open, seconds: float) -> RoundRecord:
        judged = [{"examples": 0, **row} for _, row in sorted(current.asked.get("evaluate", _Asked()).rows.items())]
        pooled = _pooled(judged)
        metrics = dict(current.metrics)
        if pooled:
            metrics[CLIENT_TEST] = {**pooled, **metrics.get(CLIENT_TEST, {}), "examples": pooled["examples"]}
        # Those that train are a round's clients; an app without training has its queries. Round 0 has none.
        order = sorted(current.asked, key=lambda kind: (kind != "train", kind == "evaluate"))
        main = current.asked[order[0]] if order and current.number else _Asked()
        return RoundRecord(
            current.number,
            cohort=len(main.clients),
            completed=len(main.clients - main.failed),
            clients=[row for _, row in sorted(main.rows.items())] if order[:1] != ["evaluate"] else [],
            chunks=current.chunks,
            events=current.events,
            bytes_up=current.bytes_up,
            bytes_down=current.bytes_down,
            seconds=seconds,
            train_seconds=_covered(current.spans),
            metrics=metrics,
            epsilon=self._epsilon,
            client_metrics=[{"split": CLIENT_TEST, **row} for row in judged if len(row) > 2],
        )

    # ------------------------------------------------------------------------------------------ the directory

    def _client(self, node: int) -> int:
        return self._clients.get(node, node)

    def _learn(self, sent: Sequence[Message]) -> None:
        """Names and shapes of what is sent first; the final weights are written in that order."""
        if self._layout or self._store is not None:
            return
        for message in sent:
            records = [record for record in message.content.array_records.values() if record]
            if len(records) == 1:
                # Arrays of legacy messages do not say their shape.
                shapes = {name: array.shape or array.numpy().shape for name, array in records[0].items()}
                self._layout = {name: list(shape) for name, shape in shapes.items()}
                return

    def _kept(self) -> RunStore:
        """The run's directory, made when there is something to write."""
        if self._store is None:
            from fedsim.runs import RunStore

            self._store = RunStore.create(self.directory, self._experiment(), self._manifest(), self._layout)
        return self._store

    def _experiment(self) -> str:
        """What the run was asked, in the form that reports and exports read."""
        import tomlkit

        rounds = {} if self.planned is None else {"rounds": self.planned}
        table = {
            "name": self.app.name,
            "seed": self._seed,
            **rounds,
            "strategy": self.strategy or self.app.name,
            "data": {"clients": self.app.supernodes},
            "app": {"serverapp": self.app.server, "clientapp": self.app.client, "config": self.app.config},
        }
        return tomlkit.dumps(table)

    def _manifest(self) -> dict[str, Any]:
        return {
            "versions": {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()},
            "seed": self._seed,
            "machine": {"system": platform.system(), "architecture": platform.machine()},
            "execution": {"name": "flower", "engine": self._engine, "workers": self._workers},
            "clients": self.app.supernodes,
            "app": {
                "directory": str(self.app.directory),
                "serverapp": self.app.server,
                "clientapp": self.app.client,
            },
            "sources": {
                str(path.relative_to(self.app.directory)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in _sources(self.app)
            },
            "again": self._command(),
            "command": ["fedsim" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name, *sys.argv[1:]],
        }

    def _command(self) -> list[str]:
        """The command that runs the app again with this configuration."""
        settings = [word for key, value in self.app.config.items() for word in ("-c", f"{key}={_toml(value)}")]
        clients = ["--num-supernodes", str(self.app.supernodes), "--seed", str(self._seed)]
        return ["fedsim", "simulate", str(self.app.directory), *settings, *clients]

    def _tensors(self) -> dict[str, Any]:
        """The server's weights as a checkpoint: one row where they are what was sent, by name otherwise."""
        import torch

        if not self._arrays:
            return {}
        shapes = {name: list(array.shape) for name, array in self._arrays}
        if shapes == self._layout:
            return {"row": torch.from_numpy(_row(self._arrays))}
        return {name: torch.from_numpy(array.copy()) for name, array in self._arrays}

    # --------------------------------------------------------------------------------------------------- its end

    def finish(self, seconds: float | None = None) -> dict[str, Any]:
        """Commits the last round, marks the run as finished, and returns what it came to."""
        with self._lock:
            self._commit()
            store = self._kept()
            summary = self._summary(time.monotonic() - self._started if seconds is None else seconds)
            store.finish(summary)
            return summary

    def event(self, kind: str, text: str, traceback: str = "") -> None:
        """Records something that belongs to the run: the server's own failure, a report that was not written."""
        with self._lock:
            self._commit()
            self._kept().event(Event(max(self._last, 0), kind, text, stage="server", traceback=traceback))
            self._totals["events"] += 1

    def close(self) -> None:
        """Gives the directory free. May be called twice."""
        with self._lock:
            if self._store is not None:
                self._store.close()

    def _summary(self, seconds: float) -> dict[str, Any]:
        split = next((name for name in (TEST, CLIENT_TEST) if name in self._evaluated), None)
        found = self._evaluated[split][1] if split else {}
        named = [name for name in found if name not in ("loss", "examples")]
        primary = "accuracy" if "accuracy" in named or not found else named[0] if named else "loss"
        return {
            "out": str(self.shown),
            "name": self.app.name,
            "rounds": max(self._last, 0),
            "metric_name": primary,
            "metric": found.get(primary),
            "split": split,
            "examples": found.get("examples"),
            "accuracy": found.get("accuracy"),
            "loss": found.get("loss"),
            "weights_sha256": _sha256(self._arrays),
            "parameters": sum(array.size for _, array in self._arrays) or None,
            "bytes_up": self._totals["bytes_up"],
            "bytes_down": self._totals["bytes_down"],
            "epsilon": self._epsilon,
            "seconds": seconds,
            "events": self._totals["events"],
            "messages": self.messages,
            "failures": self._totals["failures"],
            "notes": _notes(split),
        }


def _number(message: Message) -> int | None:
    """The round that a message names: ``server-round`` in a configuration, or a legacy message's group."""
    content = message.content
    for record in content.config_records.values():
        found = record.get("server-round", record.get("server_round"))
        if isinstance(found, int):
            return found
    group = message.metadata.group_id
    legacy = any(name.partition(".")[0] in _LEGACY for name in content)
    return int(group) if legacy and group.isdecimal() else None


def _trains(message: Message) -> bool:
    return message.metadata.message_type.partition(".")[0] == "train"


def size(content: RecordDict) -> int:
    """Bytes of a message's payload: its arrays' data and the byte strings of its configurations (masked shares)."""
    total = 0
    for record in content.array_records.values():
        total += sum(len(array.data) for array in record.values())
    for config in content.config_records.values():
        for value in config.values():
            if isinstance(value, bytes):
                total += len(value)
            elif isinstance(value, list) and value and isinstance(value[0], bytes):
                total += sum(len(item) for item in value)
    return total


def values(content: RecordDict) -> tuple[int | None, dict[str, float]]:
    """The number of examples that a reply names, and its numeric metrics under canonical names."""
    found: dict[str, Any] = {}
    for record in content.metric_records.values():
        found |= record
    for name, config in content.config_records.items():
        if name.endswith("res.metrics"):  # a legacy client's
            found |= config
    examples = next((found.pop(name) for name in _EXAMPLES if name in found), None)
    return None if examples is None else int(examples), canonical(found)


def canonical(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among metrics, ``eval_loss`` as ``loss`` and ``test-acc`` as ``accuracy``: the split says the rest.

    A name is kept as it is where the short one is taken.
    """
    numbers = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in _EXAMPLES
    }
    named: dict[str, float] = {}
    for name, value in numbers.items():
        place, separator, rest = name.replace("-", "_").partition("_")
        short = rest if separator and place in _PLACES else name
        short = _SHORT.get(short, short)
        chosen = name if short in named or (short in numbers and short != name) else short
        named[f"{chosen}_" if chosen in _RESERVED else chosen] = value
    return named


def _problem(reply: Message | None) -> str | None:
    """What is wrong with a reply, ``None`` for a good one."""
    if reply is None:
        return "no reply"
    if reply.has_error():
        error = reply.error
        return " ".join((error.reason or f"error {error.code}").split())
    for name, config in reply.content.config_records.items():
        if name.endswith("res.status") and config.get("code", 0) != 0:  # a legacy client's
            return str(config.get("message") or "the client says that it failed")
    return None


def _pooled(evaluated: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Each metric's mean over the clients' examples, over the clients that have it; nothing where nobody has one."""
    rows = list(evaluated)
    names = dict.fromkeys(name for row in rows for name in row if name not in ("client", "examples"))
    if not names:
        return {}
    pooled: dict[str, float] = {}
    for name in names:
        having = [row for row in rows if name in row]
        weights = [row["examples"] for row in having]
        if not any(weights):
            weights = [1] * len(having)
        pooled[name] = sum(w * row[name] for w, row in zip(weights, having, strict=True)) / sum(weights)
    return {**pooled, "examples": float(sum(row["examples"] for row in rows))}


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of a union of spans: phases of a legacy server overlap."""
    total, end = 0.0, -math.inf
    for begin, until in sorted(spans):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


def numpy_arrays(record: ArrayRecord) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of an ArrayRecord."""
    return ((name, array.numpy()) for name, array in record.items())


def _row(arrays: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """The arrays, one after another, as one row of little-endian float32."""
    import numpy as np

    return np.concatenate([np.asarray(array).astype("<f4").reshape(-1) for _, array in arrays])


def _sha256(arrays: Sequence[tuple[str, np.ndarray]]) -> str | None:
    return hashlib.sha256(_row(arrays).tobytes()).hexdigest() if arrays else None


def _notes(split: str | None) -> list[str]:
    by = {
        TEST: "Evaluated by the server app: test is what it evaluated on, which only the app knows.",
        CLIENT_TEST: "Evaluated by the client apps: client test is what each evaluated on, which only the app knows.",
    }
    return [by[split]] if split else []


def _sources(app: App) -> list[Path]:
    """The Python files of the packages that the app's halves are in."""
    found: set[Path] = set()
    for top in {reference.split(":")[0].split(".")[0] for reference in (app.server, app.client)}:
        found |= {*(app.directory / top).rglob("*.py"), *app.directory.glob(f"{top}.py")}
    return sorted(found)


def _toml(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"'{value}'" if "'" not in value else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
