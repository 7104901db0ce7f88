"""What a server reads out of clients' replies; whatever is no usable reply is a ValueError that says why."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clients.evaluation import Total, add_totals
from clients.messages import EXAMPLES, TOTAL, tensors_of
from clients.task import Task
from clients.updates import Updates
from clients.weights import Layout
from strategies.client_hooks import PAYLOAD, SEND, STEPS, UPDATE, WEIGHT, codecs, decoded, hides
from strategies.composition import Composition

from flwr.app import ArrayRecord, Message  # isort: skip

#: Numbers of a client that mean nothing as a mean.
_OWN = (EXAMPLES, STEPS, WEIGHT)


class Dropped(NamedTuple):
    """A reply that was left out, and why; the client is -1 where the node has not said who it is."""

    round: int
    node: int
    client: int
    why: str


def contribution(arrays: ArrayRecord, strategy: Composition, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """The row ``[d]`` and the statistics ``[1, ...]`` of a client with the strategy's half."""
    tensors = tensors_of(arrays)
    sends = {name.removeprefix(SEND): value[None] for name, value in tensors.items() if name.startswith(SEND)}
    for name, value in sends.items():
        if value.is_complex():
            raise ValueError(f"{name!r} is complex; real numbers are needed")
        # What is finite as float64 need not be in the server's state, which has the weights' dtype.
        if value.is_floating_point() and not bool(torch.isfinite(value.to(layout.dtype)).all()):
            raise ValueError(f"{name!r} holds NaN or infinite values")
    if UPDATE in tensors:
        row = tensors[UPDATE]
        if hides(strategy):
            return _fitting(row.to(torch.float64), (layout.size,), UPDATE), sends
        return _fitting(row, (layout.size,), UPDATE).to(layout.dtype), sends
    known = codecs(strategy)
    names = [name for name in tensors if name.startswith(PAYLOAD) and name.removeprefix(PAYLOAD) in known]
    if not names:
        raise ValueError(f"it holds neither {UPDATE!r} nor a payload, but {', '.join(tensors) or 'nothing'}")
    name = names[0]
    payload = tensors[name].to(torch.uint8).numpy().tobytes()
    row = decoded(known[name.removeprefix(PAYLOAD)], payload, layout.size, [slot.slice for slot in layout])
    return _fitting(row, (layout.size,), name).to(layout.dtype), sends


def moved(arrays: ArrayRecord, sent: Tensor, layout: Layout) -> Tensor:
    """How far a client's weights, by name, are from those that it was sent, ``[d]``."""
    tensors = tensors_of(arrays, layout.names)
    missing = [name for name in layout.names if name not in tensors]
    if missing:
        raise ValueError(f"it has no array {missing[0]!r}, but {', '.join(list(arrays)[:5]) or 'none'}")
    for slot in layout:
        _fitting(tensors[slot.name], slot.shape, slot.name)
    return layout.flatten(tensors) - sent


def only(records: Mapping[str, Any], what: str) -> Any:
    if len(records) != 1:
        raise ValueError(f"it holds {len(records)} {what}s; exactly one is needed")
    return next(iter(records.values()))


def numbers_of(reply: Message) -> dict[str, Any]:
    return dict(only(reply.content.metric_records, "MetricRecord"))


def _fitting(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    if tuple(tensor.shape) != tuple(shape) or not (tensor.is_floating_point()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name!r} is {kind} {list(tensor.shape)}; real numbers {list(shape)} are needed")
    return tensor


def pooled(found: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Means by example of the plain numbers that all clients tell."""
    whole = [said for _, said in sorted(found.items())]
    if not whole:
        return {}
    weights = np.array([float(said[EXAMPLES]) for said in whole])
    names = [name for name, value in whole[0].items() if isinstance(value, int | float) and name not in _OWN]
    pooled = {}
    for name in names:
        values = [said.get(name) for said in whole]
        if all(isinstance(value, int | float) for value in values):
            pooled[name] = float(np.average(np.array(values, dtype=np.float64), weights=weights))
    return pooled


def totals_of(said: Mapping[str, Any]) -> Total:
    """The sums that a client's metrics were made of; none where it does not tell."""
    return {
        name.removeprefix(TOTAL): torch.tensor(value, dtype=torch.float64)
        for name, value in said.items()
        if name.startswith(TOTAL) and isinstance(value, list)
    }


def examples_of(said: Mapping[str, Any], held: int | None) -> int:
    """How many examples a reply speaks of; as many as the client ``held`` in the roll call, where it said that."""
    examples = said.get(EXAMPLES)
    if not isinstance(examples, int | float) or not 0 < examples < 2**53:
        raise ValueError(f"its metrics say {EXAMPLES} = {examples}; a number above 0 is needed")
    if held is not None and examples != held:
        raise ValueError(f"its metrics say {EXAMPLES} = {examples}, and in the roll call it held {held}")
    return int(examples)


def kind_of(u: Updates) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Names and shapes of the statistics that are sent beside."""
    return tuple(sorted((name, tuple(value.shape)) for name, value in u.sends.items()))


def finite_state(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether nothing of a state has become NaN or infinite that was finite before."""

    def finite(value: Any) -> bool:
        return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())

    return all(finite(value) or not finite(before.get(name)) for name, value in after.items())


def judged(found: Mapping[int, Mapping[str, Any]], task: Task) -> dict[str, Any]:
    """Metrics of clients' evaluations, by client: pooled by example and, as ``*_client_mean``, over clients."""
    metrics = {**pooled(found), **_exactly_pooled(found, task)}
    for name in list(metrics):
        values = [float(said[name]) for said in found.values() if isinstance(said.get(name), int | float)]
        if len(values) == len(found):
            metrics[f"{name}_client_mean"] = float(np.mean(values))
    examples = sum(int(said[EXAMPLES]) for said in found.values())
    return {**metrics, EXAMPLES: examples, "clients": len(found)}


def _exactly_pooled(found: Mapping[int, Mapping[str, Any]], task: Task) -> dict[str, float]:
    """The metrics of all clients' examples together, where all clients tell the sums that theirs are made of."""
    totals = [totals_of(found[client]) for client in sorted(found)]
    kinds = {tuple((name, len(value)) for name, value in total.items()) for total in totals}
    if len(kinds) != 1 or not totals[0]:
        return {}
    try:
        whole: Total = reduce(add_totals, totals)
        return {name: float(value) for name, value in task.metrics(whole).items()}
    except (KeyError, IndexError, ArithmeticError):  # of another task than the server's
        return {}


def last_line(text: object) -> str:
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    return lines[-1] if lines else "an error without a reason"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
