"""The command line as a user runs it: another process."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "fedsim"]


def environment() -> dict[str, str]:
    paths = [path for path in sys.path if path and Path(path).is_dir()]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FLWR_TELEMETRY_ENABLED": "0"}


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def fedsim(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    """The one JSON object of a run that ends well."""
    code, out, err = fedsim(folder, "run", "--json", "--quiet", *arguments)
    assert code == 0, err
    return json.loads(out)


def query(directory: Path, sql: str) -> list[tuple]:
    with sqlite3.connect(f"file:{directory / 'run.db'}?mode=ro", uri=True) as database:
        return database.execute(sql).fetchall()


def rounds_committed(directory: Path) -> int:
    """The newest committed round, -1 while there is none."""
    try:
        return query(directory, "SELECT coalesce(max(round), -1) FROM rounds")[0][0]
    except sqlite3.Error:
        return -1


def interrupt_after(process: subprocess.Popen[str], directory: Path, rounds: int, how: int = signal.SIGKILL) -> bool:
    """Sends a signal once so many rounds are committed; False where the run ended before."""
    deadline = time.monotonic() + 60
    while rounds_committed(directory) < rounds and time.monotonic() < deadline:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    process.send_signal(how)
    return True


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
