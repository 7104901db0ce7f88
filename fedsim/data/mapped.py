"""Columns in files that are mapped into memory: rows are read when they are taken, and processes share what is read."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedsim.data.columns import Columns, in_unit_range
from fedsim.data.tensors import as_tensor


@dataclass(frozen=True, eq=False)
class MappedFile:
    """An array ``[N, ...]`` in a file. It is pickled by the path: who unpickles it maps the file again.

    Attributes:
        path: the file.
        dtype: of its numbers there.
        shape: of the array.
        offset: bytes before it.
        order: rows or columns first.
        delivered: the type in which rows are read.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    order: Literal["C", "F"]
    delivered: np.dtype

    @classmethod
    def of(cls, array: np.memmap, delivered: np.dtype | type | None = None) -> MappedFile:
        """The file of an array that is mapped whole. Numbers with a fraction are read as float32 if nothing is said."""
        if delivered is None:
            delivered = np.float32 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
        order: Literal["C", "F"] = "C" if array.flags.c_contiguous else "F"
        path = Path(str(array.filename)).resolve()
        return cls(path, array.dtype, array.shape, array.offset, order, np.dtype(delivered))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "array"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @cached_property
    def array(self) -> np.memmap:
        """The mapped array; opened when a process first asks for it."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, self.order)

    def rows(self, index: np.ndarray) -> Tensor:
        """The rows at ``index`` ``[n]``, in memory."""
        return torch.from_numpy(np.ascontiguousarray(self.array[index].astype(self.delivered, copy=False)))


def is_mapped(value: Any) -> bool:
    """Whether an array is a file's, mapped whole: a part of one has no place in its file to be found again by."""
    return isinstance(value, np.memmap) and isinstance(value.base, mmap.mmap) and value.filename is not None


@dataclass(frozen=True, eq=False)
class MappedColumns(Columns):
    """Columns in mapped files, and small ones beside them in memory.

    Attributes:
        files: name -> file, of ``[N, ...]``.
        tensors: name -> ``[N, ...]`` in memory, such as labels.
        listed: the names of all, in the source's order.
        pixels: those files of bytes (``uint8``) that ``take`` gives as float32 in [0, 1].
    """

    files: Mapping[str, MappedFile]
    tensors: Mapping[str, Tensor]
    listed: tuple[str, ...]
    pixels: frozenset[str] = frozenset()

    def __len__(self) -> int:
        name = self.listed[0]
        return self.files[name].shape[0] if name in self.files else len(self.tensors[name])

    @property
    def names(self) -> tuple[str, ...]:
        return self.listed

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files[name].shape[1:] if name in self.files else tuple(self.tensors[name].shape[1:])

    def take(self, index: Tensor) -> dict[str, Tensor]:
        flat = index.reshape(-1)
        rows, taken = flat.numpy(), {}
        for name in self.listed:
            values = self.files[name].rows(rows) if name in self.files else self.tensors[name].index_select(0, flat)
            if name in self.pixels:
                values = in_unit_range(values)
            taken[name] = values.reshape((*index.shape, *values.shape[1:]))
        return taken

    def held(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def map_tensors(self, fn: Callable[[Any], Any]) -> MappedColumns:
        return replace(self, tensors={name: fn(tensor) for name, tensor in self.tensors.items()})


def mapped_columns(arrays: Mapping[str, Any], delivered: Mapping[str, np.dtype | type] | None = None) -> MappedColumns:
    """Columns some of which are mapped: those of one number an example are read into memory, others stay in their file.

    Args:
        arrays: name -> memory-mapped array, or tensor in memory.
        delivered: the types in which columns are read, where they are others than :class:`MappedFile` takes.
    """
    files: dict[str, MappedFile] = {}
    tensors: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if isinstance(array, Tensor):
            tensors[name] = array
            continue
        file = MappedFile.of(array, (delivered or {}).get(name))
        if array.ndim > 1:
            files[name] = file
        else:
            tensors[name] = as_tensor(np.array(array, dtype=file.delivered))
    return MappedColumns(files, tensors, tuple(arrays))
