"""A run read again, beside its writer and after it."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from clients.errors import RequestError, RunError
from fedsim.runs import RunStore, load
from tests.runs.making import EXPERIMENT, LAYOUT, commit, create, record, row


def test_the_history_has_the_ledger_its_totals_and_the_metrics(tmp_path: Path) -> None:
    with create(tmp_path / "run") as store:
        store.commit(record(0, clients=[], chunks=[], cohort=0, completed=0, bytes_up=0, bytes_down=0), {"row": row(0)})
        store.commit(record(1, metrics={}), {"row": row(1)})
        commit(store, 2)
        history = load(tmp_path / "run").history
    assert history["round"].tolist() == [0, 1, 2]
    assert history["bytes_up"].tolist() == [0, 64, 64]
    assert history["bytes_up_total"].tolist() == [0, 64, 128]
    assert history["bytes_down_total"].tolist() == [0, 80, 160]
    assert history["test_accuracy"].dropna().tolist() == [0.5, 0.6]
    assert history["test_loss"].dropna().tolist() == [1.0, 1 / 3]
    assert history["train_loss"].dropna().tolist() == [0.5, 0.5]
    assert math.isnan(history["test_accuracy"][1])
    assert history["epsilon"].isna().all()
    assert history["epsilon"].dtype == "float64"


def test_what_was_not_sent_stands_in_the_ledger(tmp_path: Path) -> None:
    with create(tmp_path / "run") as store:
        store.commit(record(1, bytes_saved=1000), {"row": row(1)})
        store.commit(record(2, bytes_saved=3 * 10**9), {"row": row(2)})
        store.commit(record(3), {"row": row(3)})
        assert store.totals()["bytes_saved"] == 3 * 10**9 + 1000
    run = load(tmp_path / "run")
    assert run.ledger["bytes_saved"].tolist() == [1000, 3 * 10**9, 0]
    assert run.history["bytes_saved_total"].tolist() == [1000, 3 * 10**9 + 1000, 3 * 10**9 + 1000]


def test_the_training_loss_weighs_by_examples(tmp_path: Path) -> None:
    clients = [{"client": 0, "examples": 30, "loss": 1.0}, {"client": 1, "examples": 10, "loss": 5.0}]
    with create(tmp_path / "run") as store:
        store.commit(record(1, clients=[*clients, {"client": 2, "examples": 60, "loss": None}]), {"row": row(1)})
    assert load(tmp_path / "run").history["train_loss"].tolist() == [2.0]


def test_every_table_is_a_frame(tmp_path: Path) -> None:
    evaluated = [{"client": 4, "split": "client_test", "examples": 3, "accuracy": 0.5, "loss": 1.0}]
    clients = [{"client": 4, "examples": 5, "loss": 1.0, "trust": 0.25, "votes": [1, 2], "attack": "label_flip"}]
    with create(tmp_path / "run") as store:
        store.commit(record(1, clients=clients, client_metrics=evaluated), {"row": row(1)})
        commit(store, 2)
        store.finish({"metric": 0.6, "where": tmp_path})
    run = load(tmp_path / "run")
    assert run.clients.loc[0, ["trust", "votes", "attack"]].tolist() == [0.25, [1, 2], "label_flip"]
    assert len(run.clients) == 3
    assert run.clients["attack"].isna().tolist() == [False, True, True]
    assert run.client_metrics.to_dict("records") == [{"round": 1, **evaluated[0]}]
    assert set(run.metrics["name"]) == {"accuracy", "loss", "examples"}
    assert run.events["kind"].tolist() == ["client_failed"]
    assert run.chunks["pid"].tolist() == [42, 42]
    assert run.ledger.columns.tolist()[:5] == ["round", "cohort", "completed", "bytes_up", "bytes_down"]
    assert "bytes_saved" in run.ledger
    assert run.summary == {"metric": 0.6, "where": str(tmp_path)}
    assert run.experiment["data"]["clients"] == 20
    assert repr(run) == f"Run({str(tmp_path / 'run')!r}, finished)"


def test_a_run_without_rounds(tmp_path: Path) -> None:
    with create(tmp_path / "run"):
        pass
    run = load(tmp_path / "run")
    for frame in (run.history, run.ledger, run.clients, run.client_metrics, run.metrics, run.events, run.chunks):
        assert len(frame) == 0
        assert len(frame.columns) > 2
    assert run.summary is None
    with pytest.raises(RunError, match="no round is committed"):
        run.row  # noqa: B018


def test_the_weights_by_name(tmp_path: Path) -> None:
    with create(tmp_path / "run", rounds=2):
        run = load(tmp_path / "run")  # beside the writer
        assert torch.equal(run.row, row(2))
        assert {name: list(tensor.shape) for name, tensor in run.weights.items()} == LAYOUT
        assert torch.equal(run.weights["bias"], row(2)[6:])
    (tmp_path / "run" / "checkpoints" / "round-000002.safetensors").write_bytes(b"")
    assert torch.equal(load(tmp_path / "run").row, row(1))


def test_a_checkpoint_alone_can_be_unpacked(tmp_path: Path) -> None:
    from safetensors import safe_open

    with create(tmp_path / "run", rounds=1):
        pass
    with safe_open(tmp_path / "run" / "checkpoints" / "round-000001.safetensors", "pt") as file:
        assert json.loads(file.metadata()["layout"]) == LAYOUT
        assert torch.equal(file.get_tensor("row"), row(1))


def test_a_directory_of_any_name(tmp_path: Path) -> None:
    odd = tmp_path / "100% of #1? ü"
    with RunStore.create(odd, EXPERIMENT, {}) as store:
        commit(store, 1)
        assert len(load(odd).history) == 1
    assert len(load(odd).history) == 1


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no such directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(RequestError, match="holds no run"):
        load(tmp_path)


def test_reading_beside_a_writer_never_sees_half_a_round(tmp_path: Path) -> None:
    with create(tmp_path / "run") as store, ThreadPoolExecutor(1) as pool:
        writing = pool.submit(commit, store, *range(1, 60))
        while not writing.done():
            found = load(tmp_path / "run").rounds()
            assert [made["round"] for made in found] == list(range(1, len(found) + 1))
            assert all("test_accuracy" in made and "train_loss" in made for made in found)
        writing.result()
