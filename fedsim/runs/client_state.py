"""What clients keep between rounds (control variates, residuals, personal layers) as versioned rows in ``run.db``."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clients.errors import RunError

Writes = Mapping[str, tuple[Tensor, Tensor]]

_NEWEST = "SELECT dtype, data FROM client_state WHERE name = ? AND client = ? ORDER BY round DESC LIMIT 1"

# A version is needed only while it is the newest at or before some kept checkpoint. The older kept checkpoint moves
# one round with each commit, so what it makes superfluous is what its own round's writes replaced.
_PRUNE = """
DELETE FROM client_state WHERE rowid IN (
    SELECT old.rowid FROM client_state AS new JOIN client_state AS old
    ON old.name = new.name AND old.client = new.client AND old.round < new.round
    WHERE new.round = ?
)
"""


def write(database: sqlite3.Connection, round: int, state: Writes) -> None:
    """Adds a round's versions inside the caller's transaction: name -> (ids int64 ``[k]``, rows ``[k, m]``)."""
    for name, (ids, rows) in state.items():
        dtype = str(rows.dtype).removeprefix("torch.")
        versions = ((client, name, round, dtype, data) for client, data in zip(ids.tolist(), _bytes(rows), strict=True))
        database.executemany("INSERT INTO client_state VALUES (?, ?, ?, ?, ?)", versions)


def prune(database: sqlite3.Connection, older_checkpoint: int) -> None:
    """Removes, inside the caller's transaction, the versions that neither kept checkpoint needs."""
    database.execute(_PRUNE, (older_checkpoint,))


def read(
    database: sqlite3.Connection, directory: Path, name: str, ids: Iterable[int], width: int, dtype: torch.dtype
) -> Tensor:
    """The newest versions ``[k, width]``, zeros where a client has none.

    Raises:
        RunError: if what is stored has another dtype or width.
    """
    clients = list(ids)
    rows = torch.zeros(len(clients), width, dtype=dtype)
    block = rows.view(torch.uint8).numpy() if width else np.empty((len(clients), 0), np.uint8)
    expected = str(dtype).removeprefix("torch.")
    for k, client in enumerate(clients):
        found = database.execute(_NEWEST, (name, client)).fetchone()
        if found is None:
            continue
        if found[0] != expected or len(found[1]) != block.shape[1]:
            raise RunError(
                f"{directory}: client {client}'s state {name!r} is {len(found[1])} bytes of {found[0]}, "
                f"where {width} values of {expected} are wanted; did the model or the strategy change?"
            )
        block[k] = np.frombuffer(found[1], np.uint8)
    return rows


def _bytes(rows: Tensor) -> Iterator[memoryview]:
    """Each row's bytes, without copying them."""
    block = rows.detach().cpu().reshape(len(rows), math.prod(rows.shape[1:]))
    if not block.is_contiguous() or block.stride(-1) != 1:  # a dimension of size 1 may keep any stride
        block = block.clone(memory_format=torch.contiguous_format)
    return (memoryview(row) for row in block.view(torch.uint8).numpy())
