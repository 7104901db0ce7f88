"""The report's figures as plain data; ``page.js`` draws them with Plotly in the reader's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from fedsim.report.facts import ATTACK, Facts, measure, words
from fedsim.report.markup import plot_text
from fedsim.report.numbers import SHARES, thinned, unit_of, unit_of_time

#: Classes that a picture of label mixes has a line for.
MOST_CLASSES = 100

#: Points a curve keeps in a page; a longer run is thinned evenly.
_POINTS = 1500
_BINS = 20

Figure = dict[str, Any]


def axes(runs: Sequence[Facts]) -> dict[str, dict[str, Any]]:
    """What curves can be drawn against: key -> title, label of its choice, and how much one of its units is.

    Only what every run recorded and what moves is offered.
    """
    most = max((facts.total("bytes_up") + facts.total("bytes_down") for facts in runs), default=0)
    scale, unit = unit_of(most)
    made = {"round": {"label": "Rounds", "title": "Round", "scale": 1}}
    if most:
        made["bytes"] = {"label": "Bytes", "title": f"{unit} sent, up and down, so far", "scale": scale}
    scale, unit = unit_of_time(max((facts.total("seconds") for facts in runs), default=0.0))
    made["seconds"] = {"label": "Time", "title": f"{unit} so far", "scale": scale}
    if all(any(row["simulated_seconds"] is not None for row in facts.rounds) for facts in runs):
        scale, unit = unit_of_time(max(facts.total("simulated_seconds") for facts in runs))
        made["simulated"] = {"label": "Simulated time", "title": f"Simulated {unit.lower()} so far", "scale": scale}
    if all(facts.epsilon is not None for facts in runs) and len({facts.privacy_kind for facts in runs}) == 1:
        made["epsilon"] = {"label": "Epsilon", "title": "Epsilon spent", "scale": 1}
    return made


def curves(runs: Sequence[Facts]) -> dict[str, Figure]:
    """The learning curves: the primary metric and the loss, each against every axis.

    An attack's success is drawn beside the accuracy of a single run, in a figure of its own otherwise.
    """
    offered = axes(runs)
    primary = runs[0].primary
    figures = {}
    success = {f"{ATTACK}_accuracy": measure(ATTACK, "accuracy").capitalize()}
    beside = len(runs) == 1 and primary == "accuracy"
    if primary != "loss" and any(facts.last(primary) is not None for facts in runs):
        figures["metric"] = _curve(runs, offered, primary, success if beside else {})
    if any(facts.attacked for facts in runs) and not (beside and "metric" in figures):
        figures["attack"] = _curve(runs, offered, "accuracy", {}, ATTACK)
    figures["loss"] = _curve(runs, offered, "loss", {"train_loss": "Training (cohort mean)"} if len(runs) == 1 else {})
    return {name: figure for name, figure in figures.items() if figure["traces"]}


def client_distribution(facts: Facts) -> Figure | None:
    """How many clients reached what, in the last evaluation of clients."""
    found = facts.client_values
    if found is None:
        return None
    share = facts.primary in SHARES
    low, width = _bins(found.values[0], 1.0 if share else found.values[-1], share)
    counts = [0] * _BINS
    for value in found.values:
        counts[min(max(int((value - low) / width), 0), _BINS - 1)] += 1
    return {
        "kind": "bars",
        "x": [low + (i + 0.5) * width for i in range(_BINS)],
        "y": counts,
        "width": width,
        "percent": share,
        "range": [low, low + _BINS * width],
        "xtitle": plot_text(f"{words(found.split)} {words(facts.primary)}").capitalize(),
        "ytitle": "Clients",
        "marks": [{"x": found.mean, "text": "mean"}],
    }


def population(facts: Facts) -> Figure | None:
    """How many training examples each shown client holds, and of which classes."""
    shown, summary = facts.shown_clients, facts.run.census
    if not shown or summary is None:
        return None
    classes: list[int] = []
    if all(row["labels"] is not None for row in shown):
        totals = [sum(counts) for counts in zip(*(row["labels"] for row in shown), strict=True)]
        frequent = sorted(range(len(totals)), key=lambda label: (-totals[label], label))
        classes = sorted(frequent[:MOST_CLASSES])
    return {
        "kind": "population",
        "clients": [row["client"] for row in shown],
        "sizes": [row["train"] for row in shown],
        "marks": _marks(shown),
        "classes": classes,
        "counts": [[row["labels"][label] for row in shown] for label in classes],
    }


def _marks(shown: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Which of the shown clients, by their places, are held out, and which attack in what way."""
    found = {"Held out": [i for i, row in enumerate(shown) if row["held_out"]]}
    for kind in sorted({row["attack"] for row in shown if row["attack"] is not None}):
        name = plot_text(f"Attack: {words(kind)}")
        found[name] = [i for i, row in enumerate(shown) if row["attack"] == kind]
    return [{"name": name, "at": at} for name, at in found.items() if at]


def participation(facts: Facts) -> Figure | None:
    """How many clients took part in how many rounds."""
    found = facts.participation
    if not found:
        return None
    width = max(1, -(-(max(found) + 1) // 40))
    counts: dict[int, int] = {}
    for times, clients in found.items():
        counts[times // width] = counts.get(times // width, 0) + clients
    first = min(counts)
    bins = range(first, max(counts) + 1)
    return {
        "kind": "bars",
        "x": [i * width + (width - 1) / 2 for i in bins],
        "y": [counts.get(i, 0) for i in bins],
        "width": width,
        "percent": False,
        "range": [first * width - 0.5, (max(counts) + 1) * width - 0.5],
        "xtitle": "Rounds taken part in" + (f" (in groups of {width})" if width > 1 else ""),
        "ytitle": "Clients",
        "marks": [],
    }


def _bins(lowest: float, highest: float, share: bool) -> tuple[float, float]:
    """Where equal bins over the values begin and how wide they are; on whole per cents for shares."""
    width = (highest - lowest) / _BINS or 1.0
    if not share:
        return lowest, width
    whole = max(math.ceil(100 * width), 1) / 100
    return max(1.0 - _BINS * whole, 0.0), whole


def _curve(
    runs: Sequence[Facts], offered: dict[str, Any], name: str, further: Mapping[str, str], split: str | None = None
) -> Figure:
    """One metric of a split (left out: of all splits of a single run, of the judged one of several), and further keys
    with their labels."""
    traces = []
    for i, facts in enumerate(runs):
        along = _along(facts, offered)
        splits = [split or facts.split] if split or len(runs) > 1 else facts.splits
        keys = [(f"{split}_{name}", words(split).capitalize()) for split in splits]
        keys += further.items()
        for j, (key, label) in enumerate(keys):
            trace = _trace(facts, along, key, most=_POINTS // max(len(runs) // 4, 1))
            if trace is not None:
                single = len(runs) == 1
                trace |= {"name": plot_text(label if single else facts.label), "color": j if single else i}
                trace["dash"] = "dot" if key in further else "solid"
                traces.append(trace)
    return {
        "kind": "lines",
        "traces": traces,
        "axes": {key: axis["title"] for key, axis in offered.items()},
        "percent": name in SHARES,
        "ytitle": plot_text((measure(split, name) if split else words(name)).capitalize()),
    }


def _along(facts: Facts, offered: dict[str, Any]) -> dict[str, list[float | None]]:
    """Axis -> the value of every round on it."""
    rows = facts.rounds
    found = {
        "round": [row["round"] for row in rows],
        "bytes": [(row["bytes_up_total"] + row["bytes_down_total"]) for row in rows],
        "seconds": [row["seconds_total"] for row in rows],
        "simulated": list(accumulate(row["simulated_seconds"] or 0.0 for row in rows)),
        "epsilon": [row["epsilon"] for row in rows],
    }
    return {key: [None if v is None else v / axis["scale"] for v in found[key]] for key, axis in offered.items()}


def _trace(facts: Facts, along: dict[str, list[float | None]], key: str, most: int) -> dict[str, Any] | None:
    known = [i for i, row in enumerate(facts.rounds) if row.get(key) is not None]
    if not known:
        return None
    at = [known[i] for i in thinned(len(known), most)]
    return {
        "x": {axis: [values[i] for i in at] for axis, values in along.items()},
        "y": [facts.rounds[i][key] for i in at],
    }
