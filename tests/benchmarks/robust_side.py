"""fedsim's robust rules and Flower's in one process: ``python -m tests.benchmarks.robust_side [--repeat 5]``.

Every rule gets the same 100 rows of a million float32 numbers, in the form that its library holds them in: fedsim one
matrix, Flower a list of arrays (``flwr.server.strategy``) or array records (``flwr.serverapp.strategy``). Only the
rule is timed, nothing that either does before or after; both may use all cores. The rules of one line run in turn,
``--repeat`` times; Flower's older Krum, which takes long, once. Before anything is timed both sides combine a few small
rows and must agree: on everything but Bulyan, of which Flower has a variant that selects all at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, RecordDict
from flwr.server.strategy import aggregate as older
from flwr.serverapp.strategy import bulyan as flower_bulyan
from flwr.serverapp.strategy import fedtrimmedavg, multikrum

from strategies import coordinates, selection

CLIENTS, NUMBERS, MALICIOUS = 100, 1_000_000, 20


@dataclass(frozen=True)
class Pair:
    """One line of the table.

    Attributes:
        name: the rule, and which of Flower's.
        ours: fedsim's.
        flowers: Flower's.
        once: whether it takes too long to be repeated.
    """

    name: str
    ours: Callable[[], object]
    flowers: Callable[[], object]
    once: bool = False


def pairs(clients: int = CLIENTS, numbers: int = NUMBERS, f: int = MALICIOUS) -> list[Pair]:
    """The lines of the table, over rows that both sides share."""
    rows = torch.randn(clients, numbers, generator=torch.Generator().manual_seed(0))
    arrays = list(rows.numpy())
    results = [([array], 1) for array in arrays]
    contents = [RecordDict({"arrays": ArrayRecord([array])}) for array in arrays]
    most = clients - f

    def multi() -> object:
        chosen = multikrum.select_multikrum(contents, f, most)
        return older.aggregate([(record["arrays"].to_numpy_ndarrays(), 1) for record in chosen])

    return [
        Pair("Krum, serverapp", lambda: selection.krum(rows, f), lambda: multikrum.select_multikrum(contents, f, 1)),
        Pair(
            "Krum, server",
            lambda: selection.krum(rows, f),
            lambda: older.aggregate_krum(results, f, to_keep=0),
            once=True,
        ),
        Pair("Multi-Krum, serverapp", lambda: selection.multi_krum(rows, f), multi),
        Pair(
            "Multi-Krum, server",
            lambda: selection.multi_krum(rows, f),
            lambda: older.aggregate_krum(results, f, to_keep=most),
            once=True,
        ),
        Pair("median, both", lambda: coordinates.median(rows), lambda: older.aggregate_median(results)),
        Pair(
            "trimmed mean, both",
            lambda: coordinates.trimmed_mean(rows, f),
            lambda: fedtrimmedavg.trim_mean(np.stack(arrays), f / clients),
        ),
        Pair("Bulyan, serverapp", lambda: selection.bulyan(rows, f), lambda: _flowers_bulyan(contents, f)),
    ]


def compare(pair: Pair, repeat: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides, in turn."""
    ours, flowers = [], []
    pair.ours()  # the first call also loads libraries
    for _ in range(1 if pair.once else repeat):
        ours.append(_seconds(pair.ours))
        flowers.append(_seconds(pair.flowers))
    return ours, flowers


def differences() -> list[str]:
    """Which rules do not give the same row on both sides; empty if all do."""
    return [
        pair.name
        for pair in pairs(15, 64, 3)
        if "Bulyan" not in pair.name and not np.allclose(_row(pair.ours()), _row(pair.flowers()), rtol=0, atol=1e-5)
    ]


def table(repeat: int) -> str:
    """The Markdown table; its lines also go to stderr as they are known."""
    lines = ["|  | fedsim, s | Flower, s | fedsim is |", "| --- | ---: | ---: | ---: |"]
    for pair in pairs():
        ours, flowers = compare(pair, repeat)
        ratios = [theirs / own for own, theirs in zip(ours, flowers, strict=True)]
        spread = "" if pair.once else f" ({min(ratios):.3g} to {max(ratios):.3g})"
        lines.append(f"| {pair.name} | {median(ours):.3f} | {median(flowers):.3f} | {median(ratios):.3g}x{spread} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join([f"**robust**: {CLIENTS} rows of {NUMBERS:,} float32, f = {MALICIOUS}", "", *lines])


def _flowers_bulyan(contents: list[RecordDict], f: int) -> object:
    """What ``flwr.serverapp.strategy.Bulyan.aggregate_train`` does with its replies; it selects in one go."""
    theta = len(contents) - 2 * f
    chosen = multikrum.select_multikrum(contents, f, theta)
    layers = [record["arrays"].to_numpy_ndarrays() for record in chosen]
    middle = [np.median(layer, axis=0) for layer in zip(*layers, strict=True)]
    return flower_bulyan.aggregate_n_closest_weights(middle, layers, theta - 2 * f)


def _row(result: Any) -> np.ndarray:
    """The row in any of the forms that a side returns."""
    if isinstance(result, torch.Tensor):
        return result.numpy()
    while isinstance(result, list):
        result = result[0]
    return result["arrays"].to_numpy_ndarrays()[0] if isinstance(result, RecordDict) else result


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.robust_side", description=__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="times that both sides run, in turn (5)")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load before the start {os.getloadavg()[0]:.1f}", file=sys.stderr)
    if different := differences():
        print(f"not the same results: {', '.join(different)}", file=sys.stderr)
        return 1
    print(table(arguments.repeat))
    return 0


if __name__ == "__main__":
    sys.exit(main())
