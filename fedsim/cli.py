"""The command line. Nothing heavy is imported before a request is known to be right.

Exit codes: 0 done; 1 the run failed; 2 the request is wrong; 3 done, but a check failed; 130 interrupted, resumable.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from clients.errors import FedsimError, RequestError, nearest

if TYPE_CHECKING:
    from fedsim.experiment import Experiment

#: Set in the environment, failures show their traceback.
_DEBUG = "FEDSIM_DEBUG"

DONE, FAILED, WRONG, CHECK_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

_TEMPLATES = Path(__file__).with_name("templates")
_FORMATS = ("parquet", "csv", "tensorboard")
_SYNONYMS = {"datasets": "sources"}

app = typer.Typer(
    help="Simulates federated learning: clients train local copies, a server combines their weights and biases.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        arguments: the command line; the process's own where it is left out.
    """
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="fedsim", standalone_mode=False)
        return code if isinstance(code, int) else DONE
    except click.ClickException as error:
        # click and typer may both suggest the same command.
        return _failed(WRONG, [" ".join(dict.fromkeys(re.split(r"(?<=[.?]) ", error.format_message())))])
    except RequestError as error:
        return _failed(WRONG, error.problems, error)
    except (KeyboardInterrupt, click.Abort):
        return _failed(INTERRUPTED, ["interrupted"])
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, FedsimError):
            text = f"{type(error).__name__}: {text} ({_DEBUG}=1 shows where)"
        return _failed(FAILED, [text], error)


def _failed(code: int, lines: Sequence[str], error: BaseException | None = None) -> int:
    if error is not None and _DEBUG in os.environ:
        import traceback

        traceback.print_exception(error)
    for line in lines:
        print(line, file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _fedsim(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"fedsim {installed('fedsim')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


_Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where the run goes; else runs/NAME.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]


@app.command()
def run(
    experiment: Annotated[
        Path | None,
        typer.Argument(
            metavar="[EXPERIMENT.toml|my.py]",
            help="An experiment file, or a Python file that defines `experiment`. Left out: the digits experiment.",
            show_default=False,
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="a.b=value", help="Change a key; values are TOML, bare words are strings."),
    ] = None,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="auto, inline, processes or an own one.")] = None,
    workers: Annotated[str | None, typer.Option(metavar="N", help="How many workers.")] = None,
    out: _Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, or the newest.")] = False,
    as_json: _Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run and what it costs.")] = False,
) -> int:
    """Run an experiment."""
    named = {"engine.name": engine, "engine.workers": workers}
    options = [f"{key}={value}" for key, value in named.items() if value is not None]
    with _stdout_kept_for_results(as_json):
        try:
            outcome = _carry_out(experiment, sets or [], options, out, resume, quiet, dry_run)
        except KeyboardInterrupt:
            again = _resume_command(experiment, sets or [], out)
            return _failed(INTERRUPTED, [f"interrupted; go on with: {again}"])
    if as_json:
        _print_json(outcome.plan if dry_run else outcome.result.summary)
    elif dry_run:
        _print_plan(outcome)
    else:
        _print_summary(outcome.result.summary)
    failed = [] if dry_run else list(getattr(outcome.result, "checks_failed", ()))
    return _failed(CHECK_FAILED, [f"check failed: {name}" for name in failed]) if failed else DONE


@dataclass(frozen=True)
class _Outcome:
    experiment: Experiment
    plan: dict[str, Any] = field(default_factory=dict)
    result: Any = None


def _carry_out(
    file: Path | None,
    sets: Sequence[str],
    engine: Sequence[str],
    out: Path | None,
    resume: bool,
    quiet: bool,
    dry_run: bool,
) -> _Outcome:
    from fedsim import request

    asked = request.read(file, sets, engine, out, resume)

    from fedsim import running
    from fedsim.progress import progress

    if dry_run:
        return _Outcome(asked.experiment, plan=running.plan(asked.experiment))
    result = running.run(asked.experiment, out=asked.out, resume=asked.resume, progress=progress(quiet))
    return _Outcome(asked.experiment, result=result)


def _resume_command(file: Path | None, sets: Sequence[str], out: Path | None) -> str:
    """The command that goes on with a run, at whichever moment it was interrupted."""
    words = ["fedsim", "run", *([str(file)] if file else []), *(word for text in sets for word in ("--set", text))]
    return shlex.join([*words, "--resume", *(["--out", str(out)] if out else [])])


@app.command()
def simulate(
    app_dir: Annotated[
        Path,
        typer.Argument(
            metavar="[APP_DIR]",
            help="A Flower app's folder, with its pyproject.toml. Left out: this one.",
            show_default=False,
        ),
    ] = Path("."),
    config: Annotated[
        list[str] | None,
        typer.Option(
            "-c",
            "--run-config",
            metavar='"key=value ..."',
            help="Change keys of the app's configuration; values are TOML. Or a TOML file.",
        ),
    ] = None,
    supernodes: Annotated[
        str | None, typer.Option("--num-supernodes", metavar="N", help="How many clients; else what the app says.")
    ] = None,
    engine: Annotated[str | None, typer.Option(metavar="NAME", help="auto, inline or processes.")] = None,
    workers: Annotated[str | None, typer.Option(metavar="N", help="How many workers.")] = None,
    seed: Annotated[str | None, typer.Option(metavar="S", help="Seeds the random generators; else 0.")] = None,
    client_timeout: Annotated[
        str | None, typer.Option("--client-timeout", metavar="SECONDS", help="A client that takes longer has failed.")
    ] = None,
    dropout: Annotated[
        str | None, typer.Option(metavar="P", help="The probability that a client does not answer a message.")
    ] = None,
    out: _Out = None,
    as_json: _Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress, and of Flower's log only errors.")] = False,
) -> int:
    """Run a Flower app as it is, without Ray, SuperLink or network."""
    from fedsim.flower import command

    request = command.read(
        app_dir, config or [], supernodes, engine or "auto", workers, seed or "0", client_timeout, dropout or "0", out
    )
    with _stdout_kept_for_results(as_json):
        try:
            summary = command.simulate(request, quiet)
        except KeyboardInterrupt as error:
            return _failed(INTERRUPTED, [str(error) or "interrupted"])
    if as_json:
        _print_json(summary)
    else:
        print("\n".join(command.lines(summary)))
    return DONE


@app.command()
def new(
    name: Annotated[Path | None, typer.Argument(metavar="[NAME]", help="The file; my.py or my.toml.")] = None,
    task: Annotated[
        str, typer.Option(metavar="TASK", help="classification, segmentation, regression or tokens.")
    ] = "classification",
    toml: Annotated[bool, typer.Option("--toml", help="An experiment file instead of a Python file.")] = False,
) -> None:
    """Write a runnable experiment of your own: data, model, loss and metric in one file."""
    known = sorted(path.stem for path in _TEMPLATES.glob("*.py"))
    if task not in known:
        raise RequestError(f"--task: unknown task {task!r}; known are {', '.join(known)}{nearest(task, known)}")
    template = _TEMPLATES / ("my.toml" if toml else f"{task}.py")
    path = name or Path("my.toml" if toml else "my.py")
    if path.suffix != template.suffix:
        path = path.with_name(path.name + template.suffix)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(template.read_text(encoding="utf-8"))
    except FileExistsError:
        raise RequestError(f"{path} exists already; give another name: fedsim new NAME") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be written: {error.strerror}") from None
    print(f"wrote {path}; run it with: fedsim run {shlex.quote(str(path))}")


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="e.g. strategies; left out, every kind.")] = None,
) -> None:
    """List what an experiment can name, with its settings."""
    import fedsim.kinds  # noqa: F401  (declares what only the simulator names)
    import strategies.kinds  # noqa: F401  (declares what the server side of an experiment may name)
    from clients import catalog, kinds

    shown = kinds.declared()
    if kind is not None:
        shown = {name: known for name, known in shown.items() if name == _SYNONYMS.get(kind, kind)}
        if not shown:
            allowed = [*kinds.declared(), *_SYNONYMS]
            raise RequestError(f"unknown kind {kind!r}; known are {', '.join(allowed)}{nearest(kind, allowed)}")
    for place, name in enumerate(shown):
        if len(shown) > 1:
            print(f"{os.linesep if place else ''}{name}")
        found = catalog.entries(name)
        for entry in found:
            settings = ", ".join(f"{key}={known.shown}".rstrip("=") for key, known in entry.settings.items())
            print(f"  {entry.name}({settings})" if settings else f"  {entry.name}")
            print("      " + re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", entry.summary))
            if "composes_with" in entry.attributes:
                told = entry.attributes
                print(f"      Needs the {told['needs']}; keeps {told['keeps']}; goes with {told['composes_with']}.")
            elif "needs" in entry.attributes and name == "aggregators":
                print(f"      Needs the {entry.attributes['needs']}.")
        if not found:
            print("  none yet")


@app.command()
def report(directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of runs.")]) -> None:
    """Write the report of a run anew, or one page that lays several runs over one another."""
    _need_runs(directories)
    from fedsim.report import write_report

    print(write_report(directories))


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory.")],
    format: Annotated[str, typer.Option("--format", metavar="FORMAT", help="parquet, csv or tensorboard.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to; else DIR/export.")] = None,
) -> None:
    """Write a run's tables for other programs."""
    wrong = [f"--format: {format!r} is not one of {', '.join(_FORMATS)}{nearest(format, _FORMATS)}"]
    _need_runs([directory], wrong if format not in _FORMATS else [])
    from fedsim.report import export as write

    for path in write(directory, format, out):
        print(path)


def _need_runs(directories: Sequence[Path], wrong: Sequence[str] = ()) -> None:
    from fedsim.runs.directory import holds_run, no_run

    lines = [*wrong, *(no_run(directory) for directory in directories if not holds_run(directory))]
    if lines:
        raise RequestError(lines)


def _print_plan(outcome: _Outcome) -> None:
    print(outcome.experiment.to_toml())
    plan = {name: value for name, value in outcome.plan.items() if not isinstance(value, dict)}
    width = max(map(len, plan), default=0)
    for name, value in plan.items():
        print(f"{name.replace('_', ' '):<{width}}  {'none' if value is None else value}")


def _print_summary(summary: dict[str, Any]) -> None:
    split, metric, value = summary.get("split"), summary.get("metric_name"), summary.get("metric")
    said = [f"{split} {metric} {value:.4f}" if isinstance(value, int | float) else f"no {metric}"]
    if isinstance(summary.get("loss"), int | float):
        said.append(f"loss {summary['loss']:.4f}")
    print(f"{', '.join(said)} after {summary['rounds']} rounds in {summary['seconds']:.1f} s")
    if summary.get("out"):
        page = Path(summary["out"]) / "report.html"
        print(f"report: {page}" if page.exists() else f"run: {page.parent}")


def _print_json(value: Any) -> None:
    """One JSON object. NaN and infinities, which JSON has not, become null."""
    print(json.dumps(_finite(value), allow_nan=False, default=str), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _stdout_kept_for_results(active: bool) -> Iterator[None]:
    """Meanwhile what models, data and worker processes print on stdout goes to stderr."""
    if not active:
        yield
        return
    sys.stdout.flush()
    printed, descriptor = sys.stdout, os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = printed
        os.dup2(descriptor, 1)
        os.close(descriptor)
