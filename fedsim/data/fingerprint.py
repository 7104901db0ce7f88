"""What a run's data are told by: who holds which examples, and the examples themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedsim.data.columns import Columns, TensorColumns

if TYPE_CHECKING:
    from fedsim.data.population import Population

#: Bytes of examples in memory up to which all are looked at.
_WHOLE = 256 * 2**20

#: Examples that are looked at where there are more, or where they have to be read.
_SOME = 256

#: Bytes that are copied at once on the way to a hash.
_BLOCK = 2**24


def fingerprint(population: Population) -> str:
    """SHA-256, in hexadecimal, of who holds which examples and of the examples themselves.

    Positions count whole, and so do columns that lie in memory, up to 256 MiB together. Of larger ones, and of those
    that are read or made when they are taken, 256 examples of every split count, evenly chosen, beside their number,
    shape and type: a change of a single example among millions may be missed. Where the memory lies does not matter.
    """
    digest = hashlib.sha256()
    for name, csr in sorted(population.splits.items()):
        _add(digest, f"clients' {name}", csr.order, csr.offsets)
    _add(digest, "held out", population.held_out)
    parts = {"pool": population.columns, **{f"server's {name}": part for name, part in population.server.items()}}
    whole = sum(tensor.nbytes for part in parts.values() for tensor in _held(part) or ()) <= _WHOLE
    for name, part in parts.items():
        _add(digest, f"{name}: {len(part)} of {', '.join(part.names)}")
        held = _held(part) if whole else None
        if held is not None:
            _add(digest, name, *held)
        else:
            index = np.unique(np.linspace(0, len(part) - 1, _SOME).astype(np.int64))
            taken = part.take(torch.from_numpy(index))
            _add(digest, name, *(taken[column] for column in part.names))
    return digest.hexdigest()


def _held(columns: Columns) -> list[Tensor] | None:
    """All that columns are made of, where it lies in memory."""
    return list(columns.tensors.values()) if isinstance(columns, TensorColumns) else None


def _add(digest: Any, name: str, *arrays: np.ndarray | Tensor) -> None:
    """Adds arrays by shape, type and little-endian bytes."""
    digest.update(f"{name}\n".encode())
    for array in arrays:
        tensor = torch.as_tensor(array)
        digest.update(f"{str(tensor.dtype)[6:]} {list(tensor.shape)}\n".encode())
        for block in _blocks(tensor):
            digest.update(block.contiguous().view(-1).view(torch.uint8).numpy())


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    if not tensor.numel():
        return
    yield from tensor.split(max(1, _BLOCK * len(tensor) // max(1, tensor.nbytes)))
