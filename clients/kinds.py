"""The kinds of things that an experiment names. Each floor declares its own when it is imported.

A kind says how its built-in things are recognised in the source of a package, so that nobody edits a registry: a new
strategy, plug-in or partition is a new class or function.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of thing.

    Attributes:
        name: the plural that ``fedsim list`` takes, e.g. ``"plugins"``.
        noun: the singular for messages, e.g. ``"plug-in"``.
        package: the package or module, by its dotted name, whose source is read; or several of them.
        base: things are the public, concrete classes that descend from a class of this name (or of one of several);
        returns: or the public functions whose return annotation is one of these names.
        first: the first argument of such a function is one of these, where its result does not tell it from helpers.
        offered: arguments that whoever builds the thing passes where its signature asks for them; no settings.
        also: names that stand for no thing of their own, e.g. ``"auto"``; lower case.
        entry_points: the entry-point group in which published packages add theirs.
        applied: whether a plain function is such a thing itself, and its first argument what it is applied to.
    """

    name: str
    noun: str
    package: str | tuple[str, ...]
    base: str | tuple[str, ...] | None = None
    returns: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    entry_points: str | None = None
    applied: bool = False

    @property
    def packages(self) -> tuple[str, ...]:
        return (self.package,) if isinstance(self.package, str) else self.package

    @property
    def bases(self) -> tuple[str, ...]:
        return (self.base,) if isinstance(self.base, str) else self.base or ()


_DECLARED: dict[str, Kind] = {}


def declare(*kinds: Kind) -> None:
    """Makes kinds known by name."""
    _DECLARED.update({kind.name: kind for kind in kinds})


def declared() -> dict[str, Kind]:
    """Name to kind, of the floors that have been imported."""
    return dict(_DECLARED)


declare(
    Kind("tasks", "task", "clients", base="Task"),
    Kind("optimizers", "optimiser", "clients", base="Optimizer"),
    Kind(
        "initializations",
        "initialisation",
        "clients.initialization",
        returns=("Tensor", "Module"),
        first=("weight", "model"),
        offered=("weight", "fan_in", "fan_out", "model", "generator", "base"),
    ),
    Kind("schedules", "schedule", "clients", base="Schedule"),
    Kind("transforms", "transform", "torchvision.transforms.v2", base="Transform", applied=True),
    Kind("attacks", "attack", "clients", base="DataAttack"),
    Kind("local_trainings", "local training", "clients", base="LocalTraining"),
)
