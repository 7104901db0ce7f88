"""Columns that are read when they are taken: a data set's examples, or a client's at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from clients.errors import RequestError, RunError
from fedsim.data.columns import Columns, TensorColumns
from fedsim.data.tensors import as_tensor, not_finite, to_column


class Dataset(Protocol):
    """A map-style data set whose examples are dicts, e.g. a ``torch.utils.data.Dataset``."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class DatasetColumns(Columns):
    """Columns read example by example from a map-style data set of dicts; nothing is kept.

    Values may be tensors, arrays or numbers, of the same shape in every example.

    Attributes:
        dataset: the data set; sent to workers as it is, so it must be picklable.
    """

    dataset: Dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        if index.numel() == 0:
            return self._none(index)
        examples = [self._example(position) for position in index.reshape(-1).tolist()]
        stacked = {name: _stack(name, examples) for name in examples[0]}
        return {name: values.reshape((*index.shape, *values.shape[1:])) for name, values in stacked.items()}

    def column(self, name: str) -> Tensor:
        return _stack(name, [{name: self._example(position).get(name)} for position in range(len(self))])

    def _example(self, place: int) -> dict[str, Tensor]:
        example = self.dataset[place]
        if not isinstance(example, Mapping):
            kind = type(example).__name__
            raise RequestError(
                f'data.source: a data set gives one dict an example, {{"x": ..., "y": ...}}; got {kind} at {place}'
            )
        return {name: _value(value, name, place) for name, value in example.items()}


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
        return as_tensor(value) if isinstance(value, np.ndarray) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise RequestError(
            f"data.source.{name}: {type(value).__name__} at {place} is no tensor; give tensors, arrays or numbers"
        ) from None


@dataclass(frozen=True, eq=False)
class ClientColumns(Columns):
    """Examples that are loaded a client at a time, for more than fit in memory; positions are client after client.

    As ``Source(train=ClientColumns(load, sizes))`` it says whose each example is by itself: take the partition
    ``natural``. Name the ``classes`` there too, else they are counted in all clients' examples. Every process keeps
    those that it loaded last. Where clients train in stacks, a stack's clients take turns, so they should fit together.

    Attributes:
        load: client -> its columns ``[n, ...]``, tensors or arrays; all clients' have the same names, shapes and types.
            It is sent to workers, so it must be picklable (a function of the experiment's file is), and must give the
            same whenever it is called.
        sizes: ``int [clients]`` how many examples each has.
        kept_mib: how much of what was loaded is kept, in MiB; the last client always is.
    """

    load: Callable[[int], Mapping[str, Any]]
    sizes: Any
    kept_mib: int = 256

    def __post_init__(self) -> None:
        sizes = np.asarray(self.sizes)
        where = "data.source.train"
        if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or not len(sizes) or sizes.min() < 0 or not sizes.any():
            raise RequestError(
                f"{where}: sizes {sizes.dtype} {list(sizes.shape)} given; give the number of examples of each client,"
                " which are not all 0"
            )
        object.__setattr__(self, "sizes", sizes.astype(np.int64, copy=False))

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Less what is loaded, which each process does for itself."""
        return {name: value for name, value in vars(self).items() if name not in ("loaded", "offsets")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @cached_property
    def offsets(self) -> np.ndarray:
        """``int64 [clients + 1]``: client ``k`` has the positions ``offsets[k]`` to ``offsets[k + 1]``."""
        return np.concatenate([[0], np.cumsum(self.sizes)])

    @property
    def ids(self) -> np.ndarray:
        """``int64 [N]`` the client of each position."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    @cached_property
    def loaded(self) -> OrderedDict[int, TensorColumns]:
        """The clients in memory, the one used last at the end."""
        return OrderedDict()

    def take(self, index: Tensor) -> dict[str, Tensor]:
        if not index.numel():
            return self._none(index)
        flat = index.reshape(-1).numpy()
        owners = np.searchsorted(self.offsets, flat, side="right") - 1
        order = np.argsort(owners, kind="stable")
        clients, starts = np.unique(owners[order], return_index=True)
        taken: dict[str, Tensor] = {}
        for client, places in zip(clients.tolist(), np.split(order, starts[1:]), strict=True):
            part = self.of(client).take(torch.from_numpy(flat[places] - self.offsets[client]))
            for name, values in part.items():
                if name not in taken:
                    taken[name] = values.new_empty((len(flat), *values.shape[1:]))
                taken[name][torch.from_numpy(places)] = values
        return {name: values.reshape((*index.shape, *values.shape[1:])) for name, values in taken.items()}

    def of(self, client: int) -> TensorColumns:
        """One client's examples.

        Raises:
            RunError: where ``load`` raises, naming the client.
            RequestError: where it gives other than it should, likewise.
        """
        kept = self.loaded
        if client in kept:
            kept.move_to_end(client)
            return kept[client]
        columns = self._checked(client)
        kept[client] = columns
        room, used = self.kept_mib * 2**20, sum(_bytes(known) for known in kept.values())
        while used > room and len(kept) > 1:
            used -= _bytes(kept.popitem(last=False)[1])
        return columns

    def _checked(self, client: int) -> TensorColumns:
        where = f"data.source.train: client {client}"
        try:
            given = self.load(client)
        except RequestError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())
            raise RunError(f"{where}: loading it raises {type(error).__name__}: {said}") from error
        if not isinstance(given, Mapping) or not given:
            raise RequestError(
                f'{where}: its loader gave {type(given).__name__}; give a dict of columns, {{"x": x, "y": y}}'
            )
        columns = TensorColumns({name: to_column(value, f"{where}: {name}") for name, value in given.items()})
        wanted = int(self.sizes[client])
        for name, tensor in columns.tensors.items():
            if len(tensor) != wanted:
                raise RequestError(f"{where}: {name} has {len(tensor)} examples, and sizes says {wanted}")
            wrong = not_finite(tensor)
            if wrong is not None:
                raise RequestError(f"{where}: {name} has {wrong}")
        if client != self._model:
            self._compare(columns, where)
        return columns

    @cached_property
    def _model(self) -> int:
        """The first client with examples, which the others must be like."""
        return int(np.flatnonzero(self.sizes)[0])

    @cached_property
    def _first(self) -> dict[str, Tensor]:
        return {name: values[0].clone() for name, values in self.of(self._model).tensors.items()}

    def _compare(self, columns: TensorColumns, where: str) -> None:
        first = self._first
        told = f"client {self._model}'s {', '.join(f'{name} {_shown(value)}' for name, value in first.items())}"
        if set(columns.names) != set(first):
            raise RequestError(f"{where}: columns {', '.join(columns.names)} given, unlike {told}")
        for name, value in first.items():
            if columns.shape(name) != tuple(value.shape) or columns.dtype(name) != value.dtype:
                shown = _shown(columns.tensors[name][0]) if len(columns) else list(columns.shape(name))
                raise RequestError(f"{where}: {name} is {shown} an example, unlike {told}; give all clients' alike")


def _shown(value: Tensor) -> str:
    return f"{str(value.dtype)[6:]} {list(value.shape)}"


def _bytes(columns: TensorColumns) -> int:
    return sum(tensor.nbytes for tensor in columns.tensors.values())
