"""The clients' and the server's examples: a source cut up as the experiment says, every draw keyed by the seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clients import randomness
from clients.errors import RequestError
from fedsim.data.partitions import partition
from fedsim.data.source import SPLITS, Columns, Source, TensorColumns

if TYPE_CHECKING:
    from fedsim.experiment import DataSettings


@dataclass(frozen=True, eq=False)
class CSR:
    """Which examples each client holds: client ``k`` those at ``order[offsets[k]:offsets[k + 1]]``.

    Attributes:
        order: ``int64 [N]`` positions in the pool.
        offsets: ``int64 [clients + 1]``.
    """

    order: np.ndarray
    offsets: np.ndarray

    @property
    def clients(self) -> int:
        return len(self.offsets) - 1

    @property
    def examples(self) -> int:
        return len(self.order)

    @property
    def sizes(self) -> np.ndarray:
        """``int64 [clients]`` examples of each client."""
        return np.diff(self.offsets)

    @property
    def owners(self) -> np.ndarray:
        """``int64 [N]`` the client of each element of ``order``."""
        return np.repeat(np.arange(self.clients), self.sizes)

    def of(self, client: int) -> np.ndarray:
        """One client's examples, a view of ``order``."""
        return self.order[self.offsets[client] : self.offsets[client + 1]]

    def only(self, chosen: np.ndarray) -> CSR:
        """The same clients with those elements of ``order`` alone that are chosen, ``bool [N]``."""
        before = np.concatenate([[0], np.cumsum(chosen)])
        return CSR(self.order[chosen], before[self.offsets])

    def map_tensors(self, fn: Callable[[Any], Any]) -> CSR:
        return CSR(_mapped(self.order, fn), _mapped(self.offsets, fn))


@dataclass(frozen=True, eq=False)
class Population:
    """All examples of an experiment and who holds them.

    Attributes:
        columns: the pool that the clients' splits point into.
        splits: ``"train"``, and ``"validation"`` and ``"test"`` where clients keep some: positions in ``columns``.
        server: the server's splits, those there are among ``"test"``, ``"validation"``, ``"proxy"`` (unlabelled) and
            ``"root"``.
        held_out: ``int64``, ids of clients that are never trained on, ascending.
        label: the column of labels.
        input_range: ``(low, high)`` of the inputs, where the source declares it.
        classes: one more than the largest label of any split, where labels are integers; else None.
        input_shape: shape of one example of ``x`` (of the first column that is no label, where there is no ``x``).
    """

    columns: Columns
    splits: dict[str, CSR]
    server: dict[str, Columns]
    held_out: np.ndarray
    label: str
    input_range: tuple[float, float] | None
    classes: int | None
    input_shape: tuple[int, ...]

    @property
    def clients(self) -> int:
        """How many clients there are, held-out and empty ones included; their ids count from 0."""
        return self.splits["train"].clients

    @cached_property
    def trainable(self) -> np.ndarray:
        """``int64``, ids of the clients that can be trained: not held out, at least one training example."""
        able = self.splits["train"].sizes > 0
        able[self.held_out] = False
        return np.flatnonzero(able)

    def map_tensors(self, fn: Callable[[Any], Any]) -> Population:
        """The same population with ``fn`` applied to everything large that it holds.

        ``fn`` gets a tensor and returns a tensor with the same values (say, in shared memory). It may also return a
        handle to be pickled, which a second ``map_tensors`` turns back into a tensor. A data set stays as it is.
        """
        return replace(
            self,
            columns=self.columns.map_tensors(fn),
            splits={name: csr.map_tensors(fn) for name, csr in self.splits.items()},
            server={name: columns.map_tensors(fn) for name, columns in self.server.items()},
            held_out=_mapped(self.held_out, fn),
        )


def _mapped(array: Any, fn: Callable[[Any], Any]) -> Any:
    """``fn`` of an array as a tensor, an array again where ``fn`` gives a tensor."""
    given = fn(torch.from_numpy(array) if isinstance(array, np.ndarray) else array)
    return given.numpy() if isinstance(given, Tensor) else given


def build(source: Source, data: DataSettings, seed: int, base: Path | None = None) -> Population:
    """Cuts a source into the server's splits and the clients'.

    In this order: the server's test split (``test_fraction`` of the pool, unless the source brings one), validation
    (``validation_fraction`` of the pool, likewise), proxy and root from what remains, then the partition of the rest
    among the clients, then each client's own test and validation examples.

    Args:
        source: the examples.
        data: the experiment's settings.
        seed: the experiment's seed; ``data.seed`` goes before it.
        base: the folder that a partition's ``file.py`` is relative to.

    Raises:
        RequestError: where there are too few examples for what is asked.
    """
    seed = seed if data.seed is None else data.seed
    pool = source.columns("train")
    assert pool is not None
    server, drawn, rest = _server_splits(source, pool, data, seed)
    label = source.label if source.label in pool.names else None
    labels = None if label is None or pool.shape(label) else pool.column(label)
    ids = source.client_ids
    order, offsets = partition(
        data.partition,
        np.empty((len(rest), 0)) if labels is None else labels.numpy()[rest],
        data.clients,
        seed,
        ids=None if ids is None else ids[rest],
        base=base,
    )
    whole = CSR(rest[order], offsets)
    splits = _client_splits(whole, data.client_validation_fraction, data.client_test_fraction or 0.0, seed)
    _check_cover(len(pool), [drawn, *(csr.order for csr in splits.values())])
    name = "x" if "x" in pool.names else next((name for name in pool.names if name != label), pool.names[0])
    return Population(
        columns=pool,
        splits=splits,
        server=server,
        held_out=_held_out(splits["train"], data.held_out_clients, seed),
        label=source.label,
        input_range=source.input_range,
        classes=_count_classes(source, labels),
        input_shape=pool.shape(name),
    )


def _server_splits(
    source: Source, pool: Columns, data: DataSettings, seed: int
) -> tuple[dict[str, Columns], np.ndarray, np.ndarray]:
    """The server's splits, the positions in the pool that they took, and those that remain, ascending."""
    examples = len(pool)
    wanted = {
        "test": ("test_fraction", data.test_fraction, round(data.test_fraction * examples)),
        "validation": ("validation_fraction", data.validation_fraction, round(data.validation_fraction * examples)),
        "proxy": ("proxy", data.proxy, data.proxy),
        "root": ("root", data.root, data.root),
    }
    drawn = randomness.uniforms(randomness.keys(seed, "split", clients=np.arange(examples)), 1)[:, 0]
    order = np.argsort(drawn, kind="stable")
    server: dict[str, Columns] = {}
    start = 0
    for split, (setting, value, size) in wanted.items():
        given = source.columns(split)
        if given is None and size > 0:
            if size >= examples - start:
                raise RequestError(
                    f"data.{setting}: {value} asks for {size} examples, but {examples - start} remain and the clients "
                    "need some; lower it"
                )
            given = pool.subset(torch.from_numpy(np.sort(order[start : start + size])))
            start += size
        if given is not None:
            server[split] = _unlabelled(given, source.label) if split == "proxy" else given
    return server, order[:start], np.sort(order[start:])


def _unlabelled(columns: Columns, label: str) -> Columns:
    """Less the label, so that nothing can learn from it; kept where it is all there is (text is its own label)."""
    return columns.without(label) if label in columns.names and len(columns.names) > 1 else columns


def _check_cover(examples: int, parts: list[np.ndarray]) -> None:
    """Every example of the pool is in one of the parts, and in no other."""
    if not (np.bincount(np.concatenate(parts), minlength=examples) == 1).all():
        raise AssertionError("the splits do not cover the examples, or overlap")


def _client_splits(whole: CSR, validation: float, test: float, seed: int) -> dict[str, CSR]:
    """Each client's examples as train, validation and test; at least one of them stays for training.

    A client of n examples keeps ``test * n`` for testing and ``validation * n`` for validation, each rounded.
    """
    if validation == 0 and test == 0:
        return {"train": whole}
    if validation + test >= 1:
        raise RequestError(
            f"data.client_test_fraction: {test} and client_validation_fraction {validation} leave nothing to train on; "
            "together they must be below 1"
        )
    sizes = whole.sizes
    tests = np.clip(np.rint(test * sizes).astype(np.int64), 0, np.maximum(sizes - 1, 0))
    validations = np.clip(np.rint(validation * sizes).astype(np.int64), 0, np.maximum(sizes - 1 - tests, 0))
    owners = whole.owners
    drawn = randomness.uniforms(randomness.keys(seed, "client split", clients=whole.order), 1)[:, 0]
    rank = np.empty(whole.examples, dtype=np.int64)
    rank[np.lexsort((drawn, owners))] = np.arange(whole.examples)
    rank -= whole.offsets[owners]
    in_test = rank < tests[owners]
    in_validation = ~in_test & (rank < (tests + validations)[owners])
    splits = {"train": whole.only(~(in_test | in_validation))}
    if validation:
        splits["validation"] = whole.only(in_validation)
    if test:
        splits["test"] = whole.only(in_test)
    return splits


def _held_out(train: CSR, count: int, seed: int) -> np.ndarray:
    """Ids of ``count`` clients with examples, drawn at random, ascending."""
    able = np.flatnonzero(train.sizes)
    if count and count >= len(able):
        raise RequestError(
            f"data.held_out_clients: {count} of {len(able)} clients with examples; at least one must stay to train"
        )
    drawn = randomness.uniforms(randomness.keys(seed, "held out", clients=able), 1)[:, 0]
    return np.sort(able[np.argsort(drawn, kind="stable")[:count]])


def _count_classes(source: Source, labels: Tensor | None) -> int | None:
    """One more than the largest label of any split, where labels are integers (``labels``: the pool's, if at hand)."""
    largest = -1
    for split in SPLITS:
        columns = source.columns(split)
        if columns is None or source.label not in columns.names:
            continue
        for values in [labels] if split == "train" and labels is not None else _blocks(columns, source.label):
            if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
                return None
            largest = max(largest, int(values.max()))
    return largest + 1 if largest >= 0 else None


def _blocks(columns: Columns, name: str, size: int = 64) -> Iterator[Tensor]:
    """A column; a data set's in blocks of examples, since a mask an example may not fit in memory at once."""
    if isinstance(columns, TensorColumns):
        yield columns.column(name)
    else:
        for block in torch.arange(len(columns)).split(size):
            yield columns.take(block)[name]
