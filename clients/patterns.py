"""Patterns of names: which parameters of a model are meant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from clients.errors import RequestError, nearest

_LISTED = 12


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern means a name, or what the name is inside of: ``"head"`` means ``"head.weight"``."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def selected(patterns: Iterable[str], names: Sequence[str], key: str, noun: str = "parameter") -> list[str]:
    """The names that the patterns mean, in the order of ``names``; of several that match one, the last counts.

    Args:
        patterns: ``"!"`` in front takes back what an earlier one took.
        names: all names there are.
        key: the dotted key that an error names.
        noun: what the names are of.

    Raises:
        RequestError: with a line for each pattern that matches none.
    """
    chosen, wrong = dict.fromkeys(names, False), []
    for pattern in patterns:
        found = [name for name in names if matches(pattern.removeprefix("!"), name)]
        chosen |= dict.fromkeys(found, not pattern.startswith("!"))
        if not found:
            wrong.append(
                f"{key}: {pattern!r} matches no {noun}; the model has {listed(names)}{nearest(pattern, names)}"
            )
    if wrong:
        raise RequestError(wrong)
    return [name for name in names if chosen[name]]


def listed(names: Sequence[str]) -> str:
    """Names for a message; of many, the first and the last."""
    if len(names) <= _LISTED:
        return ", ".join(names) or "none"
    half = _LISTED // 2
    return f"{', '.join(names[:half])}, ..., {', '.join(names[-half:])} ({len(names)} in all)"
