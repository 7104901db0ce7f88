"""What is looked for in the numbers of a source before anything is built on them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError
from fedsim.data.columns import Columns, Derived, TensorColumns
from fedsim.data.lazy import ClientColumns
from fedsim.data.mapped import MappedColumns
from fedsim.data.source import SPLITS, Source, input_name
from fedsim.data.tensors import Wrong, not_finite, to_int64

#: Classes above which labels are taken for something else, such as ids, where they are more than ten times as many as
#: the examples: a model would have a row of weights for each. Tokens have vocabularies of some 100,000 words.
_MOST_CLASSES = 1000
_MOST_WORDS = 2**20

_DOUBLE = ', or set client.precision = "float64"'


def checked(source: Source, dtype: torch.dtype = torch.float32) -> dict[str, Columns]:
    """A source's columns by split, its numbers known to be good: those at hand now, others whenever they are taken.

    Args:
        source: what is looked through, for NaN and infinities as far as it says so.
        dtype: what training computes in; numbers must be finite there.

    Raises:
        RequestError: names the split, the column, and the place.
    """
    found = {}
    for split in SPLITS:
        columns = source.columns(split)
        if columns is None:
            continue
        if isinstance(columns, TensorColumns | MappedColumns):
            if source.scan:
                _check_finite(columns, split, dtype)
        else:
            columns = _checked_when_taken(columns, source, split, dtype)
        found[split] = columns
    return found


def _check_finite(columns: TensorColumns | MappedColumns, split: str, dtype: torch.dtype) -> None:
    for name in columns.names:
        tensor = columns.tensors.get(name)
        if tensor is not None:
            wrong = not_finite(tensor, dtype, _DOUBLE)
        else:
            assert isinstance(columns, MappedColumns)
            file = columns.files[name]
            once = file.delivered == np.float32  # whatever training computes in
            wrong = not_finite(file.array, torch.float32 if once else dtype, "" if once else _DOUBLE)
        if wrong is not None:
            raise RequestError(f"data.source.{split}.{name}: {wrong}")


def _checked_when_taken(columns: Columns, source: Source, split: str, dtype: torch.dtype) -> Columns:
    floats = tuple(name for name in columns.names if columns.dtype(name).is_floating_point) if source.scan else ()
    label = source.label if source.label in columns.names and columns.held(source.label) is None else None
    if label is not None and not _is_class(columns, label):
        label = None
    if label is None and not floats:
        return columns
    given = source.train if split == "train" and isinstance(source.train, ClientColumns) else None
    casts = label is not None and label != input_name(columns, label)
    change = WhenTaken(split, label, source.classes, casts, floats, dtype, given)
    return Derived(columns, change, changes=frozenset({label} if casts and label is not None else ()))


def _is_class(columns: Columns, label: str) -> bool:
    """Whether labels are whole numbers, or yes and no once an example."""
    dtype = columns.dtype(label)
    return whole(dtype) or (dtype == torch.bool and not columns.shape(label))


@dataclass(frozen=True, eq=False)
class WhenTaken:
    """Looks at examples when they are taken; labels become int64. See :data:`fedsim.data.columns.Change`.

    Attributes:
        split: where they are from.
        label: the column of labels, where those are whole numbers.
        classes: how many classes the source says that there are.
        casts: whether labels become int64.
        floats: the columns that must be finite.
        dtype: what training computes in.
        clients: the columns of the clients, where each loads its own.
    """

    split: str
    label: str | None
    classes: int | None
    casts: bool
    floats: tuple[str, ...]
    dtype: torch.dtype
    clients: ClientColumns | None

    def __call__(self, batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        for name in self.floats:
            self._refuse(not_finite(batch[name], self.dtype, _DOUBLE), name, index)
        if self.label is None:
            return {}
        labels = batch[self.label]
        fitting = to_int64(labels)
        self._refuse(fitting if isinstance(fitting, Wrong) else None, self.label, index)
        assert isinstance(fitting, Tensor)
        self._refuse(no_class(fitting, self.classes), self.label, index)
        return {self.label: fitting} if self.casts and labels.dtype != torch.int64 else {}

    def _refuse(self, wrong: Wrong | None, name: str, index: Tensor) -> None:
        if wrong is None:
            return
        position, where = int(index[wrong.place[0]]), f"data.source.{self.split}.{name}:"
        if self.clients is not None:
            client = int(np.searchsorted(self.clients.offsets, position, side="right")) - 1
            position -= int(self.clients.offsets[client])
            where = f"data.source.{self.split}: client {client}: {name} has"
        raise RequestError(f"{where} {wrong._replace(place=[position, *wrong.place[1:]])}")


def count_classes(source: Source, labels: Tensor | None) -> int | None:
    """How many classes the labels of all splits are of: what the source says, or one more than the largest.

    Args:
        source: whose labels.
        labels: the training split's, where they are at hand.

    Returns:
        None where labels are no classes: real numbers, or none at all.

    Raises:
        RequestError: for a class below 0 (of labels that are one an example; others may mark what does not count), one
            that the source's own number does not allow, or one so large that it can be no class, with its place.
    """
    largest, where = -1, ""
    for split in SPLITS:
        columns = source.columns(split)
        if columns is None or source.label not in columns.names:
            continue
        if not whole(columns.dtype(source.label)):
            return None
        if source.classes is not None and (labels is None or split != "train") and columns.held(source.label) is None:
            continue  # to read them all is what naming the number spares
        start = 0
        for values in [labels] if split == "train" and labels is not None else columns.blocks(source.label):
            wrong = no_class(values, source.classes)
            if wrong is not None:
                place = [start + wrong.place[0], *wrong.place[1:]]
                raise RequestError(f"data.source.{split}.{source.label}: {wrong._replace(place=place)}")
            most = int(values.max())
            if most > largest:
                first = (values == most).nonzero()[0].tolist()
                largest = most
                where = f"data.source.{split}.{source.label}: class {most} at {[start + first[0], *first[1:]]}"
            start += len(values)
    if source.classes is not None:
        return source.classes
    train = source.columns("train")
    assert train is not None
    single = source.label in train.names and not train.shape(source.label)
    if largest >= (max(_MOST_CLASSES, 10 * len(train)) if single else _MOST_WORDS):
        raise RequestError(
            f"{where} would make {largest + 1:,} classes, and there are {len(train):,} examples; number the classes"
            " from 0, give real targets as floats, or give a Source its number of classes"
        )
    return largest + 1 if largest >= 0 else None


def whole(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def no_class(values: Tensor, classes: int | None) -> Wrong | None:
    """The first of some labels ``int64 [N, ...]`` that is no class: too large, or below 0 where an example has one."""
    if not values.numel():
        return None
    if values.dim() == 1 and int(values.min()) < 0:
        place = int(values.argmin())
        return Wrong(f"class {int(values[place])}", [place], "classes count from 0 (real targets are floats)")
    if classes is not None and int(values.max()) >= classes:
        first = (values >= classes).nonzero()[0]
        return Wrong(
            f"class {int(values[tuple(first)])}",
            first.tolist(),
            f"the source says that there are {classes} classes, and they count from 0",
        )
    return None


def class_labels(columns: Columns, name: str) -> Tensor | None:
    """Labels ``int [N]`` of one class an example that lie in memory, or None."""
    if name not in columns.names or columns.shape(name):
        return None
    held = columns.held(name)
    return held if held is not None and whole(held.dtype) else None
