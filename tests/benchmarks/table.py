"""Medians, spread and ratios as a Markdown table, and the check that all sides did the same work."""

from __future__ import annotations

from statistics import median

from tests.benchmarks.sides import Side
from tests.benchmarks.work import STEPS, Timing, Work

#: Sides draw their cohorts and orders anew, so their losses agree only roughly: to this fraction, and this amount.
LOSS_TOLERANCE = (0.1, 0.02)

#: fedsim's own sides, one of which is in a table.
_OURS = ("fedsim", "simulate")

Timings = dict[Side, list[Timing]]


def table(work: Work, timings: Timings) -> str:
    """The table of one work, a row for each side; ``timings`` holds a side's repetitions in the order they ran."""
    number = common_round(timings)
    header = ["", "processes", "clients/s", "per process", "ms a round", "fedsim is", f"loss in round {number}"]
    rows = [_row(side, runs, _ours(side, timings), number) for side, runs in timings.items()]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] + ["---:"] * 6, *rows)]
    return "\n".join([_title(work), "", *lines])


def common_round(timings: Timings) -> int:
    """The last round (from 1) that every side trained."""
    return min(len(timing.losses) for runs in timings.values() for timing in runs)


def differences(work: Work, timings: Timings) -> list[str]:
    """What shows that the sides did not do the same work; empty if they did."""
    found = []
    number = common_round(timings)
    losses = {side: median(timing.losses[number - 1] for timing in runs) for side, runs in timings.items()}
    middle = median(losses.values())
    allowed = LOSS_TOLERANCE[0] * middle + LOSS_TOLERANCE[1]
    for side, runs in timings.items():
        where = f"{work.name}: {side.label}, {side.processes} process(es)"
        for timing in runs:
            if set(timing.clients) != {work.cohort}:
                found.append(f"{where} trained {sorted(set(timing.clients))} clients a round, not {work.cohort}")
            if set(timing.steps) != {work.cohort * STEPS}:
                found.append(f"{where} took {sorted(set(timing.steps))} steps a round, not {work.cohort * STEPS}")
        if not abs(losses[side] - middle) <= allowed:  # also where one is not a number
            found.append(f"{where} has loss {losses[side]:.3f} in round {number}, the sides' median is {middle:.3f}")
    return found


def _ours(side: Side, timings: Timings) -> list[Timing] | None:
    """What a rival is compared with: fedsim on as many processes."""
    return next((timings[own] for group in _OURS if (own := Side(group, side.processes)) in timings), None)


def _title(work: Work) -> str:
    shape = "x".join(str(size) for size in work.shape)
    return (
        f"**{work.name}**: {work.model} on {shape}, {work.cohort} of {work.population} clients a round, "
        f"{STEPS} steps each"
    )


def _row(side: Side, runs: list[Timing], ours: list[Timing] | None, number: int) -> list[str]:
    rates = [timing.rate for timing in runs]
    milliseconds = median(1000 * sum(timing.seconds) / len(timing.seconds) for timing in runs)
    ratio = ""
    if ours is not None and side.group not in _OURS:
        # Each repetition's sides ran one after another: their ratio is less disturbed than that of the medians.
        ratio = _spread([own.rate / timing.rate for own, timing in zip(ours, runs, strict=True)], "x")
    loss = median(timing.losses[number - 1] for timing in runs)
    return [
        side.label,
        str(side.processes),
        _spread(rates),
        _number(median(rates) / side.processes),
        f"{milliseconds:,.1f}",
        ratio,
        f"{loss:.3f}",
    ]


def _spread(values: list[float], unit: str = "") -> str:
    middle = f"{_number(median(values))}{unit}"
    return middle if len(values) == 1 else f"{middle} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
