"""Workers for the engine tests."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsim.engines.engine import Answer


class Worker:
    def square(self, chunk, broadcast):
        time.sleep(0.02 * (chunk % 3))  # they finish out of order
        return Answer(chunk * chunk + int(broadcast["add"].sum()), {"big": torch.full((50_000,), float(chunk))})

    def slowly(self, chunk, broadcast):
        time.sleep(chunk)
        return Answer(chunk)

    def write(self, chunk, broadcast):
        broadcast["matrix"][chunk] = float(chunk)
        return Answer(torch.get_num_threads())

    def raises(self, chunk, broadcast):
        raise ValueError(f"chunk {chunk} is bad")

    def says(self, chunk, broadcast):
        raise broadcast["kind"](f"data.source.train.x: nan at [{chunk}]")

    def die_once(self, chunk, broadcast):
        mark = Path(broadcast["folder"]) / str(chunk)
        if chunk == 2 and not mark.exists():
            mark.touch()
            os._exit(9)
        return Answer(chunk)

    def die_on_five(self, chunk, broadcast):
        if 5 in chunk.items:
            os._exit(9)
        return Answer(list(chunk.items))

    def hang_on_five(self, chunk, broadcast):
        if 5 in chunk.items:
            time.sleep(60)
        return Answer(list(chunk.items))

    def echo(self, chunk, broadcast):
        return Answer(chunk, {"tensor": broadcast["tensor"].clone()})


@dataclass(frozen=True)
class Items:
    items: tuple[int, ...]

    def __len__(self):
        return len(self.items)

    def split(self):
        middle = len(self.items) // 2
        return [Items(self.items[:middle]), Items(self.items[middle:])] if middle else []


def failing_setup():
    raise RuntimeError("no data here")
