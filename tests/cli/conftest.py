"""What the tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsim import cli


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    lines: list[str]


Command = Callable[..., Ended]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDSIM_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def fedsim(folder: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in an empty folder; ``lines`` is what it said on stderr."""

    def run(*arguments: str) -> Ended:
        code = cli.main(arguments)
        said = capfd.readouterr()
        return Ended(code, said.out, said.err.splitlines())

    return run


def sets(values: Sequence[str]) -> list[str]:
    """``--set`` for each value."""
    return [word for value in values for word in ("--set", value)]
