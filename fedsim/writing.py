"""The resolved experiment as plain values and as TOML, and in which keys two of them differ."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from clients import catalog
from clients.errors import RequestError
from clients.parts import Part
from clients.reading import COMPUTED, REQUIRED
from fedsim.overriding import LISTS


def plain(value: Any, base: Path) -> Any:
    """Settings as nested dicts, lists, strings and numbers; what is None is left out.

    A part that is an object is written as ``"file.py:Thing"`` where naming it would make it again, and otherwise with a
    bracket, ``"file.py:Thing(...)"``: a record, which cannot be run without the Python file that made it.
    """
    if isinstance(value, BaseModel):
        table = {name: plain(getattr(value, name), base) for name in type(value).model_fields}
        named = table.pop("part", None)
        head = {} if named is None else named if isinstance(named, dict) else {"name": named}
        return {name: known for name, known in {**head, **table}.items() if known is not None}
    if isinstance(value, Part):
        name, settings = _name(value, base), plain(_placed(value.settings, base), base)
        return {"name": name, **settings} if settings else name
    if isinstance(value, Mapping):
        return {str(name): plain(item, base) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [plain(item, base) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if hasattr(value, "item") and not getattr(value, "shape", ()):
        return value.item()
    return _name(Part.of(value), base) if dataclasses.is_dataclass(value) else str(value)


def _placed(value: Any, base: Path) -> Any:
    """A part's settings with the files of parts that stand in them, ``"file.py:Thing"``, made absolute."""
    if isinstance(value, Mapping):
        return {name: _placed(item, base) for name, item in value.items()}
    place, _, attribute = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    if place.endswith(".py") and attribute.isidentifier() and (base / place).is_file():
        return f"{(base / Path(place).expanduser()).resolve()}:{attribute}"
    return value


def with_defaults(value: Any, kind: str, base: Path) -> Any:
    """A part's plain value, paths made absolute, with its settings' defaults as far as its source tells them."""
    table = value if isinstance(value, dict) else {"name": value}
    try:
        part = Part.of(table)
        entry = catalog.describe(part, kind, base)
    except (RequestError, ValueError):
        return value
    if entry is None:
        return value
    settings = entry.settings
    # A Partitioner's seed that is left out is the experiment's, whatever its class says.
    drawn = ("seed",) if kind == "partitions" and part.own else ()
    given = {
        name: Path(known.given(table, name)).expanduser()
        for name, known in settings.items()
        if (known.is_path or known.is_folder) and known.given(table, name) is not None
    }
    paths = {name: str(base / path) for name, path in given.items()}
    defaults = {
        name: plain(known.default, base)
        for name, known in settings.items()
        if name not in {**table, **paths, **dict.fromkeys(drawn)} and known.default not in (REQUIRED, COMPUTED, None)
    }
    if not paths and not defaults:
        return value
    whole = {**table, **paths, **defaults}
    return {"name": whole["name"], **{name: whole[name] for name in settings if name in whole}, **whole}


def to_toml(table: Mapping[str, Any]) -> str:
    """A table as TOML; lists of parts as ``[[tables]]``."""
    import tomlkit

    written = {
        name: [item if isinstance(item, dict) else {"name": item} for item in value] if name in LISTS else value
        for name, value in table.items()
    }
    return tomlkit.dumps({name: value for name, value in written.items() if value != []})


def differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The dotted keys in which two resolved experiments differ, with both values (None: not there).

    Folders of files do not count: a project may be moved, and what the files hold is compared by hash.
    """
    a, b = dict(_flat(mine)), dict(_flat(theirs))
    return [(key, a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list) and key in LISTS:
        if not value:
            return
        tables = [item if isinstance(item, Mapping) else {"name": item} for item in value]
        yield key, [_moved(table["name"]) for table in tables]
        for table in tables:
            settings = {name: item for name, item in table.items() if name != "name"}
            yield from _flat(settings, f"{key}.{table['name']}")
    else:
        # A part is a name or a table with one; both are told by their name.
        yield key.removesuffix(".name"), _moved(value) if isinstance(value, str) else value


def _moved(name: str) -> str:
    """A part's name without the folder of its file."""
    place, _, attribute = name.rpartition(":")
    return f"{Path(place).name}:{attribute}" if place.endswith(".py") else name


def _name(part: Part, base: Path) -> str:
    if part.thing is None:
        place, _, attribute = part.name.rpartition(":")
        return f"{(base / Path(place).expanduser()).resolve()}:{attribute}" if place.endswith(".py") else part.name
    what = part.thing if hasattr(part.thing, "__qualname__") else type(part.thing)
    module = sys.modules.get(what.__module__)
    file = getattr(module, "__file__", None) if what.__module__ == "__main__" or _loaded_by_path(module) else None
    name = f"{file or what.__module__}:{what.__qualname__}"
    remade = what is part.thing and "<" not in what.__qualname__
    return name if remade else f"{name}({_arguments(part.thing)})"


def _loaded_by_path(module: Any) -> bool:
    return getattr(module, "__name__", "").startswith("fedsim_file_")


def _arguments(thing: Any) -> str:
    """The fields of a dataclass of plain values and such dataclasses, or the parts of a strategy; else ``...``."""
    if type(thing).__module__.startswith("strategies.") and not dataclasses.is_dataclass(thing):
        return repr(thing).partition("(")[2].removesuffix(")")  # a strategy tells all of its parts
    if not dataclasses.is_dataclass(thing):
        return "..."
    values = {field.name: _told(getattr(thing, field.name)) for field in dataclasses.fields(thing) if field.init}
    if None in values.values():
        return "..."
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _told(value: Any) -> str | None:
    """A value as text that tells it from others; None where there is none."""
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    if isinstance(value, type) or not dataclasses.is_dataclass(value):
        return None
    inside = _arguments(value)
    return None if inside == "..." else f"{type(value).__name__}({inside})"
