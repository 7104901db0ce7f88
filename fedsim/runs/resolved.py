"""The resolved experiment that a run's directory holds, and runs by its name. Imports no torch."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from clients.errors import RequestError, RunError
from fedsim.runs.database import open_to_read, read_meta
from fedsim.runs.directory import DATABASE, EXPERIMENT, check_name, checkpoint_files, holds_run, no_run


def read_experiment(path: Path) -> dict[str, Any]:
    """The resolved experiment of the run in ``path``, as a table.

    Raises:
        RequestError: where there is no run.
        RunError: where it cannot be read.
    """
    if not holds_run(path):
        raise RequestError(no_run(path))
    return parse_experiment(read_experiment_text(path), path)


def read_experiment_text(path: Path) -> str:
    """The text of the resolved experiment: the file, or run.db's own copy where the file is gone."""
    try:
        return (path / EXPERIMENT).read_text(encoding="utf-8")
    except FileNotFoundError:
        with open_to_read(path) as database:
            return read_meta(database, path)["experiment"]
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path / EXPERIMENT} cannot be read: {error}") from error


def parse_experiment(text: str, path: Path) -> dict[str, Any]:
    """The experiment's table from its text; ``path`` is the run's directory, for the message."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RunError(f"{path / EXPERIMENT} is damaged ({error}); delete it, run.db holds a copy") from error


def latest(root: Path, name: str, unfinished: bool = False) -> Path | None:
    """The run of that experiment name that was written to last, or ``None``.

    Only ``root/name`` and ``root/name-N`` are looked at, and only those whose experiment has that name.

    Args:
        root: where runs are.
        name: the experiment's name.
        unfinished: look only at runs that have not come to their end.
    """
    check_name(name)
    numbered = re.compile(re.escape(name) + r"(-\d+)?")
    if not root.is_dir():
        return None
    runs = [path for path in root.iterdir() if numbered.fullmatch(path.name) and holds_run(path)]
    named = [path for path in runs if _name_of(path) in (name, None) and not (unfinished and _finished(path))]
    return max(named, key=_last_written, default=None)


def _finished(path: Path) -> bool:
    try:
        with open_to_read(path) as database:
            return "summary" in read_meta(database, path)
    except RunError:
        return False


def _name_of(path: Path) -> str | None:
    """The experiment's name; ``None`` where it cannot be read, so that a resume may say what is wrong with it."""
    try:
        return read_experiment(path).get("name")
    except (RunError, RequestError):
        return None


def _last_written(path: Path) -> float:
    files = [path / DATABASE, path / (DATABASE + "-wal"), *checkpoint_files(path)]
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
