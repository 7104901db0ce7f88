"""The clients' and the server's examples: a source cut up as the experiment says, every draw keyed by the seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError
from fedsim.data.checks import checked, class_labels, count_classes
from fedsim.data.columns import Change, Columns, Derived, View, derive
from fedsim.data.csr import CSR, mapped
from fedsim.data.matched import matched_tests
from fedsim.data.partitions import partition
from fedsim.data.source import Source, input_name
from fedsim.data.splits import check_cover, client_splits, held_out, server_splits

if TYPE_CHECKING:
    from fedsim.data.shifts import FeatureShift
    from fedsim.experiment import DataSettings

#: Partitions that only count labels, for which those need not be read.
_BLIND = ("iid", "natural", "quantity_skew", "feature_shift")


@dataclass(frozen=True, eq=False)
class Population:
    """All examples of an experiment and who holds them.

    Attributes:
        columns: the pool that the clients' splits point into.
        splits: ``"train"``, and ``"validation"`` and ``"test"`` where clients keep some: positions in
            ``columns_of(split)``.
        server: the server's splits, those there are among ``"test"``, ``"validation"``, ``"proxy"`` (unlabelled) and
            ``"root"``.
        held_out: ``int64``, ids of clients that are never trained on, ascending.
        label: the column of labels.
        input_range: ``(low, high)`` of the inputs, where the source declares it.
        classes: how many classes the labels are of: what the source says, or one more than the largest label of any
            split; None where labels are no integers.
        input_shape: shape of one example of the input.
        input: the column of inputs: ``x``, or the first that is no label where there is no ``x``.
        matched: whether clients test on examples of the server's test split, chosen by their own label mixes.
        evaluation: what changes clients' examples wherever they are evaluated and not trained on; the server's splits
            are changed already.
    """

    columns: Columns
    splits: dict[str, CSR]
    server: dict[str, Columns]
    held_out: np.ndarray
    label: str
    input_range: tuple[float, float] | None
    classes: int | None
    input_shape: tuple[int, ...]
    input: str = "x"
    matched: bool = False
    evaluation: Change | None = None

    @property
    def clients(self) -> int:
        """How many clients there are, held-out and empty ones included; their ids count from 0."""
        return self.splits["train"].clients

    @property
    def examples(self) -> np.ndarray:
        """``int64 [clients]``, how many training examples each holds."""
        return self.splits["train"].sizes

    @cached_property
    def trainable(self) -> np.ndarray:
        """``int64``, ids of the clients that can be trained: not held out, at least one training example."""
        able = self.splits["train"].sizes > 0
        able[self.held_out] = False
        return np.flatnonzero(able)

    def columns_of(self, split: str) -> Columns:
        """What a split of the clients (``"train"``, ``"validation"``, ``"test"``) points into, as it is evaluated."""
        if self.matched and split == "test":
            return self.server["test"]
        if self.evaluation is None:
            return self.columns
        return Derived(self.columns, self.evaluation, changes=self._changed)

    def evaluated_by(self, change: Change) -> Population:
        """The same population, all of whose examples are changed where they are evaluated."""
        server = {split: derive(columns, change, changes=self._changed) for split, columns in self.server.items()}
        shape = Derived(self.columns, change).shape(self.input)
        return replace(self, server=server, evaluation=change, input_shape=shape)

    @property
    def _changed(self) -> frozenset[str]:
        """The columns that a change of examples may change: inputs, and labels that are no single number."""
        alike = self.label not in self.columns.names or not self.columns.shape(self.label)
        return frozenset({self.input} if alike else {self.input, self.label})

    def label_table(self, split: str, clients: np.ndarray) -> np.ndarray | None:
        """How many examples of each class some clients hold.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            clients: ``int64 [k]`` ids.

        Returns:
            ``int64 [k, classes]``; None where labels are not one class an example or do not lie in memory, or where
            clients have no such split.
        """
        labels = class_labels(self.columns_of(split), self.label)
        if labels is None or self.classes is None or split not in self.splits:
            return None
        return self.splits[split].label_table(labels.numpy(), self.classes, np.asarray(clients))

    def map_tensors(self, fn: Callable[[Any], Any]) -> Population:
        """The same population with ``fn`` applied to everything large that it holds in memory.

        ``fn`` gets a tensor and returns a tensor with the same values (say, in shared memory). It may also return a
        handle to be pickled, which a second ``map_tensors`` turns back into a tensor. What is read from files or from a
        data set stays as it is.
        """
        return replace(
            self,
            columns=self.columns.map_tensors(fn),
            splits={name: csr.map_tensors(fn) for name, csr in self.splits.items()},
            server={name: columns.map_tensors(fn) for name, columns in self.server.items()},
            held_out=mapped(self.held_out, fn),
        )


def build(
    source: Source,
    data: DataSettings,
    seed: int,
    base: Path | None = None,
    dtype: torch.dtype = torch.float32,
) -> Population:
    """Cuts a source into the server's splits and the clients'.

    In this order: the server's test split (``test_fraction`` of the pool, unless the source brings one), validation
    (``validation_fraction`` of the pool, likewise), proxy and root from what remains, then the partition of the rest
    among the clients, then each client's own test and validation examples.

    Args:
        source: the examples.
        data: the experiment's settings.
        seed: the experiment's seed; ``data.seed`` goes before it.
        base: the folder that a partition's ``file.py`` is relative to.
        dtype: what training computes in, where numbers must be finite.

    Raises:
        RequestError: where there are too few examples for what is asked, or numbers that cannot be used.
    """
    seed = seed if data.seed is None else data.seed
    source = source.with_columns(checked(source, dtype))
    pool = source.columns("train")
    assert pool is not None
    server, drawn, rest = server_splits(source, pool, data, seed)
    labels = _labels(source, pool, blind=not data.partition.own and data.partition.name in _BLIND)
    ids = source.client_ids
    dealt = partition(
        data.partition,
        np.empty((len(rest), 0)) if labels is None else labels.numpy()[rest],
        data.clients,
        seed,
        ids=None if ids is None else ids[rest],
        columns=View(pool, torch.from_numpy(rest)),
        base=base,
    )
    classes = count_classes(source, labels)
    whole = CSR(rest[dealt.order], dealt.offsets)
    matched, share = data.client_test == "matched", data.client_test_fraction or 0.0
    splits = client_splits(whole, data.client_validation_fraction, 0.0 if matched else share, seed)
    check_cover(len(pool), [drawn, *(csr.order for csr in splits.values())])
    shift = getattr(dealt, "shift", None)
    if matched:
        splits["test"] = _matched(server, splits["train"], pool, source.label, classes, share, shift, seed)
    name = input_name(pool, source.label)
    if shift is not None:
        owners = np.full(len(pool), -1)
        owners[whole.order] = whole.owners
        change = Shifted(shift, name, torch.from_numpy(owners), seed, source.input_range)
        pool = derive(pool, change, torch.from_numpy(whole.order), {name})
    return Population(
        columns=pool,
        splits=splits,
        server=server,
        held_out=held_out(splits["train"], data.held_out_clients, seed),
        label=source.label,
        input_range=source.input_range,
        classes=classes,
        input_shape=pool.shape(name),
        input=name,
        matched=matched,
    )


def _labels(source: Source, pool: Columns, blind: bool) -> Tensor | None:
    """The pool's labels ``[N]``; None where there are none, or where nobody looks and they would have to be read."""
    if source.label not in pool.names or pool.shape(source.label):
        return None
    held = pool.held(source.label)
    return pool.column(source.label) if held is None and not blind else held


def _matched(
    server: dict[str, Columns],
    train: CSR,
    pool: Columns,
    label: str,
    classes: int | None,
    share: float,
    shift: Any,
    seed: int,
) -> CSR:
    """The clients' test examples among the server's; says what is missing for that."""
    key = 'data.client_test: "matched"'
    if not share:
        raise RequestError(f"{key} needs data.client_test_fraction above 0, the size of a client's test")
    if "test" not in server:
        raise RequestError(f"{key} draws from the server's test split, and there is none; set data.test_fraction")
    if shift is not None:
        raise RequestError(f'{key} tests on the server\'s inputs, which no feature shift reaches; use "own"')
    labels, tests = class_labels(pool, label), class_labels(server["test"], label)
    if labels is None or tests is None or classes is None:
        raise RequestError(
            f"{key} goes by labels in memory, one integer class an example, and column {label!r} of this source is"
            ' none; use "own"'
        )
    return matched_tests(train, labels.numpy(), tests.numpy(), classes, share, seed)


@dataclass(frozen=True, eq=False)
class Shifted:
    """The change of the clients' inputs by a feature shift, see :func:`fedsim.data.derive`.

    Attributes:
        shift: what each client's inputs go through.
        name: the column of inputs.
        owners: ``int64 [N]`` whose each example of the pool is.
        seed: what the shift's noise is keyed by.
        input_range: what inputs stay within.
    """

    shift: FeatureShift
    name: str
    owners: Tensor
    seed: int
    input_range: tuple[float, float] | None

    def __call__(self, batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        x = self.shift.apply(batch[self.name], self.owners[index], index, self.seed, self.input_range)
        return {self.name: x}
