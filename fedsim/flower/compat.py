"""All of Flower that fedsim takes from undocumented places, in one module; it works with flwr 1.41 and 1.42.

Telemetry is switched off here, before flwr is first imported, unless ``FLWR_TELEMETRY_ENABLED`` says otherwise.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from clients.errors import RequestError

_SAID = os.environ.get("FLWR_TELEMETRY_ENABLED")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
    from flwr.app.metadata import Metadata
    from flwr.clientapp import ClientApp
    from flwr.common.constant import ErrorCode
    from flwr.serverapp import Grid, ServerApp
    from flwr.supercore import telemetry
    from flwr.supercore.logger import FLOWER_LOGGER
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = f"flwr {version('flwr')} is installed"
    except PackageNotFoundError:
        found = "flwr is not installed"
    raise RequestError(
        f"flwr: {found}, and fedsim needs flwr >= 1.41, < 2 to run Flower apps ({error});"
        ' install it with: pip install "flwr[simulation]>=1.41,<2"'
    ) from error

if _SAID is None:  # flwr may have been imported before, by the script that calls fedsim
    telemetry.FLWR_TELEMETRY_ENABLED = "0"

#: The server's place among the nodes.
SERVER_NODE = 1

CLIENT_RAISED: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
CLIENT_CRASHED: int = getattr(ErrorCode, "CLIENT_APP_CRASHED", ErrorCode.UNKNOWN)
MESSAGE_UNAVAILABLE: int = ErrorCode.MESSAGE_UNAVAILABLE
NODE_UNAVAILABLE: int = ErrorCode.NODE_UNAVAILABLE

logger = FLOWER_LOGGER

__all__ = [
    "CLIENT_CRASHED",
    "CLIENT_RAISED",
    "MESSAGE_UNAVAILABLE",
    "NODE_UNAVAILABLE",
    "SERVER_NODE",
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "Grid",
    "Message",
    "Metadata",
    "MetricRecord",
    "RecordDict",
    "Run",
    "ServerApp",
    "array",
    "assign",
    "capturing",
    "copied",
    "empty_run",
    "gathered_legacy",
    "identified",
    "logger",
    "message",
    "metadata",
    "needed_nodes",
    "quiet_logger",
    "same_task",
]


def array(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> Array:
    """An Array of its parts, without the checks that its constructor makes of arguments of any kind."""
    made = Array.__new__(Array)
    made.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)
    return made


def metadata(values: Mapping[str, Any]) -> Metadata:
    """Metadata of the values that ``vars`` gave of another."""
    made = Metadata.__new__(Metadata)
    made.__dict__.update(values)
    return made


def message(meta: Metadata, content: RecordDict | None = None, error: Error | None = None) -> Message:
    """A message with the metadata given."""
    return Message(metadata=meta, content=content, error=error)  # type: ignore[call-overload]


def assign(sent: Message, message_id: str) -> None:
    """Gives a message its id, and what identifies the run and the server where an older release left that open."""
    values = sent.metadata.__dict__
    values["_message_id"] = message_id
    if not values.get("_reply_to_message_id"):
        values["_run_id"], values["_src_node_id"] = TaskIdentity.run_id, TaskIdentity.node_id


def copied(content: RecordDict) -> RecordDict:
    """The same records, of which nothing that can be changed is shared: the arrays' bytes cannot."""
    made = RecordDict()
    for key, record in content.items():
        twin = record.copy()
        values = twin.__dict__["_data"]
        for name, value in values.items():
            if isinstance(value, Array):
                values[name] = array(value.dtype, value.shape, value.stype, value.data)
            elif isinstance(value, list):
                values[name] = list(value)
        made.__dict__["_data"][key] = twin
    return made


def empty_run(number: int) -> Run:
    """A run that has nothing but its number."""
    return Run.create_empty(number)


def same_task(run_id: int, node_id: int = SERVER_NODE, task_id: int = 1) -> None:
    """Says who this process is: messages cannot be made without."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, task_id


@contextmanager
def identified(run_id: int) -> Iterator[None]:
    """This process is the server of a run; as before when it ends."""
    names = ("_run_id", "_node_id", "_task_id")
    before = {name: vars(TaskIdentity).get(name) for name in names}
    same_task(run_id)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


@contextmanager
def quiet_logger(quiet: bool) -> Iterator[None]:
    """Of Flower's own log only errors, where that is asked for."""
    before = logger.level
    if quiet:
        logger.setLevel("ERROR")
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def capturing(app: ServerApp) -> Iterator[list[Any]]:
    """Keeps what the app's main function returns, which calling a ServerApp drops."""
    main = getattr(app, "_main", None)
    kept: list[Any] = []
    if main is None:
        yield kept
        return

    def wrapped(grid: Grid, context: Context) -> None:
        kept.append(main(grid, context))

    app._main = wrapped
    try:
        yield kept
    finally:
        app._main = main


# ------------------------------------------------------------------------------------------------- waits without end

#: Settings of Flower's strategies by which they wait for nodes.
_ASKING = ("min_available_nodes", "min_train_nodes", "min_evaluate_nodes")


def needed_nodes() -> tuple[int, list[str]] | None:
    """How many nodes Flower's sampling waits for, where it is what asked for the nodes, and the settings that say so.

    To be called from the method of the grid that it polls. Its loop ends with enough nodes only, and their number is
    fixed in a simulation: so it is known at once whether it ends.
    """
    frame = sys._getframe(2)
    if frame.f_code.co_name != "sample_nodes" or not frame.f_globals.get("__name__", "").startswith("flwr."):
        return None
    needed = frame.f_locals.get("min_available_nodes")
    if not isinstance(needed, int):
        return None
    strategy = frame.f_back.f_locals.get("self") if frame.f_back else None
    values = {name: getattr(strategy, name, None) for name in _ASKING}
    return needed, [f"{name}={value}" for name, value in values.items() if isinstance(value, int)]


@contextmanager
def gathered_legacy(nodes: int, expect: Callable[[int], Any]) -> Iterator[None]:
    """While it is on, the legacy server asks its clients all at once, and takes their results in the order it asked.

    It sends each message from a thread of its own and takes results in the order of a set of futures, which differs
    from run to run, and a float32 mean with it. Its wait for clients that never come ends in an error.

    Args:
        nodes: how many nodes there are.
        expect: a context manager around a call that sends so many messages from as many threads.
    """
    try:
        from flwr.server import SimpleClientManager
        from flwr.server import server as legacy
    except ImportError:  # a release that has no legacy servers any more
        yield
        return
    with ExitStack() as stack:

        def replace(owner: Any, name: str, wrap: Callable[[Callable], Callable]) -> None:
            original = getattr(owner, name, None)
            if original is not None:
                setattr(owner, name, wrap(original))
                stack.callback(setattr, owner, name, original)

        def asking(original: Callable) -> Callable:
            signature = inspect.signature(original)

            def wrapped(*args: Any, **kwargs: Any) -> Any:
                given = signature.bind(*args, **kwargs)
                instructions = given.arguments["client_instructions"]
                place = {id(client): number for number, (client, _) in enumerate(instructions)}
                given.arguments["max_workers"] = max(1, min(len(instructions), _THREADS))
                with expect(min(len(instructions), _THREADS)):
                    results, failures = original(*given.args, **given.kwargs)
                results.sort(key=lambda result: place.get(id(result[0]), len(place)))
                return results, failures

            return wrapped

        def waiting(original: Callable) -> Callable:
            def wrapped(self: Any, num_clients: int, *args: Any, **kwargs: Any) -> bool:
                if num_clients > nodes:
                    raise RequestError(too_few(num_clients, nodes, ["min_available_clients", "min_fit_clients"]))
                return original(self, num_clients, *args, **kwargs)

            return wrapped

        for name in ("fit_clients", "evaluate_clients"):
            replace(legacy, name, asking)
        replace(SimpleClientManager, "wait_for", waiting)
        yield


_THREADS = 256  # of a legacy server, each waiting for one client


def too_few(needed: int, nodes: int, asking: list[str]) -> str:
    """The line for a wait that cannot end."""
    said = f" ({', '.join(asking)})" if asking else ""
    there = f"{nodes} node{'' if nodes == 1 else 's'}"
    return (
        f"num_supernodes: the server app waits for {needed} nodes{said} and there will never be more than the {there}"
        f" of this simulation; give it at least {needed}, or ask for fewer"
    )


def thread_is_main() -> bool:
    """Whether this is the main thread, the only one that signals reach."""
    return threading.current_thread() is threading.main_thread()
