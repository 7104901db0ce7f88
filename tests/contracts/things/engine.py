"""An engine of the user's own. It plays the chunks last first, which must not matter."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedsim.engines import Engine, Result


class Backwards(Engine):
    """In this process, one chunk after another, the last one first; the results come in the chunks' order."""

    def start(self, setup: Callable[[], Any]) -> None:
        self.worker = setup()

    def map(self, task: str, chunks: Sequence[Any], broadcast: Mapping[str, Any]) -> Iterator[Result]:
        results = []
        for chunk in reversed(chunks):
            begun = time.perf_counter()
            answer = getattr(self.worker, task)(chunk, broadcast)
            results.append(Result(chunk, answer, os.getpid(), time.perf_counter() - begun))
        yield from reversed(results)

    def close(self) -> None:
        self.worker = None
