"""What a run shows while it works: everything on stderr, plain lines where there is no terminal."""

from __future__ import annotations

import sys

import pytest

from fedsim.progress import Bar, Lines, progress
from fedsim.records import Event, RoundRecord


def record(number: int, evaluated: bool = True, events: int = 0) -> RoundRecord:
    metrics = {"test": {"loss": 0.5, "accuracy": 0.91234, "examples": 360.0}} if evaluated else {}
    happened = [Event(number, "client_failed", f"client {client} failed") for client in range(events)]
    return RoundRecord(number, cohort=10, completed=10 if number else 0, metrics=metrics, events=happened)


def play(shown: Lines | Bar) -> None:
    shown.start(100, 0, "digits")
    shown.round(record(0))
    shown.round(record(1, evaluated=False))
    shown.round(record(2, evaluated=False, events=5))
    shown.note("the last checkpoint is damaged; going on from round 4 [of 5]")
    shown.round(record(5))
    shown.stop()


def test_plain_lines_tell_of_evaluated_rounds_and_events(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsim.progress.PACE", -1.0)
    play(Lines())
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == ""
    assert lines[:2] == ["digits: 100 rounds", "round 0/100  test accuracy 0.912"]
    assert lines[2:6] == [
        "round 2: client 0 failed",
        "round 2: client 1 failed",
        "round 2: client 2 failed",
        "round 2: and 2 more such events",
    ]
    assert lines[6] == "the last checkpoint is damaged; going on from round 4 [of 5]"
    assert lines[7].startswith("round 5/100  test accuracy 0.912  ")
    assert "clients/s" in lines[7]
    assert lines[7].endswith(" left")


def test_plain_lines_are_few_and_end_with_the_last_round(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Lines()
    shown.start(1000, 0, "digits")
    for number in range(1001):
        shown.round(record(number))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["digits: 1000 rounds", "round 0/1000", "round 1000/1000"]


def test_a_resumed_run_counts_from_where_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Lines()
    shown.start(10, 8, "digits")
    shown.round(record(9))
    assert capsys.readouterr().err.splitlines()[0] == "digits: 10 rounds, going on after round 8"
    assert shown._meter.left.startswith("0:00")


def test_the_bar_writes_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    play(Bar())
    said = capsys.readouterr()
    assert said.out == ""
    assert "going on from round 4 [of 5]" in said.err


def test_the_display_fits_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress(quiet=True) is None
    assert isinstance(progress(), Lines)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert isinstance(progress(), Bar)
