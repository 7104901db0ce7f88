"""Codecs: from a row to the bytes that travel and back; the base that every compression derives from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clients import catalog, randomness
from clients.errors import RequestError
from clients.updates import Updates
from strategies.context import Context
from strategies.plugins import Plugin, State

Generators = Sequence[torch.Generator]
Groups = Sequence[slice]

#: About how many numbers of a block are worked on at once, so that they stay in the processor's cache.
_AT_ONCE = 1 << 18


class Codec(Plugin, ABC):
    """The base of every codec: clients send ``encode(update)``, and the server goes on with what that decodes to.

    A codec of one's own gives :meth:`encode` and :meth:`decode`; bytes are counted from the payloads. Rows are float32
    or float64, and must stay as they are; what is decoded is float32. A row with NaN or infinite values is not encoded:
    it comes out as NaN, so that the client is left out. Keeps nothing.

    Attributes:
        unbiased: whether the mean of ``decode(encode(v))`` over the draws is ``v``.
        contraction: whether ``||v - decode(encode(v))||^2 <= (1 - delta) ||v||^2`` for every ``v`` with some
            ``delta > 0``, in the mean over the draws where there are any; what error feedback needs.
        by_tensor: whether ``encode`` and ``decode`` take the named tensors' slices of the row as a last argument.
    """

    unbiased: bool = False
    contraction: bool = False
    by_tensor: bool = False

    @abstractmethod
    def encode(self, row: Tensor, generator: torch.Generator) -> bytes:
        """The payload of a row ``[d]``; every draw comes from the generator."""

    @abstractmethod
    def decode(self, payload: bytes, size: int) -> Tensor:
        """The row ``float32 [size]`` that a payload stands for."""

    def transmit(self, rows: Tensor, generators: Generators, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        """What arrives of rows that are sent.

        A codec may do a whole block at once here; it must give the bits that row by row gives.

        Args:
            rows: ``[k, d]``.
            generators: one a row.
            groups: the slices of the named tensors in a row; left out, a row is one of them.

        Returns:
            ``[k, d]`` in the rows' dtype, and the bytes of each payload, ``int64 [k]``.
        """
        size = rows.shape[1]
        beside = ([slice(0, size)] if groups is None else groups,) if self.by_tensor else ()
        usable = finite(rows)
        arrived, sizes = torch.empty_like(rows), []
        for i, generator in enumerate(generators):
            payload = self.encode(rows[i] if usable[i] else torch.zeros_like(rows[i]), generator, *beside)
            row = self.decode(payload, size, *beside)
            if row.shape != (size,):
                raise ValueError(f"{self!r} decodes to a row of shape {list(row.shape)}; give [{size}]")
            arrived[i] = row
            sizes.append(len(payload))
        arrived[~usable] = torch.nan
        return arrived, torch.tensor(sizes, dtype=torch.int64)

    def client(self, u: Updates, state: State, ctx: Context) -> tuple[Updates, State]:
        return coded(self, u, u.rows, ctx), state


def coded(codec: Codec, u: Updates, rows: Tensor, ctx: Context) -> Updates:
    """Updates of which the rows ``[k, d]`` have been sent through a codec."""
    arrived, nbytes = codec.transmit(rows, generators(ctx, "codec", u.clients), slices(ctx))
    return u.replace(rows=arrived, nbytes=nbytes)


def generators(ctx: Context, purpose: str, clients: Tensor) -> list[torch.Generator]:
    """``[ctx.generator(purpose, client) for client in clients]``, their keys made in one operation."""
    keys = randomness.keys(ctx.seed, f"{ctx.scope}{purpose}", ctx.round, clients.numpy())
    return [torch.Generator().manual_seed(key) for key in (keys >> np.uint64(1)).tolist()]


def slices(ctx: Context) -> list[slice]:
    """The named tensors' places in a row."""
    return [slot.slice for slot in ctx.layout]


def finite(rows: Tensor) -> Tensor:
    """Which rows ``[k, d]`` have finite values only, ``bool [k]``."""
    return rows.abs().amax(dim=1).isfinite() if rows.shape[1] else torch.ones(len(rows), dtype=torch.bool)


def norms(rows: Tensor, order: int) -> Tensor:
    """The norm of each row ``[k, d]``, of order 1 or 2: ``float64 [k, 1]``.

    Row by row, since the order in which a block is added up may depend on its size.
    """
    found = [torch.linalg.vector_norm(row, order, dtype=torch.float64) for row in rows]
    return torch.stack(found)[:, None] if found else torch.zeros(0, 1, dtype=torch.float64)


def few_rows(rows: Tensor) -> list[slice]:
    """A block's rows ``[k, d]`` in parts that fit into the processor's cache."""
    step = max(1, _AT_ONCE // max(1, rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]


def built(codec: Any, base: Path | None, key: str) -> Codec:
    """A codec inside a plug-in, from its name, a table with its name and settings, or the object.

    Raises:
        RequestError: for what is no codec, under ``key``.
    """
    if isinstance(codec, Codec):
        return codec
    made = catalog.build_inner(codec, "plugins", base, key=key)
    if not isinstance(made, Codec):
        raise RequestError(
            f"{key}: {made!r} is no codec; name one, such as top_k, or derive it from strategies.compression.Codec"
        )
    return made
