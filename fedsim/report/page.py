"""The report: one self-contained HTML page that works offline, in light and dark, on paper and in a screen reader.

Nothing of a run can execute in it: every text is escaped where it becomes markup, the figures' data are JSON that
cannot close their element, and the content security policy admits two scripts by their hashes and no request at all.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from clients.errors import RunError
from fedsim.report import figures, sections
from fedsim.report.facts import ATTACK, Facts, measure, words
from fedsim.report.markup import Html, embedded_json, raw, tag, together
from fedsim.report.numbers import count
from fedsim.runs.directory import REPORT, disk_full, write_whole

_HERE = Path(__file__).parent


def write_report(directories: Path | str | Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Writes the report of a run, or of several whose curves are laid over one another.

    Args:
        directories: a run's directory, or several.
        out: the file to write; left out, ``report.html`` in the run's directory, or beside the directories of several.

    Returns:
        The file.

    Raises:
        RequestError: where there is no run.
        RunError: for a damaged run, or a page that cannot be written.
    """
    given = [directories] if isinstance(directories, str | Path) else list(directories)
    paths = [Path(directory) for directory in given]
    runs = [Facts(path) for path in paths]
    _label(runs)
    page = _page_of_one(runs[0]) if len(runs) == 1 else _page_of_several(runs)
    default = paths[0] / REPORT if len(paths) == 1 else paths[0].absolute().parent / REPORT
    target = Path(out) if out is not None else default
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target, page.encode("utf-8", "replace"))
    except OSError as error:
        mend = "; free some space" if disk_full(error) else "; give another --out"
        raise RunError(f"{target} cannot be written: {error.strerror}{mend}") from error
    return target


def _label(runs: Sequence[Facts]) -> None:
    """Tells runs apart by their directories' names, or by whole paths where those are the same."""
    if len(runs) == 1:
        return
    names = [facts.directory.absolute().name for facts in runs]
    for facts, name in zip(runs, names, strict=True):
        facts.label = name if names.count(name) == 1 else os.path.normpath(facts.directory)


def _page_of_one(facts: Facts) -> str:
    drawn = figures.curves([facts])
    distribution, participation = figures.client_distribution(facts), figures.participation(facts)
    population = figures.population(facts)
    body = [
        sections.tiles(facts),
        sections.notes(facts),
        _learning([facts], drawn),
        _section(
            "Clients and their examples",
            sections.population(facts),
            _figure("population", population, sections.population_title(facts)),
            sections.population_note(facts),
            sections.population_table(facts),
        ),
        _section(
            "Clients over the run",
            _blocks(
                (_figure("clients", distribution, "How their results are spread"), sections.clients(facts)),
                (
                    _figure("participation", participation, "How often they took part"),
                    together(sections.participation(facts), sections.attackers(facts)),
                ),
            ),
        ),
        _section("Events", sections.events(facts)),
        _section("Ledger", sections.ledger(facts)),
        _section("Experiment", sections.experiment(facts)),
        _section("How to reproduce it", sections.reproduction(facts)),
        _section("Versions and machine", sections.manifest(facts)),
    ]
    more = {"population": population, "clients": distribution, "participation": participation}
    drawn |= {name: figure for name, figure in more.items() if figure is not None}
    state = "finished" if facts.finished else f"unfinished, {facts.done} of {count(facts.planned, 'round')} done"
    return _page(facts.name, f"Federated learning run, {state}", sections.sentence(facts), body, drawn, [facts])


def _page_of_several(runs: Sequence[Facts]) -> str:
    drawn = figures.curves(runs)
    body = [
        _section("Where each run stands", sections.overview(runs), _note_on_one_run_each()),
        _learning(runs, drawn),
        _section("What differs", sections.differences(runs)),
        *(_run_among_several(facts) for facts in runs),
    ]
    return _page(f"{len(runs)} runs", "Federated learning runs", sections.sentence_of_several(runs), body, drawn, runs)


def _note_on_one_run_each() -> Html:
    return tag(
        "p",
        "An interval says how far the test set's size lets the accuracy be known. It does not hold the spread over "
        "seeds, so these runs alone do not show that one setting is better than another.",
        class_="note",
    )


def _run_among_several(facts: Facts) -> Html | None:
    inside = [
        ("Clients and their examples", sections.population(facts)),
        (None, sections.population_table(facts)),
        ("Clients", sections.clients(facts)),
        ("Participation", sections.participation(facts)),
        ("Events", sections.events(facts)),
        ("Ledger", sections.ledger(facts)),
        ("Experiment", sections.experiment(facts)),
        ("How to reproduce it", sections.reproduction(facts)),
        ("Versions and machine", sections.manifest(facts)),
    ]
    content = [together(tag("h3", title) if title else None, part) for title, part in inside if part is not None]
    head = tag("p", sections.sentence(facts))
    return _section(facts.label, head, tag("details", tag("summary", "Everything about this run"), *content))


def _learning(runs: Sequence[Facts], drawn: dict[str, figures.Figure]) -> Html | None:
    if not drawn:
        return None
    titles = {"metric": words(runs[0].primary), "attack": measure(ATTACK, "accuracy"), "loss": "loss"}
    shown = [_figure(name, figure, f"{titles[name]} over the run".capitalize()) for name, figure in drawn.items()]
    tables = [sections.evaluations(facts) for facts in runs]
    return _section("Learning curves", _axis_choice(runs), tag("div", *shown, class_="figures"), *tables)


def _axis_choice(runs: Sequence[Facts]) -> Html:
    choices = [
        tag(
            "label",
            tag("input", type="radio", name="axis", value=key, checked=(key == "round")),
            tag("span", axis["label"]),
        )
        for key, axis in figures.axes(runs).items()
    ]
    return tag("fieldset", tag("legend", "Drawn against"), *choices, class_="choice")


def _figure(name: str, figure: figures.Figure | None, title: str) -> Html | None:
    """A figure's place. Its text alternative is the sentence or table beside it."""
    if figure is None:
        return None
    label = f"{title}; the same numbers follow as text"
    tall = " tall" if figure.get("classes") else ""
    place = tag("div", id=f"figure-{name}", class_=f"plot{tall}", role="img", aria_label=label)
    return tag("figure", tag("figcaption", title), place)


def _blocks(*blocks: tuple[Html | None, Html | None]) -> Html | None:
    """Figures side by side, each with its text below it; those without a figure are left out."""
    shown = [tag("div", figure, text) for figure, text in blocks if figure is not None]
    return tag("div", *shown, class_="figures" if len(shown) > 1 else "figures single") if shown else None


def _section(title: str, *content: Html | None) -> Html | None:
    """A section under a heading, left out where nothing is in it."""
    if not any(content):
        return None
    return tag("section", tag("h2", title), *content)


def _page(
    title: str,
    kind: str,
    summary: str,
    body: Sequence[Html | None],
    drawn: dict[str, figures.Figure],
    runs: Sequence[Facts],
) -> str:
    own = raw((_HERE / "page.js").read_text(encoding="utf-8"))
    plotly = raw(_plotly())
    data = embedded_json(drawn)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(plotly, own)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} · fedsim"),
        tag("style", raw((_HERE / "page.css").read_text(encoding="utf-8"))),
    )
    name, result = tag("h1", tag("bdi", title)), tag("p", summary, class_="summary")
    header = tag("header", tag("p", kind, class_="kind"), name, result)
    without = tag("noscript", tag("p", "Figures need JavaScript; every number stands in the tables."))
    page = tag(
        "body",
        tag("main", header, without, *body),
        tag("footer", tag("p", f"Written by fedsim{_last_written(runs)}")),
        tag("script", data, type="application/json", id="figures"),
        tag("script", plotly),
        tag("script", own),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, page, lang='en')}\n"


def _policy(*scripts: str) -> str:
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    # Plotly sets style attributes on what it draws.
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _last_written(runs: Sequence[Facts]) -> str:
    newest = max((row["committed_at"] for facts in runs for row in facts.rounds), default=None)
    return "" if newest is None else f" · last round {datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M} UTC"


@cache
def _plotly() -> str:
    """Plotly's script, as its Python package carries it; reading it does not import the package."""
    spec = importlib.util.find_spec("plotly")
    if spec is None or not spec.submodule_search_locations:
        raise RunError("the report needs the package plotly; install it with: pip install plotly")
    return (Path(spec.submodule_search_locations[0]) / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
