"""A part of an experiment: a name, ``file.py:Thing``, ``package.module:Thing`` or an object, settings beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

_NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Part:
    """What stands in an experiment wherever a name is taken.

    Attributes:
        name: a built-in's or entry point's name (``"fedavg"``), or ``"file.py:Thing"`` / ``"package.module:Thing"``.
            For an object given in Python, ``"module:qualname"`` of what it is, for the record only.
        settings: the settings that stand beside the name in its table.
        thing: the object, when one was given in Python instead of a name.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    thing: Any = None

    @classmethod
    def of(cls, value: Any) -> Part:
        """Reads a string, a table with ``name``, a Part, or any other object.

        Raises:
            ValueError: for an empty name or a table without ``name``.
        """
        if isinstance(value, Part):
            return value
        if isinstance(value, str):
            return cls._named(value, {})
        if is_table(value):
            settings = {key: setting for key, setting in value.items() if key != "name"}
            if isinstance(value.get("name"), str):
                return cls._named(value["name"], settings)
            if value.get("name") is None:
                raise ValueError('a table here needs name = "..." beside its settings')
            named = cls.of(value["name"])
            return cls(named.name, settings, named.thing)
        if value is None or isinstance(value, bool | int | float | list | tuple):
            raise ValueError(f"{value!r} is not a name, a table with a name, or an object")
        return cls(name=_describe(value), thing=value)

    @classmethod
    def _named(cls, name: str, settings: dict[str, Any]) -> Part:
        if not (_NAME.fullmatch(name) or ":" in name):
            raise ValueError(f"{name!r} is not a name; give a built-in's name or 'file.py:Thing'")
        return cls(name=name, settings=settings)

    @property
    def own(self) -> bool:
        """Whether this is the user's own thing and not one that goes by a catalogued name."""
        return self.thing is not None or ":" in self.name

    def as_toml(self) -> str | dict[str, Any]:
        """The string or table that stands for it in a resolved experiment."""
        return {"name": self.name, **self.settings} if self.settings else self.name

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.of, serialization=core_schema.plain_serializer_function_ser_schema(cls.as_toml)
        )


def is_table(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value is a table of an experiment; Hugging Face's DatasetDict is a mapping too, and an object."""
    return isinstance(value, Mapping) and type(value).__module__.partition(".")[0] != "datasets"


def _describe(thing: Any) -> str:
    what = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{what.__module__}:{what.__qualname__}"
