"""All cores of this machine: forked workers, one torch thread each; weights, data and results in shared memory."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import select
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clients.errors import FedsimError, RequestError, RunError
from fedsim.engines.engine import Answer, Engine, Result, _reused, cores
from fedsim.engines.memory import Segment, Segments, dumps
from fedsim.engines.wire import Channel

_WAITING = 2  # chunks a worker holds: one at work, one to begin with at once
_TRIES = 3
_LATE = "took longer"  # how a loss by a time limit begins
_BIG = 1 << 16  # bytes from which a result's tensor goes through shared memory

# The driver's paths come first, so that the nursery finds the same packages.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
    " from fedsim.engines.nursery import main; main(int(sys.argv[2]))"
)


# ---------------------------------------------------------------------------------------------------------- the worker


def serve(sock: socket.socket) -> None:
    """The worker's loop: the setup first, then a job at a time; ends with the driver, whatever it is doing then."""
    segments = Segments()
    channel = Channel(sock, segments)
    shelf = _Shelf(segments)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    # A thread reads, so that the driver's sends never wait for a worker that is itself sending.
    threading.Thread(target=_listen, args=(channel, inbox), daemon=True).start()
    worker = _setup(channel, inbox)
    broadcasts: dict[int, Any] = {}
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        while worker is not None:
            kind, *rest = inbox.get()
            if kind == "broadcast":
                broadcasts = {rest[0]: rest[1]}
                continue
            job, number, task, chunk = rest
            begun = time.perf_counter()
            try:
                answer = getattr(worker, task)(chunk, broadcasts[number])
                answer = Answer(answer.value, shelf.place(answer.tensors))
                message: tuple = ("done", job, answer, time.perf_counter() - begun)
            except Exception as error:
                message = ("raised", job, _error(error))
            channel.send(message)


def _listen(channel: Channel, inbox: queue.SimpleQueue[Any]) -> None:
    """Reads until the driver is gone, or until it cannot read what comes, and ends the process then."""
    try:
        while True:
            inbox.put(channel.receive())
    except (EOFError, OSError):
        pass
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _setup(channel: Channel, inbox: queue.SimpleQueue[Any]) -> Any:
    try:
        sys.path[:], folder, setup = inbox.get()
        os.chdir(folder)
        worker = pickle.loads(setup)()
    except Exception as error:
        channel.send(("raised", -1, _error(error, "the worker could not be set up: ")))
        return None
    channel.send(("ready", os.getpid()))
    return worker


def _error(error: Exception, said: str = "") -> FedsimError:
    """What a worker raised, as the driver shall raise it: what was raised on purpose says all there is to say."""
    if isinstance(error, RequestError):
        return RequestError(error.problems)
    if type(error) is RunError:
        made = RunError(str(error))
        made.add_note(traceback.format_exc())
        return made
    return RunError(f"engine: {said}{type(error).__name__}: {error}\n{traceback.format_exc()}")


class _Shelf:
    """A worker's places for large results, used in turn: as many as it may have results waiting, and one to write."""

    def __init__(self, segments: Segments):
        self.segments = segments
        self.places: list[dict[str, Tensor]] = [{} for _ in range(_WAITING + 1)]
        self.turn = 0
        self.number = 0

    def place(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        place = self.places[self.turn]
        self.turn = (self.turn + 1) % len(self.places)
        placed = {}
        for name, tensor in tensors.items():
            if tensor.numel() * tensor.element_size() < _BIG:
                placed[name] = tensor
                continue
            placed[name] = _reused(place, name, tensor.shape, tensor.dtype, self._make)
            placed[name].copy_(tensor)
        return placed

    def _make(self, size: int, dtype: torch.dtype) -> Tensor:
        self.number += 1
        segment = self.segments.add(Segment((os.getpid(), self.number), size * dtype.itemsize))
        return segment.tensor(0, (size,), (1,), dtype)


# ---------------------------------------------------------------------------------------------------------- the driver


class _Nursery:
    """The process that workers are forked from: one for as long as this process lives, whatever runs it does."""

    current: _Nursery | None = None

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.control, theirs = socket.socketpair()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}
        paths = json.dumps([os.path.abspath(path) for path in sys.path])
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, paths, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a client's code prints must not mix with the results on the driver's stdout
            env=environment,
        )
        theirs.close()

    @classmethod
    def ready(cls) -> _Nursery:
        """The living one, or a new one, which loads torch while the driver loads the data."""
        here = cls.current
        if here is None or here.owner != os.getpid() or here.process.poll() is not None:
            here = cls.current = cls()
        return here

    def fork(self) -> socket.socket:
        """A new worker; the driver's end of its socket."""
        ours, theirs = socket.socketpair()
        try:
            socket.send_fds(self.control, [b"w"], [theirs.fileno()])
        except OSError as error:
            raise RunError(f"engine: no worker process can be started ({error}); see the messages above") from None
        theirs.close()
        return ours


@dataclass
class _Job:
    number: int
    chunk: Any
    tries: int = 0
    retries: list[str] = field(default_factory=list)
    result: Result | None = None
    error: FedsimError | None = None


@dataclass(eq=False)
class _Worker:
    channel: Channel
    pid: int = 0
    jobs: deque[_Job] = field(default_factory=deque)
    held: int = 0
    broadcast: int = -1
    begun: float = 0.0

    def fileno(self) -> int:
        return self.channel.fileno()


class Processes(Engine):
    """Worker processes on this machine.

    Args:
        workers: how many; left out, one for each core this process may use.
        client_timeout: seconds a client may take before its chunk counts as lost; left out, any time.
    """

    def __init__(self, workers: int | None = None, client_timeout: float | None = None):
        self.count = workers or cores()
        self.client_timeout = client_timeout
        self.segments = Segments()
        self.buffers: dict[str, Tensor] = {}
        self.made = 0
        self.broadcasts = 0
        self.crew: list[_Worker] = []
        self.interrupted = False
        self.nursery = _Nursery.ready()

    @property
    def workers(self) -> int:
        return self.count

    def start(self, setup: Callable[[], Any]) -> None:
        # The setup travels as bytes: only with the driver's paths can a worker import what a user's file imports.
        pickled, used = dumps(setup, self.segments)
        place = ([os.path.abspath(path) for path in sys.path], os.getcwd())
        self.setup = pickle.dumps((*place, pickled)), used
        self.crew = [self._hire() for _ in range(self.count)]
        for worker in self.crew:
            self._welcome(worker)

    def _hire(self) -> _Worker:
        worker = _Worker(Channel(self.nursery.fork(), self.segments))
        with contextlib.suppress(OSError):
            worker.channel.send_pickled(*self.setup)
        return worker

    def _welcome(self, worker: _Worker) -> None:
        try:
            kind, *rest = worker.channel.receive()
        except EOFError:
            raise RunError("engine: a worker process ended while it was set up; see the messages above") from None
        if kind == "raised":
            raise rest[1]
        worker.pid = rest[0]

    def share(self, tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor
        shared = self._make(tensor.numel(), tensor.dtype).view(tensor.shape)
        shared.copy_(tensor)
        return shared

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _reused(self.buffers, name, shape, dtype, self._make)

    def _make(self, size: int, dtype: torch.dtype) -> Tensor:
        self.made += 1
        segment = self.segments.add(Segment((0, self.made), size * dtype.itemsize))
        return segment.tensor(0, (size,), (1,), dtype)

    def map(self, task: str, chunks: Sequence[Any], broadcast: Mapping[str, Any]) -> Iterator[Result]:
        self.broadcasts += 1
        shared = dumps(("broadcast", self.broadcasts, dict(broadcast)), self.segments)
        order = [_Job(i, chunk) for i, chunk in enumerate(chunks)]
        waiting = deque(order)
        numbers = len(order)
        place = 0
        try:
            while place < len(order):
                job = order[place]
                if job.error is not None:  # raised in the chunks' order, whichever came first
                    raise job.error
                if job.result is not None:
                    yield job.result
                    self._release(job)
                    place += 1
                    continue
                self._dispatch(task, waiting, shared)
                for worker in self._ready():
                    lost = self._hear(worker)
                    if lost is None:
                        continue
                    again = self._replace(worker, lost)
                    for back in reversed(again):
                        if back.tries >= (_TRIES if self._worthwhile(back, lost) else 1):
                            halves = self._halve(back, lost)
                            if halves:
                                at = order.index(back)
                                fresh = [_Job(numbers + i, half, _TRIES - 1) for i, half in enumerate(halves)]
                                numbers += len(fresh)
                                fresh[0].retries = back.retries
                                order[at : at + 1] = fresh
                                waiting.extendleft(reversed(fresh))
                            continue
                        waiting.appendleft(back)
        except KeyboardInterrupt:
            self.interrupted = True
            raise
        finally:
            self._abandon()

    def _dispatch(self, task: str, waiting: deque[_Job], shared: tuple[bytes, set]) -> None:
        for depth in range(_WAITING):
            for worker in self.crew:
                if not waiting or len(worker.jobs) > depth or len(worker.jobs) + worker.held >= _WAITING:
                    continue
                job = waiting.popleft()
                with contextlib.suppress(OSError):  # a worker that is gone is noticed when its answer is read
                    if worker.broadcast != self.broadcasts:
                        worker.channel.send_pickled(*shared)
                        worker.broadcast = self.broadcasts
                    worker.channel.send(("job", job.number, self.broadcasts, task, job.chunk))
                if not worker.jobs:
                    worker.begun = time.monotonic()
                worker.jobs.append(job)

    def _ready(self) -> list[_Worker]:
        """Workers with something to say, or that took too long (their sockets are closed then)."""
        busy = [worker for worker in self.crew if worker.jobs]
        limits = [self._deadline(worker) for worker in busy] if self.client_timeout else []
        wait = max(0.0, min(limits) - time.monotonic()) if limits else None
        readable = select.select(busy, [], [], wait)[0]
        late = [worker for worker in busy if limits and self._deadline(worker) < time.monotonic()]
        return readable + [worker for worker in late if worker not in readable]

    def _deadline(self, worker: _Worker) -> float:
        clients = len(worker.jobs[0].chunk) if hasattr(worker.jobs[0].chunk, "__len__") else 1
        return worker.begun + (self.client_timeout or 0.0) * clients

    def _hear(self, worker: _Worker) -> str | None:
        """Takes one answer; or says how the worker was lost."""
        if (
            self.client_timeout
            and self._deadline(worker) < time.monotonic()
            and not select.select([worker], [], [], 0)[0]
        ):
            return f"{_LATE} than {self.client_timeout:g} s a client"
        try:
            kind, number, *rest = worker.channel.receive()
        except EOFError:
            return "its process ended (killed, or out of memory)"
        job = worker.jobs.popleft()
        assert job.number == number
        worker.begun = time.monotonic()
        worker.held += 1
        if kind == "raised":
            job.error = rest[0]
            return None
        answer, seconds = rest
        job.result = Result(job.chunk, answer, worker.pid, seconds, retries=tuple(job.retries))
        return None

    def _release(self, job: _Job) -> None:
        """The result was used: its worker's place is free again."""
        assert job.result is not None
        for worker in self.crew:
            if worker.pid == job.result.pid:
                worker.held -= 1
        job.result = None

    def _replace(self, worker: _Worker, why: str) -> list[_Job]:
        """Hires somebody new; the first of the lost worker's chunks counts a try, the others had not begun."""
        jobs = list(worker.jobs)
        jobs[0].tries += 1
        jobs[0].retries.append(f"worker {worker.pid}: {why}")
        self._dismiss(worker)
        fresh = self._hire()
        self._welcome(fresh)
        self.crew[self.crew.index(worker)] = fresh
        return jobs

    def _worthwhile(self, job: _Job, why: str) -> bool:
        """Whether a lost chunk may do better as it is: not where it says that it has had all the time that it may."""
        return not why.startswith(_LATE) or getattr(job.chunk, "again_when_late", True)

    def _dismiss(self, worker: _Worker) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(worker.pid, 9)
        worker.channel.close()
        for key in [key for key in self.segments.by_key if key[0] == worker.pid]:
            self.segments.remove(key)

    def _halve(self, job: _Job, why: str) -> list[Any]:
        """The halves of a chunk that was lost too often; none where it cannot be split, and then it is given up."""
        halves = job.chunk.split() if hasattr(job.chunk, "split") else []
        if not halves:
            job.result = Result(job.chunk, None, 0, 0.0, lost=why, retries=tuple(job.retries))
        return halves

    def _abandon(self) -> None:
        """After a map that ended early: what is still under way is waited for and thrown away."""
        for worker in self.crew:
            while worker.jobs and not self.interrupted:
                try:
                    worker.channel.receive()
                    worker.jobs.popleft()
                except EOFError:
                    worker.jobs.clear()
            worker.held = 0

    def close(self) -> None:
        for worker in self.crew:
            worker.channel.close()
        self.crew = []
        self.buffers.clear()
        self.segments.clear()
