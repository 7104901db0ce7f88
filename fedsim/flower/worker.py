"""The worker: calls a ClientApp for one message after another, each from random state of its own."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.util
import io
import os
import pickle
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import cloudpickle
import numpy as np
import torch

from clients import randomness
from clients.errors import RequestError, RunError
from fedsim.engines.engine import Answer
from fedsim.flower import compat
from fedsim.flower.compat import ClientApp, Context, Message, RecordDict
from fedsim.flower.parcels import Blobs, Shelf, ends, joined, moved, packed, unpack

_AGAIN = 0.25  # seconds after which a client that swallowed its interruption is interrupted again
_LONGEST = 1e8  # seconds; timers take no more


@dataclass(frozen=True)
class Item:
    """One message on its way to a ClientApp.

    Attributes:
        metadata: the values of its Metadata.
        content: packed; numbers are those of the phase's shelf.
        state: the node's state, packed likewise.
        partition: the partition that the node holds.
        config: what its configuration holds beside the partition.
        number: of the node's messages, which one; from 1.
        limit: seconds that the ClientApp may take.
    """

    metadata: dict[str, Any]
    content: tuple
    state: tuple
    partition: int
    config: dict[str, Any]
    number: int
    limit: float


@dataclass(frozen=True)
class Chunk:
    """Messages that one worker handles in one go. It has no length: an engine's time limit is for all of it.

    One that took too long could not be interrupted, and is not tried again.
    """

    items: tuple[Item, ...]
    again_when_late: ClassVar[bool] = False

    def split(self) -> list[Chunk]:
        half = len(self.items) // 2
        return [Chunk(self.items[:half]), Chunk(self.items[half:])] if half else []


@dataclass(frozen=True)
class Reply:
    """What became of a message.

    Attributes:
        metadata: of the ClientApp's reply; ``None`` where there is none.
        content: packed; numbers are those of the chunk's shelf.
        error: ``(code, reason)`` of a reply that is an error, and of a ClientApp that failed.
        traceback: where it failed.
        state: what the node keeps, packed likewise; ``None`` where nothing changed.
        late: the limit was passed. In the server's own process the reply is there all the same.
    """

    metadata: dict[str, Any] | None = None
    content: tuple = ()
    error: tuple[int, str] | None = None
    traceback: str = ""
    state: tuple | None = None
    late: bool = False


# --------------------------------------------------------------------------------------------------- apps that travel


@dataclass(frozen=True)
class Named:
    """A ClientApp by its name: imported where it is needed."""

    name: str
    folder: str | None = None

    def load(self) -> ClientApp:
        return load_app(self.name, self.folder, "client_app", ClientApp)


@dataclass(frozen=True)
class Whole:
    """A ClientApp by value, with the functions and globals that it is made of: a notebook's, or a script's."""

    pickled: bytes

    def load(self) -> ClientApp:
        return pickle.loads(self.pickled)


@dataclass(frozen=True)
class Here:
    """The ClientApp itself: for workers in this process."""

    app: ClientApp

    def load(self) -> ClientApp:
        return self.app


def travelling(app: ClientApp) -> Named | Whole:
    """A ClientApp in the form in which it goes to worker processes, once to each.

    Raises:
        RequestError: where it cannot be pickled.
    """
    name = _name_of(app)
    if name is not None:
        return Named(name)
    file = io.BytesIO()
    try:
        _Pickler(file, protocol=5).dump(app)
    except Exception as error:
        raise RequestError(
            f"client_app: it cannot be sent to worker processes ({type(error).__name__}: {error}); put it in a module"
            ' of its own, give "package.module:app", or take engine="inline"'
        ) from error
    return Whole(file.getvalue())


def _name_of(app: ClientApp) -> str | None:
    """``module:attribute`` of an app that another process can import, ``None`` of any other."""
    for name, module in list(sys.modules.items()):
        # Other modules than real ones may answer to any question with an import.
        if name == "__main__" or type(module) is not type(sys) or not getattr(module, "__file__", None):
            continue
        attribute = next((key for key, value in list(vars(module).items()) if value is app), None)
        if attribute is None:
            continue
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError):
            continue
        if spec is not None and spec.origin and Path(spec.origin) == Path(str(module.__file__)):
            return f"{name}:{attribute}"
    return None


class _Pickler(cloudpickle.Pickler):
    """Also takes cached functions of ``__main__``, which pickle knows by name only; their caches start empty."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, functools._lru_cache_wrapper) and obj.__module__ == "__main__":
            return _cached, (obj.__wrapped__, obj.cache_parameters())
        return super().reducer_override(obj)


def _cached(function: Callable, parameters: Mapping[str, Any]) -> Callable:
    return functools.lru_cache(**parameters)(function)


def load_app(name: str, folder: str | None, key: str, kind: type) -> Any:
    """Imports ``module:attribute``, the app's folder first on the path.

    Raises:
        RequestError: where there is no such thing.
        RunError: where importing it fails.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise RequestError(f'{key}: {name!r} is not of the form "package.module:app"')
    if folder is not None:
        _first_on_path(folder, module_name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise RequestError(f"{key}: there is no module {error.name!r} in {folder or 'sys.path'}") from None
        raise RunError(f"{key}: importing {module_name!r} failed: {error}\n{traceback.format_exc()}") from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
        raise RunError(f"{key}: importing {module_name!r} failed: {said}") from error
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise RequestError(f"{key}: {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    if not isinstance(found, kind):
        raise RequestError(f"{key}: {name!r} is of type {type(found).__name__}, not a flwr {kind.__name__}")
    return found


def _first_on_path(folder: str, module_name: str) -> None:
    """The app's folder goes first on the path, and a package of the same name from another folder is forgotten."""
    home = str(Path(folder).resolve())
    if sys.path[:1] != [home]:
        sys.path.insert(0, home)
    top = module_name.partition(".")[0]
    known = sys.modules.get(top)
    places = [getattr(known, "__file__", None) or "", *getattr(known, "__path__", [])]
    inside = (Path(home) / top).exists() or (Path(home) / f"{top}.py").exists()
    if (
        known is not None
        and inside
        and not any(Path(place).resolve().is_relative_to(home) for place in places if place)
    ):
        for other in [other for other in sys.modules if other == top or other.startswith(f"{top}.")]:
            del sys.modules[other]
        importlib.invalidate_caches()


# --------------------------------------------------------------------------------------------------------- the worker


@dataclass(frozen=True)
class Setup:
    """Makes a worker.

    Attributes:
        app: the ClientApp, or how to come by it.
        run_id: the run.
        run_config: the run's configuration.
        partitions: how many nodes there are.
        seed: the simulation's seed.
        quiet: of Flower's own log only errors.
        here: the worker is in the server's own process.
        dtype: torch's default dtype, as the caller has it.
    """

    app: Named | Whole | Here
    run_id: int
    run_config: Mapping[str, Any] = field(default_factory=dict)
    partitions: int = 1
    seed: int = 0
    quiet: bool = False
    here: bool = False
    dtype: torch.dtype = torch.float32

    def __call__(self) -> Worker:
        return Worker(self)


class Late(BaseException):
    """Raised in a ClientApp that has taken too long. No ``Exception``, so that an app's own handlers let it pass."""


class Worker:
    """Calls the ClientApp for messages."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.phase = -1
        self.blobs: Any = ()
        if not setup.here:
            compat.same_task(setup.run_id)
            torch.set_num_threads(1)
            torch.set_default_dtype(setup.dtype)
            if setup.quiet:
                compat.logger.setLevel("ERROR")
        self.app = setup.app.load()
        self.surroundings = Surroundings.now()
        if not setup.here:
            gc.freeze()  # Flower's own conversions collect garbage once a message
        self.interrupts = not setup.here and hasattr(signal, "setitimer") and compat.thread_is_main()

    def handle(self, chunk: Chunk, broadcast: Mapping[str, Any]) -> Answer:
        """Answers a chunk's messages, in order.

        Returns:
            The :class:`Reply` of each, and the bytes that these refer to: as they are in the server's own process, else
            as one block and where each ends.
        """
        if self.phase != broadcast["phase"]:
            # Bytes of arrays are rebuilt when they are first asked for, and are then every message's of this phase.
            self.phase = broadcast["phase"]
            self.blobs = broadcast["blobs"] if self.setup.here else Blobs(broadcast["block"], broadcast["ends"])
        shelf = Shelf()
        with _undisturbed(self.surroundings) if self.setup.here else contextlib.nullcontext():
            replies = [self._answer(item, shelf) for item in chunk.items]
        if self.setup.here:
            return Answer((replies, shelf.blobs))
        return Answer((replies, ends(shelf.blobs)), {"block": joined(shelf.blobs)})

    def _answer(self, item: Item, shelf: Shelf) -> Reply:
        setup, blobs = self.setup, self.blobs
        message = compat.message(compat.metadata(item.metadata), unpack(item.content, blobs))
        node = item.metadata["_dst_node_id"]
        state = unpack(item.state, blobs)
        before = packed(state)
        place = {**item.config, "partition-id": item.partition, "num-partitions": setup.partitions}
        context = Context(setup.run_id, node, place, state, dict(setup.run_config))
        seed_everything(randomness.key(setup.seed, "flower.client", item.number, node))
        begun = time.monotonic()
        try:
            with self._limited(item.limit):
                reply = self.app(message, context)
            late = time.monotonic() - begun > item.limit
            if late and not setup.here:
                return Reply(late=True)
            return replace(self._packed(reply, item, context, before, shelf), late=late)
        except Late:
            if time.monotonic() - begun >= min(item.limit, _LONGEST):
                return Reply(late=True)
            said = "the ClientApp was interrupted by a timer (SIGALRM) that it had set itself"
            return Reply(error=(compat.CLIENT_RAISED, said), traceback=traceback.format_exc())
        except BaseException as error:  # whatever a ClientApp raises is its own failure, and nobody else's
            if setup.here and isinstance(error, KeyboardInterrupt):
                raise
            return Reply(error=(compat.CLIENT_RAISED, told(error)), traceback=traceback.format_exc())
        finally:
            self.surroundings.restore()

    def _packed(self, reply: Any, item: Item, context: Context, before: Any, shelf: Shelf) -> Reply:
        if not isinstance(reply, Message):
            raise TypeError(
                f"the ClientApp returned {type(reply).__name__}, not a flwr Message in reply to the one it got"
            )
        given = dict(reply.metadata.__dict__)
        if given["_reply_to_message_id"] != item.metadata["_message_id"]:
            kind = f"an error ({reply.error.reason or reply.error.code})" if reply.has_error() else "a message"
            raise ValueError(f"the ClientApp returned {kind} that is no reply to the one it got (reply_to=message)")
        if not isinstance(context.state, RecordDict):
            raise TypeError(
                f"the ClientApp left a {type(context.state).__name__} as its context's state, no RecordDict"
            )
        after = packed(context.state)
        # Compared as text too: 1, 1.0 and True are equal and not the same.
        unchanged = after.same(before) and repr(after.records) == repr(before.records)
        state = None if unchanged else moved(after.records, after.blobs, shelf)
        if reply.has_error():
            return Reply(given, error=(reply.error.code, reply.error.reason or ""), state=state)
        content = packed(reply.content)
        return Reply(given, moved(content.records, content.blobs, shelf), state=state)

    @contextlib.contextmanager
    def _limited(self, seconds: float) -> Iterator[None]:
        """Interrupts what runs longer."""
        if not self.interrupts:
            yield
            return
        signal.signal(signal.SIGALRM, _late)  # each time: a ClientApp may have set another
        signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-3), _LONGEST), _AGAIN)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def _late(number: int, frame: Any) -> None:
    raise Late


def told(error: BaseException) -> str:
    """An exception's type and text, also where making the text fails."""
    try:
        text = str(error)
    except Exception:
        text = "its text cannot be made"
    return f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Surroundings:
    """What a ClientApp may change for all that run after it in its process.

    Attributes:
        folder: the current one; ``None`` where it is gone.
        environment: the environment's variables.
        dtype: torch's default dtype.
        gradients: whether torch records operations.
    """

    folder: str | None
    environment: dict[str, str]
    dtype: torch.dtype
    gradients: bool

    @classmethod
    def now(cls) -> Surroundings:
        return cls(_folder(), dict(os.environ), torch.get_default_dtype(), torch.is_grad_enabled())

    def restore(self) -> None:
        """Makes everything as it was, and one thread, as every worker has it."""
        if self.folder is not None and self.folder != _folder():
            with contextlib.suppress(OSError):
                os.chdir(self.folder)
        if os.environ != self.environment:
            os.environ.clear()
            os.environ.update(self.environment)
        if torch.get_default_dtype() != self.dtype:
            torch.set_default_dtype(self.dtype)
        if torch.is_grad_enabled() != self.gradients:
            torch.set_grad_enabled(self.gradients)
        if torch.get_num_threads() != 1:
            torch.set_num_threads(1)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:
        return None


def seed_everything(key: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators: client code draws from them."""
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    if torch.cuda.is_available():  # also where it is not initialised yet, which costs a stack trace
        torch.manual_seed(key)
    else:
        torch.default_generator.manual_seed(key)


@contextlib.contextmanager
def _undisturbed(surroundings: Surroundings) -> Iterator[None]:
    """Surroundings as every worker has them; afterwards the server's, its random state and threads are as before."""
    before = Surroundings.now()
    states, threads = (random.getstate(), np.random.get_state(), torch.get_rng_state()), torch.get_num_threads()
    surroundings.restore()
    try:
        with _blas().limit(limits=1):
            yield
    finally:
        before.restore()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads(threads)


@functools.cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
