"""A run's tables as files for other tools: Parquet, CSV, TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clients.errors import RequestError, RunError, nearest
from fedsim.runs.directory import disk_full
from fedsim.runs.history import Run, load

if TYPE_CHECKING:
    import pandas as pd

FORMATS = ("parquet", "csv", "tensorboard")

#: What :attr:`Run.history` names without a split, as TensorBoard groups it.
_SCALARS = {
    "train_loss": "train/loss",
    "bytes_up_total": "ledger/bytes_up_total",
    "bytes_down_total": "ledger/bytes_down_total",
    "bytes_saved_total": "ledger/bytes_saved_total",
    "epsilon": "ledger/epsilon",
    "simulated_seconds": "ledger/simulated_seconds",
    "seconds": "ledger/seconds",
    "completed": "ledger/completed",
}
_SUFFIX = ".fedsim"


def export(directory: Path | str, format: str, out: Path | str | None = None) -> list[Path]:
    """Writes a run's tables as files; files of an earlier export are replaced.

    Args:
        directory: the run's directory.
        format: ``parquet`` or ``csv`` (rounds, ledger, population, clients, client_metrics, metrics, events and
            chunks), or ``tensorboard`` (scalars of every round).
        out: the folder for them; left out, ``export`` in the run's directory.

    Returns:
        The files.

    Raises:
        RequestError: for another format, or where there is no run.
        RunError: for a damaged run, or files that cannot be written.
    """
    if format not in FORMATS:
        raise RequestError(f"--format: {format!r} is none of {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    run = load(directory)
    folder = Path(out) if out is not None else run.out / "export"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _scalars(run, folder) if format == "tensorboard" else _tables(run, folder, format)
    except OSError as error:
        mend = "free some space" if disk_full(error) else "give another --out"
        raise RunError(f"{folder} cannot be written to: {error.strerror or error}; {mend}") from error


def _tables(run: Run, folder: Path, format: str) -> list[Path]:
    files = []
    for name, frame in _frames(run).items():
        path = folder / f"{name}.{format}"
        frame = frame.apply(_of_one_kind)
        write: Callable[..., object] = frame.to_parquet if format == "parquet" else frame.to_csv
        write(path, index=False)
        files.append(path)
    return files


def _of_one_kind(column: pd.Series) -> pd.Series:
    """As text where a rule reported values of several kinds under one name, words beside numbers."""
    known = column.dropna()
    if column.dtype != object or known.map(lambda value: isinstance(value, str)).nunique() < 2:
        return column
    return column.where(column.isna(), known.map(str))


def _frames(run: Run) -> dict[str, pd.DataFrame]:
    return {
        "rounds": run.history,
        "ledger": run.ledger,
        "population": run.population,
        "clients": run.clients,
        "client_metrics": run.client_metrics,
        "metrics": run.metrics,
        "events": run.events,
        "chunks": run.chunks,
    }


def _scalars(run: Run, folder: Path) -> list[Path]:
    from torch.utils.tensorboard import SummaryWriter

    for earlier in _event_files(folder):
        earlier.unlink()
    splits = {row["split"] for row in run.query("SELECT DISTINCT split FROM metrics")}
    with SummaryWriter(str(folder), filename_suffix=_SUFFIX) as writer:
        for row in run.rounds():
            for name, value in row.items():
                tag = _SCALARS.get(name) or _tag(name, splits)
                if tag and value is not None and math.isfinite(value):
                    writer.add_scalar(tag, value, row["round"], walltime=row["committed_at"])
    return _event_files(folder)


def _tag(name: str, splits: set[str]) -> str | None:
    """``test/accuracy`` for ``test_accuracy``; ``None`` for what is no metric."""
    split = max((split for split in splits if name.startswith(f"{split}_")), key=len, default=None)
    return None if split is None else f"{split}/{name.removeprefix(f'{split}_')}"


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"events.out.tfevents.*{_SUFFIX}"))
