"""Who holds which examples: one permutation and one array of offsets, so a million clients cost megabytes.

A partition is a public function annotated ``-> Partition`` that takes ``labels`` ``[N]``, the number of ``clients``, a
numpy ``generator`` (and, where it asks for them, ``ids``: the source's own client of each example, and ``columns``: the
examples' columns), then its settings. Partitioners of flwr-datasets serve as well, see :mod:`fedsim.data.foreign`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np

import fedsim.kinds  # noqa: F401  (declares the kind that a partition's name is looked up in)
from clients import randomness
from clients.errors import RequestError, nearest
from clients.parts import Part
from clients.recipe import Count, Positive
from fedsim.data import class_sets, dirichlet_shares
from fedsim.data.dealing import Partition, by_owner, classes_of, enough, equal, level, offsets_of, positive, rank
from fedsim.data.shifts import FeatureShift, ShiftedPartition


def iid(labels: np.ndarray, clients: int, generator: np.random.Generator) -> Partition:
    """Every client an equal share, drawn at random; sizes differ by at most one."""
    enough(len(labels), clients)
    return Partition(generator.permutation(len(labels)), equal(len(labels), clients))


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
    alpha = positive(alpha, "alpha")
    kinds, classes = np.unique(classes_of(labels, "dirichlet"), return_inverse=True)
    enough(len(labels), clients, min_examples, "min_examples")
    if variant == "per_class":
        return dirichlet_shares.per_class(classes, len(kinds), clients, generator, alpha, min_examples)
    if variant == "per_client":
        return dirichlet_shares.per_client(classes, len(kinds), clients, generator, alpha)
    raise RequestError(f"data.partition.variant: {variant!r} given; allowed are per_class, per_client")


def quantity_skew(
    labels: np.ndarray,
    clients: int,
    generator: np.random.Generator,
    *,
    alpha: Positive = 0.5,
    law: Literal["dirichlet", "lognormal", "power"] = "dirichlet",
    min_examples: Count = 1,
) -> Partition:
    """Sizes vary and nothing else does: every client's examples are drawn from all (Li, Diao, Chen and He 2022).

    Args:
        labels: ``[N]``, only counted.
        clients: how many.
        generator: what draws.
        alpha: the law's parameter.
        law: what the sizes are proportional to. ``dirichlet``: shares ~ Dirichlet(alpha), the smaller the more skewed;
            ``lognormal``: exp(alpha z) with z ~ N(0, 1), and ``power``: 1/r^alpha for ranks r = 1, 2, ... dealt at
            random, the larger the more skewed.
        min_examples: every client has at least so many; what is missing comes from the largest, which are lowered to
            one level.
    """
    alpha = positive(alpha, "alpha")
    enough(len(labels), clients, min_examples, "min_examples")
    if law == "dirichlet":
        shares = generator.dirichlet(np.full(clients, alpha))
    elif law == "lognormal":
        logarithms = alpha * generator.standard_normal(clients)
        shares = np.exp(logarithms - logarithms.max())
    elif law == "power":
        shares = generator.permutation(np.arange(1.0, clients + 1)) ** -alpha
    else:
        raise RequestError(f"data.partition.law: {law!r} given; allowed are dirichlet, lognormal, power")
    sizes = dirichlet_shares.cut(shares / shares.sum(), len(labels))
    give, get = level(sizes, min_examples)
    return Partition(generator.permutation(len(labels)), offsets_of(sizes - give + get))


def shards(labels: np.ndarray, clients: int, generator: np.random.Generator, *, per_client: Count = 2) -> Partition:
    """Examples sorted by label and cut into equal shards, ``per_client`` dealt to each client (McMahan et al. 2017)."""
    examples, count = len(labels), clients * per_client
    classes_of(labels, "shards")
    enough(examples, clients)
    if examples < count:
        raise RequestError(
            f"data.partition.per_client: {per_client} shards for each of {clients} clients are {count}, but there are "
            f"{examples} examples; lower it or data.clients"
        )
    mixed = generator.permutation(examples)
    by_label = mixed[np.argsort(labels[mixed], kind="stable")]
    dealt_to = np.empty(count, dtype=np.int64)
    dealt_to[generator.permutation(count)] = np.arange(count) // per_client
    return by_owner(by_label, np.repeat(dealt_to, np.diff(equal(examples, count))), clients)


def pathological(
    labels: np.ndarray, clients: int, generator: np.random.Generator, *, classes_per_client: Count = 2
) -> Partition:
    """Every client has exactly so many classes: what McMahan et al. 2017 mean by shards, without their accidents.

    Every class goes to equally many clients (or to one more: the classes of most examples), and its examples are split
    among them as evenly as can be, so that sizes vary only as those of the classes do.

    Args:
        labels: ``int [N]`` classes.
        clients: how many.
        generator: what draws.
        classes_per_client: how many different classes each client has.
    """
    key = "data.partition.classes_per_client"
    kinds, classes = np.unique(classes_of(labels, "pathological"), return_inverse=True)
    enough(len(labels), clients)
    if classes_per_client > len(kinds):
        raise RequestError(
            f"{key}: {classes_per_client} asked for, but the labels are of {len(kinds)} classes; lower it"
        )
    places = clients * classes_per_client
    if places < len(kinds):
        raise RequestError(
            f"{key}: {classes_per_client} for each of {clients} clients are {places}, but there are {len(kinds)} "
            "classes and each needs a client; raise it or data.clients"
        )
    totals = np.bincount(classes)
    shared = np.full(len(kinds), places // len(kinds))
    shared[np.lexsort((generator.random(len(kinds)), -totals))[: places % len(kinds)]] += 1
    if np.any(totals < shared):
        few = int(np.argmax(totals < shared))
        raise RequestError(
            f"{key}: class {kinds[few]} has {totals[few]} examples and would be shared by {shared[few]} clients; lower "
            "it or data.clients"
        )
    sets = class_sets.deal(shared, clients, generator).reshape(-1)
    holders = generator.permutation(places)
    holders = holders[np.argsort(sets[holders], kind="stable")] // classes_per_client
    mixed = generator.permutation(len(labels))
    by_class = mixed[np.argsort(classes[mixed], kind="stable")]
    of = classes[by_class]
    place = offsets_of(shared)[of] + rank(of, len(kinds)) * shared[of] // totals[of]
    return by_owner(by_class, holders[place], clients)


def natural(
    labels: np.ndarray,
    clients: int,
    generator: np.random.Generator,
    *,
    by: str | None = None,
    ids: np.ndarray | None = None,
    columns: Any = None,
) -> Partition:
    """Every example where the source says it is.

    Args:
        labels: not used.
        clients: not used: there are as many clients as the source has, in the order of their ids.
        generator: not used.
        by: a column of integers or strings that says whose each example is, such as a speaker or a hospital; left out,
            the source's own clients.
        ids: ``int [N]`` the source's client of each example.
        columns: the examples' columns.
    """
    if by is not None:
        owner, present = _named_clients(by, columns)
    elif ids is not None:
        kinds, owner = np.unique(ids, return_inverse=True)
        present = len(kinds)
    else:
        raise RequestError(
            "data.partition: natural needs a source that says whose each example is, and this one does not; "
            "give by = a column, or take iid, dirichlet or shards"
        )
    return by_owner(np.arange(len(owner)), owner, present)


def feature_shift(
    labels: np.ndarray,
    clients: int,
    generator: np.random.Generator,
    *,
    amount: Positive,
    kind: Literal["noise", "rotation", "brightness"] = "noise",
) -> Partition:
    """Equal shares drawn at random, as ``iid``, of inputs that each client sees in a way of its own.

    Args:
        labels: ``[N]``, only counted.
        clients: how many.
        generator: what draws.
        amount: how far it goes: the largest standard deviation of the noise, the largest angle in degrees (at most
            180), or how far the brightness differs from 1 at most (below 1).
        kind: ``noise``: client ``k`` of ``n`` has Gaussian noise of standard deviation ``amount * (k + 1) / n`` (Li,
            Diao, Chen and He 2022); ``rotation`` of images by angles evenly spread over ``[-amount, amount]``;
            ``brightness``: inputs times a gain evenly spread over ``1 - amount`` to ``1 + amount``.
    """
    positive(amount, "amount")
    if kind not in ("noise", "rotation", "brightness"):
        raise RequestError(f"data.partition.kind: {kind!r} given; allowed are noise, rotation, brightness")
    if kind == "rotation" and amount > 180:
        raise RequestError(f"data.partition.amount: {amount:g} degrees given; give at most 180")
    if kind == "brightness" and amount >= 1:
        raise RequestError(
            f"data.partition.amount: {amount:g} would make inputs vanish; give less than 1 for brightness"
        )
    return ShiftedPartition(*iid(labels, clients, generator), FeatureShift(kind, float(amount), clients))


def partition(
    name: Any,
    labels: Any,
    clients: int,
    seed: int,
    *,
    ids: Any = None,
    columns: Any = None,
    base: Path | None = None,
    **settings: Any,
) -> Partition:
    """A partition by name, checked for coverage and disjointness.

    Args:
        name: a partition's name, ``"file.py:function"``, a function, a Partitioner of flwr-datasets or
            ``"flwr_datasets.partitioner:DirichletPartitioner"``, or a :class:`Part` of these with its settings.
        labels: ``[N]`` integer classes, an array, a tensor or a list; anything of length N where the partition looks at
            no labels.
        clients: how many; ``natural`` and Partitioners have their own number.
        seed: the same seed gives the same partition on every machine.
        ids: ``int [N]`` the source's client of each example, for ``natural``; likewise.
        columns: the examples' columns (``names`` and ``column(name) -> [N, ...]``), for ``natural`` by one of them and
            for Partitioners.
        base: the folder that ``file.py`` is relative to.
        settings: the partition's own.

    Returns:
        Client ``k``'s examples are ``order[offsets[k]:offsets[k + 1]]``. It also has ``shift`` where clients see their
        inputs each in a way of its own.

    Raises:
        RequestError: names ``data.partition``, one of its settings, or ``data.clients``.
    """
    from clients import catalog
    from fedsim.data import foreign

    key = "data.partition"
    part = Part.of(name)
    if settings:
        part = Part(part.name, {**part.settings, **settings}, part.thing)
    if isinstance(clients, bool) or not isinstance(clients, int | np.integer) or clients < 1:
        raise RequestError(f"data.clients: {clients!r} given; give a whole number of at least 1")
    labels = _array(labels, "labels")
    ids = None if ids is None else _array(ids, "ids")
    if len(labels) == 0:
        raise RequestError("data.source: no example is left for the clients; give more, or the server fewer")
    foreign.need_installed(part)
    generator = randomness.numpy_generator(seed, "partition")
    offered = {"labels": labels, "clients": clients, "generator": generator, "ids": ids, "columns": columns}
    if part.own and "seed" not in part.settings and foreign.takes_seed(catalog.load(part, "partitions", base, key=key)):
        offered["seed"] = seed
    found = catalog.build(part, "partitions", base, key=key, **offered)
    if foreign.is_partitioner(found):
        found = foreign.read(found, labels, generator, ids, columns)
    return _checked(found, len(labels), part.name)


def _array(values: Any, name: str) -> np.ndarray:
    """What is one value an example, as an array."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        raise RequestError(f"data.partition: ragged {name} given; give one value an example, [N]") from None
    if array.ndim == 0:
        raise RequestError(f"data.partition: {name} {values!r} given; give one value an example, [N]")
    return array


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
    shift = getattr(found, "shift", None)
    return Partition(order, offsets) if shift is None else ShiftedPartition(order, offsets, shift)


def _named_clients(by: str, columns: Any) -> tuple[np.ndarray, int]:
    """Whose each example is by a column, ``int64 [N]``, and how many clients there are; they are in sorted order."""
    import pandas

    key = "data.partition.by"
    known = () if columns is None else columns.names
    if by not in known:
        have = f"it has {', '.join(known)}" if known else "none are at hand"
        raise RequestError(f"{key}: the source has no column {by!r}; {have}{nearest(by, known)}")
    values = np.asarray(columns.column(by))
    if values.ndim != 1 or values.dtype.kind not in "iubUSO":
        raise RequestError(
            f"{key}: column {by!r} is {values.dtype} {list(values.shape)}; give one of an integer or string an example"
        )
    if values.dtype.kind in "iub":
        present, owner = np.unique(values, return_inverse=True)
        return owner, len(present)
    owner, names = pandas.factorize(values.astype(object), sort=True)  # hashed: far faster than sorting strings
    if (owner < 0).any():
        raise RequestError(f"{key}: column {by!r} has no value at example {int(np.argmax(owner < 0))}")
    if not (all(isinstance(name, str | bytes) for name in names) or all(isinstance(name, int) for name in names)):
        kinds = ", ".join(sorted({type(name).__name__ for name in names}))
        raise RequestError(f"{key}: column {by!r} has values of {kinds}; give integers alone or strings alone")
    return owner.astype(np.int64), len(names)
