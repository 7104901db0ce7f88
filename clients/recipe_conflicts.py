"""Settings of local training that are right alone and wrong together. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from clients.errors import RequestError
from clients.recipe import Recipe

#: For a proximal term in the recipe beside that of a strategy.
TWO_PROXIMAL_TERMS = (
    "client.regularization.proximal: the strategy brings a proximal term too, and the two would add; give one of them"
)

#: Other names that servers have for settings of a recipe.
_ALSO = {"learning_rate": "lr", "local_lr": "lr", "local_epochs": "epochs", "local_steps": "steps"}

#: Flower's FedProx sends its mu so.
_PROXIMAL = "proximal-mu"


def within(recipe: Recipe) -> Iterable[str]:
    """What of a recipe does not go with another part of it, one line a key."""
    own, private, stopping = recipe.local_training, recipe.dp_sgd is not None, recipe.early_stopping is not None
    phases, keeps = recipe.personal_epochs is not None, recipe.optimizer_state == "keep"
    if phases and stopping:
        yield "client.early_stopping: it would stop a client in its epochs on personal parameters; drop one"
    if phases and keeps:
        yield "client.optimizer_state: 'keep' does not go with client.personal_epochs, two phases with one state"
    given = {
        "dp_sgd": private,
        "early_stopping": stopping,
        "optimizer_state": keeps,
        "step_schedule": recipe.step_schedule.name != "constant",
        "gradient_clip": recipe.gradient_clip is not None,
        "lr_factors": bool(recipe.lr_factors),
        "adversarial": recipe.adversarial is not None,
        "personal_epochs": phases,
    }
    for key in [key for key, there in given.items() if there and own is not None]:
        yield f"client.{key}: client.local_training replaces the loop that does it; give one of them"
    if private and phases:
        yield "client.personal_epochs: what client.dp_sgd releases is counted for one phase of training; drop one"
    if private and stopping:
        yield "client.early_stopping: it looks at validation examples without noise, against client.dp_sgd; drop one"


def beside_noise(recipe: Recipe) -> Iterable[str]:
    """What of a recipe does not go with noise that hides clients, one line a key."""
    if recipe.batch_norm == "share_all":
        yield (
            'client.batch_norm: "share_all" sends batch norm\'s statistics beside the update, which no noise covers;'
            ' give "share_affine" or "local", or set model.norm = "group"'
        )
    if recipe.dp_sgd is not None:
        yield (
            "client.dp_sgd: its epsilon is of examples, that of the strategy's noise of clients, and the ledger has"
            " one; leave one of them out"
        )


def for_examples(recipe: Recipe, examples: int) -> Iterable[str]:
    """What of a recipe does not go with so many examples of a client, one line a key."""
    if recipe.dp_sgd is not None and recipe.dp_sgd.delta * examples >= 1:
        yield (
            f"client.dp_sgd.delta: {recipe.dp_sgd.delta:g} is no less than 1 / {examples}, the examples of the client,"
            " and would allow that one of them is given away; give less"
        )


def as_told(recipe: Recipe, config: Mapping[str, Any], strategy_mu: float = 0.0) -> Recipe:
    """The recipe as a server's config has it, which may bring FedProx's term (Li et al. 2020), ``proximal-mu``.

    Args:
        recipe: the client's.
        config: what the server says beside the arrays.
        strategy_mu: of the proximal term that the client's strategy brings.

    Raises:
        RequestError: for settings of local training in the config that are not the client's own.
    """
    problems = []
    for key, value in config.items():
        name = key.replace("-", "_")
        name = _ALSO.get(name, name)
        if name not in Recipe.model_fields:
            continue
        mine = recipe.learning_rate if name == "lr" else getattr(recipe, name)
        if value != mine and value != getattr(mine, "name", mine):
            problems.append(
                f"config.{key}: the server says {value!r}, and the client trains by its recipe's {mine!r}; leave it out"
                f" of train_config, or give client_app Recipe({name} = ...)"
            )
    mu = config.get(_PROXIMAL, 0.0)
    held = recipe.regularization.proximal + strategy_mu
    if not isinstance(mu, int | float) or not 0 <= mu < float("inf"):
        problems.append(f"config.{_PROXIMAL}: {mu!r} given; give a number from 0")
    elif mu and held and mu != held:
        problems.append(
            f"config.{_PROXIMAL}: the server says {mu:g}, and the client has a proximal term of {held:g}; give both the"
            " same, or the client none"
        )
    elif mu and recipe.local_training is not None:
        problems.append(
            f"config.{_PROXIMAL}: it acts in the local loop, which client.local_training replaces; give one of them"
        )
    if problems:
        raise RequestError(problems)
    if not mu or held:
        return recipe
    term = recipe.regularization.model_copy(update={"proximal": float(mu)})
    return recipe.model_copy(update={"regularization": term})
