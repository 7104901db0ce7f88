"""Tables, lists and boxes that the sections are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedsim.report.markup import Html, tag
from fedsim.report.numbers import NONE

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, what stands in a row's cell, and whether that is a number."""

    title: str
    cell: Callable[[Row], Any]
    number: bool = True


def table(caption: str, columns: Sequence[Column], rows: Iterable[Row | None], class_: str | None = None) -> Html:
    """A table in a box that scrolls, by keyboard too. The first column names its row; ``None`` is rows left out."""
    aligned = ["number" if column.number else None for column in columns]
    titles = [tag("th", column.title, scope="col", class_=a) for column, a in zip(columns, aligned, strict=True)]
    gap = tag("tr", tag("td", "⋯", colspan=len(columns), class_="gap"))
    body = [gap if row is None else _row(row, columns) for row in rows]
    made = tag("table", tag("caption", caption), tag("thead", tag("tr", *titles)), tag("tbody", *body), class_=class_)
    return tag("div", made, class_="scroll", role="group", tabindex="0", aria_label=caption)


def _row(row: Row, columns: Sequence[Column]) -> Html:
    head, *rest = columns
    first = tag("th", head.cell(row), scope="row", class_="number" if head.number else None)
    return tag("tr", first, *(tag("td", c.cell(row), class_="number" if c.number else None) for c in rest))


def pairs(table: Mapping[str, Any]) -> Html:
    """Names and values under one another."""
    shown = [tag("div", tag("dt", key.replace("_", " ")), tag("dd", _plain(value))) for key, value in table.items()]
    return tag("dl", *shown, class_="pairs")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(str(item) for item in value)
    return NONE if value is None else str(value)


def details(label: str, *content: Html) -> Html:
    """What opens on request."""
    return tag("details", tag("summary", label), *content)


def code(text: str, label: str) -> Html:
    """Text as it is, in a box that scrolls by keyboard too."""
    return tag("pre", tag("code", text), tabindex="0", role="group", aria_label=label)
