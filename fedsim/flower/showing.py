"""What a Flower app's run shows while it works: on standard error, message by message on a terminal, else by round."""

from __future__ import annotations

import sys
import time

from fedsim.progress import PACE
from fedsim.records import RoundRecord

_SPLITS = ("client_test", "test")  # of several the last is shown
_EVENTS = 3
#: Messages are shown at most so often, in seconds.
_REFRESH = 0.1


class Silent:
    """Shows nothing."""

    def start(self, name: str, clients: int) -> None:
        """The run begins."""

    def answered(self, round: int, done: int, asked: int) -> None:
        """``done`` of the ``asked`` messages of a phase are answered."""

    def round(self, record: RoundRecord) -> None:
        """A round was committed."""

    def note(self, text: str) -> None:
        """Something a user should know."""

    def stop(self) -> None:
        """The run has ended, well or not."""


class Lines(Silent):
    """Plain lines: events at once, rounds as often as they can be read."""

    def start(self, name: str, clients: int) -> None:
        self.note(f"{name}: {clients:,} clients")
        self._started = self._told = time.monotonic()
        self._left: RoundRecord | None = None
        self._answered = 0

    def round(self, record: RoundRecord) -> None:
        self._answered += record.completed
        for line in events(record):
            self.note(line)
        self._left = record
        if time.monotonic() - self._told > PACE:
            self._tell()

    def _tell(self) -> None:
        if self._left is not None:
            self._told = time.monotonic()
            speed = f"{self._answered / max(self._told - self._started, 1e-9):,.0f} clients/s"
            parts = [f"round {self._left.round}", measured(self._left), speed]
            self.note("  ".join(part for part in parts if part))
            self._left = None

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        self._tell()


class Bar(Silent):
    """One live line on a terminal: the round, its messages, the last metric."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._live = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("answered  {task.fields[metric]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
            transient=True,
        )

    def start(self, name: str, clients: int) -> None:
        self._name, self._seen = name, 0.0
        self._task = self._live.add_task(name, total=None, metric="")
        self._live.start()

    def answered(self, round: int, done: int, asked: int) -> None:
        now = time.monotonic()
        if done == asked or now - self._seen > _REFRESH:
            self._seen = now
            self._live.update(self._task, description=f"{self._name} round {round}", completed=done, total=asked)

    def round(self, record: RoundRecord) -> None:
        for line in events(record):
            self.note(line)
        self._live.update(self._task, metric=measured(record))

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._live.stop()


def showing(quiet: bool = False) -> Silent:
    """The display that fits: none where it is quiet, a bar on a terminal, plain lines elsewhere."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()


def measured(record: RoundRecord) -> str:
    """``test accuracy 0.912``, or nothing where nothing was evaluated."""
    said = ""
    for split in _SPLITS:
        found = {name: value for name, value in record.metrics.get(split, {}).items() if name != "examples"}
        name = "accuracy" if "accuracy" in found else next(iter(found), None)
        if name is not None:
            said = f"{split.replace('_', ' ')} {name} {found[name]:.3f}"
    return said


def events(record: RoundRecord) -> list[str]:
    """The first events of a round, and how many more there are. Tracebacks stand in Flower's log, and in the record."""
    shown = [f"round {event.round}: {event.message}" for event in record.events[:_EVENTS]]
    more = len(record.events) - _EVENTS
    return [*shown, f"round {record.round}: and {more} more such events"] if more > 0 else shown
