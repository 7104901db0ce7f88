"""What examples are: columns of tensors, wherever they lie, and the splits that a source brings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError, nearest

SPLITS = ("train", "test", "validation", "proxy", "root")


class Dataset(Protocol):
    """A map-style data set whose examples are dicts, e.g. a ``torch.utils.data.Dataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Columns(Sized):
    """Examples of one split, by position: each column is a tensor ``[N, ...]``."""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns' names, in the order in which the source gave them."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one example of a column."""
        raise NotImplementedError

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The examples at ``index`` (``int64``, any shape): name -> ``[*index.shape, ...]``."""
        raise NotImplementedError

    def column(self, name: str) -> Tensor:
        """A whole column ``[N, ...]``; meant for small ones such as labels."""
        raise NotImplementedError

    def subset(self, index: Tensor) -> Columns:
        """The examples at ``index`` (``int64 [n]``) alone."""
        raise NotImplementedError

    def without(self, name: str) -> Columns:
        """The same examples less one column."""
        raise NotImplementedError

    def map_tensors(self, fn: Callable[[Any], Any]) -> Columns:
        """The same columns with ``fn`` applied to every tensor that is held."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TensorColumns(Columns):
    """Columns held in memory (or in memory-mapped files): name -> ``[N, ...]``, equally long."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape[1:])

    def take(self, index: Tensor) -> dict[str, Tensor]:
        flat = index.reshape(-1)
        return {
            name: tensor.index_select(0, flat).reshape((*index.shape, *tensor.shape[1:]))
            for name, tensor in self.tensors.items()
        }

    def column(self, name: str) -> Tensor:
        return self.tensors[name]

    def subset(self, index: Tensor) -> TensorColumns:
        return TensorColumns(self.take(index))

    def without(self, name: str) -> TensorColumns:
        return TensorColumns({known: tensor for known, tensor in self.tensors.items() if known != name})

    def map_tensors(self, fn: Callable[[Any], Any]) -> TensorColumns:
        return TensorColumns({name: fn(tensor) for name, tensor in self.tensors.items()})


@dataclass(frozen=True, eq=False)
class DatasetColumns(Columns):
    """Columns read example by example from a map-style data set of dicts; nothing is kept.

    Values may be tensors, arrays or numbers, of the same shape in every example.

    Attributes:
        dataset: the data set; sent to workers as it is, so it must be picklable.
        index: ``int64 [N]`` positions in it; None for all of it.
        hidden: columns that are left out.
    """

    dataset: Dataset
    index: Tensor | None = None
    hidden: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.dataset) if self.index is None else len(self.index)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._example(0))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._example(0)[name].shape)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        if index.numel() == 0:
            return {name: value.new_empty((*index.shape, *value.shape)) for name, value in self._example(0).items()}
        examples = [self._example(position) for position in index.reshape(-1).tolist()]
        stacked = {name: _stack(name, examples) for name in examples[0]}
        return {name: values.reshape((*index.shape, *values.shape[1:])) for name, values in stacked.items()}

    def column(self, name: str) -> Tensor:
        return _stack(name, [{name: self._example(position).get(name)} for position in range(len(self))])

    def subset(self, index: Tensor) -> DatasetColumns:
        return replace(self, index=index if self.index is None else self.index[index])

    def without(self, name: str) -> DatasetColumns:
        return replace(self, hidden=self.hidden | {name})

    def map_tensors(self, fn: Callable[[Any], Any]) -> DatasetColumns:
        return self if self.index is None else replace(self, index=fn(self.index))

    def _example(self, position: int) -> dict[str, Tensor]:
        place = position if self.index is None else int(self.index[position])
        example = self.dataset[place]
        if not isinstance(example, Mapping):
            kind = type(example).__name__
            raise RequestError(
                f'data.source: a data set gives one dict an example, {{"x": ..., "y": ...}}; got {kind} at {place}'
            )
        return {name: _value(value, name, place) for name, value in example.items() if name not in self.hidden}


def _stack(name: str, examples: Sequence[Mapping[str, Tensor | None]]) -> Tensor:
    """One column of some examples, ``[n, ...]``."""
    values = [value for example in examples if (value := example.get(name)) is not None]
    if len(values) < len(examples):
        raise RequestError(f"data.source.{name}: some examples have this column and others have not")
    shapes = sorted({tuple(value.shape) for value in values})
    if len(shapes) > 1:
        raise RequestError(
            f"data.source.{name}: examples differ in shape ({', '.join(map(str, shapes[:3]))}); pad or crop them to one"
        )
    return torch.stack(values)


def _value(value: Any, name: str, place: int) -> Tensor:
    """One value of one example as a tensor."""
    if isinstance(value, Tensor):
        return value
    try:
        return _from_numpy(value) if isinstance(value, np.ndarray) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(
            f"data.source.{name}: {type(value).__name__} at {place} is no tensor; give tensors, arrays or numbers"
        ) from None


def _from_numpy(array: np.ndarray) -> Tensor:
    """The array's memory as a tensor, read-only memory (a memory map) included: nothing here writes into columns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def as_columns(split: Any, where: str) -> Columns:
    """Columns of a split as a source gives it.

    Args:
        split: dict of tensors or arrays ``[N, ...]``, or a map-style data set of dicts.
        where: the key that an error names, e.g. ``"data.source.train"``.

    Raises:
        RequestError: for no column, no example, columns of different lengths, or what is no tensor.
    """
    if isinstance(split, Columns):
        return split
    if isinstance(split, Mapping):
        columns: Columns = TensorColumns({name: _column(value, f"{where}.{name}") for name, value in split.items()})
        if not columns.names:
            raise RequestError(f'{where}: no column; give at least one, e.g. {{"x": x, "y": y}}')
        lengths = {name: len(columns.column(name)) for name in columns.names}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise RequestError(f"{where}: columns differ in length ({said})")
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


def _column(value: Any, where: str) -> Tensor:
    """A column as a tensor ``[N, ...]`` that shares the given memory."""
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            raise RequestError(f"{where}: an array of objects (ragged rows?); pad or crop its rows to one shape")
        try:
            value = _from_numpy(value)
        except TypeError:
            raise RequestError(f"{where}: no tensor has dtype {value.dtype}; give numbers") from None
    if not isinstance(value, Tensor):
        raise RequestError(f"{where}: {type(value).__name__} given; give a tensor or an array [N, ...]")
    if value.dim() == 0:
        raise RequestError(f"{where}: a single number given; give one value an example, [N, ...]")
    return value.detach()


@dataclass(frozen=True, eq=False)
class Source:
    """The data an experiment runs on.

    A split is a dict of tensors or arrays ``[N, ...]``, or a map-style data set of dicts. Splits that are not given are
    drawn from ``train`` as the experiment says.

    Attributes:
        train: the pool that clients train on.
        test: the server's test examples.
        validation: the server's validation examples.
        proxy: the server's unlabelled examples.
        root: the server's labelled examples.
        clients: ``int [N]``, whose each training example is (the natural partition).
        label: the column for label partitions and attacks.
        input_range: ``(low, high)`` of the inputs, e.g. ``(0, 1)`` for images; attacks stay inside it.

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

    def __post_init__(self) -> None:
        train = self.columns("train")
        assert train is not None
        for split in SPLITS[1:]:
            found = self.columns(split)
            if found is not None:
                self._same_columns(split, train.names, found.names)
        if self.clients is not None:
            ids = np.asarray(self.clients)
            if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) != len(train):
                raise RequestError(
                    f"data.source.clients: {ids.dtype} {list(ids.shape)} given; give one integer for each of the "
                    f"{len(train)} training examples"
                )
        if self.input_range is not None and not self.input_range[0] < self.input_range[1]:
            raise RequestError(f"data.source.input_range: {self.input_range} given; give (low, high)")

    def columns(self, split: str) -> Columns | None:
        """A split's columns, or None where the source brings none."""
        given = getattr(self, split)
        return None if given is None else as_columns(given, f"data.source.{split}")

    @property
    def client_ids(self) -> np.ndarray | None:
        """``int64 [N]``: whose each training example is, or None."""
        return None if self.clients is None else np.asarray(self.clients).astype(np.int64, copy=False)

    def _same_columns(self, split: str, wanted: tuple[str, ...], given: tuple[str, ...]) -> None:
        for name in wanted:
            if name not in given and not (split == "proxy" and name == self.label):
                raise RequestError(
                    f"data.source.{split}: column {name!r} of train is missing; it has {', '.join(given)}"
                    f"{nearest(name, given)}"
                )
