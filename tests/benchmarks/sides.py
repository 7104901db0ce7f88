"""The sides that are compared, and how one of them is run: in processes of its own, so that nothing of it leaks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.benchmarks import pfl_environment
from tests.benchmarks.work import Job, Timing, Work

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1800.0

#: One thread for each process and no accelerator, for every side alike.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PFL_PYTORCH_DEVICE": "cpu",
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
}


class SideError(Exception):
    """A side could not be run, or failed; the message says which and how it ended."""


@dataclass(frozen=True)
class Side:
    """One row of the table.

    Attributes:
        group: the name on the command line: fedsim, flower, loop or pfl; simulate, a Flower app under fedsim.
        processes: processes that train.
    """

    group: str
    processes: int

    @property
    def label(self) -> str:
        """As it stands in the table."""
        names = {
            "fedsim": "fedsim",
            "simulate": "fedsim.simulate",
            "flower": "Flower run_simulation",
            "loop": "PyTorch loop",
            "pfl": "pfl-research",
        }
        return names[self.group]

    def job(self, work: Work, data: Path) -> Job:
        """What this side does for a work."""
        warm, timed = work.flower if self.group == "flower" else (work.warm, work.timed)
        return Job(work.name, str(data), self.processes, warm, timed)


GROUPS = ("fedsim", "flower", "loop", "pfl")


def sides(groups: list[str], processes: int) -> list[Side]:
    """The rows of the table: every group with all processes, and all but Flower with one as well."""
    counts = [processes, 1] if processes > 1 else [1]
    return [Side(group, count) for group in groups for count in (counts[:1] if group == "flower" else counts)]


def app_sides(processes: int) -> list[Side]:
    """The rows of the table of a Flower app: fedsim's simulator and Flower's."""
    return [Side("simulate", processes), Side("flower", processes)]


def run(side: Side, work: Work, data: Path) -> Timing:
    """Run one side once.

    Raises:
        SideError: it could not be started, failed, or took longer than half an hour.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer, log = Path(scratch) / "answer.json", Path(scratch) / "log"
        with log.open("wb") as output:
            processes = [
                subprocess.Popen(
                    [*command, json.dumps(asdict(side.job(work, data))), str(answer)],
                    env={**os.environ, **ENVIRONMENT, **extra},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=scratch,
                )
                for command, extra in _commands(side)
            ]
            codes = _wait(processes)
        if any(codes) or not answer.exists():
            tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            raise SideError(
                f"{side.label} with {side.processes} process(es) on {work.name} ended with {codes}:\n{tail}"
            )
        return Timing(**json.loads(answer.read_text(encoding="utf-8")))


def _commands(side: Side) -> list[tuple[list[str], dict[str, str]]]:
    module = ["-m", f"tests.benchmarks.{side.group}_side"]
    if side.group != "pfl":
        return [([sys.executable, *module], {})]
    try:
        command = [str(pfl_environment.python()), *module]
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise SideError(str(error)) from error
    if side.processes == 1:
        return [(command, {})]
    # pfl's own way to join processes: the addresses of all of them, and each one's rank.
    addresses = ",".join(f"localhost:{_free_port()}" for _ in range(side.processes))
    return [
        (command, {"PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank)}) for rank in range(side.processes)
    ]


def _wait(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait until all have ended; once one fails, or time is up, stop the others. Their exit codes.

    They are asked to stop (and killed only after 20 s), so that they can end their own children.
    """
    deadline = time.monotonic() + TIMEOUT
    try:
        while None in (codes := [process.poll() for process in processes]):
            if any(codes) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
    return [process.wait() for process in processes]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
