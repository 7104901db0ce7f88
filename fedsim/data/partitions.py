"""Who holds which examples: one permutation and one array of offsets, so a million clients cost megabytes.

A partition is a public function annotated ``-> Partition`` that takes ``labels`` ``[N]``, the number of ``clients``, a
numpy ``generator`` (and, where it asks for them, ``ids``: the source's own client of each example), then its settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import fedsim.kinds  # noqa: F401  (declares the kind that a partition's name is looked up in)
from clients import randomness
from clients.errors import RequestError
from clients.parts import Part
from clients.recipe import Count, Positive


class Partition(NamedTuple):
    """Client ``k`` holds the examples ``order[offsets[k]:offsets[k + 1]]``.

    Attributes:
        order: ``int64 [N]``, a permutation of the examples.
        offsets: ``int64 [clients + 1]``, from 0 to N.
    """

    order: np.ndarray
    offsets: np.ndarray


def iid(labels: np.ndarray, clients: int, generator: np.random.Generator) -> Partition:
    """Every client an equal share, drawn at random; sizes differ by at most one."""
    _enough(len(labels), clients)
    return Partition(generator.permutation(len(labels)), _equal(len(labels), clients))


def dirichlet(
    labels: np.ndarray,
    clients: int,
    generator: np.random.Generator,
    *,
    alpha: Positive = 0.3,
    variant: Literal["per_class", "per_client"] = "per_class",
    min_examples: Count = 1,
) -> Partition:
    """Label skew: Dirichlet shares, the smaller ``alpha`` the more skewed.

    Args:
        labels: ``int [N]`` classes.
        clients: how many.
        generator: what draws.
        alpha: concentration.
        variant: ``per_class`` gives each class's examples to the clients by shares ~ Dirichlet(alpha), so that sizes
            vary too (Yurochkin et al. 2019); ``per_client`` gives equal sizes and each client a label mix
            ~ Dirichlet(alpha * classes * class frequencies) (Hsu, Qi and Brown 2019), as near as the examples allow.
        min_examples: every client has at least so many. ``per_class`` draws anew until that holds, and after many tries
            moves examples from the largest clients.
    """
    kinds, classes = np.unique(_classes(labels, "dirichlet"), return_inverse=True)
    _enough(len(labels), clients, min_examples, "min_examples")
    if variant == "per_class":
        return _per_class(classes, len(kinds), clients, generator, alpha, min_examples)
    if variant == "per_client":
        return _per_client(classes, len(kinds), clients, generator, alpha)
    raise RequestError(f"data.partition.variant: {variant!r} given; allowed are per_class, per_client")


def shards(labels: np.ndarray, clients: int, generator: np.random.Generator, *, per_client: Count = 2) -> Partition:
    """Examples sorted by label and cut into equal shards, ``per_client`` dealt to each client (McMahan et al. 2017)."""
    examples, count = len(labels), clients * per_client
    _classes(labels, "shards")
    _enough(examples, clients)
    if examples < count:
        raise RequestError(
            f"data.partition.per_client: {per_client} shards for each of {clients} clients are {count}, but there are "
            f"{examples} examples; lower it or data.clients"
        )
    mixed = generator.permutation(examples)
    by_label = mixed[np.argsort(labels[mixed], kind="stable")]
    dealt_to = np.empty(count, dtype=np.int64)
    dealt_to[generator.permutation(count)] = np.arange(count) // per_client
    return _by_owner(by_label, np.repeat(dealt_to, np.diff(_equal(examples, count))), clients)


def natural(
    labels: np.ndarray, clients: int, generator: np.random.Generator, *, ids: np.ndarray | None = None
) -> Partition:
    """Every example where the source says it is.

    Args:
        labels: not used.
        clients: not used: there are as many clients as the source has, in the order of their ids.
        generator: not used.
        ids: ``int [N]`` the source's client of each example.
    """
    if ids is None:
        raise RequestError(
            "data.partition: natural needs a source that says whose each example is, and this one does not; "
            "take iid, dirichlet or shards"
        )
    present, owner = np.unique(ids, return_inverse=True)
    return _by_owner(np.arange(len(owner)), owner, len(present))


def partition(
    name: Any,
    labels: np.ndarray,
    clients: int,
    seed: int,
    *,
    ids: np.ndarray | None = None,
    base: Path | None = None,
    **settings: Any,
) -> Partition:
    """A partition by name, checked for coverage and disjointness.

    Args:
        name: a partition's name, ``"file.py:function"``, a function, or a :class:`Part` with its settings.
        labels: ``[N]`` integer classes; another array of length N where the partition looks at no labels.
        clients: how many.
        seed: the same seed gives the same partition on every machine.
        ids: ``int [N]`` the source's client of each example, for ``natural``.
        base: the folder that ``file.py`` is relative to.
        settings: the partition's own.

    Raises:
        RequestError: names ``data.partition``, one of its settings, or ``data.clients``.
    """
    from clients import catalog

    part = Part.of(name)
    if settings:
        part = Part(part.name, {**part.settings, **settings}, part.thing)
    found = catalog.build(
        part,
        "partitions",
        base,
        key="data.partition",
        labels=labels,
        clients=clients,
        generator=randomness.numpy_generator(seed, "partition"),
        ids=ids,
    )
    return _checked(found, len(labels), part.name)


def _checked(found: Any, examples: int, name: str) -> Partition:
    """The partition, once it is known that every example has one owner."""
    try:
        order, offsets = (np.asarray(array).astype(np.int64, casting="same_kind", copy=False) for array in found)
    except (TypeError, ValueError):
        raise RequestError(f"data.partition: {name} gave {type(found).__name__}, not (order, offsets)") from None
    ends = [0, len(order)]
    if offsets.ndim != 1 or len(offsets) < 2 or list(offsets[[0, -1]]) != ends or np.any(np.diff(offsets) < 0):
        raise RequestError(f"data.partition: {name} gave offsets that do not rise from 0 to {len(order)}")
    if order.ndim != 1 or (len(order) and (order.min() < 0 or order.max() >= examples)):
        raise RequestError(f"data.partition: {name} gave examples outside 0..{examples - 1}")
    times = np.bincount(order, minlength=examples)
    if np.any(times != 1):
        wrong = int(np.argmax(times != 1))
        raise RequestError(f"data.partition: {name} gave example {wrong} to {times[wrong]} clients; each has one")
    return Partition(order, offsets)


def _enough(examples: int, clients: int, each: int = 1, setting: str | None = None) -> None:
    if clients < 1:
        raise RequestError(f"data.clients: {clients} given; at least 1 is needed")
    if examples < clients:
        raise RequestError(f"data.clients: {clients} clients but only {examples} examples to train on; lower it")
    if examples < clients * each:
        raise RequestError(
            f"data.partition.{setting}: {each} for each of {clients} clients are {clients * each}, but there are "
            f"{examples} examples; lower it or data.clients"
        )


def _classes(labels: np.ndarray, name: str) -> np.ndarray:
    """The labels, once it is known that they are one integer class an example."""
    if labels.ndim != 1 or labels.dtype.kind not in "iub":
        raise RequestError(
            f"data.partition: {name} goes by labels, one integer class an example, and this source has none; "
            "take iid or natural"
        )
    return labels


def _equal(examples: int, parts: int) -> np.ndarray:
    """Offsets of parts whose sizes differ by at most one."""
    return np.arange(parts + 1, dtype=np.int64) * examples // parts


def _by_owner(examples: np.ndarray, owner: np.ndarray, clients: int) -> Partition:
    """The partition in which ``examples[i]`` belongs to ``owner[i]``; within a client the given order stays."""
    offsets = np.zeros(clients + 1, dtype=np.int64)
    np.cumsum(np.bincount(owner, minlength=clients), out=offsets[1:])
    return Partition(examples[np.argsort(owner, kind="stable")], offsets)


#: Numbers that drawing anew may cost in all; a million clients are drawn once, a hundred a thousand times.
_DRAWS = 20_000_000
_TRIES = 1000


def _per_class(
    classes: np.ndarray, kinds: int, clients: int, generator: np.random.Generator, alpha: float, least: int
) -> Partition:
    mixed = generator.permutation(len(classes))
    by_class = mixed[np.argsort(classes[mixed], kind="stable")]
    totals = np.bincount(classes, minlength=kinds)
    root = int(generator.integers(2**62))

    tries = max(1, min(_TRIES, _DRAWS // (kinds * (clients + 500))))  # a class costs about 500 numbers beside its draws
    best, fewest = 0, None
    for attempt in range(tries):
        sizes = sum(_cut(totals, clients, alpha, root, attempt), np.zeros(clients, dtype=np.int64))
        missing = int(np.maximum(least - sizes, 0).sum())
        if fewest is None or missing < fewest:
            best, fewest = attempt, missing
        if missing == 0:
            break
    everyone = np.arange(clients)
    owner = np.concatenate([np.repeat(everyone, counts) for counts in _cut(totals, clients, alpha, root, best)])
    if fewest:
        shuffled = generator.permutation(len(owner))
        by_class, owner = by_class[shuffled], _mend(owner[shuffled], clients, least)
    return _by_owner(by_class, owner, clients)


def _cut(totals: np.ndarray, clients: int, alpha: float, root: int, attempt: int) -> Iterator[np.ndarray]:
    """For each class, how many of its examples each client gets, ``int64 [clients]``; a function of its arguments."""
    draw = randomness.numpy_generator(root, "dirichlet", attempt)
    concentration = np.full(clients, alpha)
    for total in totals:
        edges = np.floor(np.cumsum(draw.dirichlet(concentration)) * total).astype(np.int64)
        edges[-1] = total
        yield np.diff(np.minimum(edges, total), prepend=0)


def _mend(owner: np.ndarray, clients: int, least: int) -> np.ndarray:
    """Moves examples from the largest clients until everyone has ``least``; the largest are lowered to one level.

    Args:
        owner: ``int64 [N]`` in random order, with N >= clients * least. The last examples of a client leave it.
    """
    sizes = np.bincount(owner, minlength=clients)
    missing = np.maximum(least - sizes, 0)
    needed = int(missing.sum())
    low, high = least, int(sizes.max())  # the highest level with enough above it; there always is enough above least
    while low < high:
        level = (low + high + 1) // 2
        low, high = (level, high) if np.maximum(sizes - level, 0).sum() >= needed else (low, level - 1)
    give = np.maximum(sizes - low, 0)
    excess = int(give.sum()) - needed  # fewer than the clients above the level, else the level would be higher
    givers = np.flatnonzero(give)
    give[givers[len(givers) - excess :]] -= 1

    order, offsets = _by_owner(np.arange(len(owner)), owner, clients)
    of = owner[order]
    leaves = offsets[of + 1] - np.arange(len(owner)) <= give[of]
    mended = owner.copy()
    mended[order[leaves]] = np.repeat(np.arange(clients), missing)
    return mended


def _per_client(
    classes: np.ndarray, kinds: int, clients: int, generator: np.random.Generator, alpha: float
) -> Partition:
    """Every client wants labels of its own mix; examples go to the wishes at random, what is over to what is unmet."""
    examples = len(classes)
    offsets = _equal(examples, clients)
    sizes = np.diff(offsets)
    totals = np.bincount(classes, minlength=kinds)
    concentration = alpha * kinds * totals / examples

    block = max(1, 2**20 // kinds)  # clients at a time, so that the mixes of a million are never held at once
    wishes = np.concatenate(
        [_wishes(sizes[start : start + block], concentration, generator) for start in range(0, clients, block)]
    )
    slots = generator.permutation(examples)
    slots = slots[np.argsort(wishes[slots], kind="stable")]
    pool = generator.permutation(examples)
    pool = pool[np.argsort(classes[pool], kind="stable")]
    wished, had = wishes[slots], classes[pool]
    met = _rank(wished, kinds) < totals[wished]
    given = _rank(had, kinds) < np.bincount(wishes, minlength=kinds)[had]

    order = np.empty(examples, dtype=np.int64)
    order[slots[met]] = pool[given]
    order[slots[~met]] = generator.permutation(pool[~given])
    return Partition(order, offsets)


def _wishes(sizes: np.ndarray, concentration: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """For each place of each client the class it wishes for, ``int64 [sum of sizes]``."""
    counts = generator.multinomial(sizes, generator.dirichlet(concentration, size=len(sizes)))
    return np.repeat(np.tile(np.arange(len(concentration)), len(sizes)), counts.reshape(-1))


def _rank(grouped: np.ndarray, kinds: int) -> np.ndarray:
    """The position of each element within its group; ``grouped`` is sorted."""
    starts = np.cumsum(np.bincount(grouped, minlength=kinds)) - np.bincount(grouped, minlength=kinds)
    return np.arange(len(grouped)) - starts[grouped]
