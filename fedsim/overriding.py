"""``--set a.b=value``: changing keys of an experiment before it is checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from clients.errors import RequestError, nearest
from clients.parts import Part, is_table

#: The keys of an experiment that hold lists of parts.
LISTS = ("attacks", "plugins", "checks")

_NUMBER = re.compile(r"[+-]?(\d+\.|\.\d+)([eE][+-]?\d+)?")


def as_given(value: Any) -> Any:
    """Settings as the nested dicts and lists that they were given as; what was left out stays out, objects stay."""
    if isinstance(value, BaseModel):
        table = {name: as_given(getattr(value, name)) for name in value.model_fields_set}
        named = table.pop("part", None)
        return table if named is None else {**(named if is_table(named) else {"name": named}), **table}
    if isinstance(value, Part):
        return value if value.thing is not None else value.as_toml()
    if is_table(value):
        return {name: as_given(item) for name, item in value.items()}
    return [as_given(item) for item in value] if isinstance(value, list | tuple) else value


def override(given: Mapping[str, Any], overrides: Sequence[str], named: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The table with each ``key=value`` set, names before settings, whatever the order.

    Args:
        given: an experiment's table.
        overrides: ``"client.lr=0.1"``; ``"plugins.quantize.bits=4"`` addresses a list's table by its name.
        named: tables that name a part and have keys of their own beside: these stay when another part is named, and
            the old part's settings go.

    Raises:
        RequestError: for what is not ``key=value``, and for a list that has no table of that name.
    """
    table, wrong = as_given(given), []
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        path = _path(key)
        if not equals or not all(path):
            wrong.append(f"--set {text}: not of the form key=value, e.g. client.lr=0.1")
        else:
            pairs.append((path, read_value(value.strip())))
    for path, value in sorted(pairs, key=lambda pair: len(pair[0]) - (pair[0][-1] == "name")):
        try:
            _set(table, path, value, named)
        except RequestError as error:
            wrong += error.problems
    if wrong:
        raise RequestError(wrong)
    return table


def _path(key: str) -> list[str]:
    """The parts of a dotted key; a quoted one may hold dots, as in TOML."""
    parts = re.findall(r'"[^"]*"|\'[^\']*\'|[^."\']+|(?<=\.)(?=\.|$)|^(?=\.)', key.strip())
    return [part.strip().strip("\"'") for part in parts]


def read_value(text: str) -> Any:
    """A TOML value; what is none is a string, ``.1`` and ``1.`` are numbers."""
    if _NUMBER.fullmatch(text):
        return float(text)
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["value"] if len(read) == 1 else text


def _set(table: dict[str, Any], path: list[str], value: Any, named: Mapping[str, Sequence[str]]) -> None:
    holder: Any = table
    for depth, name in enumerate(path[:-1]):
        inner = holder.get(name, [] if name in LISTS and depth == 0 else None)
        if isinstance(inner, list):
            holder = _of_name(inner, path[depth + 1], ".".join(path[: depth + 1]))
            rest = path[depth + 2 :]
            if not rest:
                raise RequestError(f"--set {'.'.join(path)}: say which setting, e.g. {'.'.join(path)}.setting=value")
            return _set(holder, rest, value, {})
        if isinstance(inner, Part):
            raise RequestError(f"{'.'.join(path)}: {inner.name} was given as an object; change it where it is made")
        if isinstance(inner, str):
            inner = {"name": inner}
        holder[name] = inner = dict(inner) if isinstance(inner, Mapping) else {}
        holder = inner
    key, last = ".".join(path), path[-1]
    if last == "name" and len(path) > 1:
        _rename(holder, value, named.get(".".join(path[:-1]), ()))
    elif key in named and not isinstance(value, Mapping):
        kept = holder.get(last)
        holder[last] = dict(kept) if isinstance(kept, Mapping) else {"name": kept} if kept is not None else {}
        _rename(holder[last], value, named[key])
    else:
        holder[last] = value
    return None


def _rename(holder: dict[str, Any], name: Any, own: Sequence[str]) -> None:
    """Names another part in a table: the settings of the one before go with it."""
    if holder.get("name") != name:
        for key in [key for key in holder if key not in own]:
            del holder[key]
    holder["name"] = name


def _of_name(items: list[Any], name: str, key: str) -> dict[str, Any]:
    """The table of that name in a list; a bare name becomes a table."""
    names = [item["name"] if isinstance(item, Mapping) else str(getattr(item, "name", item)) for item in items]
    found = [index for index, known in enumerate(names) if _plain(known) == _plain(name)]
    if len(found) != 1:
        if found:
            raise RequestError(f"{key}.{name}: {key} names it {len(found)} times; change the file, or set {key} whole")
        have = ", ".join(names) or "nothing (what a strategy brings itself is set by the strategy's own keys)"
        raise RequestError(f"{key}.{name}: {key} has {have}{nearest(name, names)}")
    item = items[found[0]]
    if isinstance(item, Part):
        raise RequestError(f"{key}.{name}: {item.name} was given as an object; change it where it is made")
    items[found[0]] = table = dict(item) if isinstance(item, Mapping) else {"name": item}
    return table


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
