"""Who holds what, as a run records it once: a few figures of all clients, and a row for some thousands of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from clients.parts import Part
    from fedsim.data.population import Population

#: Clients that have a row, and label counts in all rows: above that, clients are selected.
_MOST_CLIENTS = 4096
_MOST_COUNTS = 1_000_000
_FEWEST_CLIENTS = 100

#: More classes than that are no classes to look at (words of a vocabulary, numbers that are targets).
_MOST_CLASSES = 10_000

_QUARTILES = {"min": 0, "q1": 25, "median": 50, "q3": 75, "max": 100}


@dataclass(frozen=True)
class Census:
    """What a run's record says of its clients and their examples.

    Attributes:
        summary: of all clients: ``clients``, ``examples`` (for training; ``validation`` and ``test`` where clients keep
            some), ``sizes`` (``min``, ``q1``, ``median``, ``q3``, ``max``, ``mean`` of the training examples of a
            client), ``empty`` and ``held_out`` clients, ``attacks`` (kind -> clients), ``server`` (split -> examples),
            ``matched`` (whether the clients' ``test`` examples are the server's), ``partition`` in words, ``classes``,
            and ``labels``: ``None`` where labels are no classes, else

            - ``clients``: how many clients with training examples the two figures are of (those recorded),
            - ``mean_classes``: how many classes such a client holds, on average,
            - ``distance``: how far its label mix is from that of all of them together, on average: the total variation
              distance, half the sum of the absolute differences of the shares; 0 for the same mix, 1 for no class in
              common.
        rows: one dict a recorded client, by id: ``client``, ``train``, ``validation`` and ``test`` examples (``None``
            where clients keep none), ``held_out``, ``attack`` and ``labels``, the counts of its training labels.
    """

    summary: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)


def census(population: Population, partition: Part | str = "", attacks: Mapping[int, str] | None = None) -> Census:
    """Counts a population.

    Sizes are counted of every client; labels of those that are recorded. Above some thousands, those are an even
    selection from all, ordered by size and then by id, so that each stands for as many others.

    Args:
        population: who holds what.
        partition: how the examples were dealt.
        attacks: client -> what it does to harm the training, of those that do.
    """
    attacks = attacks or {}
    sizes = {name: csr.sizes for name, csr in population.splits.items()}
    train = sizes["train"]
    classes = population.classes if (population.classes or 0) <= _MOST_CLASSES else None
    recorded = _evenly(train, _room(classes))
    table = population.label_table("train", recorded) if classes else None
    counted = {name: int(size.sum()) for name, size in sizes.items()}
    summary = {
        "clients": population.clients,
        "examples": counted.pop("train"),
        **counted,
        "sizes": _spread(train),
        "empty": int((train == 0).sum()),
        "held_out": len(population.held_out),
        "attacks": dict(sorted(Counter(attacks.values()).items())),
        "server": {name: len(columns) for name, columns in population.server.items()},
        "matched": population.matched,
        "partition": in_words(partition),
        "classes": classes if table is not None else None,
        "recorded": len(recorded),
        "labels": None if table is None else _skew(table),
    }
    held_out = np.isin(recorded, population.held_out)
    rows = [
        {
            "client": client,
            **{name: int(sizes[name][client]) if name in sizes else None for name in ("train", "validation", "test")},
            "held_out": bool(held_out[i]),
            "attack": attacks.get(client),
            "labels": None if table is None else table[i].tolist(),
        }
        for i, client in enumerate(recorded.tolist())
    ]
    return Census(summary, rows)


def in_words(part: Part | str) -> str:
    """``dirichlet (alpha 0.3, variant per_client)``."""
    if isinstance(part, str):
        return part
    settings = ", ".join(f"{key} {value}" for key, value in part.settings.items())
    return f"{part.name} ({settings})" if settings else part.name


def _room(classes: int | None) -> int:
    """How many clients have a row."""
    return max(_FEWEST_CLIENTS, min(_MOST_CLIENTS, _MOST_COUNTS // (classes or 1)))


def _evenly(sizes: np.ndarray, most: int) -> np.ndarray:
    """At most so many client ids, ascending: even steps through all, smallest first; both ends are among them."""
    if len(sizes) <= most:
        return np.arange(len(sizes))
    steps = np.rint(np.linspace(0, len(sizes) - 1, most)).astype(np.int64)
    return np.sort(np.argsort(sizes, kind="stable")[steps])


def _spread(sizes: np.ndarray) -> dict[str, float]:
    """The quartiles are sizes that occur (nearest rank)."""
    found = np.percentile(sizes, list(_QUARTILES.values()), method="inverted_cdf")
    return {name: int(value) for name, value in zip(_QUARTILES, found, strict=True)} | {"mean": float(sizes.mean())}


def _skew(table: np.ndarray) -> dict[str, Any] | None:
    """How unlike one another the label mixes ``[k, classes]`` of the clients with examples are."""
    held = table[table.sum(1) > 0].astype(np.float64)
    if not len(held):
        return None
    pooled = held.sum(0) / held.sum()
    mixes = held / held.sum(1, keepdims=True)
    return {
        "clients": len(held),
        "mean_classes": float((held > 0).sum(1).mean()),
        "distance": float(np.abs(mixes - pooled).sum(1).mean() / 2),
    }
