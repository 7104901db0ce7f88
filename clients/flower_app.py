"""A recipe as a Flower ClientApp: the one local loop, driven by messages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from clients import randomness
from clients.augmentation import Transforms
from clients.dropout import set_dropout
from clients.errors import RequestError
from clients.initialization import initialize
from clients.local_client import LocalClient
from clients.local_state import shared_layout
from clients.messages import ROLL_CALL, Hooks, named, record_of
from clients.recipe import Recipe
from clients.task import Classification, Task
from clients.transfer import prepare

from flwr.app import ArrayRecord  # isort: skip
from flwr.clientapp import ClientApp  # isort: skip

Model = nn.Module | Callable[[], nn.Module]

#: By what statistics of batch norm a client's model is judged.
Judged = Literal["clients", "clients_stored", "batch"]


def client_app(
    recipe: Recipe,
    model: Model,
    data: Callable[..., Any],
    *,
    task: Task | None = None,
    hooks: Any = None,
    seed: int = 0,
    rounds: int | None = None,
    transforms: Transforms | Sequence[Callable[..., Any]] = (),
    batch_norm: Judged = "clients",
    batch_size: int = 512,
    input: str = "x",
    label: str = "y",
    input_range: tuple[float, float] | None = None,
    mods: Sequence[Any] = (),
    evaluate_mods: Sequence[Any] = (),
    base: Path | None = None,
) -> ClientApp:
    """A ClientApp that trains by the recipe and evaluates; it runs under any Flower grid and strategy.

    Messages are as Flower's strategies send and expect them: ``arrays`` and ``config`` in; one ArrayRecord, and one
    MetricRecord with ``num-examples``, out. Only shared parameters travel, by name. Buffers never do; what else belongs
    to the client (personal parameters, batch norm's statistics, moments, control variates) stays in ``Context.state``.
    Frozen weights that a server of fedsim's sends are those that clients train beside; another server's must be theirs.

    ``num-examples`` is always told, exactly. Where the strategy hides updates from the server (local noise, a secure
    sum), training losses and numbers of the update are not, and under local noise clients do not evaluate.

    A server's config may bring ``proximal-mu``, as Flower's FedProx does. Settings of the recipe in it, such as ``lr``,
    have to be the recipe's.

    Under a server that runs a strategy of fedsim's, the client half of that strategy is run here: give it as ``hooks``.

    Args:
        recipe: how a client trains.
        model: the model, or what makes one; every client's first weights are the same, by ``seed``.
        data: ``data(partition_id)``, or ``data(partition_id, num_partitions)``, gives a client's examples: columns
            ``{"x": [n, ...], "y": [n]}``, ``(train, test)``, or a table or an object with ``train``, ``test`` and
            ``validation``. A split is columns, a data set of tuples ``(x, y)`` or dicts, or a loader of one.
        task: what is learnt; left out, classification.
        hooks: a strategy, or its ``client_hooks``.
        seed: keys every draw, by round and partition.
        rounds: how many rounds there are, for schedules; a strategy of fedsim's says it itself.
        transforms: changes of training batches, drawn anew for each.
        batch_norm: by what statistics a client's model is judged: those of its training inputs, those that it stored in
            training, or each batch's own.
        batch_size: examples evaluated at once.
        input: the column of inputs.
        label: the column of labels, which transforms may change.
        input_range: ``(low, high)`` of the inputs, which adversarial ones stay in.
        mods: Flower's mods around training. Those that look at the arrays that come back expect weights by name, which
            are what leaves under Flower's own strategies, and with no ``hooks``.
        evaluate_mods: the same around evaluation.
        base: the folder that files which the recipe names are relative to.

    Raises:
        RequestError: for what of the recipe does not go with the model, with ``hooks``, or with messages.
    """
    _check_arguments(recipe, model, data, mods, evaluate_mods, seed=seed, rounds=rounds, batch_size=batch_size)
    if hooks is not None and not isinstance(hooks, Hooks):
        hooks = getattr(hooks, "client_hooks", hooks)
    if hooks is not None and not isinstance(hooks, Hooks):
        raise RequestError(f"hooks: {hooks!r} is no strategy; give a strategies.Strategy, or leave it out")
    if not isinstance(transforms, Transforms):
        transforms = Transforms(tuple(transforms), seed, "batch", input, label)
    if batch_norm not in get_args(Judged):
        raise RequestError(f"batch_norm: {batch_norm!r} given; give one of {', '.join(get_args(Judged))}")
    client = LocalClient(
        recipe,
        prepared(model, recipe, seed, base),
        data,
        Classification() if task is None else task,
        hooks,
        seed,
        rounds,
        transforms if transforms.steps else None,
        batch_norm,
        batch_size,
        input,
        input_range,
        base,
    )
    client.refuse()
    app = ClientApp()
    app.train(mods=list(mods))(client.train)
    app.evaluate(mods=list(evaluate_mods))(client.evaluate)
    app.query(ROLL_CALL)(client.roll_call)
    return app


def _check_arguments(recipe: Any, model: Any, data: Any, mods: Any, evaluate_mods: Any, **numbers: Any) -> None:
    """Refuses arguments of the wrong kind, with a line for each."""
    problems = []
    if not isinstance(recipe, Recipe):
        problems.append(f"recipe: {type(recipe).__name__} given; give a clients.Recipe(...)")
    if not isinstance(model, nn.Module) and not callable(model):
        problems.append(f"model: {type(model).__name__} given; give a torch.nn.Module, or a function that makes one")
    if not callable(data):
        problems.append(f"data: {type(data).__name__} given; give a function of partition_id")
    for name, value in numbers.items():
        least = 0 if name == "seed" else 1
        if name == "rounds" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            problems.append(f"{name}: {value!r} given; give a whole number from {least}")
    for name, given in (("mods", mods), ("evaluate_mods", evaluate_mods)):
        if not isinstance(given, Sequence) or not all(callable(mod) for mod in given):
            problems.append(f"{name}: {given!r} given; give a list of Flower's mods, which are functions")
    if problems:
        raise RequestError(problems)


def prepared(model: Model, recipe: Recipe, seed: int = 0, base: Path | None = None) -> nn.Module:
    """The model with its first weights, as the recipe has it: the same for every client and for the server.

    Weights are drawn anew where the recipe names an initialisation, else they are as the model was made.
    """
    if not isinstance(model, nn.Module):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(randomness.key(seed, "model"))
            model = model()
    if not isinstance(model, nn.Module):
        raise RequestError(f"model: {type(model).__name__} is not a torch.nn.Module")
    made = copy.deepcopy(model).to("cpu")
    drawn = recipe.initialization if "initialization" in recipe.model_fields_set else None
    prepare(initialize(made, drawn, seed, base, recipe.layer_initialization), recipe, seed)
    if recipe.precision == "float64":
        made.double()
    rate = recipe.regularization.dropout
    if rate is not None and not set_dropout(made, rate) and rate:
        raise RequestError(
            f"client.regularization.dropout: {rate} has nothing to act on, since {type(made).__name__} has no dropout"
            " layer; add nn.Dropout to the model, or leave it out"
        )
    return made


def initial_arrays(model: Model, recipe: Recipe | None = None, seed: int = 0, base: Path | None = None) -> ArrayRecord:
    """What a server starts from: the shared weights of the clients' model, by name."""
    recipe = Recipe() if recipe is None else recipe
    made = prepared(model, recipe, seed, base)
    layout = shared_layout(recipe, made)
    return record_of(named(layout, layout.flatten(made)))
