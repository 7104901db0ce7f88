"""Everything in this process: for debugging, small runs and machines without processes to spare."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedsim.engines.engine import Engine, Result


class Inline(Engine):
    """Runs the chunks one after another where you are."""

    def start(self, setup: Callable[[], Any]) -> None:
        self.worker = setup()

    def map(self, task: str, chunks: Sequence[Any], broadcast: Mapping[str, Any]) -> Iterator[Result]:
        for chunk in chunks:
            begun = time.perf_counter()
            answer = getattr(self.worker, task)(chunk, broadcast)
            yield Result(chunk, answer, os.getpid(), time.perf_counter() - begun)

    def close(self) -> None:
        self.worker = None
