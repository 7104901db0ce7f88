"""A run's tables as files that other tools read."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from clients.errors import RequestError, RunError
from fedsim.report import export
from fedsim.runs import load
from tests.runs.making import create


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with create(tmp_path / "run", rounds=3):
        pass
    return tmp_path / "run"


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_tables(run: Path, format: str, tmp_path: Path) -> None:
    for out in (None, tmp_path / "elsewhere"):
        files = export(run, format, out)
        assert [file.parent for file in files] == [out or run / "export"] * len(files)
        names = {"rounds", "ledger", "clients", "client_metrics", "metrics", "events", "chunks"}
        assert {file.stem for file in files} == names
        assert all(file.exists() for file in files)
    read = pd.read_parquet if format == "parquet" else pd.read_csv
    history = load(run).history
    pd.testing.assert_frame_equal(read(run / "export" / f"rounds.{format}"), history, check_dtype=format == "parquet")
    assert read(run / "export" / f"clients.{format}")["client"].tolist() == [0, 2, 0, 3, 0, 4]


def test_tensorboard(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second replaces the first
        (file,) = export(run, "tensorboard")
    read = EventAccumulator(str(file)).Reload()
    assert [(s.step, round(s.value, 4)) for s in read.Scalars("test/accuracy")] == [(1, 0.55), (2, 0.6), (3, 0.65)]
    assert {"test/loss", "train/loss", "ledger/bytes_up_total", "ledger/seconds"} <= set(read.Tags()["scalars"])
    assert "ledger/epsilon" not in read.Tags()["scalars"]


def test_a_run_without_rounds(tmp_path: Path) -> None:
    with create(tmp_path / "run"):
        pass
    for format in ("parquet", "csv"):
        assert len(export(tmp_path / "run", format)) == 7


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'parkett' is none of parquet, csv, tensorboard; did you mean 'parquet'"):
        export(run, "parkett")
    with pytest.raises(RequestError, match="holds no run"):
        export(tmp_path, "csv")
    (tmp_path / "file").write_text("")
    for format in ("csv", "parquet", "tensorboard"):
        with pytest.raises(RunError, match="cannot be written to"):
            export(run, format, tmp_path / "file" / "x")
