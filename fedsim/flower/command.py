"""``fedsim simulate APP_DIR``: a Flower app, from its folder to a run's directory with record and report.

What is wrong with the request is found before flwr or torch is imported and before anything is written.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.errors import FedsimError, RequestError, RunError, nearest
from fedsim.flower import apps
from fedsim.request import RUNS
from fedsim.runs.directory import holds_run

ENGINES = ("auto", "inline", "processes")


@dataclass(frozen=True)
class Request:
    """A request that can be carried out.

    Attributes:
        app: the app with its configuration and the number of its clients.
        engine: ``auto``, ``inline`` or ``processes``.
        workers: how many workers; None for one a core.
        seed: the seed of all random generators.
        client_timeout: seconds that a client may take for a message; None for any time.
        dropout: the probability that a client does not answer a message.
        out: the run's directory; None for the first free of ``runs/NAME``.
    """

    app: apps.App
    engine: str = "auto"
    workers: int | None = None
    seed: int = 0
    client_timeout: float | None = None
    dropout: float = 0.0
    out: Path | None = None


def read(
    directory: Path,
    overrides: Sequence[str] = (),
    supernodes: str | None = None,
    engine: str = "auto",
    workers: str | None = None,
    seed: str = "0",
    client_timeout: str | None = None,
    dropout: str = "0",
    out: Path | None = None,
) -> Request:
    """Checks a request as it stands on the command line.

    Raises:
        RequestError: with one line for each wrong thing.
    """
    wrong: list[str] = []
    count = _whole("--num-supernodes", supernodes, 1, wrong)
    if engine not in ENGINES:
        wrong.append(f"--engine: {engine!r} is not one of {', '.join(ENGINES)}{nearest(engine, ENGINES)}")
    hands = _whole("--workers", workers, 1, wrong)
    begin = _whole("--seed", seed, 0, wrong)
    seconds = _number("--client-timeout", client_timeout, lambda value: value > 0, "a number above 0", wrong)
    if seconds is not None and engine == "inline":
        wrong.append("--client-timeout: the engine inline cannot enforce it; take --engine processes")
    share = _number("--dropout", dropout, lambda value: 0 <= value < 1, "a number from 0 to below 1", wrong)
    if out is not None and out.exists() and not out.is_dir():
        wrong.append(f"--out: {out} is a file; give a folder")
    elif out is not None and holds_run(out):
        wrong.append(f"--out: {out} holds a run; give another folder")
    given = count if count is not None or supernodes is None else 1  # already refused: the app is checked all the same
    try:
        app = apps.read(directory, overrides, given)
    except RequestError as error:
        raise RequestError([*error.problems, *wrong]) from None
    if wrong:
        raise RequestError(wrong)
    return Request(app, engine, hands, begin or 0, seconds, share or 0.0, out)


def simulate(request: Request, quiet: bool = False) -> dict[str, Any]:
    """Carries out a request.

    Args:
        request: what to run.
        quiet: show no progress, and of Flower's own log only errors.

    Returns:
        What the run came to: the keys of ``fedsim run --json``.

    Raises:
        RunError: where the app's server fails; what was done until then is in the run's directory.
    """
    from fedsim.flower.ledger import Ledger
    from fedsim.flower.listening import listening
    from fedsim.flower.nodes import Nodes
    from fedsim.flower.showing import showing
    from fedsim.flower.simulation import simulate as run

    app = request.app
    show = showing(quiet)
    ledger = Ledger(
        request.out or _first_free(app.name),
        app,
        engine=request.engine,
        workers=request.workers,
        seed=request.seed,
        show=show,
    )
    ledger.begin(Nodes(app.supernodes).ids, request.engine, request.workers)
    began = time.monotonic()
    show.start(app.name, app.supernodes)
    try:
        with _returning(), _recorded(ledger, show), _imported(app), listening(ledger):
            run(
                app.server,
                app.client,
                app.supernodes,
                run_config=app.config,
                engine=request.engine,
                workers=request.workers,
                seed=request.seed,
                client_timeout=request.client_timeout,
                dropout=request.dropout,
                ledger=ledger,
                app_dir=app.directory,
                quiet=quiet,
            )
        summary = ledger.finish(time.monotonic() - began)
        _write_report(ledger, show)
    finally:
        show.stop()
        ledger.close()
        if request.out is None:
            with suppress(OSError):  # what holds a run stays
                ledger.directory.rmdir()
    return summary


@contextmanager
def _imported(app: apps.App) -> Iterator[None]:
    """The server's module is loaded, so that what it defines is known, and the app's folder can be imported from."""
    folder = str(app.directory)
    sys.path.insert(0, folder)
    try:
        importlib.import_module(app.server.partition(":")[0])
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def _returning() -> Iterator[None]:
    """The current folder is as before when it ends: paths are shown relative to it."""
    folder = os.getcwd()
    try:
        yield
    finally:
        os.chdir(folder)


@contextmanager
def _recorded(ledger: Any, show: Any) -> Iterator[None]:
    """What ends the run early is recorded, and told in one line with the app's own traceback above it.

    A server app that exits with code 0, or with none, has finished.
    """
    try:
        yield
    except KeyboardInterrupt:
        if ledger.messages:
            ledger.event("interrupted", f"interrupted after {ledger.messages:,} messages")
            told = f"interrupted; {ledger.shown} has the record, from which a Flower app cannot go on"
            raise KeyboardInterrupt(told) from None
        raise
    except FedsimError as error:
        if ledger.messages:
            ledger.event("server_failed", " ".join(str(error).split()), _traceback(error))
        raise
    except BaseException as error:
        from fedsim.flower.worker import told as text_of

        if isinstance(error, SystemExit) and error.code in (None, 0):
            return
        said = " ".join(text_of(error).split())
        ledger.event("server_failed", said, _traceback(error))
        show.note(_traceback(error).rstrip())
        raise RunError(f"{ledger.app.server}: {said}; {ledger.shown} has the record") from error


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _first_free(name: str) -> Path:
    from fedsim.runs import first_free

    return first_free(RUNS, name)


def _write_report(ledger: Any, show: Any) -> None:
    """The run is done and saved; a report that cannot be written does not undo it."""
    from fedsim.report import write_report

    try:
        write_report([ledger.shown])
    except Exception as error:
        ledger.event("report_failed", f"{type(error).__name__}: {error}")
        show.note(f"the report could not be written ({error}); try again with: fedsim report {ledger.shown}")


def lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary for people."""
    said: list[str] = []
    for name in (summary["metric_name"], "loss"):
        value = summary["metric"] if name == summary["metric_name"] else summary["loss"]
        if isinstance(value, int | float) and not any(name in part for part in said):
            said.append(f"{name} {value:.4f}")
    split = (summary["split"] or "").replace("_", " ")
    head = f"{split} {', '.join(said)}" if said else "nothing was evaluated"
    rounds = f"{summary['rounds']} round{'' if summary['rounds'] == 1 else 's'}"
    page = Path(summary["out"]) / "report.html"
    where = f"report: {page}" if page.exists() else f"run: {page.parent}"
    return [f"{head} after {rounds}, {summary['messages']:,} messages, in {summary['seconds']:.1f} s", where]


def _number(key: str, text: str | None, fits: Callable[[float], bool], what: str, wrong: list[str]) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not fits(value):
        wrong.append(f"{key}: {text!r} is not {what}")
        return None
    return value


def _whole(key: str, text: str | None, least: int, wrong: list[str]) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.lstrip("+").isdigit() or int(text) < least:
        wrong.append(f"{key}: {text!r} is not a whole number of at least {least}")
        return None
    return int(text)
