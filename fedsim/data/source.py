"""What a source brings: splits of examples, checked to fit each other."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from clients.errors import RequestError, nearest
from fedsim.data import arrow
from fedsim.data.columns import Columns, Derived, TensorColumns, UnitRange
from fedsim.data.lazy import ClientColumns, DatasetColumns
from fedsim.data.mapped import MappedColumns, is_mapped, mapped_columns
from fedsim.data.tensors import Wrong, to_column, to_int64

SPLITS = ("train", "test", "validation", "proxy", "root")


def as_columns(split: Any, where: str) -> Columns:
    """Columns of a split as a source gives it.

    Args:
        split: dict of tensors or arrays ``[N, ...]``, a Hugging Face data set, or a map-style data set of dicts. Arrays
            that are mapped whole (``numpy.load(path, mmap_mode="r")``) stay in their files.
        where: the key that an error names, e.g. ``"data.source.train"``.

    Raises:
        RequestError: for no column, no example, columns of different lengths, or what is no tensor.
    """
    if isinstance(split, Columns):
        columns = split
    elif isinstance(split, Mapping):
        if not split:
            raise RequestError(f'{where}: no column; give at least one, e.g. {{"x": x, "y": y}}')
        columns = _of_mapping(split, where)
    elif arrow.is_dataset(split):
        columns = arrow.columns_of(split, where)
    elif hasattr(split, "__getitem__") and hasattr(split, "__len__"):
        columns = DatasetColumns(split)
    else:
        kind = type(split).__name__
        raise RequestError(f"{where}: {kind} given; give a dict of tensors or a data set with len() and [index]")
    if len(columns) == 0:
        raise RequestError(f"{where}: no example")
    if not columns.names:
        raise RequestError(f"{where}: its examples have no column")
    return columns


def _of_mapping(split: Mapping[str, Any], where: str) -> Columns:
    mapped = {name for name, value in split.items() if is_mapped(value)}
    tensors = {name: value if name in mapped else to_column(value, f"{where}.{name}") for name, value in split.items()}
    for name in mapped:
        if split[name].dtype.kind not in "fiub":
            raise RequestError(f"{where}.{name}: {split[name].dtype} given; give real numbers")
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RequestError(f"{where}: columns differ in length ({said})")
    return mapped_columns(tensors) if mapped else TensorColumns(tensors)


def input_name(columns: Columns, label: str) -> str:
    """The column that a model takes: ``x``, or the first that is no label where there is no ``x``."""
    names = columns.names
    return "x" if "x" in names else next((name for name in names if name != label), names[0])


@dataclass(frozen=True, eq=False)
class Source:
    """The data an experiment runs on.

    A split is a dict of tensors or arrays ``[N, ...]``, a map-style data set of dicts, a Hugging Face data set, or
    columns such as :class:`ClientColumns`. Splits that are not given are drawn from ``train`` as the experiment says.

    Inputs of bytes (``uint8``) with no range, or with (0, 1) or (0, 255), are an image's pixels: they stay bytes in
    memory and are float32 in [0, 1] when they are taken, which is then their range. Labels that are whole numbers
    become int64, and so do those that are true and false, one an example.

    Attributes:
        train: the pool that clients train on.
        test: the server's test examples.
        validation: the server's validation examples.
        proxy: the server's unlabelled examples.
        root: the server's labelled examples.
        clients: ``int [N]``, whose each training example is (the natural partition); left out, ``ClientColumns`` know.
        label: the column for label partitions and attacks.
        input_range: ``(low, high)`` of the inputs, e.g. ``(0, 1)`` for images; attacks stay inside it.
        classes: how many classes the labels are of; left out, they are counted.
        scan: whether numbers are looked through for NaN and infinities: those in memory and in mapped files once,
            others whenever they are taken.

    Raises:
        RequestError: for splits that are no columns, or that do not fit each other.
    """

    train: Any
    test: Any = None
    validation: Any = None
    proxy: Any = None
    root: Any = None
    clients: Any = None
    label: str = "y"
    input_range: tuple[float, float] | None = None
    classes: int | None = None
    scan: bool = True

    def __post_init__(self) -> None:
        if self.input_range is not None and not self.input_range[0] < self.input_range[1]:
            raise RequestError(f"data.source.input_range: {self.input_range} given; give (low, high)")
        if self.classes is not None and (
            not isinstance(self.classes, int) or isinstance(self.classes, bool) or self.classes < 1
        ):
            raise RequestError(f"data.source.classes: {self.classes!r} given; give how many there are")
        found = {
            split: as_columns(given, f"data.source.{split}")
            for split in SPLITS
            if (given := getattr(self, split)) is not None
        }
        if "train" not in found:
            raise RequestError("data.source.train: None given; give a dict of tensors or a data set")
        train = found["train"]
        for split, columns in found.items():
            self._same_columns(split, train.names, columns.names)
            arrow.check_needed(getattr(self, split), columns, [self.label], f"data.source.{split}")
            for name in columns.names:
                if columns.dtype(name).is_complex:
                    raise RequestError(f"data.source.{split}.{name}: complex numbers given; give real ones")
        name = input_name(train, self.label)
        if 0 in train.shape(name):
            shape = list(train.shape(name))
            raise RequestError(f"data.source.train.{name}: examples of shape {shape} hold no number; give at least one")
        for split, columns in found.items():
            self._same_kind(split, train, columns, name)
        if train.dtype(name) == torch.uint8 and self.input_range in (None, (0, 1), (0, 255)):
            object.__setattr__(self, "input_range", (0.0, 1.0))
            found = {split: _unit_range(columns, name) for split, columns in found.items()}
        if self.label != name:
            found = {split: _int64(columns, self.label, f"data.source.{split}") for split, columns in found.items()}
        object.__setattr__(self, "_columns", found)
        if self.clients is not None:
            ids = np.asarray(self.clients)
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) != len(train):
                raise RequestError(
                    f"data.source.clients: {ids.dtype} {list(ids.shape)} given; give one integer for each of the "
                    f"{len(train)} training examples"
                )

    @classmethod
    def of(cls, given: Any) -> Any:
        """A source of what may stand for one, a Hugging Face ``Dataset`` or ``DatasetDict``; all else as it is.

        The input, a column ``x`` or the only image or array, becomes ``x``, and the label, a column ``y`` or ``label``
        or the only ``ClassLabel``, becomes ``y``.
        """
        return cls(**arrow.splits_of(given, "data.source")) if arrow.is_dataset(given, whole=True) else given

    def columns(self, split: str) -> Columns | None:
        """A split's columns, or None where the source brings none."""
        found: dict[str, Columns] = vars(self)["_columns"]
        return found.get(split)

    def with_columns(self, columns: Mapping[str, Columns]) -> Source:
        """The same source of other columns, by split."""
        source = copy.copy(self)
        object.__setattr__(source, "_columns", dict(columns))
        return source

    @property
    def client_ids(self) -> np.ndarray | None:
        """``int64 [N]``: whose each training example is, or None."""
        if self.clients is not None:
            return np.asarray(self.clients).astype(np.int64, copy=False)
        return self.train.ids if isinstance(self.train, ClientColumns) else None

    def _same_columns(self, split: str, wanted: tuple[str, ...], given: tuple[str, ...]) -> None:
        for name in wanted:
            if name not in given and not (split == "proxy" and name == self.label):
                raise RequestError(
                    f"data.source.{split}: column {name!r} of train is missing; it has {', '.join(given)}"
                    f"{nearest(name, given)}"
                )

    def _same_kind(self, split: str, train: Columns, columns: Columns, input: str) -> None:
        for name in (name for name in train.names if name in columns.names):
            where, types = f"data.source.{split}.{name}", (train.dtype(name), columns.dtype(name))
            shapes = train.shape(name), columns.shape(name)
            if shapes[0] != shapes[1]:
                raise RequestError(f"{where}: {list(shapes[1])} an example, and train has {list(shapes[0])}")
            told = f"{where}: {str(types[1])[6:]} given, and train has {str(types[0])[6:]}"
            if name == input and torch.uint8 in types and types[0] != types[1]:
                raise RequestError(f"{told}; give bytes in all splits or in none")
            if name == self.label and types[0].is_floating_point != types[1].is_floating_point:
                raise RequestError(f"{told}; give labels that are classes (integers) in all splits or in none")


def _int64(columns: Columns, name: str, where: str) -> Columns:
    """Columns one of which, if it is of whole numbers (or of yes and no, one an example) at hand, is given as int64.

    Raises:
        RequestError: for a number that does not fit.
    """
    if not isinstance(columns, TensorColumns | MappedColumns) or name not in columns.names:
        return columns
    dtype = columns.dtype(name)
    if dtype.is_floating_point or dtype == torch.int64 or (dtype == torch.bool and columns.shape(name)):
        return columns
    if name not in columns.tensors:
        assert isinstance(columns, MappedColumns)
        file = replace(columns.files[name], delivered=np.dtype(np.int64))
        return replace(columns, files={**columns.files, name: file})
    found = to_int64(columns.tensors[name])
    if isinstance(found, Wrong):
        raise RequestError(f"{where}.{name}: {found}")
    return replace(columns, tensors={**columns.tensors, name: found})


def _unit_range(columns: Columns, name: str) -> Columns:
    """Columns one of which, if it is of bytes, is given as float32 in [0, 1]."""
    if columns.dtype(name) != torch.uint8:
        return columns
    if isinstance(columns, TensorColumns | MappedColumns):
        return replace(columns, pixels=columns.pixels | {name})
    return Derived(columns, UnitRange(name), changes=frozenset({name}))
