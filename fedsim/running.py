"""A whole run: from an experiment to a directory with its record, checkpoints and report."""

from __future__ import annotations

import hashlib
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from clients import catalog
from clients.errors import RequestError
from clients.local_state import put_unshared, unshared
from clients.transfer import frozen_size
from clients.updates import Updates
from clients.weights import Layout
from fedsim import checking
from fedsim.assembly import Assembly, assemble, choose_engine, make_engine, multiply_adds
from fedsim.census import census
from fedsim.data.fingerprint import fingerprint
from fedsim.engines.engine import Engine, cores
from fedsim.execution import chunk_sizes
from fedsim.experiment import PLACES, Experiment
from fedsim.notes import notes, privacy
from fedsim.records import Event, RoundRecord
from fedsim.request import RUNS, newest_unfinished
from fedsim.runs import RunStore, first_free, holds_run, read_experiment
from fedsim.simulation import InMemory, Simulation, StateStore
from fedsim.worker import Setup
from strategies.checks.check import Check

if TYPE_CHECKING:
    import pandas as pd

#: Draws of clients that a plan makes to count participations.
_COUNTED = 20_000_000

Callback = Callable[[RoundRecord], Literal["stop"] | None]


class Progress(Protocol):
    """Shows a run under way."""

    def start(self, total: int, done: int, name: str) -> None: ...

    def round(self, record: RoundRecord) -> None: ...

    def note(self, text: str) -> None: ...

    def stop(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, total: int, done: int, name: str) -> None:
        """Rounds in all, and those done before a resume."""

    def round(self, record: RoundRecord) -> None:
        """A round was committed."""

    def note(self, text: str) -> None:
        """Something a user should know."""

    def stop(self) -> None:
        """The run has ended, well or not."""


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        out: the run's directory.
        row: ``[d]`` the final weights in layout order.
        layout: names and shapes of ``row``.
        metrics: split -> metric -> value, of the last evaluation.
        summary: what ``fedsim run --json`` prints.
        checks_failed: the checks that failed.
    """

    out: Path
    row: Tensor
    layout: Layout
    metrics: Mapping[str, Mapping[str, float]]
    summary: dict[str, Any]
    checks_failed: tuple[str, ...] = ()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The final weights by name."""
        return self.layout.unflatten(self.row)

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row a round: metrics, bytes, seconds."""
        from fedsim.runs import load

        return load(self.out).history


@dataclass
class _Run:
    """A run's parts while it is under way."""

    assembly: Assembly
    simulation: Simulation
    checks: dict[str, Check]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    stopped: str = ""  # what ended the run before its last round


def run(
    experiment: Experiment | str | Path | None = None,
    *,
    out: Path | str | None = None,
    resume: bool = False,
    engine: str | Engine | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> Result:
    """Runs an experiment to its end and writes its directory.

    Args:
        experiment: the experiment, or its file; left out, the embedded digits experiment (on a resume: the run's own).
        out: the run's directory; left out, the first free of ``runs/NAME``, ``runs/NAME-2``, ... (on a resume: the
            newest unfinished one).
        resume: goes on with the run in ``out``, to the same bits; where there is none, it begins.
        engine: ``auto``, ``inline``, ``processes`` or an own one, instead of the experiment's.
        workers: how many workers.
        progress: shows the run under way.
        callbacks: each is called with every round's record before it is committed; ``"stop"`` ends the run there.

    Raises:
        RequestError: for a wrong request; nothing is written then.
        RunError: where the run fails; what was committed stays, and a resume goes on from there.
    """
    show = progress or Silent()
    directory = _directory(out, resume, _name(experiment))
    experiment = _experiment(experiment, directory, resume, engine, workers)
    going_on = directory is not None and holds_run(directory)
    if going_on:
        assert directory is not None
        _same_experiment(experiment, directory)
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        assembly, hired = _prepare(experiment, stack)
        checks = checking.build(experiment, assembly.setup.strategy)
        if directory is None:
            directory = first_free(RUNS, experiment.name)
        store = _open(directory, assembly, hired, going_on)
        stack.enter_context(store)
        if going_on:
            _same_sources(experiment, store)
            _same_data(assembly, store)
            put_unshared(assembly.setup.model, store.first())
        under_way = _begin(assembly, hired, store, checks)
        return _to_the_end(under_way, store, directory, show, callbacks)


def _to_the_end(
    under_way: _Run, store: RunStore, directory: Path, show: Progress, callbacks: Sequence[Callback]
) -> Result:
    simulation, experiment = under_way.simulation, under_way.assembly.experiment
    checkpoint = store.resume()
    if store.damage is not None:
        show.note(store.damage.message)
    if checkpoint is not None:
        simulation.restore(checkpoint.round, checkpoint.tensors)
        under_way.metrics = store.last_metrics()
    summary = store.summary
    try:
        show.start(experiment.rounds, simulation.round, experiment.name)
        if summary is None:
            for record in _rounds(under_way, callbacks, first=checkpoint is None):
                show.round(record)
            checked = checking.run(under_way.checks, simulation, directory)
            for event in checked.events:
                store.event(event)
                show.note(event.message)
            summary = {
                **_summary(under_way, store, directory),
                "checks": checked.metrics,
                "checks_failed": list(checked.failed),
            }
            store.finish(summary)
            _write_report(directory, store, show)
    finally:
        show.stop()
    failed = tuple(summary.get("checks_failed", ()))
    return Result(directory, simulation.weights, simulation.layout, under_way.metrics, summary, failed)


def rounds(
    experiment: Experiment | str | Path | None = None,
    *,
    out: Path | str | None = None,
    engine: str | Engine | None = None,
    workers: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> Iterator[RoundRecord]:
    """Plays an experiment round by round; the first record is round 0, the initial evaluation.

    Args:
        experiment: as for :func:`run`.
        out: where rounds are committed, a run that can be resumed; left out, nothing is written.
        engine: ``auto``, ``inline``, ``processes`` or an own one, instead of the experiment's.
        workers: how many workers.
        callbacks: as for :func:`run`.
    """
    directory = _directory(out, False, "")
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        assembly, hired = _prepare(_experiment(experiment, None, False, engine, workers), stack)
        store: StateStore = InMemory()
        if directory is not None:
            store = stack.enter_context(_open(directory, assembly, hired, going_on=False))
        yield from _rounds(_begin(assembly, hired, store), callbacks, first=True)


def plan(
    experiment: Experiment | str | Path | None = None, *, engine: str | Engine | None = None, workers: int | None = None
) -> dict[str, Any]:
    """What a run would do, without doing it: execution and why, bytes a round, memory, an estimate of its time.

    The time is that of one chunk trained here, so it holds for this machine and its present load.
    """
    import time

    experiment = _experiment(experiment, None, False, engine, workers)
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        assembly = assemble(experiment)
        setup, layout, cohort = assembly.setup, assembly.setup.layout, assembly.cohort
        name = experiment.engine.part.name
        chosen = choose_engine(assembly, experiment.engine.workers) if name == "auto" else name
        stack_size = chunk_sizes(setup, setup.stacked, cohort, experiment.engine.stack_memory_mib)
        trainer, weights = setup.trainer(), layout.flatten(setup.model)
        few = setup.population.trainable[: stack_size if setup.stacked else 1]
        trainer.train(few[:2], weights, 1)  # warms up
        begun = time.perf_counter()
        trained = trainer.train(few, weights, 1)
        each = (time.perf_counter() - begun) / len(few)
        up, down = _bytes_of_client(setup, trained.updates, weights)
    count = experiment.engine.workers or cores()
    parallel = 1 if chosen == "inline" else min(count, -(-cohort // stack_size))
    block = layout.all.size * layout.dtype.itemsize
    rows = block * cohort if setup.strategy.aggregator.needs == "rows" else 2 * 8 * layout.size * parallel
    return {
        "experiment": experiment.resolved(),
        "execution": assembly.execution.name,
        "reason": assembly.execution.reason,
        "engine": chosen,
        "workers": parallel,
        "parameters": layout.size,
        "personal_parameters": layout.personal.size,
        "frozen_parameters": frozen_size(setup.model),
        "clients": setup.population.clients,
        "clients_per_round": cohort,
        "clients_per_chunk": stack_size,
        "bytes_up_per_round": round(cohort * up),
        "bytes_down_per_round": cohort * down,
        "bytes_saved_per_round": 2 * cohort * setup.unsent * layout.dtype.itemsize,
        "malicious_clients": sum(len(group.clients) for group in setup.malicious),
        "megabytes_of_weights": (rows + block * stack_size * (2 + len(setup.optimizer.state)) * parallel) / 1e6,
        "minutes": each * cohort * experiment.rounds / parallel / 60,
        "multiply_adds": multiply_adds(assembly),
        "epsilon": _foreseen_epsilon(setup, cohort),
    }


def _bytes_of_client(setup: Setup, u: Updates, weights: Tensor) -> tuple[float, int]:
    """What a client sends, on average, and what it is sent, in bytes; ``u`` are updates of the first round."""
    strategy, ctx = setup.strategy, setup.context(1, weights, cohort=u.clients)
    state = strategy.init(setup.context(0, weights))
    kept = {name: u.rows.new_zeros(len(u), width) for name, width in strategy.client_state(ctx).items()}
    sent = strategy.broadcast(state)
    up = torch.zeros(1)
    if len(u):
        u, _ = strategy.contribute(u, sent, kept, ctx, receive=False)
        assert u.nbytes is not None
        up = u.nbytes
    down = strategy.down(state, ctx)[1] + sum(value.nbytes for value in sent.values())
    if setup.shared_statistics is not None:
        down += setup.shared_statistics.kept_size * weights.element_size()
    return float(up.double().mean()), down


def _most_often(setup: Setup, cohort: int) -> int:
    """In how many rounds the client takes part that is chosen most often; an estimate where counting takes too long."""
    able, weights = setup.population.trainable, setup.layout.flatten(setup.model)
    if setup.rounds * len(able) > _COUNTED or setup.strategy.concurrency is not None:
        return -(-setup.rounds * cohort // len(able))
    chosen = [setup.strategy.sampling.cohort(setup.context(number, weights)) for number in range(1, setup.rounds + 1)]
    return int(np.bincount(np.concatenate(chosen).astype(np.int64), minlength=1).max(initial=0))


def _foreseen_epsilon(setup: Setup, cohort: int) -> float | None:
    """What the client with the fewest examples will have spent, if it is chosen as often as may be expected."""
    dp, told = setup.recipe.dp_sgd, setup.guarantee
    sizes, able = setup.population.splits["train"].sizes, setup.population.trainable
    if told is not None:
        often = setup.rounds if told.trust == "central" else _most_often(setup, cohort)
        return min(told.spent(often), math.inf if told.budget is None else told.budget)
    if dp is None:
        return None
    from clients.dp_sgd import releases, spent

    smallest = able[[int(sizes[able].argmin())]]
    done = setup.trainer().work(smallest, 1)
    rate, count = releases(dp, done, setup.recipe.batch_size)
    return spent(dp, rate, count * -(-setup.rounds * cohort // len(able)))


# ------------------------------------------------------------------------------------------------ before the rounds


def _name(experiment: Experiment | str | Path | None) -> str:
    if isinstance(experiment, Experiment):
        return experiment.name
    return Experiment.load(experiment).name


def _experiment(
    given: Experiment | str | Path | None,
    directory: Path | None,
    resume: bool,
    engine: str | Engine | None,
    workers: int | None,
) -> Experiment:
    """The experiment with the call's engine and workers; on a resume without one, the run's own."""
    if isinstance(given, Experiment):
        experiment = given
    elif given is None and resume and directory is not None and holds_run(directory):
        experiment = Experiment(directory, **read_experiment(directory))
    else:
        experiment = Experiment.load(given)
    if engine is not None and not isinstance(engine, str):
        settings = experiment.engine.model_copy(update={"part": catalog.Part.of(engine)})
        experiment = experiment.model_copy(update={"engine": settings})
    changes = [f'engine.name="{engine}"'] if isinstance(engine, str) else []
    changes += [f"engine.workers={workers}"] if workers is not None else []
    return experiment.override(changes)


def _directory(out: Path | str | None, resume: bool, name: str) -> Path | None:
    """Where the run goes; None for a free directory that is made later."""
    if out is None:
        return newest_unfinished(name) if resume else None
    directory = Path(out)
    if holds_run(directory) and not resume:
        raise RequestError(
            f"--out: {directory} holds a run already; continue it with --resume or give another directory"
        )
    return directory


def _same_experiment(experiment: Experiment, directory: Path) -> None:
    different = experiment.difference(read_experiment(directory))
    if different:
        raise RequestError(
            [
                f"{key}: differs from the run in {directory}; go on with the same experiment, or start another run"
                for key in different
            ]
        )


def _same_sources(experiment: Experiment, store: RunStore) -> None:
    before, now = store.manifest.get("sources", {}), _sources(experiment)
    changed = [key for key in before if before[key] != now.get(key)]
    if changed:
        raise RequestError(
            [f"{key}: its file has changed since the run began; restore it, or start another run" for key in changed]
        )


def _same_data(assembly: Assembly, store: RunStore) -> None:
    before = store.manifest.get("data", {}).get("sha256")
    if before is not None and before != fingerprint(assembly.setup.population):
        raise RequestError(
            "data: the examples, or how they are dealt, have changed since the run began; restore them, or start"
            " another run"
        )


def _prepare(experiment: Experiment, stack: ExitStack) -> tuple[Assembly, Engine]:
    """The real things and an engine; workers load their libraries while the data are read."""
    early = None
    if experiment.engine.part.name != "auto":
        early = stack.enter_context(closing(make_engine(experiment)))
    assembly = assemble(experiment)
    if early is None:
        name = choose_engine(assembly, experiment.engine.workers)
        early = stack.enter_context(closing(make_engine(experiment, name)))
    return assembly, early


def _open(directory: Path, assembly: Assembly, engine: Engine, going_on: bool) -> RunStore:
    if going_on:
        return RunStore.open(directory)
    toml = assembly.experiment.to_toml()
    setup = assembly.setup
    attacks = {client: group.name for group in setup.malicious for client in group.clients.tolist()}
    counted = census(setup.population, assembly.experiment.data.partition, attacks)
    first, personal = unshared(setup.model, setup.layout), setup.layout.personal.names
    return RunStore.create(directory, toml, manifest(assembly, engine), setup.layout.shapes, counted, first, personal)


def _begin(assembly: Assembly, engine: Engine, store: StateStore, checks: dict[str, Check] | None = None) -> _Run:
    setup = assembly.setup
    shared = replace(setup, population=setup.population.map_tensors(engine.share))
    engine.start(shared)
    keep_rows = any(check.needs == "rows" for check in (checks or {}).values())
    simulation = Simulation(assembly.experiment, shared, engine, store, keep_rows=keep_rows)
    return _Run(assembly, simulation, checks or {})


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread, as every worker has: the number of threads changes the order of additions."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def manifest(assembly: Assembly, engine: Engine) -> dict[str, Any]:
    """Versions, machine and execution: all that a reader needs to get the same bits."""
    experiment = assembly.experiment
    return {
        "versions": {
            name: _version(name) for name in ("fedsim", "torch", "torchvision", "flwr", "numpy", "scikit-learn")
        }
        | {"python": platform.python_version()},
        "seed": experiment.seed,
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cores": cores(),
        },
        "execution": {
            "name": assembly.execution.name,
            "reason": assembly.execution.reason,
            "engine": type(engine).__name__.lower(),
            "workers": engine.workers,
        },
        "parameters": assembly.setup.layout.size,
        "frozen_parameters": frozen_size(assembly.setup.model),
        "personal_parameters": assembly.setup.layout.personal.size,
        "clients": assembly.setup.population.clients,
        "task": {
            "primary": assembly.setup.task.primary,
            "higher_is_better": assembly.setup.task.higher_is_better,
        },
        "sources": _sources(experiment),
        "data": {"sha256": fingerprint(assembly.setup.population)},
        "privacy": privacy(assembly.setup),
        "command": ["fedsim" if Path(sys.argv[0]).name == "__main__.py" else Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _sources(experiment: Experiment) -> dict[str, str]:
    """Key -> SHA-256 of the file that a user's own part is defined in."""
    found = {}
    for key, kind in PLACES.items():
        for place, part in experiment.parts(key):
            digest = catalog.source_hash(part, kind, experiment.base)
            if digest is not None:
                found[place] = digest
    return found


# ------------------------------------------------------------------------------------------------ the rounds and after


def _rounds(under_way: _Run, callbacks: Sequence[Callback], first: bool) -> Iterator[RoundRecord]:
    """Plays and commits the rounds that are left."""
    simulation = under_way.simulation
    if first:
        yield _adopted(under_way, simulation.first())
    while simulation.round < under_way.assembly.experiment.rounds and not under_way.stopped:
        if simulation.budget_spent(simulation.round):
            under_way.stopped = "The privacy budget"
            break
        record = simulation.step()
        if any([callback(record) == "stop" for callback in callbacks]):
            under_way.stopped = "A callback"
            record.events.append(Event(record.round, "stopped", f"a callback ended the run after round {record.round}"))
            if not record.metrics:
                simulation.judge(record)
        yield _adopted(under_way, record)


def _adopted(under_way: _Run, record: RoundRecord) -> RoundRecord:
    under_way.simulation.commit(record)
    under_way.metrics = record.metrics or under_way.metrics
    return record


def _summary(under_way: _Run, store: RunStore, directory: Path) -> dict[str, Any]:
    simulation, task = under_way.simulation, under_way.assembly.setup.task
    split = next((name for name in ("test", "client_test") if name in under_way.metrics), None)
    found = under_way.metrics.get(split, {}) if split else {}
    totals = store.totals()
    return {
        "out": str(directory),
        "name": under_way.assembly.experiment.name,
        "rounds": simulation.round,
        "metric_name": task.primary,
        "metric": found.get(task.primary),
        "split": split,
        "examples": found.get("examples"),
        "accuracy": found.get("accuracy"),
        "loss": found.get("loss"),
        "weights_sha256": sha256(simulation.weights),
        "parameters": simulation.layout.size,
        "bytes_up": totals["bytes_up"],
        "bytes_down": totals["bytes_down"],
        "bytes_saved": totals["bytes_saved"],
        "epsilon": totals["epsilon"],
        "seconds": totals["seconds"],
        "events": totals["events"],
        "stopped": bool(under_way.stopped),
        "privacy": store.manifest.get("privacy"),
        "notes": _notes(under_way),
    }


def _notes(under_way: _Run) -> list[str]:
    found = notes(under_way.assembly.setup, under_way.assembly.experiment.data.source.name)
    if under_way.stopped:
        found.append(f"{under_way.stopped} ended the run after round {under_way.simulation.round}.")
    found += _metric_note(under_way)
    if under_way.stopped == "A callback" and under_way.assembly.setup.guarantee is not None:
        found.append("Epsilon does not cover what the callback looked at.")
    return found


def _metric_note(under_way: _Run) -> list[str]:
    """What noise on clients' metrics has cost."""
    said = under_way.assembly.experiment.evaluation.noise
    spent = [told["epsilon"] for told in under_way.metrics.values() if "epsilon" in told]
    if said is None or not spent:
        return []
    delta = "1 / clients^1.1" if said.delta is None else f"{said.delta:g}"
    return [
        f"Clients' metrics got noise of multiplier {said.noise_multiplier:g}: their evaluations came to epsilon"
        f" {max(spent):.4g} at delta {delta}, by client, replace one by nothing, central trust, beside what the weights"
        " cost."
    ]


def sha256(row: Tensor) -> str:
    """SHA-256 of a row as little-endian float32, in layout order."""
    return hashlib.sha256(row.to(torch.float32).contiguous().numpy().astype("<f4").tobytes()).hexdigest()


def _write_report(directory: Path, store: RunStore, show: Progress) -> None:
    """The run is done and saved; a report that cannot be written does not undo it."""
    from fedsim.report import write_report

    try:
        write_report([directory])
    except Exception as error:
        store.event(Event(-1, "report_failed", f"{type(error).__name__}: {error}"))
        show.note(f"the report could not be written ({error}); try again with: fedsim report {directory}")
