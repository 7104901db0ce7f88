"""The parts of a report, each a function from a run's facts to markup."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedsim.report import numbers as n
from fedsim.report.elements import Column, Row, code, details, pairs, table
from fedsim.report.facts import ATTACK, Facts, flattened, measure, words
from fedsim.report.figures import MOST_CLASSES
from fedsim.report.markup import Html, tag, together

#: Rows of a long table that stand open at either end, and rows that a page holds at all.
_ENDS = 5
_MOST_ROWS = 1000
_MOST_EVENTS = 200

#: Classes that have a column each in the table of clients; more stand in one column, the largest ones only.
_CLASS_COLUMNS = 12


def sentence(facts: Facts) -> str:
    """What the run came to, in one sentence; the first thing that a reader sees."""
    examples = f" (n = {n.count(facts.examples, 'example')})" if facts.examples else ""
    if facts.last(facts.primary) is None:
        if (loss := facts.last("loss")) is not None:
            said = f"{n.metric('loss', loss)} {words(facts.split)} loss{examples}"
            if facts.finished:
                return f"{facts.strategy} reached {said} after {n.count(facts.done, 'round')}."
            done = f"{facts.done} of {n.count(facts.planned, 'round')}"
            return f"{facts.strategy} stands at {said}; the run is unfinished, with {done} done."
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
    value, loss = facts.last(facts.primary), facts.last("loss")
    shown = []
    if value is not None or loss is None:
        name = f"{words(facts.split)} {words(facts.primary)}"
        shown.append(_tile(name, n.metric(facts.primary, value), _spread(facts)))
    if facts.primary != "loss":
        shown.append(_tile(f"{words(facts.split)} loss", n.metric("loss", loss)))
    if facts.attacked:
        success = n.metric("accuracy", facts.last("accuracy", ATTACK))
        shown.append(_tile(measure(ATTACK, "accuracy"), success, _spread(facts, ATTACK)))
    of = "" if facts.done == facts.planned else f" of {facts.planned:,}"
    clients = f"{n.short(facts.cohort)} of {facts.population:,} clients each" if facts.population else None
    shown.append(_tile("rounds", f"{facts.done:,}{of}", clients))
    up, down = facts.total("bytes_up"), facts.total("bytes_down")
    shown.append(_tile("sent", n.size(up + down), f"{n.size(up)} up, {n.size(down)} down", _share_of_model(facts)))
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
    judged = [*(f"{split}_loss" for split in facts.splits), f"{ATTACK}_accuracy"]
    rows = [row for row in facts.rounds if any(row.get(key) is not None for key in judged)]
    if not rows:
        return None
    kept = [rows[i] for i in n.thinned(len(rows), 100)]
    names = [facts.primary] if facts.primary == "loss" else [facts.primary, "loss"]
    columns = [_ROUND]
    for split in facts.splits:
        for name in names:
            columns.append(_metric_column(f"{words(split)} {words(name)}".capitalize(), name, f"{split}_{name}"))
    if facts.attacked:
        columns.append(_metric_column("Attack success", "accuracy", f"{ATTACK}_accuracy"))
    columns += [_SENT, Column("Time so far", lambda row: n.duration(row["seconds_total"]))]
    some = "" if len(kept) == len(rows) else f" ({len(kept)} of {len(rows)})"
    shown = table(f"Evaluations of {facts.label}{some}", columns, kept)
    return details(f"The curves of {facts.label} as a table", shown)


def population(facts: Facts) -> Html | None:
    """Who holds what, in words."""
    found = facts.run.census
    if found is None:
        return None
    sizes = found["sizes"]
    if found["clients"] == 1:
        each = ""
    elif sizes["min"] == sizes["max"]:
        each = f", {sizes['min']:,} each"
    else:
        each = (
            f", {n.short(sizes['mean'])} each on average, from {sizes['min']:,} to {sizes['max']:,}; the middle half "
            f"of them has {sizes['q1']:,} to {sizes['q3']:,}, the median is {sizes['median']:,}"
        )
    clients = n.count(found["clients"], "client")
    held = "holds" if found["clients"] == 1 else "hold"
    said = [f"{clients} {held} {n.count(found['examples'], 'training example')}{each}."]
    if found["partition"]:
        said.append(f"They are dealt by {found['partition']}.")
    if found["labels"] and found["labels"]["clients"] > 1:
        said.append(_label_skew(found))
    shared = found["test"] if found.get("matched") else 0
    own = [
        f"{found[split]:,} for {use}"
        for split, use in _OWN_USES.items()
        if found.get(split) and not (split == "test" and shared)
    ]
    if own:
        said.append(f"Clients keep {' and '.join(own)} besides.")
    server = [f"{n.count(count, f'{split} example')}" for split, count in found["server"].items() if split != ATTACK]
    said.append(f"The server holds {_listed(server)}." if server else "The server holds no examples.")
    if shared:
        said.append(
            "Clients test on the server's test examples, each on a choice with the label mix of its own; they share"
            f" them, and what they test on comes to {n.count(shared, 'example')}, counted for each client."
        )
    if found["empty"]:
        said.append(f"{n.count(found['empty'], 'client has', 'clients have')} nothing to train on.")
    if found["held_out"]:
        said.append(f"{n.count(found['held_out'], 'client is', 'clients are')} held out and never trained on.")
    for kind, count in found["attacks"].items():
        said.append(f"{n.count(count, 'client attacks', 'clients attack')}: {words(kind)}.")
    return tag("p", " ".join(said))


def population_title(facts: Facts) -> str:
    """What the picture of the clients shows."""
    labelled = (facts.run.census or {}).get("labels") is not None
    return "How many examples each client has" + (", and of which classes" if labelled else "")


def population_note(facts: Facts) -> Html | None:
    """How to read the picture."""
    found, shown = facts.run.census, facts.shown_clients
    if found is None or not shown:
        return None
    said = []
    if len(shown) < found["clients"]:
        said.append(
            f"Shown are {len(shown)} of {found['clients']:,} clients, evenly chosen by size, the largest and the "
            "smallest among them."
        )
    if found["labels"]:
        said.append(
            "The bars are training examples; below each, the stronger the colour of a class, the larger its share of "
            "that client's."
        )
        if found["classes"] > MOST_CLASSES:
            said.append(f"Of {found['classes']:,} classes, the {MOST_CLASSES} most frequent are shown.")
    return tag("p", " ".join(said), class_="note") if said else None


def population_table(facts: Facts) -> Html | None:
    """The picture of the clients as a table, its text alternative."""
    found, shown = facts.run.census, facts.shown_clients
    if found is None or not shown:
        return None
    columns = [Column("Client", lambda row: row["client"])]
    for split, title in (("train", "Training"), ("validation", "Validation"), ("test", "Test")):
        if any(row[split] is not None for row in shown):
            columns.append(Column(title, _counted(split)))
    if any(row["held_out"] for row in shown):
        columns.append(Column("Held out", lambda row: "yes" if row["held_out"] else "", number=False))
    if any(row["attack"] is not None for row in shown):
        columns.append(Column("Attack", lambda row: words(row["attack"] or ""), number=False))
    classes = max((len(row["labels"] or ()) for row in shown), default=0)
    if classes > _CLASS_COLUMNS:
        columns.append(Column("Classes", lambda row: sum(count > 0 for count in row["labels"])))
        columns.append(Column("Training examples by class (class: examples)", _largest_classes, number=False))
    else:
        columns += [Column(f"Class {label}", _of_class(label)) for label in range(classes)]
    some = "" if len(shown) == found["clients"] else f" ({len(shown)} of {found['clients']:,})"
    label = f"Clients of {facts.label} and their examples{some}"
    return details("The clients as a table", table(label, columns, shown, class_="dense"))


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


def attackers(facts: Facts) -> Html | None:
    """What came of attackers' updates, in words."""
    found = facts.attackers
    if found is None:
        return None
    said = f"Attackers sent {n.count(found['updates'], 'update')} in {n.count(found['rounds'], 'round')}"
    if found["kept"] is not None:
        said += f"; the rule kept {found['kept']:,.0f} of them"
    elif found["share"] is not None:
        said += f"; together they had {found['share'] / found['rounds']:.1%} of a round's weight on average"
    return tag("p", f"{said}.")


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
    return together(_not_sent(facts), _epsilon(facts), _ledger_tables(facts))


def _not_sent(facts: Facts) -> Html | None:
    """Which part of the model is sent and which is not, in words."""
    if facts.sent_share is None:
        return None
    found = facts.parameters
    why = []
    if found["frozen"]:
        why.append(f"{found['frozen']:,} {'is' if found['frozen'] == 1 else 'are'} frozen")
    if found["personal"]:
        why.append(f"{found['personal']:,} {'stays' if found['personal'] == 1 else 'stay'} with the clients")
    saved = facts.total("bytes_saved")
    not_sent = f"; {n.size(saved)} were not sent" if saved else ""
    return tag(
        "p",
        f"Clients send {found['sent']:,} of {sum(found.values()):,} parameters ({n.share(facts.sent_share)}): "
        f"{' and '.join(why)}{not_sent}.",
    )


def _ledger_tables(facts: Facts) -> Html:
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
    if "again" in facts.run.manifest:
        return _app_reproduction(facts)
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


def _app_reproduction(facts: Facts) -> Html:
    """The same of a Flower app, which is run from its own folder."""
    sha256 = (facts.run.summary or {}).get("weights_sha256")
    text = tag(
        "p",
        "With the app's files as they were (their SHA-256 stand below) and the versions below, an app that draws only "
        "from generators that are seeded gives the same from every engine and any number of workers. ",
        together("The final weights have the SHA-256 ", tag("code", sha256, class_="hash"), ".") if sha256 else None,
    )
    command = shlex.join(map(str, facts.run.manifest["again"]))
    return together(text, code(command, f"Command that runs {facts.label} again"))


def manifest(facts: Facts) -> Html:
    """Versions, machine and whatever else the manifest holds, in groups."""
    known = {
        key: value
        for key, value in facts.run.manifest.items()
        if value not in ({}, [], None) and key not in ("command", "again")
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
    if any(facts.attacked for facts in runs):
        success = Column("Attack success", lambda row: n.metric("accuracy", row["facts"].last("accuracy", ATTACK)))
        columns.append(success)
    columns += [
        Column("Loss", lambda row: n.metric("loss", row["facts"].last("loss"))),
        Column("Examples", lambda row: n.NONE if row["facts"].examples is None else f"{row['facts'].examples:,}"),
        Column("Up", lambda row: n.size(row["facts"].total("bytes_up"))),
        Column("Down", lambda row: n.size(row["facts"].total("bytes_down"))),
    ]
    if any(facts.epsilon is not None for facts in runs):
        columns.append(Column("Epsilon", lambda row: n.short(row["facts"].epsilon)))
        kinds = {facts.privacy_kind for facts in runs if facts.epsilon is not None}
        if len(kinds) > 1:
            columns.append(Column("Epsilon is by", lambda row: _privacy_kind(row["facts"]), number=False))
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


def _spread(facts: Facts, split: str | None = None) -> str | None:
    examples = facts.last("examples", split)
    if examples is None:
        return None
    found = facts.attack_interval if split == ATTACK else facts.interval
    return f"95 % interval {n.interval(*found)}, n = {int(examples):,}" if found else f"n = {int(examples):,}"


def _interval(facts: Facts) -> str | None:
    return n.interval(*facts.interval) if facts.interval else None


def _share_of_model(facts: Facts) -> str | None:
    if facts.sent_share is None:
        return None
    whole = n.millions(sum(facts.parameters.values()))
    return f"{n.share(facts.sent_share)} of the model's {whole} parameters"


def _label_skew(found: Mapping[str, Any]) -> str:
    """How far the clients' label mixes differ."""
    skew = found["labels"]
    whole = skew["clients"] == found["clients"] - found["empty"]
    of = "" if whole else f" ({skew['clients']:,} clients were looked at)"
    return (
        f"A client has {n.short(round(skew['mean_classes'], 1))} of the {found['classes']:,} classes on average, and "
        f"its label mix is {skew['distance']:.2f} away from that of all{of}: total variation distance, 0 for the same "
        "mix, 1 for no class in common."
    )


def _listed(items: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(items[:-1]), items[-1])))


def _counted(split: str) -> Callable[[Row], str]:
    return lambda row: n.NONE if row[split] is None else f"{row[split]:,}"


def _of_class(label: int) -> Callable[[Row], str]:
    return lambda row: n.NONE if row["labels"] is None else f"{row['labels'][label]:,}"


def _largest_classes(row: Row) -> str:
    """``class 3: 40, class 17: 2``, the largest first."""
    held = sorted((-count, label) for label, count in enumerate(row["labels"] or ()) if count)
    shown = ", ".join(f"{label}: {-count:,}" for count, label in held[:_CLASS_COLUMNS])
    left = len(held) - _CLASS_COLUMNS
    return f"{shown}, and {n.count(left, 'class', 'classes')} more" if left > 0 else shown


def _tile(label: str, value: str, *notes: str | None) -> Html:
    below = [tag("dd", note) for note in notes if note]
    return tag("div", tag("dt", label.capitalize()), tag("dd", value, class_="value"), *below)


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
    if any(row["bytes_saved"] for row in facts.rounds):
        columns.append(Column("Not sent", lambda row: n.size(row["bytes_saved"])))
    if any(row["malicious"] for row in facts.rounds):
        columns.append(Column("Attackers", lambda row: n.NONE if row["malicious"] is None else row["malicious"]))
    if facts.epsilon is not None:
        columns.append(Column("Epsilon", lambda row: n.short(row["epsilon"])))
    if any(row["simulated_seconds"] is not None for row in facts.rounds):
        columns.append(Column("Simulated time", lambda row: n.duration(row["simulated_seconds"])))
    return [*columns, Column("Time", lambda row: n.duration(row["seconds"]))]


def _privacy_kind(facts: Facts) -> str:
    return n.NONE if facts.epsilon is None else facts.privacy_kind


def _epsilon(facts: Facts) -> Html | None:
    """What the ledger's epsilon is of."""
    told = facts.privacy
    if facts.epsilon is None or not told:
        return None
    return tag("p", f"Epsilon is by {facts.privacy_kind}; it covers {told.get('covers')}.")


_OWN_USES = {"validation": "validation", "test": "testing"}
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
