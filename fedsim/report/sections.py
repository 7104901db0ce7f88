"""The parts of a report, each a function from a run's facts to markup."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from fedsim.report import numbers as n
from fedsim.report.elements import Column, Row, code, details, pairs, table
from fedsim.report.facts import Facts, flattened, words
from fedsim.report.markup import Html, tag, together

#: Rows of a long table that stand open at either end, and rows that a page holds at all.
_ENDS = 5
_MOST_ROWS = 1000
_MOST_EVENTS = 200


def sentence(facts: Facts) -> str:
    """What the run came to, in one sentence; the first thing that a reader sees."""
    examples = f" (n = {n.count(facts.examples, 'example')})" if facts.examples else ""
    if facts.last(facts.primary) is None:
        return f"{facts.strategy} has no evaluation yet: {facts.done} of {n.count(facts.planned, 'round')} are done."
    rounds = n.count(facts.evaluated, "round")
    if facts.finished:
        return f"{facts.strategy} reached {facts.result} after {rounds}{examples}."
    return (
        f"{facts.strategy} stands at {facts.result} after {rounds}{examples}; "
        f"the run is unfinished, with {facts.done} of {n.count(facts.planned, 'round')} done."
    )


def sentence_of_several(runs: Sequence[Facts]) -> str:
    """The same for runs beside one another; it claims no difference, one run each shows none."""
    alike = len({(facts.split, facts.primary, facts.evaluated, facts.examples) for facts in runs}) == 1
    first = runs[0]
    if not alike or first.last(first.primary) is None:
        shown = (f"{facts.label} {facts.result} after {n.count(facts.evaluated, 'round')}" for facts in runs)
        return f"{'; '.join(shown)}."
    examples = f" (n = {n.count(first.examples, 'example')})" if first.examples else ""
    values = ", ".join(f"{facts.label} {n.metric(facts.primary, facts.last(facts.primary))}" for facts in runs)
    what = f"{words(first.split)} {words(first.primary)}".capitalize()
    return f"{what} after {n.count(first.evaluated, 'round')}{examples}: {values}."


def tiles(facts: Facts) -> Html:
    """The figures that a reader looks for first."""
    value = n.metric(facts.primary, facts.last(facts.primary))
    shown = [_tile(f"{words(facts.split)} {words(facts.primary)}", value, _spread(facts))]
    if facts.primary != "loss":
        shown.append(_tile(f"{words(facts.split)} loss", n.metric("loss", facts.last("loss"))))
    of = "" if facts.done == facts.planned else f" of {facts.planned:,}"
    clients = f"{n.short(facts.cohort)} of {facts.population:,} clients each" if facts.population else None
    shown.append(_tile("rounds", f"{facts.done:,}{of}", clients))
    up, down = facts.total("bytes_up"), facts.total("bytes_down")
    shown.append(_tile("sent", n.size(up + down), f"{n.size(up)} up, {n.size(down)} down"))
    if facts.epsilon is not None:
        shown.append(_tile("epsilon spent", n.short(facts.epsilon), "covers the released weights only"))
    trained = facts.total("train_seconds")
    training = f"{n.duration(trained)} of it local training" if trained else None
    shown.append(_tile("time", n.duration(facts.total("seconds")), training))
    return tag("dl", *shown, class_="tiles")


def notes(facts: Facts) -> Html | None:
    """What must be said beside the figures (a proxy's size and origin, ...): the summary's ``notes``."""
    said = (facts.run.summary or {}).get("notes") or ()
    return tag("div", *(tag("p", note, class_="note") for note in said)) if said else None


def evaluations(facts: Facts) -> Html | None:
    """The learning curves as a table, their text alternative."""
    rows = [row for row in facts.rounds if any(row.get(f"{split}_loss") is not None for split in facts.splits)]
    if not rows:
        return None
    kept = [rows[i] for i in n.thinned(len(rows), 100)]
    names = [facts.primary] if facts.primary == "loss" else [facts.primary, "loss"]
    columns = [_ROUND]
    for split in facts.splits:
        for name in names:
            columns.append(_metric_column(f"{words(split)} {words(name)}".capitalize(), name, f"{split}_{name}"))
    columns += [_SENT, Column("Time so far", lambda row: n.duration(row["seconds_total"]))]
    some = "" if len(kept) == len(rows) else f" ({len(kept)} of {len(rows)})"
    shown = table(f"Evaluations of {facts.label}{some}", columns, kept)
    return details(f"The curves of {facts.label} as a table", shown)


def clients(facts: Facts) -> Html | None:
    """The last evaluation of clients in words."""
    found = facts.client_values
    if found is None:
        return None
    show = lambda value: n.metric(facts.primary, value)  # noqa: E731
    what = f"{words(found.split)} {words(facts.primary)}"
    return tag(
        "p",
        f"{what.capitalize()} of {n.count(len(found.values), 'client')}: {show(found.mean)} as mean over clients, "
        f"{show(found.pooled)} pooled over their {n.count(sum(found.examples), 'example')}. "
        f"A tenth of the clients has {show(found.quantile(0.1))} or less, half have {show(found.quantile(0.5))} "
        "or less; "
        f"the lowest is {show(found.values[0])} (client {found.clients[0]}, {n.count(found.examples[0], 'example')}), "
        f"the highest {show(found.values[-1])}.",
    )


def participation(facts: Facts) -> Html | None:
    """Who took part, in words."""
    found = {times: clients for times, clients in facts.participation.items() if times}
    if not found:
        return None
    took_part = sum(found.values())
    updates = sum(times * clients for times, clients in found.items())
    asked = sum(row["cohort"] for row in facts.rounds)
    completed = sum(row["completed"] for row in facts.rounds)
    who = n.count(facts.population or took_part, "client")
    if facts.population:
        who = f"{took_part:,} of {who}"
    combined = f"{completed:,} of {asked:,} updates were combined"
    if completed == asked:
        combined = "Every update was combined"
    return tag(
        "p",
        f"{who} trained at least once, in {n.short(updates / took_part)} rounds on average "
        f"(from {min(found):,} to {max(found):,}). {combined}.",
    )


def events(facts: Facts) -> Html:
    """What a reader should know of: failures, dropped updates, damaged checkpoints."""
    if not facts.events:
        return tag("p", "None: no client failed, no update was dropped, no worker was lost.")
    kinds = ", ".join(f"{words(kind)} {count:,}\u00d7" for kind, count in facts.event_counts.most_common())
    shown = facts.events[:_MOST_EVENTS]
    more = "" if len(shown) == len(facts.events) else f" The first {_MOST_EVENTS} are shown; all stand in run.db."
    columns = [
        _ROUND,
        Column("What", lambda row: words(row["kind"]), number=False),
        Column("Client", lambda row: "" if row["client"] is None else row["client"]),
        Column("Stage", lambda row: row["stage"] or "", number=False),
        Column("Message", _message, number=False),
    ]
    text = tag("p", f"{n.count(len(facts.events), 'event')}: {kinds}.{more}")
    return together(text, table(f"Events of {facts.label}", columns, shown, class_="events"))


def ledger(facts: Facts) -> Html:
    """The ledger: bytes, epsilon and seconds of every round."""
    rows = facts.rounds
    columns = _ledger_columns(facts)
    if len(rows) <= 2 * _ENDS + 2:
        return table(f"Ledger of {facts.label}", columns, rows)
    ends = table(
        f"Ledger of {facts.label}: the first and the last {_ENDS} of {n.count(len(rows), 'row')}",
        columns,
        [*rows[:_ENDS], None, *rows[-_ENDS:]],
    )
    kept = [rows[i] for i in n.thinned(len(rows), _MOST_ROWS)]
    whole = len(kept) == len(rows)
    label = f"All {len(rows):,} rounds" if whole else f"{len(kept):,} of {len(rows):,} rounds (all: fedsim export)"
    return together(ends, details(label, table(f"Ledger of {facts.label}: {label.lower()}", columns, kept)))


def experiment(facts: Facts) -> Html:
    """The resolved experiment, exactly as it ran."""
    return code(facts.run.experiment_toml.rstrip(), f"Resolved experiment of {facts.label}")


def reproduction(facts: Facts) -> Html:
    """How to get the same bits again."""
    again = facts.directory.with_name(facts.directory.name + "-again")
    command = f"fedsim run {shlex.quote(str(facts.directory / 'experiment.toml'))} --out {shlex.quote(str(again))}"
    sha256 = (facts.run.summary or {}).get("weights_sha256")
    weights = None
    if sha256:
        weights = together("The final weights have the SHA-256 ", tag("code", sha256, class_="hash"), ".")
    text = tag(
        "p",
        "The experiment above stands beside this page as experiment.toml. With the versions below, on a processor "
        "of the same capability, it gives the same bits from every engine and any number of workers. ",
        weights,
    )
    shown = together(text, code(command, f"Command that runs {facts.label} again"))
    began = facts.run.manifest.get("command")
    if not began:
        return shown
    return together(
        shown, tag("p", "It was begun with:"), code(shlex.join(map(str, began)), f"Command of {facts.label}")
    )


def manifest(facts: Facts) -> Html:
    """Versions, machine and whatever else the manifest holds, in groups."""
    known = {
        key: value for key, value in facts.run.manifest.items() if value not in ({}, [], None) and key != "command"
    }
    groups = {key: value for key, value in known.items() if isinstance(value, dict)}
    single = {key: value for key, value in known.items() if key not in groups}
    if single:
        groups = {"run": single} | groups
    shown = [
        tag("div", tag("h3", words(name).capitalize()), pairs(flattened(group)), class_="group")
        for name, group in groups.items()
    ]
    return tag("div", *shown, class_="groups")


def overview(runs: Sequence[Facts]) -> Html:
    """Runs beside one another, one row each."""
    primary = runs[0].primary
    columns = [
        Column("Run", lambda row: row["facts"].label, number=False),
        Column("Strategy", lambda row: row["facts"].strategy, number=False),
        Column("Rounds", lambda row: f"{row['facts'].done:,}" + ("" if row["facts"].finished else " (unfinished)")),
        Column(words(primary).capitalize(), lambda row: n.metric(primary, row["facts"].last(primary))),
    ]
    if any(facts.interval for facts in runs):
        columns.append(Column("95 % interval", lambda row: _interval(row["facts"]) or n.NONE))
    columns += [
        Column("Loss", lambda row: n.metric("loss", row["facts"].last("loss"))),
        Column("Examples", lambda row: n.NONE if row["facts"].examples is None else f"{row['facts'].examples:,}"),
        Column("Up", lambda row: n.size(row["facts"].total("bytes_up"))),
        Column("Down", lambda row: n.size(row["facts"].total("bytes_down"))),
    ]
    if any(facts.epsilon is not None for facts in runs):
        columns.append(Column("Epsilon", lambda row: n.short(row["facts"].epsilon)))
    columns.append(Column("Time", lambda row: n.duration(row["facts"].total("seconds"))))
    return table("The last evaluation of each run, and its totals", columns, [{"facts": facts} for facts in runs])


def differences(runs: Sequence[Facts]) -> Html:
    """The settings in which the experiments differ."""
    flat = [flattened(facts.run.experiment) for facts in runs]
    keys = list(dict.fromkeys(key for settings in flat for key in settings))
    rows = [{"key": key, "values": [settings.get(key, n.NONE) for settings in flat]} for key in keys]
    rows = [row for row in rows if any(value != row["values"][0] for value in row["values"])]
    if not rows:
        return tag("p", "None: the experiments are the same.")
    columns = [Column("Setting", lambda row: row["key"], number=False)]
    columns += [Column(facts.label, _value_of(i), number=False) for i, facts in enumerate(runs)]
    return table("Settings in which the runs are not the same", columns, rows)


def _spread(facts: Facts) -> str | None:
    if facts.examples is None:
        return None
    within = _interval(facts)
    return f"95 % interval {within}, n = {facts.examples:,}" if within else f"n = {facts.examples:,}"


def _interval(facts: Facts) -> str | None:
    return n.interval(*facts.interval) if facts.interval else None


def _tile(label: str, value: str, note: str | None = None) -> Html:
    below = tag("dd", note) if note else None
    return tag("div", tag("dt", label.capitalize()), tag("dd", value, class_="value"), below)


def _ledger_columns(facts: Facts) -> list[Column]:
    primary = f"{words(facts.split)} {words(facts.primary)}".capitalize()
    columns = [
        _ROUND,
        Column("Clients", _cohort),
        _metric_column(primary, facts.primary, f"{facts.split}_{facts.primary}"),
        _metric_column("Training loss", "loss", "train_loss"),
        Column("Bytes up", lambda row: n.size(row["bytes_up"])),
        Column("Bytes down", lambda row: n.size(row["bytes_down"])),
        _SENT,
    ]
    if facts.epsilon is not None:
        columns.append(Column("Epsilon", lambda row: n.short(row["epsilon"])))
    if any(row["simulated_seconds"] is not None for row in facts.rounds):
        columns.append(Column("Simulated time", lambda row: n.duration(row["simulated_seconds"])))
    return [*columns, Column("Time", lambda row: n.duration(row["seconds"]))]


_ROUND = Column("Round", lambda row: f"{row['round']:,}" if row["round"] >= 0 else n.NONE)
_SENT = Column("Sent so far", lambda row: n.size(row["bytes_up_total"] + row["bytes_down_total"]))


def _value_of(i: int) -> Callable[[Row], str]:
    return lambda row: _toml(row["values"][i])


def _cohort(row: Row) -> str:
    return f"{row['cohort']:,}" if row["completed"] == row["cohort"] else f"{row['completed']:,} of {row['cohort']:,}"


def _metric_column(title: str, name: str, key: str) -> Column:
    return Column(title, lambda row: n.metric(name, row.get(key)))


def _message(row: Row) -> Html:
    if not row["traceback"]:
        return together(row["message"])
    return together(row["message"], details("Traceback", code(row["traceback"].rstrip(), "Traceback")))


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
