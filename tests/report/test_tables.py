"""A run's tables as files that other tools read."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from clients.errors import RequestError, RunError
from fedsim.census import census
from fedsim.report import export
from fedsim.runs import RunStore, load
from tests.runs.holding import Holding, skewed
from tests.runs.making import EXPERIMENT, LAYOUT, MANIFEST, create, record, row


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
        names = {"rounds", "ledger", "population", "clients", "client_metrics", "metrics", "events", "chunks"}
        assert {file.stem for file in files} == names
        assert all(file.exists() for file in files)
    read = pd.read_parquet if format == "parquet" else pd.read_csv
    history = load(run).history
    pd.testing.assert_frame_equal(read(run / "export" / f"rounds.{format}"), history, check_dtype=format == "parquet")
    assert read(run / "export" / f"clients.{format}")["client"].tolist() == [0, 2, 0, 3, 0, 4]


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_who_holds_what(format: str, tmp_path: Path) -> None:
    counts = skewed(20, 3)
    found = census(Holding(counts), attacks={2: "label_flip"})  # type: ignore[arg-type]
    with RunStore.create(tmp_path / "run", EXPERIMENT, MANIFEST, LAYOUT, found):
        pass
    export(tmp_path / "run", format)
    read = pd.read_parquet if format == "parquet" else pd.read_csv
    table = read(tmp_path / "run" / "export" / f"population.{format}")
    assert table["train"].tolist() == counts.sum(1).tolist()
    labels = [list(text) if format == "parquet" else json.loads(text) for text in table["labels"]]
    assert labels == counts.tolist()
    assert table["attack"].dropna().to_dict() == {2: "label_flip"}


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_words_beside_numbers_are_exported_as_text(format: str, tmp_path: Path) -> None:
    clients = [{"client": 0, "attack": "label_flip", "mixed": 0.5}, {"client": 1, "mixed": "none"}, {"client": 2}]
    with create(tmp_path / "run") as store:
        store.commit(record(1, clients=clients), {"row": row(1)})
    export(tmp_path / "run", format)
    read = pd.read_parquet if format == "parquet" else pd.read_csv
    table = read(tmp_path / "run" / "export" / f"clients.{format}")
    assert table["attack"].tolist()[0] == "label_flip"
    assert table["mixed"].tolist()[:2] == ["0.5", "none"]
    assert table["mixed"].isna().tolist() == [False, False, True]


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
        assert len(export(tmp_path / "run", format)) == 8


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'parkett' is none of parquet, csv, tensorboard; did you mean 'parquet'"):
        export(run, "parkett")
    with pytest.raises(RequestError, match="holds no run"):
        export(tmp_path, "csv")
    (tmp_path / "file").write_text("")
    for format in ("csv", "parquet", "tensorboard"):
        with pytest.raises(RunError, match="cannot be written to"):
            export(run, format, tmp_path / "file" / "x")
