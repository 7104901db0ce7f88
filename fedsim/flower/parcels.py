"""How messages cross to workers and back: structure as a small pickle, the arrays' bytes apart and each only once.

A RecordDict is packed into plain tuples in which an array's bytes are replaced by a number; equal numbers are the same
bytes object. So 400 messages with one set of weights hold it once, on the way to the workers and in each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedsim.flower import compat
from fedsim.flower.compat import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

#: Bytes below which an array travels in the pickle itself.
SMALL = 512

_PLAIN = {"config": ConfigRecord, "metrics": MetricRecord}


@dataclass(frozen=True)
class Packed:
    """A packed RecordDict: ``(key, kind, values)`` for each record, and the bytes that values refer to by number."""

    records: tuple[tuple[str, str, Any], ...] = ()
    blobs: tuple[bytes, ...] = ()

    def same(self, other: Packed) -> bool:
        """Whether the other is this, down to the very bytes objects."""
        return (
            self.records == other.records
            and len(self.blobs) == len(other.blobs)
            and all(ours is theirs for ours, theirs in zip(self.blobs, other.blobs, strict=True))
        )


EMPTY = Packed()


@dataclass
class Shelf:
    """Bytes objects by number; the same object twice has one number. Keeps them alive, so identity is certain."""

    blobs: list[bytes] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)

    def number(self, blob: bytes) -> int:
        key = id(blob)
        if key not in self.numbers:
            self.numbers[key] = len(self.blobs)
            self.blobs.append(blob)
        return self.numbers[key]


def pack(content: RecordDict, shelf: Shelf) -> tuple[tuple[str, str, Any], ...]:
    """A RecordDict's structure; the bytes of its arrays go to the shelf."""
    records: list[tuple[str, str, Any]] = []
    for key, record in content.items():
        if type(record) is ArrayRecord:
            arrays = tuple(
                (name, a.dtype, tuple(a.shape), a.stype, shelf.number(a.data) if len(a.data) >= SMALL else a.data)
                for name, a in record.items()
            )
            records.append((key, "arrays", arrays))
        elif type(record) in (ConfigRecord, MetricRecord):
            plain = {name: list(v) if isinstance(v, list) else v for name, v in record.items()}
            records.append((key, "config" if type(record) is ConfigRecord else "metrics", plain))
        else:  # a subclass of an app's own
            records.append((key, "own", record))
    return tuple(records)


def packed(content: RecordDict) -> Packed:
    """A RecordDict by itself."""
    if not content:
        return EMPTY
    shelf = Shelf()
    return Packed(pack(content, shelf), tuple(shelf.blobs))


def moved(records: tuple[tuple[str, str, Any], ...], blobs: Sequence[bytes], shelf: Shelf) -> tuple:
    """Packed records with the numbers that their bytes have on another shelf."""
    return tuple(
        (key, kind, tuple((*rest, shelf.number(blobs[b]) if type(b) is int else b) for *rest, b in values))
        if kind == "arrays"
        else (key, kind, values)
        for key, kind, values in records
    )


def unpack(records: Sequence[tuple[str, str, Any]], blobs: Sequence[bytes]) -> RecordDict:
    """The RecordDict; nothing in it that can be changed is shared with another."""
    content = RecordDict()
    held = content.__dict__["_data"]
    for key, kind, values in records:
        if kind == "arrays":
            record: Any = ArrayRecord()
            arrays = record.__dict__["_data"]
            for name, dtype, shape, stype, b in values:
                arrays[name] = compat.array(dtype, shape, stype, blobs[b] if type(b) is int else b)
        elif kind == "own":
            record = values.copy()
        else:
            record = _PLAIN[kind]()
            record.__dict__["_data"].update((n, list(v) if isinstance(v, list) else v) for n, v in values.items())
        held[key] = record
    return content


def size(records: Sequence[tuple[str, str, Any]], blobs: Sequence[bytes]) -> int:
    """Bytes of the arrays' data, and of the byte strings of configurations (secure aggregation's masked shares)."""
    total = 0
    for _, kind, values in records:
        if kind == "arrays":
            total += sum(len(blobs[b]) if type(b) is int else len(b) for *_, b in values)
        elif kind == "config":
            for value in values.values():
                items = value if isinstance(value, list) else (value,)
                total += sum(len(item) for item in items if isinstance(item, bytes))
    return total


class Blobs:
    """Bytes that lie in one shared block: made into a bytes object when they are first asked for, and once.

    Args:
        block: ``uint8 [n]``.
        ends: where each ends in it.
    """

    def __init__(self, block: Tensor, ends: Sequence[int]):
        self.block, self.ends = block, ends
        self.made: dict[int, bytes] = {}

    def __getitem__(self, number: int) -> bytes:
        if number not in self.made:
            begin = self.ends[number - 1] if number else 0
            self.made[number] = self.block[begin : self.ends[number]].numpy().tobytes()
        return self.made[number]


def ends(blobs: Sequence[bytes]) -> list[int]:
    """Where each ends when they lie one after another."""
    total, found = 0, []
    for blob in blobs:
        total += len(blob)
        found.append(total)
    return found


def lay(blobs: Sequence[bytes], block: Tensor) -> None:
    """Writes them into a block, one after another."""
    place: Any = block.numpy().data
    begin = 0
    for blob in blobs:
        place[begin : begin + len(blob)] = blob
        begin += len(blob)


def joined(blobs: Sequence[bytes]) -> Tensor:
    """One tensor of all their bytes."""
    return torch.frombuffer(bytearray().join(blobs), dtype=torch.uint8) if blobs else torch.empty(0, dtype=torch.uint8)
