"""Adversarial training and attacks on data, as a user runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fedsim
from clients.adversarial import gradient_of, pgd
from clients.data_attacks import DataAttack
from clients.errors import RequestError, RunError
from clients.task import Classification
from fedsim.assembly import assemble
from tests.end_to_end.commands import fedsim as command
from tests.end_to_end.commands import query


def robust_accuracy(result: fedsim.Result, experiment: fedsim.Experiment, eps: float) -> float:
    """Accuracy on the server's test examples, each moved by 20 steps of PGD against the trained model."""
    model = fedsim.load_model(result.out)
    test = assemble(experiment).setup.population.server["test"]
    batch = test.take(torch.arange(len(test)))
    gradient = gradient_of(model, Classification(), batch)
    x = pgd(gradient, batch["x"], eps, steps=20, step_size=eps / 4, input_range=(0.0, 1.0))
    assert float((x - batch["x"]).abs().max()) <= eps + 1e-6
    with torch.no_grad():
        return float((model(x).argmax(1) == batch["y"]).float().mean())


def trained(folder: Path, **settings) -> tuple[fedsim.Result, fedsim.Experiment]:
    experiment = fedsim.Experiment(**settings)
    return fedsim.run(experiment, out=folder), experiment


@pytest.mark.slow
def test_adversarial_training_makes_digits_robust(tmp_path):
    """By at least 15 points of PGD accuracy at eps 0.1 over plain training, mean of three seeds."""
    gains = []
    for seed in range(3):
        found = []
        for name, adversarial in (("plain", None), ("pgd", {"attack": "pgd", "eps": 0.1, "steps": 5})):
            result = trained(tmp_path / f"{name}-{seed}", seed=seed, client={"adversarial": adversarial})
            found.append(robust_accuracy(*result, eps=0.1))
        gains.append(found[1] - found[0])
    assert np.mean(gains) >= 0.15, gains


def test_adversarial_training_gives_the_same_bits_on_every_engine(tmp_path):
    ends = set()
    for name, workers in (("inline", None), ("processes", 1), ("processes", 2)):
        client = {"adversarial": {"eps": 0.1, "steps": 3, "fraction": 0.5}, "epochs": 1}
        experiment = fedsim.Experiment(rounds=3, client=client)
        result = fedsim.run(experiment, out=tmp_path / f"{name}{workers}", engine=name, workers=workers)
        ends.add(result.summary["weights_sha256"])
    assert len(ends) == 1


@pytest.mark.parametrize(
    ("client", "said"),
    [
        ({"adversarial": {"eps": 2.0}}, "client.adversarial.eps: 2 is more than the whole range of the inputs"),
        ({"adversarial": {"attack": "cw", "eps": 0.1}}, "client.adversarial.attack: 'cw' is not"),
        (
            {"adversarial": {"eps": 0.1, "fraction": 0.5}, "dp_sgd": {"noise_multiplier": 1.0}},
            "dp_sgd needs adversarial.fraction = 1",
        ),
        (
            {"personal": ["head"], "personal_epochs": 1, "early_stopping": {}},
            "client.early_stopping: it would stop a client in its epochs on personal parameters",
        ),
        ({"lr_factors": {"head": 0.0}}, r"client.lr_factors.head: 0.0 is out of range; give a number above 0"),
    ],
    ids=["eps", "attack", "dp_sgd", "phases", "factor"],
)
def test_what_makes_no_sense_is_refused(client, said, tmp_path):
    with pytest.raises(RequestError, match=said):
        fedsim.run(fedsim.Experiment(client=client), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ attacks on data


def test_flipped_labels_cost_accuracy_and_the_record_names_the_attackers(tmp_path):
    plain, _ = trained(tmp_path / "plain", rounds=20)
    flipped, experiment = trained(tmp_path / "flip", rounds=20, attacks=[{"name": "label_flip", "fraction": 0.4}])
    assert flipped.metrics["test"]["accuracy"] < plain.metrics["test"]["accuracy"] - 0.1
    (group,) = assemble(experiment).setup.malicious
    assert len(group.clients) == 40
    told = query(tmp_path / "flip", "SELECT DISTINCT client FROM clients WHERE info LIKE '%label_flip%'")
    took_part = {client for (client,) in query(tmp_path / "flip", "SELECT DISTINCT client FROM clients")}
    assert {client for (client,) in told} == took_part & set(group.clients.tolist())
    who = query(tmp_path / "flip", "SELECT client FROM population WHERE attack = 'label_flip'")
    assert sorted(client for (client,) in who) == group.clients.tolist()


def test_a_backdoor_is_learnt_beside_the_task_and_judged_on_other_classes_only(tmp_path):
    backdoor = {"name": "backdoor", "target": 7, "fraction": 0.2}
    attacked, experiment = trained(tmp_path / "attacked", rounds=30, data={"partition": "iid"}, attacks=[backdoor])
    test = assemble(experiment).setup.population.server["test"]
    assert attacked.metrics["attack"]["examples"] == int((test.column("y") != 7).sum())
    assert attacked.metrics["attack"]["accuracy"] > 0.8
    assert attacked.metrics["test"]["accuracy"] > 0.85
    assert attacked.summary["split"] == "test"
    report = (tmp_path / "attacked" / "report.html").read_text()
    assert "attack success" in report.lower()


def test_only_training_examples_of_the_attackers_change(tmp_path):
    data = {"client_test_fraction": 0.2, "client_validation_fraction": 0.2, "partition": "iid"}
    attacks = [{"name": "label_flip", "clients": [3, 5]}, {"name": "noisy_features", "std": 0.2, "clients": [4]}]
    clean = assemble(fedsim.Experiment(data=data)).setup.population
    dirty = assemble(fedsim.Experiment(data=data, attacks=attacks)).setup.population
    train = clean.splits["train"]
    labels, flipped = (population.columns.column("y") for population in (clean, dirty))
    places = torch.from_numpy(np.sort(np.concatenate([train.of(3), train.of(5)])))
    assert torch.equal((labels != flipped).nonzero()[:, 0], places)
    assert torch.equal(flipped[places], 9 - labels[places])
    moved = (clean.columns.column("x") != dirty.columns.column("x")).any(1).nonzero()[:, 0]
    assert torch.equal(moved, torch.from_numpy(np.sort(train.of(4))))
    for split in ("test", "validation"):
        assert np.array_equal(clean.splits[split].order, dirty.splits[split].order)


def test_a_free_rider_sends_nothing_of_its_own(tmp_path):
    settings = {"rounds": 2, "data": {"clients": 10}, "attacks": [{"name": "free_rider", "clients": [0]}]}
    for engine in ("inline", "processes"):
        fedsim.run(fedsim.Experiment(**settings), out=tmp_path / engine, engine=engine)
        norms = query(tmp_path / engine, "SELECT client, update_norm FROM clients")
        assert {client for client, norm in norms if norm == 0} == {0}


class Odd(DataAttack):
    """An attack of a user's own."""

    def __init__(self, fault="poison"):
        self.fault = fault

    def poison(self, batch, examples, ctx):
        if self.fault == "poison":
            raise ValueError("oops")
        return {"x": batch["x"][:1]} if self.fault == "shape" else batch

    def update(self, rows, clients, round, ctx):
        if self.fault == "update":
            return rows[:, :3]
        return rows * float("nan") if self.fault == "nan" else rows


@pytest.mark.parametrize("fault", ["poison", "shape", "update"])
def test_a_fault_in_an_attack_of_ones_own_is_named(fault, tmp_path):
    experiment = fedsim.Experiment(rounds=1, attacks=[{"name": Odd(fault), "fraction": 0.5}])
    half = "poison" if fault == "shape" else fault
    with pytest.raises(RunError, match=rf"attacks\..*Odd, {half}"):
        fedsim.run(experiment, out=tmp_path / "run", engine="inline")


def test_an_attacker_that_sends_nan_is_left_out_and_the_others_count(tmp_path):
    experiment = fedsim.Experiment(rounds=2, data={"clients": 10}, attacks=[{"name": Odd("nan"), "clients": [4]}])
    result = fedsim.run(experiment, out=tmp_path / "run")
    events = query(tmp_path / "run", "SELECT kind, client FROM events")
    assert events == [("dropped_update", 4)] * 2
    assert torch.isfinite(result.row).all()


@pytest.mark.parametrize(
    ("attacks", "said"),
    [
        ([{"name": "label_flip"}], "give fraction or clients"),
        ([{"name": "label_flip", "clients": []}], "clients names nobody"),
        (
            [{"name": "label_flip", "clients": [1]}, {"name": "free_rider", "clients": [1]}],
            r"attacks.free_rider.clients: 1 attacks already",
        ),
        ([{"name": "label_flip", "clients": [100]}], "attacks.label_flip.clients: 100 cannot be malicious"),
        ([{"name": "label_flip", "source": 1, "target": 12, "fraction": 0.1}], "12"),
        (
            [{"name": "free_rider", "fraction": 0.7}, {"name": "label_flip", "fraction": 0.5}],
            "attacks.label_flip.fraction: 0.5 of the clients are more than other attacks left",
        ),
        ([{"name": "label_flop", "fraction": 0.7}], "unknown attack 'label_flop'.*did you mean 'label_flip'"),
    ],
    ids=["nobody", "empty", "twice", "unknown client", "unknown class", "too many", "unknown attack"],
)
def test_attacks_that_cannot_be_are_refused(attacks, said, tmp_path):
    with pytest.raises(RequestError, match=said):
        fedsim.run(fedsim.Experiment(attacks=attacks), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_attacks_are_set_and_listed_on_the_command_line(tmp_path):
    (tmp_path / "attacked.toml").write_text('rounds = 1\n[[attacks]]\nname = "backdoor"\nfraction = 0.1\n')
    arguments = ["--set", "attacks.backdoor.size=3", "--set", "attacks.backdoor.fraction=0.2", "--out", "run"]
    code, out, err = command(tmp_path, "run", "attacked.toml", "--json", *arguments)
    assert code == 0, err
    assert json.loads(out)["split"] == "test"
    (attack,) = fedsim.load(tmp_path / "run").experiment["attacks"]
    assert (attack["name"], attack["size"], attack["fraction"]) == ("backdoor", 3, 0.2)
    code, out, err = command(tmp_path, "list", "attacks")
    assert {"label_flip", "backdoor", "noisy_features", "free_rider"} <= set(re.findall(r"\w+", out))
