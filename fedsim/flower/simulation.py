"""``simulate``: runs a Flower app, its server here and its clients on an engine's workers."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clients import catalog, randomness
from clients.errors import RequestError
from fedsim import kinds  # noqa: F401  (of things that have names, engines among them)
from fedsim.engines.engine import Engine, cores
from fedsim.engines.inline import Inline
from fedsim.flower import compat
from fedsim.flower.compat import ClientApp, Context, RecordDict, ServerApp
from fedsim.flower.grid import EngineGrid, Ledger, settings
from fedsim.flower.nodes import NodeConfig, Nodes
from fedsim.flower.worker import Here, Named, Setup, load_app, seed_everything, travelling

_one_at_a_time = threading.Lock()
_FROZEN = 10_000  # objects; fewer are the interpreter's own, more were frozen by whoever calls


@dataclass(frozen=True)
class SimulationResult:
    """What a simulation came to.

    Attributes:
        context: the server's, with the state that it left in it.
        returned: what the server app's main function returned.
        messages: sent to nodes.
        failures: replies that were errors, or that did not come.
        bytes_down: of arrays' data and byte strings sent to clients.
        bytes_up: the same, from them.
        seconds: in the server app, workers ready.
        engine: the engine's name.
        workers: how many workers it had.
    """

    context: Context
    returned: Any
    messages: int
    failures: int
    bytes_down: int
    bytes_up: int
    seconds: float
    engine: str
    workers: int


def simulate(
    server_app: ServerApp | str,
    client_app: ClientApp | str,
    num_supernodes: int,
    *,
    run_config: Mapping[str, bool | int | float | str] | None = None,
    engine: str | Engine = "auto",
    workers: int | None = None,
    seed: int = 0,
    node_config: NodeConfig | None = None,
    client_timeout: float | None = None,
    dropout: float = 0.0,
    ledger: Ledger | None = None,
    app_dir: str | os.PathLike[str] | None = None,
    quiet: bool = False,
) -> SimulationResult:
    """Runs a Flower app: the same bits from every engine and any number of workers.

    Before each message a ClientApp's random, NumPy and torch generators are seeded from the seed, the node and the
    number of its message. The server app's are its own: an app object finds them as you left them; an app given by name
    finds them seeded with ``seed``. After each message the current folder, the environment and torch's default dtype,
    gradient mode and threads are as before it. What a ClientApp keeps elsewhere in its process, such as globals of its
    modules and what it patches in others, reaches other clients that the same worker handles later: keep in
    ``context.state`` what is to last.

    Args:
        server_app: the ServerApp, or ``"package.module:app"``.
        client_app: the ClientApp, likewise. One of a notebook or script is sent to each worker once.
        num_supernodes: how many nodes there are, one for each partition.
        run_config: the run's configuration.
        engine: ``"inline"``, ``"processes"``, ``"auto"`` (processes where there is more than one core and node), or an
            engine of your own that was not started.
        workers: how many; left out, one for each core.
        seed: drives everything random in clients, and drop-outs.
        node_config: what a node's configuration holds beside ``partition-id`` and ``num-partitions``: a mapping, or a
            function of the partition's number.
        client_timeout: seconds a ClientApp may take for a message before it counts as failed; needs processes.
        dropout: the probability that a node does not answer a message: the reply is an error then.
        ledger: told of all that is sent and answered.
        app_dir: the folder in which apps given by name are found.
        quiet: of Flower's own log only errors.

    Returns:
        What it came to.

    Raises:
        RequestError: for what cannot be run, such as a server app that waits for more nodes than there are.
        RunError: where the ClientApp cannot be loaded.
        Exception: whatever the server app raises.
    """
    nodes = Nodes(num_supernodes, node_config)
    config = settings(run_config, "run_config")
    _check(server_app, client_app, workers, seed, client_timeout, dropout)
    if not _one_at_a_time.acquire(blocking=False):
        raise RequestError(
            "simulate: this process is already simulating a Flower app, and Flower has one run a process"
        )
    try:
        folder = None if app_dir is None else str(Path(app_dir).resolve())
        if folder is not None and not Path(folder).is_dir():
            raise RequestError(f"app_dir: there is no folder {folder}")
        with _path(folder), compat.quiet_logger(quiet), _engine(engine, workers, len(nodes)) as hands:
            here = isinstance(hands, Inline)
            if here and client_timeout is not None:
                raise RequestError('client_timeout: engine="inline" cannot enforce it; take engine="processes"')
            run_id = randomness.key(seed, "flower.run")
            with compat.identified(run_id):
                setup = Setup(
                    _client(client_app, folder, here),
                    run_id,
                    config,
                    len(nodes),
                    seed,
                    quiet,
                    here,
                    torch.get_default_dtype(),
                )
                hands.start(setup)
                if isinstance(server_app, str):
                    seed_everything(randomness.key(seed, "flower.server"))
                    app = load_app(server_app, folder, "server_app", ServerApp)
                else:
                    app = server_app
                grid = EngineGrid(
                    hands,
                    nodes,
                    run_id,
                    seed=seed,
                    here=here,
                    dropout=dropout,
                    client_timeout=client_timeout,
                    ledger=ledger,
                )
                name = type(hands).__name__.lower()
                if ledger is not None:
                    ledger.begin(nodes.ids, name, hands.workers)
                context = Context(run_id, compat.SERVER_NODE, {}, RecordDict(), config)
                begun = time.perf_counter()
                with _frozen(), compat.gathered_legacy(len(nodes), grid.expect), compat.capturing(app) as returned:
                    app(grid=grid, context=context)
                seconds = time.perf_counter() - begun
                total, value = grid.totals, returned[-1] if returned else None
                return SimulationResult(
                    context,
                    value,
                    total.messages,
                    total.failures,
                    total.bytes_down,
                    total.bytes_up,
                    seconds,
                    name,
                    hands.workers,
                )
    finally:
        _one_at_a_time.release()


def _check(
    server_app: Any, client_app: Any, workers: Any, seed: Any, client_timeout: float | None, dropout: float
) -> None:
    wrong = []
    for key, app, kind in (("server_app", server_app, ServerApp), ("client_app", client_app, ClientApp)):
        if not isinstance(app, str | kind):
            wrong.append(f'{key}: {type(app).__name__} is not a flwr {kind.__name__}, or "package.module:app"')
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
        wrong.append(f"workers: {workers!r} is not a whole number of at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int):
        wrong.append(f"seed: {seed!r} is not a whole number")
    if client_timeout is not None and not (_real(client_timeout) and client_timeout > 0):
        wrong.append(f"client_timeout: {client_timeout!r} is not a number of seconds above 0")
    if not (_real(dropout) and 0 <= dropout < 1):
        wrong.append(f"dropout: {dropout!r} is not a probability of at least 0 and below 1")
    if wrong:
        raise RequestError(wrong)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _client(app: ClientApp | str, folder: str | None, here: bool) -> Any:
    if isinstance(app, str):
        return Named(app, folder)
    return Here(app) if here else travelling(app)


def _engine(said: str | Engine, workers: int | None, nodes: int) -> Engine:
    if isinstance(said, Engine):
        return said
    if said == "auto":
        several = hasattr(os, "fork") and min(workers or cores(), nodes) > 1
        said = "processes" if several else "inline"
    return catalog.build(catalog.Part(said), "engines", Path.cwd(), key="engine", workers=workers)


@contextmanager
def _path(folder: str | None) -> Iterator[None]:
    """The app's folder first on the path; as before when it ends."""
    before = list(sys.path)
    if folder is not None:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path[:] = before


@contextmanager
def _frozen() -> Iterator[None]:
    """Leaves all that there is now out of garbage collections.

    Flower collects garbage for every message that it takes apart, 0.2 s each time beside torch's objects.
    """
    before = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if before < _FROZEN:
            gc.unfreeze()
