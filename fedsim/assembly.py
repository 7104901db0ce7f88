"""From an experiment's settings to the real things: data, model, strategy, engine."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from clients import catalog, randomness
from clients.augmentation import Transforms
from clients.dropout import set_dropout
from clients.errors import FedsimError, RequestError
from clients.examples import in_precision
from clients.hooks import LocalTraining
from clients.initialization import initialize
from clients.local_state import shared_layout
from clients.normalization import batch_norms
from clients.optimizers import Optimizer
from clients.parts import Part
from clients.schedules import Schedule
from clients.statistics import Statistics
from clients.task import Task
from clients.transfer import frozen_size, prepare, unreached_adapters
from fedsim import data, private
from fedsim.data.population import Population
from fedsim.data.source import Source
from fedsim.engines.engine import Engine, cores
from fedsim.execution import Execution, decide
from fedsim.experiment import Experiment
from fedsim.worker import Setup
from strategies.aggregation import Mean
from strategies.plugins import Plugin
from strategies.sampling import Poisson, Sampling
from strategies.strategy import Strategy

if TYPE_CHECKING:
    from fedsim.attacking import Malicious

#: Multiply-adds of local training in the whole run below which processes cost more than they bring.
_WORTH_PROCESSES = 2e11


@dataclass(frozen=True)
class Assembly:
    """An experiment's real things.

    Attributes:
        experiment: the settings they were made from.
        setup: what workers are made of.
        execution: stacked or loop, and why.
    """

    experiment: Experiment
    setup: Setup
    execution: Execution

    @property
    def cohort(self) -> int:
        """The expected number of clients a round."""
        return round(self.setup.strategy.sampling.expected(len(self.setup.population.trainable)))


def assemble(experiment: Experiment) -> Assembly:
    """Builds everything but the engine.

    Raises:
        RequestError: for what only the real data and model can tell to be wrong.
    """
    base, seed, client = experiment.base, experiment.seed, experiment.client
    source = catalog.build(experiment.data.source, "sources", base, key="data.source", seed=seed)
    source = Source.of(source)
    expect(source, Source, "data.source", "a fedsim.Source")
    settings = experiment.data.model_copy(update={"client_test_fraction": experiment.client_test_fraction})
    precision = torch.float64 if client.precision == "float64" else torch.float32
    population = data.build(source, settings, seed, base, precision)
    if not len(population.trainable):
        raise RequestError("data: no client has a training example")
    task = catalog.build(experiment.task, "tasks", base, key="task")
    expect(task, Task, "task", "a clients.Task")
    malicious: tuple[Malicious, ...] = ()
    if experiment.attacks:
        from fedsim import attacking

        malicious = attacking.choose(experiment, population)
        population = attacking.poisoned(population, malicious)
    prepared = _transforms(experiment, "test_transforms", population)
    if prepared is not None:
        population = population.evaluated_by(prepared.change)
    model = prepare(_model(experiment, population), client, seed)
    if client.precision == "float64":
        model.double()
    _set_dropout(experiment, model)
    statistics = Statistics(model)
    with private.keyed(experiment):
        strategy = _strategy(experiment, population)
    setup = Setup(
        model=model,
        task=task,
        recipe=client,
        layout=shared_layout(client, model),
        strategy=strategy,
        population=population,
        optimizer=_built(experiment, "client.optimizer", "optimizers", client.optimizer, Optimizer),
        schedule=_built(experiment, "client.schedule", "schedules", client.schedule, Schedule),
        step_schedule=_built(experiment, "client.step_schedule", "schedules", client.step_schedule, Schedule),
        local_training=_local_training(experiment),
        transforms=_transforms(experiment, "transforms", population),
        malicious=malicious,
        statistics=statistics if statistics.norms else None,
        stacked=False,
        seed=seed,
        rounds=experiment.rounds,
        batch_size=experiment.evaluation.batch_size,
        batch_norm=experiment.batch_norm,
    )
    _check_training(experiment, setup)
    setup.strategy.init(setup.context(0, setup.layout.flatten(model)))  # what only the first state can refuse
    private.check(experiment, setup)
    _check_evaluation(experiment, setup)
    _try_out(setup)
    try:
        execution = decide(setup)
    except ValueError as obstacle:
        raise RequestError(
            f'client.execution: "stacked" does not work here: {obstacle}; use "auto" or "loop"'
        ) from None
    return Assembly(experiment, replace(setup, stacked=execution.stacked), execution)


def expect(thing: Any, kind: type, key: str, what: str) -> None:
    """Refuses a thing of the wrong kind, by the key that named it."""
    if not isinstance(thing, kind):
        raise RequestError(f"{key}: {type(thing).__name__} is not {what}")


def _built(experiment: Experiment, key: str, kind: str, part: Any, base_class: type) -> Any:
    made = catalog.build(part, kind, experiment.base, key=key)
    expect(made, base_class, key, f"a {base_class.__name__}")
    return made


def _local_training(experiment: Experiment) -> LocalTraining | None:
    part = experiment.client.local_training
    if part is None:
        return None
    return _built(experiment, "client.local_training", "local_trainings", part, LocalTraining)


def _transforms(experiment: Experiment, which: str, population: Population) -> Transforms | None:
    parts: Sequence[Part] = getattr(experiment.data, which)
    if not parts:
        return None
    steps = []
    for part in parts:
        key = f"data.{which}.{part.name}"
        found = catalog.load(part, "transforms", experiment.base, key=key)
        make = catalog.build if inspect.isclass(found) else catalog.build_function
        step = make(part, "transforms", experiment.base, key=key)
        if not callable(step):
            raise RequestError(f"{key}: {type(step).__name__} cannot be called with inputs")
        steps.append(step)
    by, label = experiment.data.transforms_by, population.label
    return Transforms(tuple(steps), experiment.seed, by, population.input, label, which)


def _model(experiment: Experiment, population: Population) -> nn.Module:
    """The model with its first weights: a built-in's drawn by name, a user's own as made unless told otherwise."""
    part, seed = experiment.model, experiment.seed
    _check_classes(experiment, population)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(randomness.key(seed, "model"))
        offered: dict[str, Any] = {"input_shape": population.input_shape, "classes": population.classes}
        rate = experiment.client.regularization.dropout
        if rate is not None and not part.own:
            offered["dropout"] = rate
        model = catalog.build(part, "models", experiment.base, key="model", **offered)
    expect(model, nn.Module, "model", "a torch.nn.Module")
    lazy = next((name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)), None)
    if lazy is not None:
        raise RequestError(
            f"model: {type(model).__name__} is lazy, {lazy!r} has no shape yet; let its __init__ run a batch through it"
        )
    model = copy.deepcopy(model).to("cpu")
    client = experiment.client
    keeps = part.own and "initialization" not in client.model_fields_set
    initialize(model, None if keeps else client.initialization, seed, experiment.base, client.layer_initialization)
    return model


def _check_classes(experiment: Experiment, population: Population) -> None:
    """Refuses a built-in model that has an output for each class where the labels are no classes."""
    part = experiment.model
    if part.own or population.classes is not None:
        return
    if "classes" not in inspect.signature(catalog.load(part, "models", experiment.base, key="model")).parameters:
        return
    columns, label = population.columns, population.label
    if label not in columns.names:
        found = f"this source has no column {label!r}"
    else:
        real = columns.dtype(label).is_floating_point
        found = f"column {label!r} of this source holds {'real numbers' if real else 'no whole numbers'}"
    raise RequestError(
        f"model: {part.name} needs classes, and {found}; give a model of your own, or labels that are integers"
    )


def _set_dropout(experiment: Experiment, model: nn.Module) -> None:
    rate = experiment.client.regularization.dropout
    if rate is not None and not set_dropout(model, rate) and rate:
        raise RequestError(
            f"client.regularization.dropout: {rate} has nothing to act on, since {type(model).__name__} has no dropout"
            " layer; add nn.Dropout to the model, or leave it out"
        )


def _strategy(experiment: Experiment, population: Population) -> Strategy:
    """The strategy: a preset with its settings, some parts replaced."""
    said = experiment.strategy
    parts: dict[str, Any] = {}
    for name in ("correction", "aggregator", "server_optimizer"):
        part = getattr(said, name)
        if part is not None:
            parts[name] = catalog.build(part, f"{name}s", experiment.base, key=f"strategy.{name}")
    added: list[Plugin] = []
    if experiment.plugins:
        added = [_built(experiment, f"plugins.{part.name}", "plugins", part, Plugin) for part in experiment.plugins]
    weighting = {} if said.weighting is None else {"weighting": said.weighting}
    made = catalog.build(said.part, "strategies", experiment.base, key="strategy", **weighting)
    expect(made, Strategy, "strategy", "a strategies.Strategy")
    if made.concurrency is not None and said.sampling is not None:
        raise RequestError(
            f"strategy.sampling: {said.sampling.name} chooses whole cohorts, and with {said.part.name} clients begin"
            " one by one; leave it out, and say with clients_per_round how many updates a step takes"
        )
    if said.weighting is not None and said.aggregator is not None:
        raise RequestError(
            f"strategy.weighting: it would stand against that of strategy.aggregator, {parts['aggregator']!r}; give one"
        )
    parts["sampling"] = _sampling(experiment, population, made)
    if said.weighting is not None:
        if not isinstance(parts.get("aggregator", made.aggregator), Mean):
            raise RequestError(
                f"strategy.weighting: {made.aggregator!r} has its own weights; only a mean takes this one"
            )
        parts["aggregator"] = Mean(said.weighting)
    if added:  # a preset's own stay: what it promises may rest on them
        parts["plugins"] = (*made.plugins, *added)
    return made.with_parts(**parts)


def _sampling(experiment: Experiment, population: Population, made: Strategy) -> Sampling | None:
    """Who trains in a round; None keeps the choice of a strategy of the user's own."""
    said = experiment.strategy
    sized = said.clients_per_round is not None or said.fraction is not None
    if said.part.own and not sized and said.sampling is None:
        return None
    number = said.clients_per_round
    if not sized:
        number = said.cohort_size(len(population.trainable))
    elif number is not None and number > len(population.trainable):
        raise RequestError(
            f"strategy.clients_per_round: {number} is more than the {len(population.trainable)} clients that can be"
            " trained; lower it, or give fewer clients fewer examples to hold out"
        )
    offered = {"clients_per_round": number, "fraction": said.fraction}
    sampling = catalog.build(
        said.sampling or catalog.Part(_own_sampling(made)),
        "samplings",
        experiment.base,
        key="strategy.sampling",
        **offered,
    )
    expect(sampling, Sampling, "strategy.sampling", "a Sampling")
    return sampling


def _own_sampling(made: Strategy) -> str:
    """The name of the sampling that a preset comes with, where it has a size."""
    return "poisson" if isinstance(made.sampling, Poisson) else "fixed"


def _check_training(experiment: Experiment, setup: Setup) -> None:
    """Refuses training that this model, task and data cannot have."""
    client, model, problems = experiment.client, setup.model, []
    norms = batch_norms(model)
    if client.batch_norm != "share_affine" and not norms:
        problems.append(_no_batch_norm("client.batch_norm", client.batch_norm, model))
    elif client.batch_norm == "share_all" and setup.statistics is None:
        problems.append('client.batch_norm: "share_all" needs batch norms that keep running statistics, and none does')
    if norms and client.batch_size == 1:
        problems.append("client.batch_size: 1 does not go with batch norm, which needs two examples; give 2 or more")
    if client.regularization.label_smoothing and not setup.task.can_smooth:
        problems.append(
            f"client.regularization.label_smoothing: {type(setup.task).__name__} has no smoothed_loss that goes with"
            " its loss; write one, or leave label smoothing out"
        )
    problems += _adversarial_problems(setup)
    problems += setup.strategy.correction.check(client)
    problems += setup.strategy.aggregator.check(client)
    correction = setup.strategy.correction
    changes = correction.adds_loss or correction.changes_gradient or correction.client_state
    if client.local_training is not None and changes:
        problems.append(
            f"strategy.correction: {correction!r} acts in the local loop, which client.local_training replaces; give"
            " one of them"
        )
    if client.dp_sgd is not None and setup.transforms is not None and setup.transforms.mixes:
        problems.append(
            "data.transforms: they mix examples of a batch, or may, against client.dp_sgd; leave mix_up and cut_mix"
            ' out, and with a transform of your own set data.transforms_by = "example"'
        )
    if client.dp_sgd is not None:
        from clients.dp_sgd import check_private

        problems += check_private(model)
        largest = int(setup.population.splits["train"].sizes.max())
        if client.dp_sgd.delta * largest >= 1:
            problems.append(
                f"client.dp_sgd.delta: {client.dp_sgd.delta:g} is no less than 1 / {largest}, the examples of the"
                " largest client, and would allow that one of them is given away; give less"
            )
    if problems:
        raise RequestError(problems)


def _adversarial_problems(setup: Setup) -> list[str]:
    said, population = setup.recipe.adversarial, setup.population
    if said is None:
        return []
    kind = population.columns.take(torch.zeros(1, dtype=torch.int64))[population.input].dtype
    if not kind.is_floating_point:
        return [f"client.adversarial: it moves real-valued inputs, and {population.input!r} is {kind}; leave it out"]
    if population.input_range is None:
        return []
    low, high = population.input_range
    if said.eps > high - low:
        return [f"client.adversarial.eps: {said.eps:g} is more than the whole range of the inputs, {low} to {high}"]
    if setup.transforms is not None:
        few = torch.from_numpy(population.splits["train"].order[:64].copy())
        x = setup.transforms(population.columns.take(few))[population.input]
        if float(x.min()) < low - 1e-3 or float(x.max()) > high + 1e-3:
            return [
                f"client.adversarial: data.transforms take inputs out of their range, {low} to {high}, which an attack"
                " stays in; normalise inside the model"
            ]
    return []


def _no_batch_norm(key: str, said: str, model: nn.Module) -> str:
    return (
        f'{key}: "{said}" has nothing to act on, since {type(model).__name__} has no batch norm; set model.norm ='
        ' "batch", or leave it out'
    )


def _check_evaluation(experiment: Experiment, setup: Setup) -> None:
    """Refuses an evaluation that would give a number without a meaning, or none at all."""
    population = setup.population
    for split, fraction in (("test", "data.client_test_fraction"), ("validation", "data.client_validation_fraction")):
        if split in population.splits and not population.splits[split].examples:
            raise RequestError(
                f"{fraction}: every client holds too few examples to keep one of them; give a larger share"
            )
    if setup.layout.personal.size and "test" not in population.splits:
        raise RequestError(
            "client.personal: the server has no whole model to test, so clients must test on examples of their own; set"
            " data.client_test_fraction above 0"
        )
    if experiment.checks and not setup.server_has_all:
        raise RequestError(
            "checks: they look at the server's model, and it has no whole one, since parameters or batch norm's"
            " statistics stay with the clients; leave the checks out, or have the server keep all"
        )
    if experiment.clients_evaluate and not {"test", "validation"} & set(population.splits):
        raise RequestError(
            "evaluation.clients: the clients hold no examples to test on; set data.client_test_fraction above 0"
        )
    norms = batch_norms(setup.model)
    if any(norm.running_mean is None for norm in norms) and setup.batch_norm != "batch":
        raise RequestError(
            "evaluation.batch_norm: the model has batch norms without running statistics, which always take the"
            ' evaluated batch\'s own; say so with evaluation.batch_norm = "batch", or let them track statistics'
        )
    if not norms and setup.batch_norm in ("clients", "clients_stored"):
        raise RequestError(_no_batch_norm("evaluation.batch_norm", setup.batch_norm, setup.model))
    proxies = len(population.server["proxy"]) if "proxy" in population.server else 0
    if norms and setup.batch_norm == "recalibrate" and proxies < 2:
        raise RequestError(
            f"evaluation.batch_norm: recalibration needs proxy examples and there are {proxies}; set data.proxy, or"
            ' evaluation.batch_norm = "batch"'
        )


def _try_out(setup: Setup) -> None:
    """Model and task meet the data, two examples of it, before anything is written."""
    few = torch.from_numpy(setup.population.splits["train"].order[:2].copy())
    columns = setup.population.columns_of("train")
    batch = in_precision(columns.take(few), setup.layout.dtype)
    evaluator = setup.evaluator("batch")
    try:
        total = evaluator.totals(columns, few)
        if setup.transforms is not None:
            batch = in_precision(setup.transforms(setup.population.columns.take(few)), setup.layout.dtype)
            evaluator.loss(batch)
    except Exception as error:
        given = ", ".join(f"{name} {str(column.dtype)[6:]} {list(column.shape)}" for name, column in batch.items())
        if isinstance(error, KeyError) and isinstance(error.args[0], str) and error.args[0] not in batch:
            raise RequestError(
                f"model and task: {type(setup.model).__name__} with {type(setup.task).__name__} asks for a column"
                f" {error.args[0]!r}, and a batch has {given}; name the source's columns so, or give a task of your own"
                " that reads these"
            ) from error
        said = str(error) if isinstance(error, FedsimError) else f"{type(error).__name__}: {error}"
        raise RequestError(
            f"model and task: {type(setup.model).__name__} with {type(setup.task).__name__} raises on a batch of"
            f" {given}: {' '.join(said.split())}"
        ) from error
    unreached = unreached_adapters(setup.model, setup.task, batch) if setup.recipe.adapters is not None else []
    if unreached:
        raise RequestError(
            f"client.adapters.layers: {type(setup.model).__name__} never calls {', '.join(unreached)}, whose weights it"
            " reads directly, so an adapter there has no effect; leave them out"
        )
    try:
        setup.task.metrics(total)
    except KeyError as error:
        raise RequestError(
            f"task: {type(setup.task).__name__} gives no metric {error} from its statistics {', '.join(total)}; give"
            " that statistic, or override metric()"
        ) from error
    except ArithmeticError:
        pass  # too few examples for this metric


def make_engine(experiment: Experiment, name: str | None = None) -> Engine:
    """The engine that the experiment names, or ``name`` where that is ``auto``."""
    said = experiment.engine
    part = catalog.Part(name) if name is not None else said.part
    settings = {"workers": said.workers, "client_timeout": said.client_timeout}
    made = catalog.build(part, "engines", experiment.base, key="engine", **settings)
    expect(made, Engine, "engine", "a fedsim.engines.Engine")
    return made


def choose_engine(assembly: Assembly, workers: int | None) -> str:
    """``processes`` or ``inline``, by the local training that the whole run holds."""
    able = hasattr(os, "fork") and (workers or cores()) > 1
    return "processes" if able and multiply_adds(assembly) > _WORTH_PROCESSES else "inline"


def multiply_adds(assembly: Assembly) -> float:
    """A rough count for all local training: three passes over every parameter's uses an example (a linear layer's once,
    a convolution's once for each pixel)."""
    setup = assembly.setup
    sizes = setup.population.splits["train"].sizes
    recipe = setup.recipe
    amount = recipe.epochs if recipe.steps is None else recipe.steps
    number = sum(amount.uniform) / 2 if not isinstance(amount, int) else amount
    examples = number * (float(sizes[sizes > 0].mean()) if recipe.steps is None else recipe.batch_size)
    pixels = 1
    if any(isinstance(module, nn.Conv2d) for module in setup.model.modules()):
        pixels = max(1, int(torch.Size(setup.population.input_shape).numel()) // 4)
    # What is frozen is passed through, forwards and often backwards; an attack passes through all of it again.
    weights = 3.0 * setup.layout.all.size + 2.0 * frozen_size(setup.model)
    said = recipe.adversarial
    attacks = 0.0 if said is None else said.fraction * (said.steps if said.attack == "pgd" else 1)
    return (1 + attacks) * weights * pixels * examples * assembly.cohort * assembly.experiment.rounds
