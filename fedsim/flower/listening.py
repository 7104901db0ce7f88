"""What a Flower server's strategy comes to, overheard while it runs: a ServerApp returns nothing.

Flower's strategies aggregate and evaluate in methods of known names, and its legacy servers write a History. While
:func:`listening` is on, these methods also tell a ledger what they return; nothing else about them changes, and they
are as before when it ends.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from fedsim.flower.ledger import CLIENT_TEST, TEST, TRAIN, Ledger, numpy_arrays


@contextmanager
def listening(ledger: Ledger) -> Iterator[None]:
    """While it is on, ``ledger`` hears of every aggregation and evaluation of a Flower server."""
    from flwr.server.history import History
    from flwr.server.strategy import Strategy as LegacyStrategy
    from flwr.serverapp.strategy import Strategy

    told: dict[str, Callable[[Ledger, Any, inspect.BoundArguments], None]] = {
        "aggregate_train": _trained,
        "aggregate_evaluate": _evaluated,
    }
    history = {
        "add_loss_centralized": (TEST, "loss"),
        "add_metrics_centralized": (TEST, "metrics"),
        "add_loss_distributed": (CLIENT_TEST, "loss"),
        "add_metrics_distributed": (CLIENT_TEST, "metrics"),
        "add_metrics_distributed_fit": (TRAIN, "metrics"),
    }
    with ExitStack() as stack:
        heard: set[tuple[type, str]] = set()
        running: list[Any] = []

        def replace(owner: type, name: str, wrap: Callable[[Callable], Callable]) -> None:
            original = vars(owner).get(name)
            if (owner, name) in heard or not inspect.isfunction(original):
                return
            heard.add((owner, name))
            setattr(owner, name, wrap(original))
            stack.callback(setattr, owner, name, original)

        def look() -> None:
            for owner in _family(Strategy):
                replace(owner, "start", lambda method: _starting(ledger, method, running))
                for name, tell in told.items():
                    replace(owner, name, lambda method, tell=tell: _telling(ledger, method, tell))  # type: ignore[misc]
            for owner in _family(LegacyStrategy):
                replace(owner, "aggregate_fit", lambda method: _telling(ledger, method, _fitted))

        for name, (split, argument) in history.items():
            replace(History, name, lambda method, split=split, key=argument: _writing(ledger, method, split, key))  # type: ignore[misc]
        look()
        ledger.look = look  # an app may define its strategy as late as in its main function
        stack.callback(setattr, ledger, "look", lambda: None)
        yield


def _family(base: type) -> list[type]:
    """A class and all classes made of it."""
    children: list[type] = base.__subclasses__()
    return [base, *(owner for child in children for owner in _family(child))]


def _telling(ledger: Ledger, method: Callable, tell: Callable) -> Callable:
    """A method that tells what it returned; of a method and the one it overrides, the outer one tells last."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        try:
            tell(ledger, found, signature.bind(*args, **kwargs))
        except (TypeError, ValueError, AttributeError, LookupError) as error:  # the app may return what it likes
            ledger.unheard(method.__qualname__, error)
        return found

    return wrapped


def _trained(ledger: Ledger, found: Any, given: inspect.BoundArguments) -> None:
    arrays, metrics = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
    if arrays is not None:
        ledger.arrays(numpy_arrays(arrays))
    if metrics is not None:
        ledger.metrics(TRAIN, _round(given), metrics)


def _evaluated(ledger: Ledger, found: Any, given: inspect.BoundArguments) -> None:
    if found is not None:
        ledger.metrics(CLIENT_TEST, _round(given), found)


def _fitted(ledger: Ledger, found: Any, given: inspect.BoundArguments) -> None:
    from flwr.common import parameters_to_ndarrays

    parameters = found[0] if isinstance(found, tuple) and found else None
    if parameters is not None:
        ledger.arrays((str(i), array) for i, array in enumerate(parameters_to_ndarrays(parameters)))


def _round(given: inspect.BoundArguments) -> int:
    """The round that a strategy's method was called for: its first argument, whatever it is called."""
    return int(given.args[1]) if len(given.args) > 1 else int(given.arguments["server_round"])


def _starting(ledger: Ledger, method: Callable, running: list[Any]) -> Callable:
    """A strategy's ``start``, which tells of its rounds and of what it evaluates on the server."""
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if any(self is other for other in running):  # a start that calls the one it overrides is one start
            return method(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs)
        defaults = {name: known.default for name, known in signature.parameters.items()}
        ledger.strategy_starts(_name(self), {**defaults, **given.arguments}.get("num_rounds"))
        if callable(evaluate := given.arguments.get("evaluate_fn")):
            given.arguments["evaluate_fn"] = _judging(ledger, evaluate)
        running.append(self)
        try:
            return method(*given.args, **given.kwargs)
        finally:
            running.remove(self)

    return wrapped


def _name(strategy: Any) -> str:
    """A strategy's name; that of the strategy of fedsim's own that speaks in messages."""
    from strategies.strategy import Strategy

    own = getattr(strategy, "strategy", None)
    return type(own if isinstance(own, Strategy) else strategy).__name__


def _judging(ledger: Ledger, evaluate: Callable) -> Callable:
    """A server's evaluation, called with the round and the weights, which tells what it found."""

    @functools.wraps(evaluate)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        found = evaluate(*args, **kwargs)
        if found is not None:
            try:
                ledger.metrics(TEST, int([*args, *kwargs.values()][0]), found)
            except (TypeError, ValueError, AttributeError, LookupError) as error:
                ledger.unheard("evaluate_fn", error)
        return found

    return wrapped


def _writing(ledger: Ledger, method: Callable, split: str, key: str) -> Callable:
    signature = inspect.signature(method)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        value = given[key]
        ledger.metrics(split, given["server_round"], {"loss": value} if key == "loss" else value)
        return method(*args, **kwargs)

    return wrapped
