"""Flower's Grid without a network: what a server app sends is handled by an engine's workers."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from clients import randomness
from clients.errors import RequestError
from fedsim.engines.engine import Engine
from fedsim.flower import compat
from fedsim.flower.compat import Error, Grid, Message, RecordDict, Run, logger
from fedsim.flower.nodes import Nodes
from fedsim.flower.parcels import EMPTY, Packed, Shelf, ends, lay, moved, pack, size, unpack
from fedsim.flower.worker import Chunk, Item, Reply

_TARGET = 0.01  # seconds of work that a chunk of quick messages should hold
_GRACE = 2.0  # seconds after its limit at which a worker that cannot be interrupted is ended
_ENDLESS = 1e8  # seconds that no limit needs to be kept for
_QUIET = 0.5  # seconds without another message after which a legacy server is taken to have sent all
_POLLS, _PATIENCE = 10, 10.0  # of a server app that asks for nodes and sleeps, times and seconds
_SHOWN = 3  # tracebacks a phase


class Ledger(Protocol):
    """Whoever keeps the record of a simulation."""

    def begin(self, nodes: Sequence[int], engine: str, workers: int) -> None: ...

    def answered(self, message: Message, done: int, asked: int) -> None: ...

    def failed(self, message: Message, text: str, traceback: str = "") -> None: ...

    def dropped(self, message: Message, why: str) -> None: ...

    def phase(
        self, sent: Sequence[Message], replies: Sequence[Message], seconds: float, pids: Sequence[int]
    ) -> None: ...


@dataclass
class _Sent:
    """A message that was pushed: as it was then, and how many seconds the server waits for its reply."""

    message: Message
    content: tuple
    number: int
    timeout: float

    @property
    def node(self) -> int:
        return self.message.metadata.dst_node_id

    @property
    def id(self) -> str:
        return self.message.metadata.message_id

    @property
    def ttl(self) -> float:
        return self.message.metadata.ttl


@dataclass
class Totals:
    """What a simulation came to.

    Attributes:
        messages: sent to nodes.
        failures: replies that were errors, or that did not come.
        bytes_down: of arrays' data and byte strings sent to clients.
        bytes_up: the same, from them.
    """

    messages: int = 0
    failures: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


class EngineGrid(Grid):
    """A grid whose nodes are partitions, and whose messages are handled by an engine.

    Messages that were pushed are handled when replies are first pulled, all that there are in one phase, in parallel;
    those to one node one after another, in the order in which they were sent. Replies come in that order too. Bits
    depend on the seed, the node and the number of its message alone. Thread-safe.

    Limits (a message's ttl, the timeout of :meth:`send_and_receive`) are on the time that a node's own ClientApp takes.
    Nodes work side by side in what is simulated, so waiting for one of few workers is not counted.

    Args:
        engine: started, with workers of :class:`fedsim.flower.worker.Setup`.
        nodes: the nodes.
        run_id: the run.
        seed: drives drop-outs.
        here: the engine's workers are in this process.
        dropout: the probability that a node does not answer a message.
        client_timeout: seconds a ClientApp may take for a message.
        ledger: told of each phase and failure.
    """

    def __init__(
        self,
        engine: Engine,
        nodes: Nodes,
        run_id: int,
        *,
        seed: int = 0,
        here: bool = False,
        dropout: float = 0.0,
        client_timeout: float | None = None,
        ledger: Ledger | None = None,
    ):
        self.engine, self.nodes, self.run_id, self.seed, self.here = engine, nodes, run_id, seed, here
        self.dropout, self.client_timeout, self.ledger = dropout, client_timeout, ledger
        self.totals = Totals()
        self._run: Run = compat.empty_run(run_id)
        self._pending: list[_Sent] = []
        self._shelf = Shelf()
        self._known: dict[str, _Sent] = {}  # pushed, and not delivered yet
        self._replies: dict[str, Message | None] = {}  # by the id of what was sent; None: came too late
        self._phases = 0
        self._made = 0  # ids
        self._pace: dict[str, float] = {}  # message type -> seconds a message
        self._lock = threading.RLock()
        self._running = threading.RLock()
        self._expected = 0
        self._arrived = threading.Condition(self._lock)
        self._waits = _Waits()
        self._told = False

    # ------------------------------------------------------------------------------------------- what a server calls

    def set_run(self, run: Run) -> None:
        """Sets the run."""
        if not isinstance(run, Run):
            raise TypeError(f"`run` must be an instance of Run, got {type(run).__name__}")
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return Run(**vars(self._run))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message; Flower has deprecated this for ``Message(...)``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes' ids, always the same and in the order of their partitions.

        Raises:
            RequestError: where the server app waits for more nodes than there are.
        """
        needed = compat.needed_nodes()
        if needed is not None and needed[0] > len(self.nodes):
            asking = [text for text in needed[1] if int(text.partition("=")[2]) > len(self.nodes)]
            raise RequestError(compat.too_few(needed[0], len(self.nodes), asking))
        self._waits.asked(sys._getframe(1), self._made, len(self.nodes))
        return list(self.nodes.ids)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Takes messages; returns their ids. Those to nodes that do not exist are dropped, and it is said."""
        return [sent.id for sent in self._push(messages)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, each once; for an id that is not known (any more) an error, code 3."""
        asked = list(dict.fromkeys(message_ids))
        self._settle()
        return [reply for reply in (self._take(message_id) for message_id in asked) if reply is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Sends messages and waits for the replies: in the order of the messages, those that came in time."""
        sent = self._push(messages, math.inf if timeout is None else timeout)
        self._settle()
        replies = [self._take(one.id) for one in sent]
        if None in replies:
            late = [self._name(one.node) for one, reply in zip(sent, replies, strict=True) if reply is None]
            logger.warning(
                "%d of %d replies did not come within %g s, from %s", len(late), len(sent), timeout, _listed(late)
            )
        return [reply for reply in replies if reply is not None]

    # ------------------------------------------------------------------------------------------------ what it takes

    @contextlib.contextmanager
    def expect(self, count: int) -> Iterator[None]:
        """While it is on, a phase begins when so many messages have come, from as many threads."""
        self._expected = count
        try:
            yield
        finally:
            self._expected = 0

    def _push(self, messages: Iterable[Message], timeout: float = math.inf) -> list[_Sent]:
        taken: list[_Sent] = []
        dropped: list[int] = []
        for message in messages:
            if not isinstance(message, Message):
                raise TypeError(f"only messages can be sent, not {type(message).__name__}")
            with self._lock:
                self._made += 1
                if message.metadata.message_id in self._known:  # sent before, and its reply is still to be taken
                    message = compat.message(compat.metadata(vars(message.metadata)), message.content)
                compat.assign(message, f"{self.run_id:016x}-{self._made:08x}")
                meta = message.metadata
                if meta.reply_to_message_id or not meta.ttl > 0 or not message.has_content():
                    raise ValueError(f"Invalid message: {message}")
                if meta.dst_node_id not in self.nodes:
                    dropped.append(meta.dst_node_id)
                    if self.ledger is not None:
                        self.ledger.dropped(message, f"there is no such node; the nodes are {self.nodes}")
                    continue
                sent = _Sent(
                    message,
                    pack(message.content, self._shelf),
                    self.nodes.count(meta.dst_node_id),
                    timeout,
                )
                self._pending.append(sent)
                self._known[sent.id] = sent
                taken.append(sent)
                self._arrived.notify_all()
        if dropped:
            said = "1 message was" if len(dropped) == 1 else f"{len(dropped)} messages were"
            to = _listed([str(node) for node in dropped])
            logger.error("%s dropped: to %s, and the nodes are %s", said, to, self.nodes)
        return taken

    def _take(self, message_id: str) -> Message | None:
        with self._lock:
            sent = self._known.pop(message_id, None)
            reply = self._replies.pop(message_id, None)
        return self._unknown(message_id) if sent is None else reply

    def _unknown(self, message_id: str) -> Message:
        """Flower's answer to a question for a message that it does not have."""
        meta = compat.Metadata(
            run_id=self.run_id,
            message_id=f"{message_id}-unknown",
            src_node_id=compat.SERVER_NODE,
            dst_node_id=compat.SERVER_NODE,
            reply_to_message_id=message_id,
            group_id="",
            created_at=time.time(),
            ttl=0,
            message_type="query",
        )
        meta.delivered_at = ""
        said = f"Message Unavailable - there is no message {message_id!r} whose reply was not pulled before"
        return compat.message(meta, error=Error(compat.MESSAGE_UNAVAILABLE, said))

    # ------------------------------------------------------------------------------------------------------ a phase

    def _settle(self) -> None:
        """Handles all that was pushed. Of several threads one works for all, and the others wait for it."""
        with self._running:
            with self._lock:
                while 0 < len(self._pending) < self._expected and self._arrived.wait(_QUIET):
                    pass
                batch, shelf = self._pending, self._shelf
                self._pending, self._shelf = [], Shelf()
                if self._expected:  # threads come in any order
                    batch.sort(key=lambda sent: sent.node)
            if batch:
                self._phase(batch, shelf)

    def _phase(self, batch: list[_Sent], shelf: Shelf) -> None:
        begun = time.perf_counter()
        done: dict[str, tuple[Message | None, int]] = {}
        asked, shown = len(batch), 0
        self.totals.messages += asked
        self.totals.bytes_down += sum(size(sent.content, shelf.blobs) for sent in batch)

        def close(sent: _Sent, reply: Message | None, pid: int, failure: tuple[str, str] | None = None) -> None:
            nonlocal shown
            done[sent.id] = reply, pid
            if failure is not None:
                shown += 1
                self._tell(sent, *failure, with_traceback=shown <= _SHOWN)
            if reply is None or reply.has_error():
                self.totals.failures += 1
            if self.ledger is not None:
                self.ledger.answered(sent.message, len(done), asked)

        there = []
        for sent in batch:
            if self._drops_out(sent):
                said = "Node Unavailable - the node dropped out, as the simulation was asked for"
                close(sent, self._error(sent, compat.NODE_UNAVAILABLE, said), 0)
            else:
                there.append(sent)
        for wave in _waves(there):
            self._wave(wave, shelf, close)
        if shown > _SHOWN:
            logger.error("%d more clients failed; their replies say how", shown - _SHOWN)
        replies = [done[sent.id] for sent in batch]
        with self._lock:
            self._replies.update((sent.id, reply) for sent, (reply, _) in zip(batch, replies, strict=True))
        if self.ledger is not None:
            self.ledger.phase(
                [sent.message for sent in batch],
                [reply for reply, _ in replies if reply is not None],
                time.perf_counter() - begun,
                [pid for reply, pid in replies if reply is not None and pid],
            )

    def _wave(self, wave: list[_Sent], shelf: Shelf, close: Any) -> None:
        """Handles messages to as many different nodes."""
        self._phases += 1
        items = [self._item(sent, shelf) for sent in wave]
        broadcast: dict[str, Any] = {"phase": self._phases, "blobs": shelf.blobs}
        if not self.here:
            where = ends(shelf.blobs)
            block = self.engine.buffer("flower", (where[-1] if where else 1,), torch.uint8)
            lay(shelf.blobs, block)
            broadcast = {"phase": self._phases, "block": block, "ends": where}
        chunks, counts = self._chunks(wave, items)
        self._limit(wave, max(counts))
        place, spent = 0, dict[str, float]()
        with contextlib.closing(self.engine.map("handle", chunks, broadcast)) as results:  # type: ignore[type-var]
            for result in results:
                part = wave[place : place + len(result.chunk.items)]
                place += len(part)
                # The last loss of a chunk that is given up is no retry.
                for line in result.retries if result.answer is not None else result.retries[:-1]:
                    self._say_again(part, line)
                if result.answer is None:
                    for sent in part:
                        if result.lost.startswith("took longer"):
                            self._late(sent, 0, close)
                            continue
                        said = f"the worker process was lost over this message, each time it was tried: {result.lost}"
                        close(sent, self._error(sent, compat.CLIENT_CRASHED, said), 0, (said, ""))
                    continue
                replies, blobs = result.answer.value
                if not self.here:
                    blobs = _cut(result.answer.tensors["block"], blobs)
                for sent, reply in zip(part, replies, strict=True):
                    self._close(sent, reply, blobs, result.pid, close)
                kind = part[0].message.metadata.message_type
                spent[kind] = spent.get(kind, 0.0) + result.seconds
        for kind, seconds in spent.items():
            self._pace[kind] = seconds / sum(sent.message.metadata.message_type == kind for sent in wave)

    def _item(self, sent: _Sent, shelf: Shelf) -> Item:
        state = self.nodes.states.get(sent.node, EMPTY)
        return Item(
            dict(sent.message.metadata.__dict__),
            sent.content,
            moved(state.records, state.blobs, shelf),
            self.nodes.partition(sent.node),
            self.nodes.extra(sent.node),
            sent.number,
            self._seconds(sent),
        )

    def _chunks(self, wave: list[_Sent], items: list[Item]) -> tuple[list[Chunk], list[int]]:
        """Quick messages several at a time, as many as make a chunk's work worth its way, but four chunks a worker."""
        pace = self._pace.get(wave[0].message.metadata.message_type)
        most = math.ceil(len(items) / (4 * self.engine.workers))
        count = 1 if pace is None else max(1, min(most, int(_TARGET / max(pace, 1e-6))))
        chunks = [Chunk(tuple(items[i : i + count])) for i in range(0, len(items), count)]
        return chunks, [len(chunk.items) for chunk in chunks]

    def _limit(self, wave: list[_Sent], longest: int) -> None:
        """The engine's own limit ends workers that cannot be interrupted: code that holds the interpreter."""
        if self.here or not hasattr(self.engine, "client_timeout"):
            return
        limit = max(map(self._seconds, wave)) * longest + _GRACE
        self.engine.client_timeout = limit if limit < _ENDLESS else None

    def _close(self, sent: _Sent, reply: Reply, blobs: Sequence[bytes], pid: int, close: Any) -> None:
        """Turns a worker's reply into a message."""
        if reply.state is not None:
            self.nodes.keep(sent.node, _alone(reply.state, blobs))
        if reply.late and not self.here:
            self._late(sent, pid, close)
        elif reply.metadata is None:
            assert reply.error is not None
            code, said = reply.error
            close(sent, self._error(sent, code, f"{said} ({self._where(sent)})"), pid, (said, reply.traceback))
        else:
            if reply.late:
                self._say_inline(sent)
            message = compat.message(
                compat.metadata({**reply.metadata, "_message_id": f"{sent.id}-reply"}),
                None if reply.error is not None else unpack(reply.content, blobs),
                None if reply.error is None else Error(*reply.error),
            )
            self.totals.bytes_up += size(reply.content, blobs)
            close(sent, message, pid)

    def _seconds(self, sent: _Sent) -> float:
        """How long a ClientApp may take for a message."""
        return min(sent.ttl, sent.timeout, math.inf if self.client_timeout is None else self.client_timeout)

    def _late(self, sent: _Sent, pid: int, close: Any) -> None:
        """A reply that did not come in time: an error, or none where the server itself stops waiting."""
        seconds = self._seconds(sent)
        if seconds == self.client_timeout:
            said = f"the ClientApp took longer than {seconds:g} s"
            close(sent, self._error(sent, compat.CLIENT_CRASHED, said), pid, (said, ""))
        elif seconds == sent.ttl:
            said = f"Message Unavailable - the ClientApp took longer than {seconds:g} s, which is the message's ttl"
            close(sent, self._error(sent, compat.MESSAGE_UNAVAILABLE, said), pid, (said, ""))
        else:
            close(sent, None, pid)

    def _error(self, sent: _Sent, code: int, reason: str) -> Message:
        reply = Message(Error(code, reason), reply_to=sent.message)
        compat.assign(reply, f"{sent.id}-reply")
        return reply

    def _drops_out(self, sent: _Sent) -> bool:
        if not self.dropout:
            return False
        keys = randomness.keys(self.seed, "flower.dropout", sent.number, sent.node)
        return bool(randomness.uniforms(keys, 1)[0, 0] < self.dropout)

    # ------------------------------------------------------------------------------------------------- what it says

    def _name(self, node: int) -> str:
        return f"node {node} (partition {self.nodes.partition(node)})"

    def _where(self, sent: _Sent) -> str:
        """Who was asked for what, and in which round where the message tells it."""
        meta = sent.message.metadata
        configs = sent.message.content.config_records.values()
        numbers = [config["server-round"] for config in configs if "server-round" in config]
        number = numbers[0] if numbers else meta.group_id if meta.group_id.isdigit() else None
        return f"{self._name(sent.node)}, {meta.message_type}" + ("" if number is None else f", round {number!s}")

    def _tell(self, sent: _Sent, text: str, trace: str, *, with_traceback: bool) -> None:
        if self.ledger is not None:
            self.ledger.failed(sent.message, text, trace)
        if with_traceback:
            logger.error("%s: %s%s", self._where(sent), text, f"\n{trace.rstrip()}" if trace else "")

    def _say_again(self, part: Sequence[_Sent], line: str) -> None:
        names = _listed([self._name(sent.node) for sent in part])
        logger.warning("%s: a worker was lost over it, and it was run again from the start (%s)", names, line)

    def _say_inline(self, sent: _Sent) -> None:
        if not self._told:
            self._told = True
            logger.warning(
                '%s answered after its time limit, and was waited for: engine="inline" cannot enforce limits,'
                ' engine="processes" does',
                self._where(sent),
            )


class _Waits:
    """Notices a server app that waits for nodes: it asks again and again from one place, sends nothing, and sleeps.

    Work between the questions shows in the thread's processor time. Only the thread that the server app was started in
    is watched: Flower's legacy servers ask from another one all the time.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.place: tuple = ()
        self.times, self.since, self.worked = 0, 0.0, 0.0

    def asked(self, frame: Any, traffic: int, nodes: int) -> None:
        if threading.get_ident() != self.thread:
            return
        place, now, worked = (frame.f_code, frame.f_lasti, traffic), time.monotonic(), time.thread_time()
        if place != self.place:
            self.place, self.times, self.since, self.worked = place, 0, now, worked
        self.times += 1
        waited = now - self.since
        if self.times > _POLLS and waited > _PATIENCE and worked - self.worked < 0.2 * waited:
            raise RequestError(
                f"num_supernodes: the server app has asked for nodes {self.times} times in {waited:.0f} s and sent"
                f" nothing: it waits for more than the {nodes} that there are; raise num_supernodes or ask for fewer"
            )


def _waves(batch: list[_Sent]) -> list[list[_Sent]]:
    """Messages to one node in different waves, in the order in which they were sent."""
    seen = Counter[int]()
    waves: list[list[_Sent]] = []
    for sent in batch:
        number = seen[sent.node]
        seen[sent.node] += 1
        if number == len(waves):
            waves.append([])
        waves[number].append(sent)
    return waves


def _alone(records: tuple, blobs: Sequence[bytes]) -> Packed:
    """Packed records with no more than the bytes that they refer to."""
    shelf = Shelf()
    return Packed(moved(records, blobs, shelf), tuple(shelf.blobs))


def _cut(block: torch.Tensor, where: Sequence[int]) -> list[bytes]:
    """The bytes that lie in a block, copied out of it."""
    view: Any = block.numpy().data
    begins: Iterable[int] = [0, *where[:-1]] if where else []
    return [bytes(view[begin:end]) for begin, end in zip(begins, where, strict=True)]


def _listed(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def settings(config: Mapping[str, Any] | None, key: str) -> dict[str, Any]:
    """A run's configuration: names and plain values, as Flower has it."""
    if config is None:
        return {}
    if not isinstance(config, Mapping):
        raise RequestError(f"{key}: {type(config).__name__} is not a mapping of settings")
    wrong = [
        f"{key}.{name}: {type(value).__name__} is not a bool, int, float or str"
        for name, value in config.items()
        if not isinstance(value, bool | int | float | str)
    ]
    if wrong:
        raise RequestError(wrong)
    return dict(config)
