"""What an experiment file may say: its schema, how it is read, and how the resolved experiment is written.

Everything that can be wrong with a request is found here, all at once, before torch is imported.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, PrivateAttr, Strict, ValidationError, model_validator

import fedsim.kinds  # noqa: F401  (declares what only the simulator names)
import strategies.kinds  # noqa: F401  (declares what the server side of an experiment may name)
from clients import catalog, problems
from clients.errors import RequestError
from clients.parts import Part, is_table
from clients.recipe import BatchNorm, Count, NonNegative, Positive, Recipe, Settings
from fedsim import overriding, writing
from fedsim.conflicts import conflicts, counted, only_clients_test

NoneOrMore = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

#: What a batch-norm mode says of ``evaluation.batch_norm = "auto"``.
AUTO_BATCH_NORM: dict[str, BatchNorm] = {"share_affine": "recalibrate", "local": "clients", "share_all": "shared"}

DIGITS = Path(__file__).with_name("digits.toml")

#: Where a part stands in an experiment, and of which kind it is; ``[]`` marks a list of parts, ``{}`` a table of them.
PLACES = {
    "data.source": "sources",
    "data.partition": "partitions",
    "model": "models",
    "task": "tasks",
    "client.initialization": "initializations",
    "data.transforms[]": "transforms",
    "data.test_transforms[]": "transforms",
    "client.layer_initialization{}": "initializations",
    "client.optimizer": "optimizers",
    "client.schedule": "schedules",
    "client.step_schedule": "schedules",
    "client.local_training": "local_trainings",
    "strategy": "strategies",
    "strategy.sampling": "samplings",
    "strategy.correction": "corrections",
    "strategy.aggregator": "aggregators",
    "strategy.server_optimizer": "server_optimizers",
    "attacks[]": "attacks",
    "plugins[]": "plugins",
    "checks[]": "checks",
    "engine": "engines",
}


class Section(Settings):
    """A table of an experiment; ``"1"`` is no number and ``true`` no 1."""

    model_config = ConfigDict(strict=True)


class Named(Section):
    """A table that names a part and says more about it: keys that are not the table's own are the part's settings.

    Attributes:
        part: what is named, with its settings.
    """

    part: Part

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, given: Any) -> Any:
        if isinstance(given, cls):
            return given
        if not is_table(given):
            return {"part": Part.of(given)}
        table = {name: value for name, value in given.items() if name in cls.own_keys()}
        default = cls.model_fields["part"].default
        return {**table, "part": named_part(given, cls.own_keys(), default if isinstance(default, Part) else None)}

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys that are the table's own and no settings of the part."""
        return [name for name in cls.model_fields if name != "part"]


def named_part(table: Mapping[str, Any], own_keys: Sequence[str], default: Part | None) -> Part:
    """The part that a table names, with those of the table's keys that are not its own.

    Raises:
        ValueError: for what is no name.
    """
    settings = {name: value for name, value in table.items() if name not in own_keys}
    if isinstance(settings.get("part"), Part):
        default = settings.pop("part")
    part = Part.of(settings.pop("name", default))
    return Part(part.name, {**part.settings, **settings}, part.thing)


class DataSettings(Section):
    """Which examples there are, and who holds them.

    Attributes:
        source: where the examples come from.
        clients: how many clients they are dealt to.
        partition: how they are dealt.
        seed: draws the splits and the partition apart from the experiment's seed.
        test_fraction: share of all examples that the server tests on, unless the source brings a test split.
        validation_fraction: share of all examples that the server validates on, likewise.
        proxy: how many unlabelled examples the server holds.
        root: how many labelled examples the server holds.
        client_test_fraction: share of its own examples that each client tests on; left out, 0.2 where the clients alone
            can test (parameters or batch norm are their own), else none.
        client_test: whose examples clients test on. ``own``: some of their own, which they do not train on;
            ``matched``: so many of the server's test examples, with the label mix of the client's own.
        client_validation_fraction: share of its own examples that each client validates on.
        held_out_clients: how many clients are never trained on.
        transforms: random changes of training batches, one after another: torchvision's v2 transforms by name
            (``random_horizontal_flip``), or callables on inputs ``[B, ...]``. Drawn anew for every batch of a client.
        transforms_by: what one draw is for: a whole ``batch``, as torchvision's are, or each ``example`` (slower).
        test_transforms: the same for all that is evaluated, such as a centre crop.
    """

    source: Part = Part("digits")
    clients: Count = 100
    partition: Part = Part("dirichlet", {"alpha": 0.3})
    seed: int | None = None
    test_fraction: Share = 0.2
    validation_fraction: Share = 0.0
    proxy: NoneOrMore = 120
    root: NoneOrMore = 0
    client_test_fraction: Share | None = None
    client_test: Literal["own", "matched"] = "own"
    client_validation_fraction: Share = 0.0
    held_out_clients: NoneOrMore = 0
    transforms: Annotated[tuple[Part, ...], Strict(False)] = ()
    transforms_by: Literal["batch", "example"] = "batch"
    test_transforms: Annotated[tuple[Part, ...], Strict(False)] = ()


class AttackSettings(Named):
    """Malicious clients: what they do, and which they are.

    Attributes:
        part: the attack with its own settings.
        fraction: share of the clients that can be trained which attack, drawn by the seed; those of several attacks are
            different ones.
        clients: their ids instead.
    """

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    clients: Annotated[tuple[NoneOrMore, ...], Strict(False)] | None = None

    @model_validator(mode="after")
    def _either(self) -> AttackSettings:
        if (self.fraction is None) == (self.clients is None):
            raise ValueError("give fraction or clients, to say who attacks")
        if self.clients is not None and not self.clients:
            raise ValueError("clients names nobody; give ids, or leave the attack out")
        return self


class StrategySettings(Named):
    """How the server chooses, combines and moves; a named strategy is a preset of parts that can be replaced.

    Attributes:
        part: the strategy with its own settings.
        clients_per_round: how many clients train in a round. Neither it nor ``fraction``: 10, or all where fewer.
        fraction: which share of the clients trains in a round.
        sampling: who trains in a round.
        correction: what changes in the local loop.
        aggregator: how updates become one.
        server_optimizer: what is done with the aggregated update.
        min_clients: a round with fewer updates than that keeps the weights; left out, 1, or 0 under central noise,
            where every round is a release.
        weighting: how clients' updates are weighted; left out, the strategy's own way.
    """

    part: Part = Part("fedavg")
    clients_per_round: Count | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    sampling: Part | None = None
    correction: Part | None = None
    aggregator: Part | None = None
    server_optimizer: Part | None = None
    min_clients: NoneOrMore | None = None
    weighting: Literal["examples", "uniform"] | None = None

    def cohort_size(self, clients: int) -> int:
        """How many clients train in a round, of so many that can be trained (the expected number, where it varies)."""
        if self.clients_per_round is not None:
            return self.clients_per_round
        return max(1, round(self.fraction * clients)) if self.fraction is not None else min(10, clients)


class MetricNoise(Section):
    """Noise on what clients send of an evaluation, see :func:`fedsim.private_metrics.noised`.

    Attributes:
        noise_multiplier: standard deviation of the noise over how far one client moves the sum.
        delta: of the epsilon that the evaluations come to; left out, 1 / clients^1.1.
        loss_bound: clients' mean losses above it count as it.
        bound: the largest norm of any other statistic of a client, a mean over its examples; 1 is enough for shares.
    """

    noise_multiplier: Positive
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    loss_bound: Positive = 5.0
    bound: Positive = 1.0

    def bound_of(self, statistic: str) -> float:
        """The largest norm of a client's statistic of that name."""
        return self.loss_bound if statistic == "loss" else self.bound


class EvaluationSettings(Section):
    """When and on what the weights are evaluated.

    Attributes:
        every: rounds between evaluations; the last round always.
        batch_norm: where batch norm's statistics come from. ``recalibrate``: from the server's proxy examples;
            ``batch``: from each evaluated batch itself (transductive); ``shared``: those that clients sent, pooled;
            ``clients``: every client tests, and estimates them on its own training inputs; ``clients_stored``:
            likewise, with the running statistics of its own training. ``auto``: ``clients`` where batch norm is local,
            ``shared`` where clients send statistics, else ``recalibrate``.
        batch_size: examples evaluated at once.
        clients: whether clients evaluate on their own test and validation examples too; left out, they do where
            ``data.client_test_fraction`` says that they test.
        noise: noise on the clients' metrics, so that these too have an epsilon; each client's own are not recorded
            then.
    """

    every: Count = 5
    batch_norm: Literal["auto", BatchNorm] = "auto"
    batch_size: Count = 512
    clients: bool | None = None
    noise: MetricNoise | None = None


class DeviceSettings(Section):
    """Clients' devices on a virtual clock. Without them the record has no simulated time.

    Attributes:
        step_seconds: how long a local step takes on a device of median speed.
        speed_spread: sigma of the lognormal by which devices' speeds differ.
        jitter: sigma of the lognormal by which the same work takes longer or shorter each time.
        down_mbps: megabits a second to a device; left out, sending takes no time.
        up_mbps: megabits a second from a device, likewise.
        network_spread: sigma of the lognormal by which devices' networks differ.
        latency: seconds each way.
        dropout: chance that a client which has begun its work never answers.
        available: share of every period in which a device is there; each has its own time of day.
        period: seconds.
    """

    step_seconds: Positive = 0.1
    speed_spread: NonNegative = 0.0
    jitter: NonNegative = 0.0
    down_mbps: Positive | None = None
    up_mbps: Positive | None = None
    network_spread: NonNegative = 0.0
    latency: NonNegative = 0.0
    dropout: Share = 0.0
    available: Annotated[float, Field(gt=0, le=1)] = 1.0
    period: Positive = 86400.0


class EngineSettings(Named):
    """Where clients are trained. Nothing here changes a result.

    Attributes:
        part: ``auto``, an engine's name, or an own one.
        workers: how many workers; left out, one a core.
        stack_memory_mib: how much a stack of clients may take.
        client_timeout: seconds after which a client is given up.
    """

    part: Part = Part("auto")
    workers: Count | None = None
    stack_memory_mib: Count = 512
    client_timeout: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class Experiment(Section):
    """A whole experiment, checked: whatever can be told to be wrong without importing torch is refused here.

    ``Experiment(rounds=20, model=Net, strategy={"name": "fedprox", "mu": 0.1})``: a table of the file is a dict, and
    wherever a name stands, ``"file.py:Thing"`` or the object itself may stand too.

    Args:
        base: the folder that files are relative to; the current one where it is left out.
        values: the experiment's keys, as in an experiment file.

    Raises:
        RequestError: with one line for each wrong key.
    """

    name: str = "digits"
    seed: NoneOrMore = 0
    rounds: Count = 100
    data: DataSettings = DataSettings()
    model: Part = Part("mlp")
    task: Part = Part("classification")
    client: Recipe = Recipe()
    strategy: StrategySettings = StrategySettings()
    attacks: Annotated[tuple[AttackSettings, ...], Strict(False)] = ()
    plugins: Annotated[tuple[Part, ...], Strict(False)] = ()
    evaluation: EvaluationSettings = EvaluationSettings()
    checks: Annotated[tuple[Part, ...], Strict(False)] = ()
    devices: DeviceSettings | None = None
    engine: EngineSettings = EngineSettings()

    _base: Path = PrivateAttr(default_factory=Path.cwd)

    def __init__(self, base: Path | None = None, /, **values: Any):
        base = (base or Path.cwd()).resolve()
        given = _with_default_names(overriding.as_given(values))
        wrong = _check_parts(given, base)
        try:
            super().__init__(**given)
        except ValidationError as error:
            wrong = [*problems.explain(error, type(self), "", given), *wrong]
        wrong += conflicts(given, {name: field.default for name, field in type(self).model_fields.items()})
        if wrong:
            raise RequestError(list(dict.fromkeys(wrong)))
        self._base = base

    @property
    def base(self) -> Path:
        """The folder that ``file.py`` in a part's name, and paths in settings, are relative to."""
        return self._base

    @classmethod
    def load(cls, path: Path | str | None = None, overrides: Sequence[str] = ()) -> Experiment:
        """Reads an experiment file.

        Args:
            path: a TOML file; left out, the embedded digits experiment.
            overrides: ``"client.lr=0.1"``, ``"plugins.quantize.bits=4"``: values are TOML, bare words strings.

        Raises:
            RequestError: for a missing file, what is not TOML (with line and column), and every wrong key.
        """
        base = Path.cwd() if path is None else Path(path).resolve().parent
        return cls.of(read_toml(DIGITS if path is None else Path(path)), base, overrides)

    @classmethod
    def of(cls, table: Mapping[str, Any], base: Path, overrides: Sequence[str] = ()) -> Experiment:
        """An experiment from the table of its file, see :meth:`load`."""
        return cls(base, **overriding.override(table, overrides, _named_tables()))

    def override(self, overrides: Sequence[str]) -> Experiment:
        """The same experiment with some keys changed, see :meth:`load`.

        Raises:
            RequestError: for every wrong key.
        """
        return Experiment.of(overriding.as_given(self), self.base, overrides) if overrides else self

    @property
    def batch_norm(self) -> BatchNorm:
        """Where batch norm's statistics come from in evaluation, ``auto`` decided."""
        said = self.evaluation.batch_norm
        return AUTO_BATCH_NORM[self.client.batch_norm] if said == "auto" else said

    @property
    def client_test_fraction(self) -> float:
        """The share of its own examples that each client tests on, the default where none is given."""
        if self.data.client_test_fraction is not None:
            return self.data.client_test_fraction
        client = self.client
        return 0.2 if only_clients_test(client.batch_norm, self.evaluation.batch_norm, client.personal) else 0.0

    @property
    def clients_evaluate(self) -> bool:
        """Whether clients evaluate on examples of their own beside the server."""
        said = self.evaluation.clients
        return bool(self.data.client_test_fraction) if said is None else said

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, defaults filled in, as plain values; what is left out (None) is not there."""
        table = writing.plain(self, self.base)
        told = self.strategy.part.own or self.strategy.fraction is not None or "clients_per_round" in table["strategy"]
        if not told and counted(table):  # a strategy of the user's own may choose its clients itself
            trainable = self.data.clients - self.data.held_out_clients
            table["strategy"]["clients_per_round"] = self.strategy.cohort_size(trainable)
        table["evaluation"]["clients"] = self.clients_evaluate
        told_data = {**table["data"], "client_test_fraction": self.client_test_fraction}
        table["data"] = {name: told_data[name] for name in DataSettings.model_fields if name in told_data}
        if self.client.steps is not None:
            del table["client"]["epochs"]  # steps are instead of them
        if not self.client.optimizer.own:
            table["client"]["lr"] = self.client.learning_rate
        if self.model.own and "initialization" not in self.client.model_fields_set:
            del table["client"]["initialization"]  # a model of the user's own starts as it is made
        for place, holder, name in _places(table):
            holder[name] = writing.with_defaults(holder[name], PLACES[place], self.base)
        layers = table["client"]["layer_initialization"]
        if any(isinstance(part, dict) for part in layers.values()):
            # TOML has plain values before tables, and of several patterns that match a layer the last one counts.
            table["client"]["layer_initialization"] = {
                pattern: part if isinstance(part, dict) else {"name": part} for pattern, part in layers.items()
            }
        return table

    def parts(self, place: str) -> Iterator[tuple[str, Part]]:
        """The parts that stand in a place of :data:`PLACES`, each with its own dotted key."""
        found: Any = self
        for name in place.rstrip("[]{}").split("."):
            found = getattr(found, name)
        if place.endswith("{}"):
            yield from ((f"{place[:-2]}.{name}", part) for name, part in found.items())
            return
        for part in found if place.endswith("[]") else [found]:
            named = part.part if isinstance(part, Named) else part
            if named is not None:
                yield (f"{place[:-2]}.{named.name}" if place.endswith("[]") else place), named

    def to_toml(self) -> str:
        """The resolved experiment as an experiment file."""
        return writing.to_toml(self.resolved())

    def difference(self, other: Experiment | Mapping[str, Any]) -> list[str]:
        """The dotted keys in which two experiments differ, see :meth:`differences`."""
        return [key for key, _, _ in self.differences(other)]

    def differences(self, other: Experiment | Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """Where two experiments differ: dotted key, own value, other value. ``engine`` does not count.

        Args:
            other: an experiment, or the table of a resolved one.
        """
        theirs = other.resolved() if isinstance(other, Experiment) else other
        found = writing.differences(self.resolved(), theirs)
        return [difference for difference in found if difference[0].split(".")[0] != "engine"]


def read_toml(path: Path) -> dict[str, Any]:
    """The table of a TOML file.

    Raises:
        RequestError: where it is missing or is not TOML, with line and column.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        lines = text.splitlines() or [""]
        end = f"at line {len(lines)}, column {len(lines[-1]) + 1}, the end"
        raise RequestError(f"{path} is not TOML: {str(error).replace('at end of document', end)}") from None
    except UnicodeDecodeError:
        raise RequestError(f"{path} is not TOML: it is not UTF-8 text") from None
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file; make an experiment file with: fedsim new --toml") from None
    except IsADirectoryError:
        raise RequestError(f"{path} is a folder; to go on with a run: fedsim run --resume --out {path}") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None


def _with_default_names(given: dict[str, Any]) -> dict[str, Any]:
    """Tables that name no part are about the default one: ``model.norm`` alone is the MLP's."""
    for place, holder, name in list(_places(given)):
        value = holder[name]
        if place.endswith(("[]", "{}")) or not is_table(value) or "name" in value:
            continue
        model: Any = Experiment
        *path, last = place.split(".")
        for step in path:
            model = model.model_fields[step].annotation
        field = model.model_fields[last]
        if field.annotation is Part and isinstance(field.default, Part):
            holder[name] = {"name": field.default.name, **field.default.settings, **value}
    return given


def _named_tables() -> dict[str, list[str]]:
    """The tables (and lists of tables, ``attacks[]``) that name a part and have keys of their own beside."""
    found = {}
    for key, field in Experiment.model_fields.items():
        inner = get_args(field.annotation)
        kind, key = (inner[0], f"{key}[]") if inner else (field.annotation, key)
        if isinstance(kind, type) and issubclass(kind, Named):
            found[key] = kind.own_keys()
    return found


def _places(table: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The parts that a table has: the place's key, what holds the part, and under which name or index."""
    for key in PLACES:
        *path, last = key.rstrip("[]{}").split(".")
        holder: Any = table
        for name in path:
            holder = holder.get(name) if is_table(holder) else None
        if not is_table(holder) or holder.get(last) is None:
            continue
        if key.endswith("{}"):
            if is_table(holder[last]):
                yield from ((key, holder[last], name) for name in list(holder[last]))
        elif not key.endswith("[]"):
            yield key, holder, last
        elif isinstance(holder[last], list):
            yield from ((key, holder[last], index) for index in range(len(holder[last])))


def _check_parts(given: dict[str, Any], base: Path) -> list[str]:
    """What is wrong with the named parts; known names are replaced by the way they are written here."""
    lines: list[str] = []
    tables = _named_tables()
    for place, holder, name in _places(given):
        value, kind, own_keys = holder[name], PLACES[place], tables.get(place, [])
        key = place
        if place.endswith(("[]", "{}")):
            key = f"{place[:-2]}.{_name_of(value) if place.endswith('[]') else name}"
        try:
            if place in tables and is_table(value):
                default = None if place.endswith("[]") else Experiment.model_fields[place].default.part
                part = named_part(value, own_keys, default)
            else:
                part = Part.of(value)
        except ValueError:
            continue  # the schema says it
        if part.thing is None and part.name.endswith(")"):
            lines.append(f"{key}: {part.name} was made in Python; run the Python file that makes it")
            continue
        wrong = catalog.check(part, kind, base, key=key, beside=["name", *own_keys])
        if not wrong and not part.own:
            canonical = catalog.canonical(kind, part.name)
            holder[name] = {**value, "name": canonical} if is_table(value) else canonical
        lines += wrong
    return lines


def _name_of(value: Any) -> str:
    return str(value.get("name", "?")) if is_table(value) else str(value)
