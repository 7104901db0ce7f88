"""What of an experiment, beside its strategy, does not go with differential privacy of clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from clients import catalog
from clients.errors import RequestError
from clients.parts import Part
from clients.recipe_conflicts import beside_noise
from fedsim.conflicts import against_central_noise
from fedsim.experiment import Experiment
from fedsim.worker import Setup


def check(experiment: Experiment, setup: Setup) -> None:
    """Refuses an experiment whose guarantee would not hold.

    Raises:
        RequestError: with a line for each reason, and the mend.
    """
    problems = [*_metric_problems(experiment, setup), *_hidden_problems(experiment, setup)]
    if any(plugin.overrides("guarantee") for plugin in setup.strategy.plugins):
        problems += _problems(experiment, setup)
    with keyed(experiment):
        try:
            setup.strategy.guarantee(len(setup.population.trainable), setup.rounds)
        except RequestError as error:
            problems += error.problems
        if problems:
            raise RequestError(problems)


def _metric_problems(experiment: Experiment, setup: Setup) -> Iterator[str]:
    said = experiment.evaluation.noise
    if said is None:
        return
    if not experiment.clients_evaluate and setup.server_has_all:
        yield (
            "evaluation.noise: it is for metrics that clients send, and they send none; set data.client_test_fraction"
            " above 0, or leave it out"
        )
    clients = setup.population.clients
    if said.delta is not None and said.delta * clients >= 1:
        yield f"evaluation.noise.delta: {said.delta:g} is no less than 1 / {clients} clients; give less"


def _hidden_problems(experiment: Experiment, setup: Setup) -> Iterator[str]:
    if not any(plugin.owns_sum for plugin in setup.strategy.plugins):
        return
    for check in (part.name for part in experiment.checks if _needs_rows(part, experiment)):
        yield (
            f"checks.{check}: it looks at each update of the last round, which secure_sum hides; leave one of them out"
        )
    if any(group.crafts for group in setup.malicious):
        yield (
            "attacks: attackers' updates are made where all others' are seen, which secure_sum hides; use an attack on"
            " data, or leave secure_sum out"
        )


def _needs_rows(part: Part, experiment: Experiment) -> bool:
    found = catalog.load(part, "checks", experiment.base, key=f"checks.{part.name}")
    return getattr(found, "needs", "") == "rows"


@contextmanager
def keyed(experiment: Experiment) -> Iterator[None]:
    """Names the settings of a preset's noise by the keys that they have in the experiment."""
    try:
        yield
    except RequestError as error:
        if any(part.name == "noise" for part in experiment.plugins):
            raise
        raise RequestError([line.replace("plugins.noise", "strategy") for line in error.problems]) from error


def _problems(experiment: Experiment, setup: Setup) -> Iterator[str]:
    yield from beside_noise(setup.recipe)
    if not setup.strategy.noised:
        return
    available = 1.0 if experiment.devices is None else experiment.devices.available
    yield from against_central_noise(experiment.strategy.min_clients, setup.recipe.stragglers, available)
    for group in setup.malicious:
        if group.crafts and getattr(group.attack, "sees_others", True):
            yield (
                f"attacks.{group.name}: its clients send what they make of others' updates, so that one honest client"
                " is in several rows, which no epsilon counts; use an attack that knows its own update alone, or leave"
                " noise out"
            )
