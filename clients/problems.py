"""What pydantic found wrong, as one line a key: which key, what was given, what is allowed, the nearest name."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from clients.errors import nearest
from clients.parts import Part

_RANGE = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "multiple_of",
    "finite_number",
    "too_short",
    "too_long",
}
_PLAIN = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


def explain(error: ValidationError, annotation: Any, key: str, value: Any) -> list[str]:
    """The lines for everything that is wrong with a value.

    Args:
        error: what pydantic raised.
        annotation: the type that the value was checked against.
        key: the value's dotted key, ``""`` for a whole experiment.
        value: what was given.
    """
    lines = [_line(found, annotation, key, value) for found in error.errors(include_url=False)]
    return list(dict.fromkeys(line for line in lines if line))


def unknown_key(key: str, allowed: Sequence[str]) -> str:
    """The line for a key that nobody reads; ``allowed`` are the keys of the same table."""
    table, _, name = key.rpartition(".")
    have = f"{table or 'an experiment'} has {', '.join(allowed)}" if allowed else f"{table} has no settings"
    return f"{key}: unknown key; {have}{nearest(name, allowed)}"


def show(value: Any) -> str:
    """What was given, short and as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "a table"
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def describe(annotation: Any, limits: bool = True) -> str:
    """What a type allows, in words; without ``limits`` only its kind."""
    core, metadata = _unwrap(annotation)
    if get_origin(core) is Literal:
        return _either([show(choice) for choice in get_args(core)])
    if _arms(core):
        return _either([describe(arm, limits) for arm in _arms(core)])
    if get_origin(core) in (list, tuple, set, frozenset) or _is_sequence(core):
        inner = get_args(core)
        item = describe(inner[0], limits) if inner and inner[0] is not Any else ""
        count = f" of {len(inner)}" if get_origin(core) is tuple and inner[-1] is not Ellipsis else ""
        return f"a list{count}" + (f", each item {item}" if item else "")
    if core is Part:
        return "a name or a table with a name"
    if _is_table(core):
        return f"a table with {', '.join(core.model_fields)}"
    if core in (dict, Mapping) or get_origin(core) in (dict, Mapping):
        return "a table"
    return _PLAIN.get(core, getattr(core, "__name__", str(core))) + (_limits(metadata) if limits else "")


def _line(found: Any, annotation: Any, key: str, value: Any) -> str:
    key, annotation, value, rest = _descend(annotation, key, value, list(found["loc"]))
    kind = found["type"]
    if rest is None:
        return ""
    if kind == "extra_forbidden" and rest:
        known = list(_unwrap(annotation)[0].model_fields)
        return unknown_key(_join(key, rest[0]), known)
    if kind == "missing" and rest:
        wanted = _field(_unwrap(annotation)[0], str(rest[0]))
        return f"{_join(key, rest[0])}: missing; give {describe(wanted)}"
    if kind == "value_error":
        message = str(found["ctx"]["error"])
        return f"{key}: {message}" if key else message
    if kind in _RANGE:
        return f"{key}: {show(value)} is out of range; give {describe(annotation)}"
    core = _unwrap(annotation)[0]
    if get_origin(core) is Literal:
        close = nearest(value, [str(choice) for choice in get_args(core)]) if isinstance(value, str) else ""
        return f"{key}: {show(value)} is not {describe(core)}{close}"
    bare, full = describe(annotation, limits=False), describe(annotation)
    return f"{key}: {show(value)} is not {bare}" + (f"; give {full}" if full != bare else "")


def _descend(annotation: Any, key: str, value: Any, loc: list[Any]) -> tuple[str, Any, Any, list[Any] | None]:
    """Follows an error's place through the types: key, type and value there, and what of the place is left.

    Nothing is left (None) where another error of the same union says it better.
    """
    while loc:
        core, _ = _unwrap(annotation)
        arms = _arms(core)
        if arms:
            tables = [arm for arm in arms if _is_table(arm)]
            if not (isinstance(value, Mapping) and tables):
                return key, annotation, value, []
            if tables[0].__name__ not in str(loc[0]):  # pydantic names it with its validators
                return key, annotation, value, None
            annotation, loc = tables[0], loc[1:]
        elif _is_table(core) and loc[0] in core.model_fields and isinstance(value, Mapping) and loc[0] in value:
            key, annotation, value, loc = _join(key, loc[0]), _field(core, loc[0]), value[loc[0]], loc[1:]
        elif get_origin(core) in (dict, Mapping) and isinstance(value, Mapping) and loc[0] in value:
            key, annotation, value, loc = _join(key, loc[0]), get_args(core)[1], value[loc[0]], loc[1:]
        elif isinstance(loc[0], int) and isinstance(value, Sequence) and get_args(core):
            inner = get_args(core)
            annotation = inner[loc[0]] if loc[0] < len(inner) and Ellipsis not in inner and len(inner) > 1 else inner[0]
            key, value, loc = f"{key}[{loc[0]}]", value[loc[0]], loc[1:]
        else:
            break
    return key, annotation, value, loc


def _is_table(core: Any) -> bool:
    return isinstance(core, type) and issubclass(core, BaseModel)


def _field(model: type[BaseModel], name: str) -> Any:
    """A field's type with its limits."""
    field = model.model_fields[name]
    annotation: Any = field.annotation
    for limit in field.metadata:
        annotation = Annotated[annotation, limit]
    return annotation


def _unwrap(annotation: Any) -> tuple[Any, list[Any]]:
    """The type without ``Annotated`` and without ``| None`` (in a file a key is simply left out), and its limits."""
    metadata: list[Any] = []
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata += more
        elif _is_union(annotation) and len(_without_none(annotation)) == 1:
            annotation = _without_none(annotation)[0]
        else:
            return annotation, metadata


def _arms(core: Any) -> list[Any]:
    return _without_none(core) if _is_union(core) else []


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _without_none(union: Any) -> list[Any]:
    return [arm for arm in get_args(union) if arm is not type(None)]


def _is_sequence(core: Any) -> bool:
    return core in (list, tuple, Sequence) or get_origin(core) is Sequence


def _limits(metadata: list[Any]) -> str:
    """``" above 0"``, ``" of at least 1"``, ``" of at least 0 and below 1"``."""
    found: dict[str, Any] = {}
    for item in metadata:
        for part in getattr(item, "metadata", [item]):
            found |= {name: getattr(part, name) for name in ("gt", "ge", "lt", "le") if hasattr(part, name)}
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    parts = [f"{words[name]} {found[name]:g}" for name in ("gt", "ge", "lt", "le") if found.get(name) is not None]
    return " " + " and ".join(parts) if parts else ""


def _either(choices: list[str]) -> str:
    return ", ".join(choices[:-1]) + " or " + choices[-1] if len(choices) > 1 else choices[0]


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)
