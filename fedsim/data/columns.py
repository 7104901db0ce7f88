"""Columns: the examples of a split by position, in memory or not, and what is derived from them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from clients.errors import RunError

#: Bytes of examples that are read at once where a whole column is gone through.
_BLOCK = 2**24

#: What changes examples: it gets columns ``[n, ...]`` and their positions ``int64 [n]``, and gives the columns that it
#: changes (or all). It is pickled to workers, must follow from its arguments alone, and may write into what it gets.
Change = Callable[[dict[str, Tensor], Tensor], Mapping[str, Tensor]]


class Columns(Sized):
    """Examples of one split, by position: each column is a tensor ``[N, ...]``."""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns' names, in the order in which the source gave them."""
        return tuple(self._first)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one example of a column."""
        return tuple(self._first[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """The type in which ``take`` gives a column."""
        return self._first[name].dtype

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The examples at ``index`` (``int64``, any shape): name -> ``[*index.shape, ...]``."""
        raise NotImplementedError

    def held(self, name: str) -> Tensor | None:
        """A column ``[N, ...]`` that lies in memory as ``take`` gives it; None where it has to be read or made."""
        return None

    def column(self, name: str) -> Tensor:
        """A whole column ``[N, ...]``; meant for small ones such as labels."""
        return torch.cat(list(self.blocks(name)))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A column in its order, in blocks of examples that fit in memory (a mask an example may not, all at once)."""
        held = self.held(name)
        if held is not None:
            yield held
        else:
            for index in torch.arange(len(self)).split(self.at_once):
                yield self.take(index)[name]

    def subset(self, index: Tensor) -> Columns:
        """The examples at ``index`` (``int64 [n]``) alone."""
        return View(self, index)

    def without(self, name: str) -> Columns:
        """The same examples less one column."""
        return View(self, hidden=frozenset({name}))

    def map_tensors(self, fn: Callable[[Any], Any]) -> Columns:
        """The same columns with ``fn`` applied to every tensor that is held."""
        return self

    @property
    def at_once(self) -> int:
        """How many examples to read at once where all are gone through."""
        return max(1, _BLOCK // max(1, sum(value.nbytes for value in self._first.values())))

    @cached_property
    def _first(self) -> dict[str, Tensor]:
        """The first example."""
        return {name: values[0] for name, values in self.take(torch.zeros(1, dtype=torch.int64)).items()}

    def _none(self, index: Tensor) -> dict[str, Tensor]:
        """What an empty ``index`` takes."""
        return {name: value.new_empty((*index.shape, *value.shape)) for name, value in self._first.items()}


@dataclass(frozen=True, eq=False)
class TensorColumns(Columns):
    """Columns held in memory: name -> ``[N, ...]``, equally long.

    Attributes:
        tensors: the columns.
        pixels: those of bytes (``uint8``) that ``take`` gives as float32 in [0, 1].
    """

    tensors: Mapping[str, Tensor]
    pixels: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32 if name in self.pixels else self.tensors[name].dtype

    def take(self, index: Tensor) -> dict[str, Tensor]:
        flat = index.reshape(-1)
        taken = {}
        for name, tensor in self.tensors.items():
            values = tensor.index_select(0, flat)
            if name in self.pixels:
                values = in_unit_range(values)
            taken[name] = values.reshape((*index.shape, *tensor.shape[1:]))
        return taken

    def held(self, name: str) -> Tensor | None:
        return None if name in self.pixels else self.tensors[name]

    def column(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return in_unit_range(tensor) if name in self.pixels else tensor

    def subset(self, index: Tensor) -> TensorColumns:
        return replace(self, tensors={name: tensor.index_select(0, index) for name, tensor in self.tensors.items()})

    def without(self, name: str) -> TensorColumns:
        return TensorColumns(
            {known: tensor for known, tensor in self.tensors.items() if known != name}, self.pixels - {name}
        )

    def map_tensors(self, fn: Callable[[Any], Any]) -> TensorColumns:
        return replace(self, tensors={name: fn(tensor) for name, tensor in self.tensors.items()})


@dataclass(frozen=True, eq=False)
class View(Columns):
    """Some examples, or some columns, of columns that stay where they are.

    Attributes:
        columns: what is looked at.
        index: ``int64 [N]`` positions in it; None for all.
        hidden: columns that are left out.
    """

    columns: Columns
    index: Tensor | None = None
    hidden: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.columns) if self.index is None else len(self.index)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self.columns.names if name not in self.hidden)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.columns.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.columns.dtype(name)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        taken = self.columns.take(index if self.index is None else self.index[index])
        return {name: values for name, values in taken.items() if name not in self.hidden}

    def held(self, name: str) -> Tensor | None:
        whole = None if name in self.hidden else self.columns.held(name)
        return whole if whole is None or self.index is None else whole.index_select(0, self.index)

    def subset(self, index: Tensor) -> View:
        return replace(self, index=index if self.index is None else self.index[index])

    def without(self, name: str) -> View:
        return replace(self, hidden=self.hidden | {name})

    def map_tensors(self, fn: Callable[[Any], Any]) -> View:
        index = None if self.index is None else fn(self.index)
        return replace(self, columns=self.columns.map_tensors(fn), index=index)


@dataclass(frozen=True, eq=False)
class Derived(Columns):
    """Columns whose examples are changed whenever they are taken; nothing is kept.

    Attributes:
        columns: what they come from.
        change: what changes them, see :data:`Change`.
        which: ``int64 [n]`` positions of the examples to change, ascending; None for all. Those keep shape and type.
        changes: the columns that ``change`` changes; None where that is not known. All others are then as good as
            those they come from: labels that lie in memory still do.
    """

    columns: Columns
    change: Change
    which: Tensor | None = None
    changes: frozenset[str] | None = None

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        return self.columns.names

    def take(self, index: Tensor) -> dict[str, Tensor]:
        if not index.numel():
            return self._none(index)
        flat = index.reshape(-1)
        batch = self.columns.take(flat)
        if self.which is None:
            batch |= changed(self.change, batch, flat)
        else:
            these = _among(flat, self.which).nonzero()[:, 0]
            if len(these):
                part = {name: values[these] for name, values in batch.items()}
                for name, values in changed(self.change, part, flat[these]).items():
                    batch[name] = batch[name].clone()
                    _put(batch[name], these, values, name, self.change)
        return {name: values.reshape((*index.shape, *values.shape[1:])) for name, values in batch.items()}

    def held(self, name: str) -> Tensor | None:
        return None if self.changes is None or name in self.changes else self.columns.held(name)

    def map_tensors(self, fn: Callable[[Any], Any]) -> Derived:
        which = None if self.which is None else fn(self.which)
        return replace(self, columns=self.columns.map_tensors(fn), which=which)


def derive(
    columns: Columns, change: Change, which: Tensor | None = None, changes: Collection[str] | None = None
) -> Columns:
    """Columns some of whose examples are changed.

    What lies in memory is changed at once, in blocks, and only the columns that change are copied. Columns of bytes
    that are taken as float32 in [0, 1] are changed as such: one of which any example changes is float32 from then on,
    four times as large. Columns that are read or made are changed whenever they are taken.

    Args:
        columns: what they come from; it stays as it is.
        change: gets columns ``[n, ...]`` and their positions ``int64 [n]`` in ``columns``, gives those that it changes.
        which: ``int64 [n]`` positions of the examples to change, in any order; None for all. Some examples keep their
            shape and type; all of them may change it.
        changes: the columns that ``change`` changes, where that is known.

    Raises:
        RunError: where the change gives other than as many examples of columns that there are, or what does not fit.
    """
    rows = None if which is None else torch.as_tensor(which, dtype=torch.int64).unique()
    if rows is not None and not len(rows):
        return columns
    if not isinstance(columns, TensorColumns):
        return Derived(columns, change, rows, None if changes is None else frozenset(changes))
    fresh: dict[str, Tensor] = {}
    for index in (torch.arange(len(columns)) if rows is None else rows).split(columns.at_once):
        batch = columns.take(index)
        found = changed(change, batch, index)
        for name, values in found.items():
            if name not in fresh:
                fresh[name] = _room(columns, name, values, int(index[0]) == 0 and rows is None)
            _put(fresh[name], index, values, name, change)
        if rows is None:
            for name in fresh.keys() - found.keys():
                _put(fresh[name], index, batch[name], name, change)
    return TensorColumns({**columns.tensors, **fresh}, columns.pixels - fresh.keys())


def _room(columns: TensorColumns, name: str, values: Tensor, all_change: bool) -> Tensor:
    """A tensor of its own for a column of which some examples change: like ``values`` where all of them do."""
    if all_change:
        return values.new_empty((len(columns), *values.shape[1:]))
    column = columns.column(name)
    return column if name in columns.pixels else column.clone()


def _put(column: Tensor, index: Tensor, values: Tensor, name: str, change: Change) -> None:
    if values.shape[1:] != column.shape[1:] or not torch.can_cast(values.dtype, column.dtype):
        raise RunError(
            f"{_called(change)}: examples of {name!r} became {values.dtype} {list(values.shape[1:])} and others are "
            f"{column.dtype} {list(column.shape[1:])}; a change of some examples keeps shape and type"
        )
    column[index] = values.to(column.dtype)


def changed(change: Change, batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """The columns that a change changes, ``[n, ...]`` each, in a batch with positions ``index`` ``[n]``."""
    given = dict(batch)
    versions = {name: values._version for name, values in batch.items()}  # counts what is written into a tensor
    returned = change(given, index)
    if not isinstance(returned, Mapping):
        raise RunError(f"{_called(change)}: gave {type(returned).__name__}, not a dict of columns")
    found = {}
    for name, values in {**given, **returned}.items():
        if name not in batch:
            raise RunError(f"{_called(change)}: gave a column {name!r}; there are {', '.join(batch)}")
        if values is batch[name] and values._version == versions[name]:
            continue
        if not isinstance(values, Tensor) or values.shape[:1] != index.shape:
            shown = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise RunError(f"{_called(change)}: gave {shown} for {len(index)} examples of {name!r}")
        found[name] = values
    return found


def _called(change: Change) -> str:
    return getattr(change, "__name__", type(change).__name__)


def _among(values: Tensor, ascending: Tensor) -> Tensor:
    """Which of some numbers are among others, ``bool [n]``."""
    places = torch.searchsorted(ascending, values).clamp_(max=len(ascending) - 1)
    return ascending[places] == values


def in_unit_range(pixels: Tensor) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return pixels.to(torch.float32).div_(255)


@dataclass(frozen=True)
class UnitRange:
    """The change of one column of bytes to float32 in [0, 1]."""

    name: str

    def __call__(self, batch: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
        return {self.name: in_unit_range(batch[self.name])}
