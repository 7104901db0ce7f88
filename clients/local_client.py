"""One client behind a Flower ClientApp: it trains, evaluates and says who it is."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from clients import catalog
from clients.augmentation import Transforms
from clients.client_examples import HeldExamples, SizedExamples, client_splits
from clients.errors import ClientError, FedsimError, RequestError
from clients.evaluation import Evaluator
from clients.hooks import Correction
from clients.local_state import CORRECTION, PERSONAL, RELEASES, kept_state, shared_layout
from clients.messages import (
    ADOPTED,
    ALIAS_OF,
    ALIASES,
    BROADCAST,
    CONFIG,
    EXAMPLES,
    METRICS,
    PLAIN,
    PROBLEM,
    REFUSED,
    ROUND,
    ROUNDS,
    RUN,
    STRATEGY,
    TOTAL,
    Circumstances,
    Hooks,
    arrays_key,
    config_of,
    named,
    partition_of,
    record_of,
    tensors_of,
)
from clients.node_state import begin, keep, kept
from clients.normalization import batch_norms
from clients.recipe import Recipe
from clients.recipe_conflicts import as_told, for_examples, within
from clients.sent_weights import aliases, frozen, with_frozen
from clients.statistics import STATISTICS, Statistics
from clients.task import Task
from clients.training import Trained, Trainer

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict  # isort: skip

#: Client state that goes with the server's, and is adopted only where that was.
_WITH_SERVER = (CORRECTION, "plugin/")

_AT_ONCE = 2048


@dataclass(eq=False)
class LocalClient:
    """What is behind :func:`clients.client_app`, whose arguments these are.

    Trainers are made once a thread, and never travel with it.
    """

    recipe: Recipe
    model: nn.Module
    data: Callable[..., Any]
    task: Task
    hooks: Hooks | None
    seed: int
    rounds: int | None
    transforms: Transforms | None
    batch_norm: Literal["clients", "clients_stored", "batch"]
    batch_size: int
    input: str
    input_range: tuple[float, float] | None
    base: Path | None

    def __post_init__(self) -> None:
        self.layout = shared_layout(self.recipe, self.model)
        found = Statistics(self.model)
        self.statistics = found if found.norms else None
        self.tracked = None
        if self.recipe.batch_norm != "share_affine" or self.batch_norm == "clients_stored":
            self.tracked = self.statistics
        self.optimizer = self._part("optimizer", "optimizers")
        self.schedule, self.step_schedule = (
            self._part("schedule", "schedules"),
            self._part("step_schedule", "schedules"),
        )
        self.local_training = None
        if self.recipe.local_training is not None:
            self.local_training = self._part("local_training", "local_trainings")
        self._made: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": {}}

    def _part(self, name: str, kind: str) -> Any:
        return catalog.build(getattr(self.recipe, name), kind, self.base, key=f"client.{name}")

    def refuse(self) -> None:
        """Refuses a recipe that messages, the model or the strategy cannot have.

        Raises:
            RequestError: with a line for each key.
        """
        recipe, norms, problems = self.recipe, batch_norms(self.model), list(within(self.recipe))
        correction = self._correction
        if recipe.stragglers == "drop":
            problems.append(
                'client.stragglers: "drop" compares the clients of a round before they train, and a client that gets a'
                ' message knows itself alone; give "keep"'
            )
        if recipe.batch_norm == "share_all":
            problems.append(
                'client.batch_norm: "share_all" sends running statistics, and only parameters travel in messages; give'
                ' "share_affine" or "local"'
            )
        if (recipe.batch_norm == "local" or self.batch_norm == "clients_stored") and not norms:
            problems.append(f"client.batch_norm: {type(self.model).__name__} has no batch norm; leave it out")
        if norms and recipe.batch_size == 1:
            problems.append(
                "client.batch_size: 1 does not go with batch norm, which needs two examples; give 2 or more"
            )
        if recipe.regularization.label_smoothing and not self.task.can_smooth:
            problems.append(
                f"client.regularization.label_smoothing: {type(self.task).__name__} has no smoothed_loss that goes with"
                " its loss; write one, or leave label smoothing out"
            )
        if self.local_training is not None and (
            correction.adds_loss or correction.changes_gradient or correction.client_state
        ):
            problems.append(
                f"hooks: {correction!r} acts in the local loop, which client.local_training replaces; give one of them"
            )
        if recipe.dp_sgd is not None:
            from clients.dp_sgd import check_private

            problems += check_private(self.model)
            if self.transforms is not None and self.transforms.mixes:
                problems.append("transforms: they mix examples of a batch, against client.dp_sgd; leave them out")
        if self.hooks is not None:
            problems += self.hooks.check(recipe)
        if problems:
            raise RequestError(problems)

    # ------------------------------------------------------------------------------------------ messages

    def train(self, message: Message, context: Context) -> Message:
        """Trains from the arrays of the message; what the client sends is the update, or its weights by name.

        Raises:
            RequestError: for a message that lacks what is needed, or examples that do.
            ClientError: for what the client's own code raised, and an update of NaN or infinite values.
        """
        client, config = partition_of(context), config_of(message)
        round, key = self._round(config), arrays_key(message)
        hooks = self._hooks(config)
        weights = self.layout.flatten(tensors_of(message.content.array_records[key], self.layout.names))
        state = tensors_of(message.content.array_records[BROADCAST]) if BROADCAST in message.content else {}
        begin(context, config.get(RUN), self._spent)
        held = kept(context, self._lengths(), self.layout.dtype, int(config.get(ADOPTED, 0)))
        recipe = as_told(self.recipe, config, float(getattr(self._correction, "mu", 0.0)))
        trainer = self._trainer(self._rounds(config), recipe, self._model(message.content.array_records[key], config))
        trained = self._train(client, self._splits(context), weights, round, held, state, trainer)
        u = trained.updates
        if hooks is None:
            arrays = named(self.layout, weights + u.rows[0])
            numbers: dict[str, float] = {"steps": int(u.steps)}
            fresh = trained.state
        else:
            here = Circumstances(round, self.layout, weights, self.task, recipe, self.seed, config)
            arrays, numbers, fresh = hooks.contribute(u, state, held, here)
            fresh = {**trained.state, **fresh}
        metrics: dict[str, Any] = {EXAMPLES: int(u.examples)}
        if hooks is None or not hooks.discreet:
            metrics |= {"train_loss": float(trained.loss)} | {n: float(value) for n, value in trained.report.items()}
        metrics |= numbers
        self._keep(context, fresh, round, waits=hooks is not None)
        content = RecordDict({key: record_of(arrays), METRICS: MetricRecord(metrics)})
        return Message(content, reply_to=message)

    def evaluate(self, message: Message, context: Context) -> Message:
        """Metrics of the weights in the message, with what is the client's own, on its test examples.

        The config's ``split`` may say ``validation``.
        """
        client, config = partition_of(context), config_of(message)
        if self.hooks is not None and self.hooks.local_noise:
            raise RequestError(
                "evaluation: a client's metrics are exact, and would tell the server what local noise hides; evaluate"
                " on the server (evaluate_fn)"
            )
        splits, split = self._splits(context), str(config.get("split", "test"))
        if split not in splits:
            raise RequestError(
                f"data: partition {client} has no {split} examples; give some, or evaluate no clients"
                " (fraction_evaluate = 0)"
            )
        begin(context, config.get(RUN), self._spent)
        arrays = message.content.array_records[arrays_key(message)]
        evaluator = self._evaluator(self._model(arrays, config))
        row = self.layout.flatten(tensors_of(arrays, self.layout.names))
        self._load(evaluator, row, kept(context, self._lengths(), self.layout.dtype, None), splits["train"])
        total = evaluator.totals(splits[split], torch.arange(len(splits[split])))
        told = {
            name: float(value) for name, value in self.task.metrics(total).items()
        }  # NumPy's numbers are no metrics
        metrics: dict[str, Any] = {EXAMPLES: int(total["examples"][0]), **told}
        if STRATEGY in config and not (self.hooks is not None and self.hooks.discreet):
            metrics |= {f"{TOTAL}{name}": value.tolist() for name, value in total.items()}
        return Message(RecordDict({METRICS: MetricRecord(metrics)}), reply_to=message)

    def roll_call(self, message: Message, context: Context) -> Message:
        """Who the client is: its partition, how many examples it holds, and what of the model it shares.

        A client that cannot take part says why.
        """
        try:
            splits = self._splits(context)
            numbers: dict[str, Any] = {f"{split}-examples": len(columns) for split, columns in splits.items()}
            numbers |= {"partition-id": partition_of(context), "seed": self.seed}
        except Exception as error:  # the user's own code gives the examples
            text = str(error) if isinstance(error, FedsimError) else f"data: {type(error).__name__}: {error}"
            return self._answer(message, {}, {PROBLEM: " ".join(text.split()), REFUSED: False})
        refused = list(for_examples(self.recipe, len(splits["train"])))
        if refused:
            return self._answer(message, numbers, {PROBLEM: refused[0], REFUSED: True})
        told = "" if self.hooks is None else self.hooks.told
        shapes = [",".join(map(str, slot.shape)) for slot in self.layout]
        dtypes = [str(slot.dtype).removeprefix("torch.") for slot in self.layout]
        said = {STRATEGY: told, PLAIN: self.hooks is None or self.hooks.plain}
        said |= {"names": self.layout.names, "shapes": shapes, "dtypes": dtypes}
        tied = aliases(self.model, self.layout)
        return self._answer(message, numbers, {**said, ALIASES: list(tied), ALIAS_OF: list(tied.values())})

    @staticmethod
    def _answer(message: Message, numbers: dict[str, Any], said: dict[str, Any]) -> Message:
        content: dict[str, Any] = {METRICS: MetricRecord(numbers), CONFIG: ConfigRecord(said)}
        return Message(RecordDict(content), reply_to=message)

    # ------------------------------------------------------------------------------------------ training

    def _train(
        self,
        client: int,
        splits: Mapping[str, SizedExamples],
        weights: Tensor,
        round: int,
        held: Mapping[str, Tensor],
        server: Mapping[str, Tensor],
        made: tuple[Trainer, dict[str, HeldExamples]],
    ) -> Trained:
        if self.recipe.early_stopping is not None and "validation" not in splits:
            raise RequestError(
                f"client.early_stopping: partition {client} has no validation examples; let data give some"
            )
        trainer, pools = made
        for split, pool in pools.items():
            pool.hold(splits.get(split))
        mine = {name: value for name, value in held.items() if name.startswith(CORRECTION) or name in trainer.kept}
        theirs = {name: value for name, value in server.items() if name.startswith(CORRECTION)}
        try:
            trained = trainer.train(np.array([client]), weights, round, mine, theirs)
        finally:
            for pool in pools.values():
                pool.hold(None)
        for failure in trained.failures:
            raise ClientError(
                failure.message, client=client, stage=failure.stage, round=round, traceback=failure.traceback
            )
        return trained

    def _model(self, arrays: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
        """The model with the frozen weights that were sent, the same object as long as these are the same.

        A server of fedsim's sends them in every round, another one those that clients have sent.
        """
        place = ("model", threading.get_ident())
        before = self._made.get(place, self.model)
        self._made[place] = with_frozen(self.model, tensors_of(arrays, self._stands), before, lasting=RUN in config)
        return self._made[place]

    @cached_property
    def _stands(self) -> list[str]:
        """The names of frozen weights, and of the statistics of batch norms that may be."""
        return [*frozen(self.model), *(name for name, _ in self.model.named_buffers())]

    def _trainer(self, rounds: int, recipe: Recipe, model: nn.Module) -> tuple[Trainer, dict[str, HeldExamples]]:
        place = ("trainer", threading.get_ident())
        found = self._made.get(place)
        if found is None or found[0] is not model or found[1:3] != (rounds, recipe):
            pools = {split: HeldExamples() for split in ("train", "validation")}
            hooks = self.hooks
            trainer = Trainer(
                model,
                self.task,
                recipe,
                self.layout,
                pools["train"],
                lambda _: np.arange(len(pools["train"])),
                optimizer=self.optimizer,
                validation=lambda _: np.arange(len(pools["validation"])),
                validated=pools["validation"],
                schedule=self.schedule,
                step_schedule=self.step_schedule,
                correction=None if hooks is None else hooks.correction,
                loss_before=hooks is not None and hooks.loss_before,
                local_training=self.local_training,
                statistics=self.tracked,
                transforms=self.transforms,
                input=self.input,
                input_range=self.input_range,
                stacked=self.recipe.execution == "stacked",
                seed=self.seed,
                rounds=rounds,
            )
            found = self._made[place] = model, rounds, recipe, trainer, pools
        return found[3], found[4]

    def _hooks(self, config: Mapping[str, Any]) -> Hooks | None:
        """The strategy's half where its server is there; None where clients send their weights as they are."""
        hooks, theirs = self.hooks, config.get(STRATEGY)
        if hooks is None or (theirs is None and hooks.alone):
            return None
        if theirs is None:
            raise RequestError(
                f"hooks: {hooks.told} needs the server's half too, and this server runs another strategy; start it with"
                " strategies.flower.on_grid, or leave hooks out"
            )
        if theirs != hooks.told:
            raise RequestError(f"hooks: the client has {hooks.told} and the server {theirs}; give both the same")
        return hooks

    def _round(self, config: Mapping[str, Any]) -> int:
        if ROUND not in config:
            raise RequestError(f"config: the message has no {ROUND!r}, which every draw is keyed by; have it sent")
        return int(config[ROUND])

    def _rounds(self, config: Mapping[str, Any]) -> int:
        said = config.get(ROUNDS, self.rounds)
        if said is None and self.recipe.schedule.name != "constant":
            raise RequestError(
                f"client.schedule: {self.recipe.schedule.name!r} goes by the number of rounds, and this server does not"
                " say it; give client_app(rounds = ...)"
            )
        return 1 if said is None else int(said)

    # ------------------------------------------------------------------------------------------ evaluation

    def _evaluator(self, model: nn.Module) -> Evaluator:
        place = ("evaluator", threading.get_ident())
        found = self._made.get(place)
        if found is None or found[0] is not model:
            made = Evaluator(model, self.task, self.layout, self.batch_size, self.batch_norm, self.statistics)
            found = self._made[place] = model, made
        return found[1]

    def _load(self, evaluator: Evaluator, row: Tensor, held: Mapping[str, Tensor], train: SizedExamples) -> None:
        """The client's own model: the weights it was sent with what it keeps in their place."""
        layout, statistics, inputs = self.layout, None, None
        if layout.personal.size:
            first = layout.personal.flatten(self.model)
            row = torch.cat([row, first + held[PERSONAL][0] if PERSONAL in held else first])
            layout = layout.all
        if evaluator.normalizes and self.batch_norm != "batch":
            stored, known = held.get(STATISTICS), self.statistics
            wanted = self.batch_norm == "clients_stored"
            if wanted and known is not None and stored is not None and known.known(stored[0]):
                statistics = known.in_work(stored[0])
            else:
                inputs = [train.take(index) for index in torch.arange(len(train)).split(_AT_ONCE)]
        evaluator.load(row, layout, statistics=statistics, inputs=inputs)

    # ------------------------------------------------------------------------------------------ what is the client's

    def _splits(self, context: Context) -> dict[str, SizedExamples]:
        client, number = partition_of(context), context.node_config.get("num-partitions")
        given = self.data(client, number) if self._asks_for_number else self.data(client)
        return client_splits(given, f"data({client})", self.input)

    @cached_property
    def _asks_for_number(self) -> bool:
        """Whether ``data`` takes the number of partitions too."""
        asked = inspect.signature(self.data).parameters.values()
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return len([p for p in asked if p.kind in positional and p.default is p.empty]) > 1

    @property
    def _correction(self) -> Correction:
        return Correction() if self.hooks is None else self.hooks.correction

    @property
    def _spent(self) -> frozenset[str]:
        """Names of what counts the client's releases, over all runs on its node."""
        return frozenset({RELEASES}) | (frozenset() if self.hooks is None else self.hooks.stands)

    def _lengths(self) -> dict[str, int]:
        """Name -> length of what the client keeps."""
        own = kept_state(self.recipe, self.layout, self.optimizer, self.tracked)
        return own if self.hooks is None else {**own, **self.hooks.client_state(self.layout)}

    def _keep(self, context: Context, fresh: Mapping[str, Tensor], round: int, waits: bool) -> None:
        stands = frozenset() if self.hooks is None else self.hooks.stands
        keep(context, fresh, round, {n for n in fresh if waits and n.startswith(_WITH_SERVER) and n not in stands})
