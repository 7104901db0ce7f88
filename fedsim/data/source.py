"""What a source brings: splits of examples, checked to fit each other."""

from __future__ import annotations

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
from fedsim.data.tensors import to_column

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
    tensors = {name: to_column(value, f"{where}.{name}") for name, value in split.items()}
    lengths = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise RequestError(f"{where}: columns differ in length ({said})")
    mapped = {name for name, value in split.items() if is_mapped(value)}
    if not mapped:
        return TensorColumns(tensors)
    return mapped_columns({name: split[name] if name in mapped else tensors[name] for name in split})


def input_name(columns: Columns, label: str) -> str:
    """The column that a model takes: ``x``, or the first that is no label where there is no ``x``."""
    names = columns.names
    return "x" if "x" in names else next((name for name in names if name != label), names[0])


@dataclass(frozen=True, eq=False)
class Source:
    """The data an experiment runs on.

    A split is a dict of tensors or arrays ``[N, ...]``, a map-style data set of dicts, a Hugging Face data set, or
    columns such as :class:`ClientColumns`. Splits that are not given are drawn from ``train`` as the experiment says.

    Inputs of bytes (``uint8``) with the range (0, 1) are images: they stay bytes in memory and are float32 in [0, 1]
    when they are taken.

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
        scan: whether numbers in memory are looked through for NaN and infinities, once.

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
        if self.classes is not None and (not isinstance(self.classes, int) or self.classes < 1):
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
        name = input_name(train, self.label)
        for split, columns in found.items():
            types = train.dtype(name), columns.dtype(name)
            if torch.uint8 in types and types[0] != types[1]:
                raise RequestError(
                    f"data.source.{split}.{name}: {str(types[1])[6:]} given, and train has {str(types[0])[6:]}; give"
                    " bytes in all splits or in none"
                )
        if self.input_range == (0, 1):
            found = {split: _unit_range(columns, name) for split, columns in found.items()}
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


def _unit_range(columns: Columns, name: str) -> Columns:
    """Columns one of which, if it is of bytes, is given as float32 in [0, 1]."""
    if columns.dtype(name) != torch.uint8:
        return columns
    if isinstance(columns, TensorColumns | MappedColumns):
        return replace(columns, pixels=columns.pixels | {name})
    return Derived(columns, UnitRange(name), changes=frozenset({name}))
