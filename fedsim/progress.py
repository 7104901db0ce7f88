"""What a long run shows while it works: on standard error, a bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsim.records import RoundRecord
    from fedsim.running import Progress

#: Plain lines of evaluated rounds are at least so many seconds apart, the first and the last round aside.
PACE = 1.0
#: A round without an evaluation is told in plain lines only after so many seconds of silence.
SILENCE = 10.0
_EVENTS_SHOWN = 3
_ORDER = {"accuracy": 0, "loss": 2}


def progress(quiet: bool = False) -> Progress | None:
    """The display that fits: none where it is quiet, a bar on a terminal, plain lines elsewhere."""
    if quiet:
        return None
    return Bar() if sys.stderr.isatty() else Lines()


class _Meter:
    """Reads accuracy, speed and time left off the rounds."""

    def __init__(self, total: int, done: int):
        self.total, self.first, self.done = total, done, done
        self.started = time.monotonic()
        self.metric = ""
        self._clients = 0

    def read(self, record: RoundRecord) -> None:
        self.done = record.round
        self._clients += record.completed
        for split in ("validation", "test", "client_validation", "client_test"):
            found = record.metrics.get(split, {})
            # Accuracy where there is one, else a metric before the loss; of several splits the last is shown.
            named = sorted((name for name in found if name != "examples"), key=lambda name: _ORDER.get(name, 1))
            if named:
                self.metric = f"{split} {named[0]} {found[named[0]]:.3f}"

    @property
    def speed(self) -> str:
        """Clients trained a second, the evaluations' time included."""
        elapsed = time.monotonic() - self.started
        return f"{self._clients / elapsed:,.0f} clients/s" if elapsed > 0 and self._clients else ""

    @property
    def left(self) -> str:
        """Time left at the pace so far."""
        trained = self.done - self.first
        if trained < 1:
            return ""
        seconds = round((time.monotonic() - self.started) / trained * (self.total - self.done))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"


class Lines:
    """Plain lines for evaluated rounds, and one when nothing was told for long."""

    def start(self, total: int, done: int, name: str) -> None:
        self._meter = _Meter(total, done)
        since = f", going on after round {done}" if done else ""
        self.note(f"{name}: {total} rounds{since}")
        self._told = 0.0

    def round(self, record: RoundRecord) -> None:
        self._meter.read(record)
        for line in _events(record):
            self.note(line)
        meter, now = self._meter, time.monotonic()
        if record.round == meter.total or now - self._told > (PACE if record.metrics else SILENCE):
            self._told = now
            parts = [f"round {record.round}/{meter.total}", meter.metric, meter.speed, meter.left]
            self.note("  ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def stop(self) -> None:
        pass


class Bar:
    """One live line on a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Live

        self._live = Live(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("round"),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metric]}  {task.fields[speed]}  {task.fields[left]}"),
            console=Console(stderr=True),
            refresh_per_second=4,
            transient=True,
        )

    def start(self, total: int, done: int, name: str) -> None:
        self._meter = _Meter(total, done)
        self._task = self._live.add_task(name, total=total, completed=done, metric="", speed="", left="")
        self._live.start()

    def round(self, record: RoundRecord) -> None:
        meter = self._meter
        meter.read(record)
        for line in _events(record):
            self.note(line)
        self._live.update(self._task, completed=record.round, metric=meter.metric, speed=meter.speed, left=meter.left)

    def note(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self._live.stop()


def _events(record: RoundRecord) -> list[str]:
    """The first events of a round, and how many more there are."""
    shown = [f"round {event.round}: {event.message}" for event in record.events[:_EVENTS_SHOWN]]
    more = len(record.events) - len(shown)
    return [*shown, f"round {record.round}: and {more} more such events"] if more > 0 else shown
