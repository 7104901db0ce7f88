"""Settings of parts that are made in Python, checked as those of an experiment file are."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

from clients import problems


def wrong_settings(thing: Any, key: str) -> list[str]:
    """What is wrong with the fields of a dataclass, and of those in it, one line each; nothing of anything else.

    Args:
        thing: a part, such as a plug-in or an aggregator.
        key: its dotted key.
    """
    if not dataclasses.is_dataclass(thing) or isinstance(thing, type):
        return []
    lines = []
    for name, adapter in _adapters(type(thing)).items():
        value, where = getattr(thing, name), f"{key}.{name}"
        lines += wrong_settings(value, where)
        if adapter is None:
            continue
        annotation, check = adapter
        try:
            check.validate_python(value)
        except ValidationError as error:
            lines += problems.explain(error, annotation, where, value)
    return lines


@functools.cache
def _adapters(kind: type) -> Mapping[str, tuple[Any, TypeAdapter] | None]:
    """Field -> its type and what checks it; None where any value may stand."""
    try:
        hints = typing.get_type_hints(kind, include_extras=True)
    except NameError:  # a class of a user's own whose types are not there when it runs
        return {}
    found: dict[str, tuple[Any, TypeAdapter] | None] = {}
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        annotation = hints.get(field.name, Any)
        try:
            made = TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
        except (PydanticSchemaGenerationError, TypeError):
            made = None
        found[field.name] = None if made is None or annotation is Any else (annotation, made)
    return found
