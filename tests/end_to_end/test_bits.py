"""A result is a function of the experiment: the same bits from every engine and any number of workers."""

from __future__ import annotations

import os

import pytest

import fedsim

ENGINES = [("inline", None), ("processes", 1), ("processes", 2), ("processes", 3)]

EXPERIMENTS = {
    "digits": {},
    "loop": {"client": {"execution": "loop", "epochs": 2}},
    "adam, poisson, uneven": {
        "client": {"optimizer": "adam", "epochs": {"uniform": [1, 4]}},
        "strategy": {"name": "fedadam", "sampling": "poisson"},
    },
    "convolutions": {"model": {"name": "cnn"}, "client": {"epochs": 1, "lr": 0.05}},
    "batch norm": {"model": {"name": "mlp", "norm": "batch"}, "data": {"partition": "iid"}},
}


@pytest.mark.parametrize("settings", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_every_engine_gives_the_same_bits(settings, tmp_path):
    found = {}
    for engine, workers in ENGINES:
        out = tmp_path / f"{engine}-{workers}"
        result = fedsim.run(fedsim.Experiment(rounds=3, **settings), out=out, engine=engine, workers=workers)
        history = result.history.drop(columns=["seconds", "train_seconds"], errors="ignore")
        told = {name: value for name, value in result.summary.items() if name not in ("out", "seconds")}
        found[engine, workers] = told, history[[c for c in history if "test_" in c or "bytes" in c]].to_json()
    assert len({str(value) for value in found.values()}) == 1, found


def test_chunks_go_to_both_workers_and_none_to_the_driver(tmp_path):
    fedsim.run(fedsim.Experiment(rounds=3), out=tmp_path / "run", engine="processes", workers=2)
    chunks = fedsim.load(tmp_path / "run").chunks
    assert (chunks.groupby("round")["chunk"].nunique() == 2).all()
    pids = set(chunks["pid"])
    assert len(pids) == 2
    assert os.getpid() not in pids


def test_seeds_differ_and_data_seed_fixes_the_partition(tmp_path):
    def made(name, **settings):
        result = fedsim.run(fedsim.Experiment(rounds=2, **settings), out=tmp_path / name)
        clients = fedsim.load(result.out).clients
        return result.summary["weights_sha256"], dict(zip(clients["client"], clients["examples"], strict=True))

    plain, other, fixed = made("a"), made("b", seed=1), made("c", seed=1, data={"seed": 0})
    assert len({plain[0], other[0], fixed[0]}) == 3
    common = set(plain[1]) & set(fixed[1])
    assert all(plain[1][client] == fixed[1][client] for client in common)


def test_callers_threads_and_random_state_are_left_alone(tmp_path):
    import torch

    threads = torch.get_num_threads()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fedsim.run(fedsim.Experiment(rounds=1), out=tmp_path / "run", engine="inline")
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
