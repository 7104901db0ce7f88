"""What ``fedsim run`` is asked to do: which experiment, where to, and whether it goes on with a run.

Everything that is wrong with the request is found here, before torch is imported and before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients import catalog, problems
from clients.errors import RequestError, RunError
from fedsim.experiment import Experiment
from fedsim.runs.directory import holds_run
from fedsim.runs.resolved import latest, read_experiment

RUNS = Path("runs")


@dataclass(frozen=True)
class Request:
    """A request that can be carried out.

    Attributes:
        experiment: what to run.
        out: the run's directory; None for the first free of ``runs/NAME``.
        resume: go on with what ``out`` holds; where that is nothing, the run begins.
    """

    experiment: Experiment
    out: Path | None
    resume: bool


def read(
    file: Path | None = None,
    overrides: Sequence[str] = (),
    engine: Sequence[str] = (),
    out: Path | None = None,
    resume: bool = False,
) -> Request:
    """Checks a request.

    Args:
        file: an experiment file, or a Python file that defines ``experiment``; None for the run's own where one is
            resumed and nothing is overridden, and otherwise for the embedded digits experiment.
        overrides: ``"client.lr=0.1"``.
        engine: overrides that change no result: a resumed run stays the same run.
        out: the run's directory.
        resume: go on with the run in ``out``, or else with the newest unfinished ``runs/NAME*``; where there is
            nothing yet, the run begins.

    Raises:
        RequestError: with one line for each wrong thing.
    """
    wrong = [] if out is None else _check_out(out, resume)
    try:
        if resume and out is None and file is None and not overrides:
            out = newest_unfinished("digits")
        stored = out if resume and out is not None and file is None and not overrides and holds_run(out) else None
        if stored is not None:
            experiment = Experiment.of(read_experiment(stored), stored, engine)
        else:
            experiment = _experiment(file, [*overrides, *engine], bool(wrong))
        if resume and out is None:
            out = newest_unfinished(experiment.name)
        if resume and out is not None and not wrong:
            wrong += _check_same(experiment, out)
    except RequestError as error:
        wrong += error.problems
    if wrong:
        raise RequestError(list(dict.fromkeys(wrong)))
    return Request(experiment, out, resume)


def newest_unfinished(name: str) -> Path | None:
    """The run ``runs/NAME`` or ``runs/NAME-N`` that was written to last, of those that are not finished.

    Returns:
        None where there is no such run at all.

    Raises:
        RequestError: where all are finished.
    """
    unfinished = latest(RUNS, name, unfinished=True)
    if unfinished is None and latest(RUNS, name) is not None:
        raise RequestError(f"--resume: every run {RUNS / name} is finished; leave --resume out to start another")
    return unfinished


def _check_out(out: Path, resume: bool) -> list[str]:
    if out.exists() and not out.is_dir():
        return [f"--out: {out} is a file; give a folder"]
    if holds_run(out) and not resume:
        return [f"--out: {out} holds a run; give --resume to go on with it, or another folder"]
    return []


def _check_same(experiment: Experiment, out: Path) -> list[str]:
    """One line for each key in which the run in ``out`` was made with something else."""
    if not holds_run(out):
        return []
    return [
        f"{key}: {_said(mine)} here, but {_said(theirs)} in the run in {out}; "
        "a resume needs the same experiment: give that, or another --out"
        for key, mine, theirs in experiment.differences(read_experiment(out))
    ]


def _experiment(file: Path | None, overrides: Sequence[str], refused: bool) -> Experiment:
    """The experiment of a file; a Python file is not run for a request that is refused anyway."""
    if file is None or file.suffix != ".py":
        return Experiment.load(file, overrides)
    module = catalog.read_file(file)
    if "experiment" not in module.bound and not module.open:
        raise RequestError(f"{file} defines no experiment; add: experiment = fedsim.Experiment(...)")
    if refused:
        raise RequestError([])
    found = getattr(_run(file), "experiment", None)
    if not isinstance(found, Experiment):
        raise RequestError(f"{file}: experiment is {type(found).__name__}; make it a fedsim.Experiment(...)")
    return found.override(overrides)


def _run(file: Path) -> Any:
    try:
        return catalog.load_file(file)
    except (RequestError, RunError, KeyboardInterrupt):
        raise
    except BaseException as error:
        place = _line_in(error, file)
        raise RunError(f"{file}{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error


def _line_in(error: BaseException, file: Path) -> str:
    lines, at = [], error.__traceback__
    while at is not None:
        if Path(at.tb_frame.f_code.co_filename) == file.resolve():
            lines.append(at.tb_lineno)
        at = at.tb_next
    return f", line {lines[-1]}" if lines else ""


def _said(value: Any) -> str:
    return "nothing" if value is None else problems.show(value)
