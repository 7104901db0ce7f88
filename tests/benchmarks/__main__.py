"""Run the sides in turn and print their tables: ``python -m tests.benchmarks mlp50 mlp400 conv robust flower_apps``."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.sides import GROUPS, Side, SideError, app_sides, run, sides
from tests.benchmarks.table import Timings, differences, table
from tests.benchmarks.work import WORKS, Work, write_data

#: The robust rules beside Flower's, a comparison in one process.
ROBUST = "robust"

#: A Flower app under fedsim's simulator and under Flower's, with every work.
APPS = "flower_apps"


def main() -> int:
    """Exit 0 if every side ran and did the same work, 1 otherwise (with the tables of those that ran)."""
    arguments = _arguments()
    rows = sides(arguments.only, arguments.processes)
    compared = [(name, rows) for name in arguments.works if name not in (ROBUST, APPS)]
    if APPS in arguments.works:
        compared += [(name, app_sides(arguments.processes)) for name in WORKS]
    # A machine that is busy before it starts gives numbers of no worth: let whoever reads the table see it.
    load = f"load before the start {os.getloadavg()[0]:.1f}"
    print(f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}, {load}\n", flush=True)
    complaints, versions = [], {}
    if ROBUST in arguments.works:
        from tests.benchmarks import robust_side  # loads Flower into this process

        complaints += robust_side.differences()
        print(robust_side.table(arguments.repeat) + "\n", flush=True)
    for name, shown in compared:
        timings, failures = _compare(WORKS[name], shown, arguments.repeat)
        complaints += failures
        if timings:
            complaints += differences(WORKS[name], timings)
            print(table(WORKS[name], timings) + "\n", flush=True)
        for runs in timings.values():
            versions |= runs[-1].versions
    print(", ".join(f"{package} {number}" for package, number in sorted(versions.items())))
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


def _compare(work: Work, rows: list[Side], repeat: int) -> tuple[Timings, list[str]]:
    """Every side once, then every side again, ...; a side that fails is left out from then on."""
    timings: Timings = {side: [] for side in rows}
    failures = []
    with tempfile.TemporaryDirectory() as directory:
        data = write_data(work, Path(directory))
        for repetition in range(1, repeat + 1):
            for side in list(timings):
                try:
                    timing = run(side, work, data)
                except SideError as error:
                    failures.append(str(error))
                    del timings[side]
                    continue
                timings[side].append(timing)
                place = f"{work.name} {repetition}/{repeat}"
                print(f"{place} {side.label} x{side.processes}: {timing.rate:,.1f} clients/s", file=sys.stderr)
    return timings, failures


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    words = [*WORKS, ROBUST, APPS]
    parser.add_argument("works", nargs="+", choices=words, metavar="WORK", help=", ".join(words))
    parser.add_argument("--repeat", type=_count, default=3, help="times that every side runs, in turn (3)")
    parser.add_argument("--only", type=_groups, default=list(GROUPS), help=f"some of {','.join(GROUPS)}")
    parser.add_argument("--processes", type=_count, default=os.cpu_count(), help="processes a side (one a core)")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _groups(text: str) -> list[str]:
    groups = [group.strip() for group in text.split(",")]
    if unknown := [group for group in groups if group not in GROUPS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(GROUPS)}")
    return groups


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
